// Python bindings for swapped sequences.
#ifndef KVPAGE_PYTHON_SWAP_BINDING_H_
#define KVPAGE_PYTHON_SWAP_BINDING_H_

#include <nanobind/nanobind.h>

#include <memory>
#include <utility>

#include "python/pool_reference.h"

namespace kvpage {

// A swapped sequence, which is dropped together with this object. It keeps the store alive.
class SwapReference {
 public:
  explicit SwapReference(nanobind::object store) : store_(std::move(store)) {}
  ~SwapReference() { Drop(); }
  SwapReference(const SwapReference&) = delete;
  SwapReference& operator=(const SwapReference&) = delete;

  std::shared_ptr<store::SwapStore> store() const;
  // Null before `Set`.
  const SwapPtr& swap() const { return swap_; }
  void Set(const PoolPtr& pool, SwapPtr swap) {
    pool_ = pool;
    swap_ = std::move(swap);
  }
  // Checks that it was swapped out of this pool.
  Status Check(const char* op, const PoolPtr& pool) const;
  // Waits up to `seconds` for pending work. Returns whether all of it is done. Call it without the GIL.
  bool Wait(double seconds) const;
  void Drop();
  // Marks this as a part of a JointSwapped, which will drop it.
  void set_joined() { joined_ = true; }

 private:
  const nanobind::object store_;  // destroyed last
  std::weak_ptr<Pool> pool_;
  SwapPtr swap_;
  bool joined_ = false;
};

// Class `Swapped`, and the methods of `Pool` that take one and queue no program.
void BindSwapping(nanobind::module_& m, nanobind::class_<PoolReference>& pool);

}  // namespace kvpage

#endif  // KVPAGE_PYTHON_SWAP_BINDING_H_
