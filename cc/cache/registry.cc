#include "cache/registry.h"

#include <mutex>
#include <unordered_map>

#include "cache/messages.h"

namespace kvpage {
namespace {

struct Table {
  std::mutex mutex;
  std::unordered_map<std::int32_t, std::shared_ptr<Pool>> pools;
  std::int32_t next_id = 1;
};

Table& TheTable() {
  static Table* const table = new Table;
  return *table;
}

Status Missing(const Table& table, const std::string& op, std::int32_t id) {
  return id > 0 && id < table.next_id ? messages::Closed(op, id) : messages::NoPool(op, id);
}

}  // namespace

void Register(const std::shared_ptr<Pool>& pool) {
  Table& table = TheTable();
  const std::lock_guard<std::mutex> lock(table.mutex);
  pool->set_id(table.next_id++);
  table.pools.emplace(pool->id(), pool);
}

void Unregister(std::int32_t id) {
  Table& table = TheTable();
  std::shared_ptr<Pool> last;  // the pool may end here: not under the lock
  const std::lock_guard<std::mutex> lock(table.mutex);
  const auto it = table.pools.find(id);
  if (it == table.pools.end()) return;
  last = std::move(it->second);
  table.pools.erase(it);
}

Status Find(const char* op, std::int32_t id, std::shared_ptr<Pool>* out) {
  Table& table = TheTable();
  const std::lock_guard<std::mutex> lock(table.mutex);
  const auto it = table.pools.find(id);
  if (it != table.pools.end()) {
    *out = it->second;
    return {};
  }
  return Missing(table, op, id);
}

Status NotHere(const std::string& op, std::int32_t id) {
  Table& table = TheTable();
  const std::lock_guard<std::mutex> lock(table.mutex);
  return table.pools.count(id) > 0 ? messages::OtherDevice(op, id) : Missing(table, op, id);
}

}  // namespace kvpage
