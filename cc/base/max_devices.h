// Upper bound of the number of devices per machine.
#ifndef KVPAGE_BASE_MAX_DEVICES_H_
#define KVPAGE_BASE_MAX_DEVICES_H_

namespace kvpage {

constexpr int kMaxDevices = 64;  // more than any machine has today

}  // namespace kvpage

#endif  // KVPAGE_BASE_MAX_DEVICES_H_
