// Sequences that are swapped out of all pools of a mesh, as Python holds them.
#ifndef KVPAGE_PYTHON_JOINT_SWAP_BINDING_H_
#define KVPAGE_PYTHON_JOINT_SWAP_BINDING_H_

#include <nanobind/nanobind.h>

#include <memory>
#include <utility>

#include "cache/joint_swap.h"
#include "cache/process.h"
#include "python/swap_binding.h"

namespace kvpage {

// A swapped sequence, which is given up with this object. Its parts, an object of class `Swapped` for each pool, keep
// the store.
class JointSwapReference {
 public:
  explicit JointSwapReference(nanobind::list parts) : parts_(std::move(parts)) {}
  ~JointSwapReference() { Drop(); }
  JointSwapReference(const JointSwapReference&) = delete;
  JointSwapReference& operator=(const JointSwapReference&) = delete;

  const nanobind::list& parts() const { return parts_; }
  const SwapReference& first() const { return nanobind::cast<const SwapReference&>(parts_[0]); }
  // The parts were swapped out, of the pools of `maps`. From now on they go on together, and end with this object.
  void Join(const std::shared_ptr<JointMaps>& maps);
  JointSwap& joint() const;
  // Whether nothing is to be waited for, within some seconds. Without the GIL.
  bool Wait(double seconds) const;
  void Drop();

 private:
  const int fork_count_ = ForkCount();
  const nanobind::list parts_;
  std::shared_ptr<JointSwap> joint_;  // null before Join
};

// Class `JointSwapped`, and the methods of `Pool` that take one.
void BindJointSwapping(nanobind::module_& m, nanobind::class_<PoolReference>& pool);

}  // namespace kvpage

#endif  // KVPAGE_PYTHON_JOINT_SWAP_BINDING_H_
