// CUDA's vector types, with its sizes and alignments.
#pragma once

#include <cstdint>

#define LPD_VECTOR_TYPES(name, element)                                                \
  struct name##2 {                                                                     \
    alignas(2 * sizeof(element)) element x;                                            \
    element y;                                                                         \
  };                                                                                   \
  struct name##3 { element x, y, z; };                                                 \
  struct name##4 {                                                                     \
    alignas(4 * sizeof(element) < 16 ? 4 * sizeof(element) : 16) element x;            \
    element y, z, w;                                                                   \
  };                                                                                   \
  inline name##2 make_##name##2(element x, element y) { return {x, y}; }               \
  inline name##3 make_##name##3(element x, element y, element z) { return {x, y, z}; } \
  inline name##4 make_##name##4(element x, element y, element z, element w) { return {x, y, z, w}; }

LPD_VECTOR_TYPES(char, signed char)
LPD_VECTOR_TYPES(uchar, unsigned char)
LPD_VECTOR_TYPES(short, short)
LPD_VECTOR_TYPES(ushort, unsigned short)
LPD_VECTOR_TYPES(int, int)
LPD_VECTOR_TYPES(uint, unsigned int)
LPD_VECTOR_TYPES(longlong, long long)
LPD_VECTOR_TYPES(ulonglong, unsigned long long)
LPD_VECTOR_TYPES(float, float)
LPD_VECTOR_TYPES(double, double)
#undef LPD_VECTOR_TYPES

struct dim3 {
  unsigned int x = 1, y = 1, z = 1;
  constexpr dim3(unsigned int x_ = 1, unsigned int y_ = 1, unsigned int z_ = 1) : x(x_), y(y_), z(z_) {}
};
