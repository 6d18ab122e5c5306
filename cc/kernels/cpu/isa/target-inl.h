// The instruction set that this translation unit compiles the kernels for.
//
// isa/<set>.cc defines KVPAGE_ISA (the name of the set, also used as a namespace) and KVPAGE_LANES (float32 lanes per
// vector) before it includes anything from this folder. A header that an IDE or a linter opens alone gets the portable
// set. The kernels are in an anonymous namespace inside KVPAGE_ISA: otherwise the linker could keep a template that was
// instantiated with one set's flags for all of them.
#ifndef KVPAGE_KERNELS_CPU_ISA_TARGET_INL_H_
#define KVPAGE_KERNELS_CPU_ISA_TARGET_INL_H_

#ifndef KVPAGE_ISA
#define KVPAGE_ISA baseline
#define KVPAGE_LANES 4
#endif

// GCC 12 emits these warnings for its AVX-512 intrinsics when they are inlined (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define KVPAGE_INLINE inline __attribute__((always_inline))
// For inner loops: as separate functions they keep their accumulators in registers; if they are inlined into their
// callers, GCC spills them.
#define KVPAGE_NOINLINE __attribute__((noinline))
#if defined(__clang__)
#define KVPAGE_UNROLL _Pragma("clang loop unroll(full)")
#else
#define KVPAGE_UNROLL _Pragma("GCC unroll 16")
#endif

#endif  // KVPAGE_KERNELS_CPU_ISA_TARGET_INL_H_
