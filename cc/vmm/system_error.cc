#include "vmm/system_error.h"

#include <cerrno>
#include <cstring>
#include <string>

namespace kvpage {

Status SystemError(const char* call, std::int64_t bytes, int error) {
  std::string message = call;
  if (bytes >= 0) message += " of " + std::to_string(bytes) + " bytes";
  message += std::string(" failed: ") + std::strerror(error);
  switch (error) {
    case ENOMEM:
    case ENOSPC:
    case EAGAIN:
      return ResourceExhausted(message);
    case EPERM:
    case EACCES:
    case ENOSYS:
    case EOPNOTSUPP:
      return FailedPrecondition(message +
                                ": the system does not allow this call, which pools on CPU cannot do without. A "
                                "sandbox forbids it (a container's seccomp profile must allow memfd_create, ftruncate, "
                                "fallocate, mmap and mremap), or the kernel lacks it");
    case EMFILE:
      return FailedPrecondition(message + ": a pool keeps one file open: close other pools, or raise `ulimit -n`");
    case ENFILE:
      return FailedPrecondition(message + ": the whole system has too many files open (fs.file-max)");
    case EFBIG:
      return FailedPrecondition(message + ": give a smaller capacity, or raise `ulimit -f`");
    default:
      return Internal(message);
  }
}

}  // namespace kvpage
