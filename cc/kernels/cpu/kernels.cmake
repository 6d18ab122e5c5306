# The CPU kernels. Each isa/*.cc file compiles the same arithmetic for one instruction set. The best set that the
# machine supports is chosen at run time, so one binary runs everywhere.
add_library(kvpage_cpu_kernels STATIC
  cc/kernels/cpu/append.cc
  cc/kernels/cpu/attend.cc
  cc/kernels/cpu/attend_group.cc
  cc/kernels/cpu/context.cc
  cc/kernels/cpu/copy.cc
  cc/kernels/cpu/copy_rotated.cc
  cc/kernels/cpu/gather.cc
  cc/kernels/cpu/isa.cc
  cc/kernels/cpu/isa/avx2.cc
  cc/kernels/cpu/isa/avx512.cc
  cc/kernels/cpu/isa/avx512_bf16.cc
  cc/kernels/cpu/isa/baseline.cc
  cc/kernels/cpu/plan.cc
  cc/kernels/cpu/prefix_groups.cc
  cc/kernels/cpu/workspace.cc)
target_link_libraries(kvpage_cpu_kernels PUBLIC kvpage_options)
if(JAX_KVPAGE_SANITIZE)
  target_compile_options(kvpage_cpu_kernels PRIVATE -O2)
endif()
# Only Fma() may fuse a product with a sum: elsewhere, the product that is compared must equal the one that is
# subtracted.
set(arithmetic -ffp-contract=off)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(avx2 ${arithmetic} -mavx2 -mfma -mf16c)
  set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512)
  set_source_files_properties(cc/kernels/cpu/isa/avx2.cc PROPERTIES COMPILE_OPTIONS "${avx2}")
  set_source_files_properties(cc/kernels/cpu/isa/avx512.cc PROPERTIES COMPILE_OPTIONS "${avx512}")
  set_source_files_properties(cc/kernels/cpu/isa/avx512_bf16.cc PROPERTIES COMPILE_OPTIONS "${avx512};-mavx512bf16;-mavx512vnni;-mavx512vbmi")
endif()
set_source_files_properties(cc/kernels/cpu/copy_rotated.cc cc/kernels/cpu/isa/baseline.cc PROPERTIES COMPILE_OPTIONS ${arithmetic})
