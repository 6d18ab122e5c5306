#include "kernels/cpu/workspace.h"

#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace kvpage::cpu {
namespace {

constexpr std::size_t kCacheLine = 64;

struct Recycler {
  std::mutex mutex;
  std::vector<std::unique_ptr<Workspace>> free;  // LIFO: the workspace that is warmest in the cache is reused first
};

// Never destroyed: programs may still run while the process exits.
Recycler& TheRecycler() {
  static auto* recycler = new Recycler;
  return *recycler;
}

}  // namespace

void Workspace::Free::operator()(float* p) const { ::operator delete(p, std::align_val_t{kCacheLine}); }

float* Workspace::Floats(std::int64_t count) {
  if (count > capacity_) {
    floats_.reset();
    capacity_ = 0;
    // Allocate half as much again, so that a context that grows by one token per step does not reallocate at every
    // step.
    const std::int64_t wanted = count + count / 2;
    auto* p = static_cast<float*>(::operator new(wanted * sizeof(float), std::align_val_t{kCacheLine}, std::nothrow));
    if (p == nullptr) return nullptr;
    floats_.reset(p);
    capacity_ = wanted;
  }
  return floats_.get();
}

WorkspaceLoan::WorkspaceLoan() {
  Recycler& recycler = TheRecycler();
  {
    const std::lock_guard<std::mutex> lock(recycler.mutex);
    if (!recycler.free.empty()) {
      workspace_ = std::move(recycler.free.back());
      recycler.free.pop_back();
    }
  }
  if (workspace_ == nullptr) workspace_ = std::make_unique<Workspace>();
}

WorkspaceLoan::~WorkspaceLoan() {
  Recycler& recycler = TheRecycler();
  const std::lock_guard<std::mutex> lock(recycler.mutex);
  recycler.free.push_back(std::move(workspace_));
}

}  // namespace kvpage::cpu
