#include "vmm/headroom.h"

#include <string>

#include "vmm/limits.h"

namespace kvpage {
namespace {

constexpr std::int64_t kReserve = std::int64_t{64} << 20;

}  // namespace

Status CheckHeadroom(std::int64_t bytes) {
  const std::int64_t available = AvailableBytes();
  if (available < 0 || bytes + kReserve <= available) return {};
  return ResourceExhausted("allocating " + std::to_string(bytes) + " bytes of blocks would leave the system under " +
                           std::to_string(kReserve) + " bytes; " + std::to_string(available) +
                           " are available to this process");
}

}  // namespace kvpage
