#include "cache/registry.h"

#include <sys/random.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <limits>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "base/max_devices.h"
#include "cache/messages.h"
#include "cache/process.h"

namespace kvpage {
namespace {

constexpr std::int32_t kMaxId = std::numeric_limits<std::int32_t>::max();

// Consecutive ids: first .. next - 1.
struct Run {
  std::int64_t first = 0, next = 0;
  bool Has(std::int32_t id) const { return id >= first && id < next; }
};

struct Table {  // guarded by RegistryMutex
  std::unordered_map<std::int32_t, std::shared_ptr<Pool>> pools;
  std::vector<Run> runs;
  int fork_count = 0;  // of the process when the latest run began

  bool WasGiven(std::int32_t id) const {
    for (const Run& run : runs) {
      if (run.Has(id)) return true;
    }
    return false;
  }
};

// In 1..kMaxId, different in every process.
std::int32_t RandomId() {
  std::uint64_t bits = 0;
  if (getrandom(&bits, sizeof(bits), GRND_NONBLOCK) != sizeof(bits)) {
    const auto now = std::chrono::system_clock::now().time_since_epoch().count();
    bits = (static_cast<std::uint64_t>(now) ^ static_cast<std::uint64_t>(getpid()) << 40) * 0x9E3779B97F4A7C15u >> 16;
  }
  return static_cast<std::int32_t>(1 + bits % kMaxId);
}

// A forked child would continue with its parent's numbers, so it begins a run elsewhere.
std::int32_t NextId(Table* table) {
  std::vector<Run>& runs = table->runs;
  while (runs.empty() || table->fork_count != ForkCount() || runs.back().next > kMaxId ||
         (runs.back().next > runs.back().first && table->WasGiven(static_cast<std::int32_t>(runs.back().next)))) {
    const std::int32_t first = RandomId();
    if (table->WasGiven(first)) continue;
    runs.push_back({first, first});
    table->fork_count = ForkCount();
  }
  return static_cast<std::int32_t>(runs.back().next++);
}

std::atomic<bool> tables_wanted[kMaxDevices] = {}, tables_open[kMaxDevices] = {};

bool Counts(int device) { return device >= 0 && device < kMaxDevices; }

Table& TheTable() {
  static Table* const table = new Table;
  return *table;
}

Status Missing(const Table& table, const std::string& op, std::int32_t id) {
  return table.WasGiven(id) ? messages::Closed(op, id) : messages::NoPool(op, id);
}

}  // namespace

void Register(const std::shared_ptr<Pool>& pool) {
  Table& table = TheTable();
  const std::lock_guard<std::mutex> lock(RegistryMutex());
  pool->set_id(NextId(&table));
  table.pools.emplace(pool->id(), pool);
}

void Unregister(std::int32_t id) {
  Table& table = TheTable();
  std::shared_ptr<Pool> last;  // the pool may be destroyed here, outside of the lock
  const std::lock_guard<std::mutex> lock(RegistryMutex());
  const auto it = table.pools.find(id);
  if (it == table.pools.end()) return;
  last = std::move(it->second);
  table.pools.erase(it);
}

Status Find(const char* op, std::int32_t id, std::shared_ptr<Pool>* out) {
  Table& table = TheTable();
  const std::lock_guard<std::mutex> lock(RegistryMutex());
  const auto it = table.pools.find(id);
  if (it != table.pools.end()) {
    *out = it->second;
    return {};
  }
  return Missing(table, op, id);
}

Status NotHere(const std::string& op, std::int32_t id) {
  Table& table = TheTable();
  const std::lock_guard<std::mutex> lock(RegistryMutex());
  return table.pools.count(id) > 0 ? messages::OtherDevice(op, id) : Missing(table, op, id);
}

void OpenDeviceTables(int device) {
  if (device_tables_open(device) || !Counts(device)) return;
  tables_wanted[device] = true;  // before the pools are listed: later registrations see it
  std::vector<std::shared_ptr<Pool>> pools;
  {
    const std::lock_guard<std::mutex> lock(RegistryMutex());
    for (const auto& [id, pool] : TheTable().pools) {
      if (pool->device() == device) pools.push_back(pool);
    }
  }
  bool all = true;
  for (const std::shared_ptr<Pool>& pool : pools) all &= pool->OpenTable().ok();
  if (all) tables_open[device].store(true, std::memory_order_release);
}

bool device_tables_wanted(int device) { return Counts(device) && tables_wanted[device]; }
bool device_tables_open(int device) { return Counts(device) && tables_open[device].load(std::memory_order_acquire); }

}  // namespace kvpage
