// The machine instructions that attention uses, each with a version for the emulated device.
//
// Fragments are those of mma.m16n8k16. With lane = 4 g + t, each thread of the warp holds
//   A (16 x 16): rows g and g + 8, columns 2t, 2t + 1 and those + 8      [4 registers of two elements]
//   B (16 x 8):  rows 2t, 2t + 1 and those + 8 of column g               [2 registers of two elements]
//   C (16 x 8):  rows g and g + 8, columns 2t and 2t + 1                 [4 floats]
#ifndef KVPAGE_KERNELS_CUDA_PTX_CUH_
#define KVPAGE_KERNELS_CUDA_PTX_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace kvpage::cuda {

using Bf16 = __nv_bfloat16;
using F16 = __half;

// Two elements of T in one register, the first in the low half.
template <class T>
__device__ __forceinline__ std::uint32_t Pack(float low, float high);
template <>
__device__ __forceinline__ std::uint32_t Pack<Bf16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  std::uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}
template <>
__device__ __forceinline__ std::uint32_t Pack<F16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  std::uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

#ifndef KVPAGE_EMULATED

__device__ __forceinline__ std::uint32_t SharedAddress(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes from global to shared memory, bypassing L1. If not `valid`, writes zeros and does not access `from`.
__device__ __forceinline__ void CopyAsync16(void* to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(SharedAddress(to)), "l"(from),
               "r"(bytes)
               : "memory");
}
// The same for 4 bytes.
__device__ __forceinline__ void CopyAsync4(void* to, const void* from, bool valid) {
  const int bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(SharedAddress(to)), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void CommitCopies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kLeft) : "memory");
}

// Loads four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void LoadMatrices(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(row))
               : "memory");
}
__device__ __forceinline__ void LoadMatricesTransposed(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(row))
               : "memory");
}

// c += a b
template <class T>
__device__ __forceinline__ void MultiplyAdd(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                            std::uint32_t b1);
template <>
__device__ __forceinline__ void MultiplyAdd<Bf16>(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                                  std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void MultiplyAdd<F16>(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                                 std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// a b + c for two pairs, rounded once.
template <class T>
__device__ __forceinline__ std::uint32_t MultiplyAddPair(std::uint32_t a, std::uint32_t b, std::uint32_t c);
template <>
__device__ __forceinline__ std::uint32_t MultiplyAddPair<Bf16>(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
template <>
__device__ __forceinline__ std::uint32_t MultiplyAddPair<F16>(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;\n" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Any bitwise function of a, b and c; its table is its result for a = 0xf0, b = 0xcc, c = 0xaa. The compiler would
// split a function of two constants in order to have both as immediate operands.
template <int kTable>
__device__ __forceinline__ std::uint32_t Logic(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;\n" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
}

// Selects four bytes of `x`, one per hexadecimal digit of the selector. A digit above 7 gives eight copies of the sign
// bit of byte digit - 8.
__device__ __forceinline__ std::uint32_t Permute(std::uint32_t x, std::uint32_t selector) {
  std::uint32_t y;
  asm("prmt.b32 %0, %1, %1, %2;\n" : "=r"(y) : "r"(x), "r"(selector));
  return y;
}

// 2^x; subnormal results are zero.
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

#else  // KVPAGE_EMULATED

inline void CopyAsync16(void* to, const void* from, bool valid) { emulation::CopyAsync(to, from, 16, valid ? 16 : 0); }
inline void CopyAsync4(void* to, const void* from, bool valid) { emulation::CopyAsync(to, from, 4, valid ? 4 : 0); }
inline void CommitCopies() { emulation::CommitCopies(); }
template <int kLeft>
void WaitForCopies() {
  emulation::WaitForCopies(kLeft);
}

// The arguments that the lanes of a warp pass to a collective instruction.
struct MatrixLoad {
  std::uint32_t* r;
  const unsigned char* row;
};

template <bool kTransposed>
void EmulateLoadMatrices(void* const* args, unsigned) {
  const auto lanes = reinterpret_cast<MatrixLoad* const*>(args);
  for (int matrix = 0; matrix < 4; ++matrix) {
    const void* rows[8];
    for (int row = 0; row < 8; ++row) rows[row] = lanes[8 * matrix + row]->row;
    emulation::CountBankConflicts(rows, 8);
    for (int lane = 0; lane < 32; ++lane) {
      unsigned char pair[4];
      for (int i = 0; i < 2; ++i) {
        const int row = kTransposed ? lane % 4 * 2 + i : lane / 4, column = kTransposed ? lane / 4 : lane % 4 * 2 + i;
        std::memcpy(pair + 2 * i, lanes[8 * matrix + row]->row + 2 * column, 2);
      }
      std::memcpy(&lanes[lane]->r[matrix], pair, 4);
    }
  }
}
inline void LoadMatrices(std::uint32_t (&r)[4], const void* row) {
  MatrixLoad load = {r, static_cast<const unsigned char*>(row)};
  if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) emulation::Fail("ldmatrix: the row is not 16-byte aligned");
  emulation::WarpCollective(0xffffffffu, {"ldmatrix", "", 0}, &load, EmulateLoadMatrices<false>);
}
inline void LoadMatricesTransposed(std::uint32_t (&r)[4], const void* row) {
  MatrixLoad load = {r, static_cast<const unsigned char*>(row)};
  if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) emulation::Fail("ldmatrix: the row is not 16-byte aligned");
  emulation::WarpCollective(0xffffffffu, {"ldmatrix.trans", "", 0}, &load, EmulateLoadMatrices<true>);
}

inline float Element(Bf16, std::uint32_t pair, int i) {
  return __bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(pair >> 16 * i)));
}
inline float Element(F16, std::uint32_t pair, int i) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16 * i)));
}

