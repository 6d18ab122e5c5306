// Chooses the instruction set at run time.
#include "kernels/cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <string>

#include "base/status.h"
#include "kernels/cpu/kernels.h"

namespace kvpage::cpu {
namespace {

constexpr const char* kVariable = "JAX_KVPAGE_ISA";
constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

// Returns null if the build or the machine does not support the set.
const Kernels* Find(const std::string& name) {
  if (name == "baseline") return baseline::Table();
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (name == "avx2" && avx2) return avx2::Table();
  if (name == "avx512" && avx512) return avx512::Table();
  const bool dots = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
                    __builtin_cpu_supports("avx512vbmi");
  if (name == "avx512_bf16" && dots) return avx512_bf16::Table();
#endif
  return nullptr;
}

struct Choice {
  const Kernels* kernels = nullptr;
  std::string error;
};

Choice Choose() {
  Choice choice;
  std::string supported;
  for (const char* name : kNames) {
    const Kernels* kernels = Find(name);
    if (kernels == nullptr) continue;
    choice.kernels = kernels;
    supported += supported.empty() ? name : std::string(", ") + name;
  }
  const char* wanted = std::getenv(kVariable);
  if (wanted == nullptr || *wanted == '\0') return choice;
  if (const Kernels* kernels = Find(wanted)) {
    choice.kernels = kernels;
    return choice;
  }
  choice.error = std::string(kVariable) + "=" + wanted + ": this machine and build can run " + supported +
                 "; set it to one of these, or unset it to get the best";
  return choice;
}

const Choice& Chosen() {
  static const Choice choice = Choose();
  return choice;
}

std::atomic<const Kernels*> forced{nullptr};

}  // namespace

const Kernels& ActiveKernels() {
  const Kernels* kernels = forced.load(std::memory_order_acquire);
  return kernels != nullptr ? *kernels : *Chosen().kernels;
}

const Kernels* ForceInstructionSet(const char* name) {
  const Kernels* kernels = Find(name);
  if (kernels != nullptr) forced.store(kernels, std::memory_order_release);
  return kernels;
}

const char* InstructionSet() { return ActiveKernels().name; }

Status CheckInstructionSet() {
  const std::string& error = Chosen().error;
  return error.empty() ? Status() : InvalidArgument(error);
}

}  // namespace kvpage::cpu
