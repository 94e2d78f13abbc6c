// Rounding to bfloat and half, to nearest even, which clang calls by these names where the CPU has no instruction.
#include "libc.h"

static uint32_t bits_of(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

// A double rounded to float towards odd, so that rounding once more gives what rounding once would have given.
static float to_odd(double d) {
  float f = (float)d;
  if ((double)f == d || f != f) return f;
  uint32_t u = bits_of(f);
  if (!(u & 1)) u = __builtin_fabs((double)f) > __builtin_fabs(d) ? u - 1 : u | 1;
  memcpy(&f, &u, 4);
  return f;
}

extern "C" {
__bf16 __truncsfbf2(float f) {
  uint32_t u = bits_of(f);
  bool nan = (u & 0x7FFFFFFF) > 0x7F800000;
  uint16_t r = nan ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16);
  return __builtin_bit_cast(__bf16, r);
}
__bf16 __truncdfbf2(double d) { return __truncsfbf2(to_odd(d)); }
_Float16 __truncdfhf2(double d) { return (_Float16)to_odd(d); }
}
