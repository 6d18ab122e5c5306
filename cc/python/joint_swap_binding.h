// Python bindings for sequences that are swapped out of all pools of a mesh.
#ifndef KVPAGE_PYTHON_JOINT_SWAP_BINDING_H_
#define KVPAGE_PYTHON_JOINT_SWAP_BINDING_H_

#include <nanobind/nanobind.h>

#include <memory>
#include <utility>

#include "cache/joint_swap.h"
#include "cache/process.h"
#include "python/swap_binding.h"

namespace kvpage {

// A swapped sequence, dropped together with this object. Its parts, one `Swapped` object per pool, keep the store
// alive.
class JointSwapReference {
 public:
  explicit JointSwapReference(nanobind::list parts) : parts_(std::move(parts)) {}
  ~JointSwapReference() { Drop(); }
  JointSwapReference(const JointSwapReference&) = delete;
  JointSwapReference& operator=(const JointSwapReference&) = delete;

  const nanobind::list& parts() const { return parts_; }
  const SwapReference& first() const { return nanobind::cast<const SwapReference&>(parts_[0]); }
  // Joins the parts, swapped out of the pools of `maps`: from now on they change state together and end with this
  // object.
  void Join(const std::shared_ptr<JointMaps>& maps);
  JointSwap& joint() const;
  // Waits up to `seconds` for pending work. Returns whether all of it is done. Call it without the GIL.
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
