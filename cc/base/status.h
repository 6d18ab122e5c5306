// Status: how every layer below XLA and Python reports errors.
//
// The codes are the absl/XLA numbers, so the FFI layer passes them on unchanged and a Python user sees the usual names
// (RESOURCE_EXHAUSTED, FAILED_PRECONDITION, ...). If host calls in Python should raise a more specific exception than
// the code implies, `reason` selects it. Nothing here throws or aborts.
#ifndef KVPAGE_BASE_STATUS_H_
#define KVPAGE_BASE_STATUS_H_

#include <cstdint>
#include <string>
#include <utility>

namespace kvpage {

enum class Code : std::uint8_t {
  kOk = 0,
  kInvalidArgument = 3,
  kNotFound = 5,
  kResourceExhausted = 8,
  kFailedPrecondition = 9,
  kOutOfRange = 11,
  kUnimplemented = 12,
  kInternal = 13,
};

enum class Reason : std::uint8_t {
  kNone = 0,
  kClosed,             // the pool is closed
  kForked,             // the pool belongs to a parent process
  kOutOfBlocks,        // the pool's budget is not enough
  kOutOfSlots,         // every slot is in use
  kOutOfDeviceMemory,  // the GPU is full, perhaps with memory that JAX holds
  kDeviceFault,        // a program failed on the device
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Code code, std::string message, Reason reason = Reason::kNone)
      : code_(code), reason_(reason), message_(std::move(message)) {}

  bool ok() const { return code_ == Code::kOk; }
  Code code() const { return code_; }
  Reason reason() const { return reason_; }
  const std::string& message() const { return message_; }

  // The same status with another message or for another reason.
  Status WithMessage(std::string message) const { return {code_, std::move(message), reason_}; }
  Status WithReason(Reason reason) const { return {code_, message_, reason}; }

 private:
  Code code_ = Code::kOk;
  Reason reason_ = Reason::kNone;
  std::string message_;
};

inline Status InvalidArgument(std::string m) { return {Code::kInvalidArgument, std::move(m)}; }
inline Status ResourceExhausted(std::string m, Reason reason = Reason::kNone) {
  return {Code::kResourceExhausted, std::move(m), reason};
}
inline Status FailedPrecondition(std::string m, Reason reason = Reason::kNone) {
  return {Code::kFailedPrecondition, std::move(m), reason};
}
inline Status OutOfRange(std::string m) { return {Code::kOutOfRange, std::move(m)}; }
inline Status Internal(std::string m) { return {Code::kInternal, std::move(m)}; }

}  // namespace kvpage

#define KVPAGE_RETURN_IF_ERROR(expr)   \
  do {                                 \
    ::kvpage::Status _status = (expr); \
    if (!_status.ok()) return _status; \
  } while (false)

#endif  // KVPAGE_BASE_STATUS_H_
