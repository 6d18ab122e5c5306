// CUDA's vector types with their alignments: the undefined behaviour sanitizer reports misaligned accesses.
#ifndef KVPAGE_TESTING_CUDA_EMULATION_VECTOR_TYPES_H_
#define KVPAGE_TESTING_CUDA_EMULATION_VECTOR_TYPES_H_

#define KVPAGE_VECTOR(type, name, align2, align4)                             \
  struct name##1 { type x; };                                                 \
  struct alignas(align2) name##2 { type x, y; };                              \
  struct name##3 { type x, y, z; };                                           \
  struct alignas(align4) name##4 { type x, y, z, w; };                        \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }            \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

KVPAGE_VECTOR(signed char, char, 2, 4)
KVPAGE_VECTOR(unsigned char, uchar, 2, 4)
KVPAGE_VECTOR(short, short, 4, 8)
KVPAGE_VECTOR(unsigned short, ushort, 4, 8)
KVPAGE_VECTOR(int, int, 8, 16)
KVPAGE_VECTOR(unsigned, uint, 8, 16)
KVPAGE_VECTOR(float, float, 8, 16)
KVPAGE_VECTOR(long long, longlong, 16, 16)
KVPAGE_VECTOR(unsigned long long, ulonglong, 16, 16)
KVPAGE_VECTOR(double, double, 16, 16)
#undef KVPAGE_VECTOR

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3() = default;
  constexpr dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}  // NOLINT: as CUDA's
};

#endif  // KVPAGE_TESTING_CUDA_EMULATION_VECTOR_TYPES_H_
