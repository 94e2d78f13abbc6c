// Names of vector types, constants, and last the address spaces: the library above is free of them.
#pragma once
#define MSL_VECTORS(t)                                                                                     \
  typedef metal::vec<t, 2> t##2;                                                                           \
  typedef metal::vec<t, 3> t##3;                                                                           \
  typedef metal::vec<t, 4> t##4;                                                                           \
  typedef metal::packed_vec<t, 2> packed_##t##2;                                                           \
  typedef metal::packed_vec<t, 3> packed_##t##3;                                                           \
  typedef metal::packed_vec<t, 4> packed_##t##4;
MSL_VECTORS(float) MSL_VECTORS(half) MSL_VECTORS(bfloat) MSL_VECTORS(int) MSL_VECTORS(uint) MSL_VECTORS(short)
MSL_VECTORS(ushort) MSL_VECTORS(char) MSL_VECTORS(uchar) MSL_VECTORS(bool) MSL_VECTORS(long) MSL_VECTORS(ulong)
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define FLT_MAX 3.402823466e38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-7f
#define HALF_MAX 6.5504e4h
#define UINT_MAX 4294967295u
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define M_PI_F 3.14159265358979323846f
#define M_SQRT1_2_F 0.70710678118654752440f
#define M_SQRT2_F 1.41421356237309504880f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.69314718055994530942f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define device MSL_SPACE(1)
#define constant MSL_SPACE(2)
#define threadgroup MSL_SPACE(3)
#define thread
#define kernel
