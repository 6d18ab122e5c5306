// JointStep: a change that is made in several pools at once, pools that stand for one, or not yet: see
// JointMaps::Together.
#ifndef KVPAGE_CACHE_JOINT_STEP_H_
#define KVPAGE_CACHE_JOINT_STEP_H_

#include <vector>

#include "cache/joint_supply.h"
#include "cache/parts.h"

namespace kvpage {

class JointStep {
 public:
  virtual ~JointStep() = default;
  // Makes the change, with the mapping mutexes of all pools held by `supply`. False: it cannot be made yet, try later.
  virtual bool Run(const std::vector<const PoolParts*>& pools, const JointSupply& supply) = 0;
  // Goes on without locks: called after each Run.
  virtual void After() = 0;
  // One of the pools is gone: it will not run. Called without locks.
  virtual void Abandon() = 0;
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_JOINT_STEP_H_
