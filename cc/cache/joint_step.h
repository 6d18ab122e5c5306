// JointStep: a change that is made in all joined pools at once, possibly later: see JointMaps::Together.
#ifndef KVPAGE_CACHE_JOINT_STEP_H_
#define KVPAGE_CACHE_JOINT_STEP_H_

#include <vector>

#include "cache/joint_supply.h"
#include "cache/parts.h"

namespace kvpage {

class JointStep {
 public:
  virtual ~JointStep() = default;
  // Makes the change while `supply` holds the mapping mutexes of all pools. Returns false if that is not possible yet
  // and must be retried.
  virtual bool Run(const std::vector<const PoolParts*>& pools, const JointSupply& supply) = 0;
  // Called without locks after each Run, for work that must not hold one.
  virtual void After() = 0;
  // Called without locks instead of Run when one of the pools is gone.
  virtual void Abandon() = 0;
};

}  // namespace kvpage

#endif  // KVPAGE_CACHE_JOINT_STEP_H_
