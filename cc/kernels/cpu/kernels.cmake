# The CPU kernels. The isa_*.cc files hold the same arithmetic compiled for one instruction set each; the best one that
# the machine has is chosen at run time, so one binary serves all.
add_library(kvpage_cpu_kernels STATIC
  cc/kernels/cpu/append.cc
  cc/kernels/cpu/attend.cc
  cc/kernels/cpu/context.cc
  cc/kernels/cpu/copy.cc
  cc/kernels/cpu/gather.cc
  cc/kernels/cpu/isa.cc
  cc/kernels/cpu/isa_avx2.cc
  cc/kernels/cpu/isa_avx512.cc
  cc/kernels/cpu/isa_avx512_bf16.cc
  cc/kernels/cpu/isa_baseline.cc
  cc/kernels/cpu/workspace.cc)
target_link_libraries(kvpage_cpu_kernels PUBLIC kvpage_options)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(avx2 -mavx2 -mfma -mf16c)
  set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512)
  set_source_files_properties(cc/kernels/cpu/isa_avx2.cc PROPERTIES COMPILE_OPTIONS "${avx2}")
  set_source_files_properties(cc/kernels/cpu/isa_avx512.cc PROPERTIES COMPILE_OPTIONS "${avx512}")
  set_source_files_properties(cc/kernels/cpu/isa_avx512_bf16.cc PROPERTIES COMPILE_OPTIONS "${avx512};-mavx512bf16;-mavx512vnni;-mavx512vbmi")
endif()
