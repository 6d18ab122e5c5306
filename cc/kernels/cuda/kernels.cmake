# The CUDA kernels and the FFI handlers that launch them. Tests compile the same sources as C++ for an emulated device
# (cc/testing/cuda_emulation), with or without CUDA.
set(KVPAGE_CUDA_SOURCES append.cu attend.cu copy.cu copy_rotated.cu decode_bf16.cu decode_f16.cu decode_float8.cu
  decode_int8.cu edit_slots.cu gather.cu general.cu grouped_bf16.cu grouped_f16.cu launch.cu prefill_bf16.cu prefill_f16.cu slots.cu
  tables.cu)
list(TRANSFORM KVPAGE_CUDA_SOURCES PREPEND ${PROJECT_SOURCE_DIR}/cc/kernels/cuda/)
set(KVPAGE_CUDA_HANDLERS attention.cc decode.cc slots.cc)
list(TRANSFORM KVPAGE_CUDA_HANDLERS PREPEND ${PROJECT_SOURCE_DIR}/cc/ffi/cuda/)

# Part of every build: programs may be lowered for CUDA on machines without it.
add_library(kvpage_cuda_scratch STATIC ${PROJECT_SOURCE_DIR}/cc/kernels/cuda/scratch.cc)
target_link_libraries(kvpage_cuda_scratch PUBLIC kvpage_options)

if(KVPAGE_CUDA)
  add_library(kvpage_cuda_kernels STATIC ${KVPAGE_CUDA_SOURCES})
  set_target_properties(kvpage_cuda_kernels PROPERTIES
    CUDA_ARCHITECTURES "${JAX_KVPAGE_CUDA_ARCHITECTURES}"
    CUDA_STANDARD 17
    CUDA_STANDARD_REQUIRED ON
    CUDA_EXTENSIONS OFF
    CUDA_RUNTIME_LIBRARY Static
    CUDA_VISIBILITY_PRESET hidden)
  target_link_libraries(kvpage_cuda_kernels PUBLIC kvpage_cuda_scratch kvpage_options CUDA::cudart_static)
  if(JAX_KVPAGE_CUDA_LINEINFO)
    target_compile_options(kvpage_cuda_kernels PRIVATE -lineinfo)
  endif()

  if(JAX_KVPAGE_CUDA_REPORT)
    # The assembler reports resource usage on standard error: store that next to each object and print a table at the
    # end.
    find_package(Python 3.11 REQUIRED COMPONENTS Interpreter)
    set(report ${Python_EXECUTABLE} ${PROJECT_SOURCE_DIR}/cc/kernels/cuda/resource_usage.py)
    target_compile_options(kvpage_cuda_kernels PRIVATE -Xptxas=-v)
    set_target_properties(kvpage_cuda_kernels PROPERTIES CUDA_COMPILER_LAUNCHER "${report};record")
    add_custom_target(kvpage_cuda_report ALL
      COMMAND ${report} table ${CMAKE_CURRENT_BINARY_DIR}/CMakeFiles/kvpage_cuda_kernels.dir
      COMMENT "Registers, spills and static shared memory of the CUDA kernels" VERBATIM USES_TERMINAL)
    add_dependencies(kvpage_cuda_report kvpage_cuda_kernels)
  endif()
endif()
