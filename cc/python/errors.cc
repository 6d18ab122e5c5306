#include "python/errors.h"

#include <exception>

namespace nb = nanobind;

namespace kvpage {

void BindErrors(nb::module_& m) {
  nb::enum_<Code>(m, "Code")
      .value("OK", Code::kOk)
      .value("INVALID_ARGUMENT", Code::kInvalidArgument)
      .value("NOT_FOUND", Code::kNotFound)
      .value("RESOURCE_EXHAUSTED", Code::kResourceExhausted)
      .value("FAILED_PRECONDITION", Code::kFailedPrecondition)
      .value("OUT_OF_RANGE", Code::kOutOfRange)
      .value("UNIMPLEMENTED", Code::kUnimplemented)
      .value("INTERNAL", Code::kInternal);
  nb::enum_<Reason>(m, "Reason")
      .value("NONE", Reason::kNone)
      .value("CLOSED", Reason::kClosed)
      .value("FORKED", Reason::kForked)
      .value("OUT_OF_BLOCKS", Reason::kOutOfBlocks)
      .value("OUT_OF_SLOTS", Reason::kOutOfSlots)
      .value("OUT_OF_DEVICE_MEMORY", Reason::kOutOfDeviceMemory)
      .value("DEVICE_FAULT", Reason::kDeviceFault);
  const nb::exception<StatusError> status_error(m, "StatusError", PyExc_RuntimeError);
  nb::register_exception_translator(
      [](const std::exception_ptr& p, void* type) {
        try {
          std::rethrow_exception(p);
        } catch (const StatusError& error) {
          const nb::handle exception_type(static_cast<PyObject*>(type));
          nb::object exception = exception_type(error.code, error.reason, error.what());
          PyErr_SetObject(exception_type.ptr(), exception.ptr());
        }
      },
      nb::object(m.attr("StatusError")).ptr());
}

}  // namespace kvpage
