// The residual stream plus a normed row, as mlx_mtp/layers.py has it: each operation rounded to the rows' type. One
// threadgroup a row; which thread has which values, and the order of their sum, follow from WIDTH alone.
#pragma METAL fp contract(off)
#include <metal_stdlib>
#include <metal_simdgroup>
using namespace metal;

// Of every thread's value, in all threads. One threadgroup of THREADS.
template <int THREADS>
METAL_FUNC float sum_of_threads(float value, threadgroup float* scratch, uint lane, uint simd) {
  const float own = simd_sum(value);
  if (lane == 0) {
    scratch[simd] = own;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return simd_sum(int(lane) < THREADS / 32 ? scratch[lane] : 0.0f);
}

// total = (x + y / rms(y) * gain) * scalar; THEN: normed = total / rms(total) * next_gain as well. `scratch` has 32 floats
// for each of both sums.
template <int WIDTH, int THREADS, bool SCALED, bool THEN, typename T>
METAL_FUNC void add_norm_row(
    const device T* x, const device T* y, const device T* gain, const device T* next_gain, float eps, float scalar,
    device T* total, device T* normed, threadgroup float* scratch, uint worker, uint lane, uint simd) {
  constexpr int OWN = (WIDTH + THREADS - 1) / THREADS;
  T values[OWN];
  float squares = 0.0f;
  for (int i = 0; i < OWN; i++) {
    const int at = worker + i * THREADS;
    values[i] = at < WIDTH ? y[at] : T(0);
    squares = metal::fma(float(values[i]), float(values[i]), squares);
  }
  float scale = metal::precise::rsqrt(sum_of_threads<THREADS>(squares, scratch, lane, simd) / WIDTH + eps);
  squares = 0.0f;
  for (int i = 0; i < OWN; i++) {
    const int at = worker + i * THREADS;
    if (at < WIDTH) {
      const T own = T(float(gain[at]) * float(T(float(values[i]) * scale)));
      values[i] = T(float(x[at]) + float(own));
      if (SCALED) {
        values[i] = T(float(values[i]) * scalar);
      }
      total[at] = values[i];
      squares = metal::fma(float(values[i]), float(values[i]), squares);
    }
  }
  if (THEN) {
    scale = metal::precise::rsqrt(sum_of_threads<THREADS>(squares, scratch + 32, lane, simd) / WIDTH + eps);
    for (int i = 0; i < OWN; i++) {
      const int at = worker + i * THREADS;
      if (at < WIDTH) {
        normed[at] = T(float(next_gain[at]) * float(T(float(values[i]) * scale)));
      }
    }
  }
}
