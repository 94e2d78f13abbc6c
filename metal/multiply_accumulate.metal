// d = c + a b for `tiles` tiles of 8x8, a simdgroup each: nothing but the instruction whose order of sums is asked for.
#pragma METAL fp contract(off)
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

template <typename T>
METAL_FUNC void multiply_accumulate_tile(
    const device T* a, const device T* b, const device float* c, device float* d, uint lane) {
  const uint row = (lane >> 1 & 3) | (lane >> 2 & 4);
  const uint column = (lane & 1) * 2 + (lane >> 3 & 1) * 4;  // of the first of the lane's two elements
  simdgroup_matrix<T, 8, 8> left, right;
  simdgroup_matrix<float, 8, 8> sums;
#pragma clang loop unroll(full)
  for (uint e = 0; e < 2; e++) {
    left.thread_elements()[e] = a[row * 8 + column + e];
    right.thread_elements()[e] = b[row * 8 + column + e];
    sums.thread_elements()[e] = c[row * 8 + column + e];
  }
  simdgroup_multiply_accumulate(sums, left, right, sums);
#pragma clang loop unroll(full)
  for (uint e = 0; e < 2; e++) {
    d[row * 8 + column + e] = sums.thread_elements()[e];
  }
}
