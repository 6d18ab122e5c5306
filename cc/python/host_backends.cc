#include "python/host_backends.h"

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "vmm/memfd_vmm.h"

namespace kvpage {
namespace {

Status MakeMemfdVmm(std::int64_t virtual_bytes, std::int64_t block_bytes, std::unique_ptr<Vmm>* out) {
  std::unique_ptr<MemfdVmm> vmm;
  KVPAGE_RETURN_IF_ERROR(MemfdVmm::Make(virtual_bytes, block_bytes, &vmm));
  *out = std::move(vmm);
  return {};
}

std::map<std::string, MakeVmm>& Backends() {
  static auto* const backends = new std::map<std::string, MakeVmm>{{"cpu", &MakeMemfdVmm}};
  return *backends;
}

}  // namespace

void RegisterHostBackend(const std::string& name, MakeVmm make) { Backends()[name] = make; }

MakeVmm FindHostBackend(const std::string& name) {
  const auto found = Backends().find(name);
  return found == Backends().end() ? nullptr : found->second;
}

}  // namespace kvpage