struct MatrixProduct {
  float* c;
  const std::uint32_t* a;
  std::uint32_t b[2];
};

template <class T>
void EmulateMultiplyAdd(void* const* args, unsigned) {
  const auto lanes = reinterpret_cast<MatrixProduct* const*>(args);
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) {
      for (int i = 0; i < 2; ++i) a[g + r % 2 * 8][2 * t + i + r / 2 * 8] = Element(T{}, lanes[lane]->a[r], i);
    }
    for (int r = 0; r < 2; ++r) {
      for (int i = 0; i < 2; ++i) b[2 * t + i + r * 8][g] = Element(T{}, lanes[lane]->b[r], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) {
      float sum = lanes[lane]->c[r];
      for (int k = 0; k < 16; ++k) sum += a[g + r / 2 * 8][k] * b[k][2 * t + r % 2];
      lanes[lane]->c[r] = sum;
    }
  }
}
template <class T>
void MultiplyAdd(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  MatrixProduct product = {c, a, {b0, b1}};
  emulation::WarpCollective(0xffffffffu, {"mma", "", 0}, &product, EmulateMultiplyAdd<T>);
}

template <class T>
std::uint32_t MultiplyAddPair(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  float sums[2];
  for (int i = 0; i < 2; ++i) sums[i] = std::fma(Element(T{}, a, i), Element(T{}, b, i), Element(T{}, c, i));
  return Pack<T>(sums[0], sums[1]);
}
template <int kTable>
std::uint32_t Logic(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t d = 0;
  for (int i = 0; i < 32; ++i) d |= (kTable >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1u) << i;
  return d;
}
inline std::uint32_t Permute(std::uint32_t x, std::uint32_t selector) { return __byte_perm(x, x, selector); }

inline float Exp2(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }

#endif  // KVPAGE_EMULATED

// Waits until all but the newest stages - 2 groups of copies have arrived, so that the oldest stage of a full pipeline
// of 2 to 8 stages is ready.
__device__ __forceinline__ void WaitForStage(int stages) {
  switch (stages) {
    case 2:
      return WaitForCopies<0>();
    case 3:
      return WaitForCopies<1>();
    case 4:
      return WaitForCopies<2>();
    case 5:
      return WaitForCopies<3>();
    case 6:
      return WaitForCopies<4>();
    case 7:
      return WaitForCopies<5>();
    default:
      return WaitForCopies<6>();
  }
}

}  // namespace kvpage::cuda

#endif  // KVPAGE_KERNELS_CUDA_PTX_CUH_
