// What attention over a few rows and attention over a prefill chunk have in common: which keys a row sees, scores,
// weights, and the order of every sum. Scale is 1. A row's bits depend on its query, its position, the keys and values
// that it sees and their positions, whether there is a window, and on nothing else:
//   score      the head's values are cut into words of eight; lanes_of(D) lanes take every lanes_of(D)-th word and
//              within it values upwards, one fma each; lanes are added as a binary tree, neighbours 1, 2, 4, 8 apart.
//   leaf       positions 16n .. 16n + 15: peak, weights exp(score - peak), their total as a binary tree over keys.
//   partition  LEAVES leaves from position 16 LEAVES p on: weights times exp(leaf's peak - partition's peak); total
//              and sums of values upwards from 0, one fma each.
//   row        partitions upwards: what is there is scaled to the new peak, the next one added with one fma.
// What a row does not see has weight 0 and adds exactly 0 everywhere.
#pragma METAL fp contract(off)
#include <metal_stdlib>
using namespace metal;

constant constexpr int LEAF = 16;
constant constexpr int WORD = 8;

METAL_FUNC constexpr int lanes_of(int dim) { return dim > 64 ? dim / 32 : 2; }       // lanes that share a key
METAL_FUNC constexpr int simdgroups_of(int dim) { return lanes_of(dim) * LEAF / 32; }  // that hold a leaf's keys

// Where consecutive rows stand and what they see: row m the keys up to first + m, the last `window` of them if not 0.
struct Rows {
  int first;
  int count;   // positions, not heads
  int window;  // 0: none
  int ring;    // buffer rows of a ring, 0 where position p lies in buffer row p - origin
  int origin;

  int lowest() const thread { return window > 0 ? max(0, first - window + 1) : 0; }
  int highest() const thread { return first + count - 1; }
  bool sees(int row, int key) const thread {
    return key >= 0 && key <= first + row && (window == 0 || key > first + row - window);
  }
  bool live(int key) const thread { return key >= lowest() && key <= highest(); }  // some row sees it
  bool all_see(int low, int high) const thread {  // every row every key from low to high
    return sees(0, high) && sees(count - 1, low);
  }
  int slot(int key) const thread { return ring > 0 ? key % ring : key - origin; }
  int slot_behind(int slot, int keys) const thread {  // of a key at most LEAF further on, without a division
    return ring > 0 && slot + keys >= ring ? slot + keys - ring : slot + keys;
  }
};

METAL_FUNC float scale_between(float from, float to) { return from == to ? 1.0f : precise::exp(from - to); }

METAL_FUNC float weight_of(float score, float peak) {
  return score == -INFINITY ? 0.0f : precise::exp(score - peak);
}

// Over the 16 lanes that hold a leaf's keys.
METAL_FUNC float peak_of_leaf(float score) {
  for (ushort apart = 1; apart < LEAF; apart *= 2) {
    score = max(score, simd_shuffle_xor(score, apart));
  }
  return score;
}

METAL_FUNC float total_of_leaf(float weight) {
  for (ushort apart = 1; apart < LEAF; apart *= 2) {
    weight += simd_shuffle_xor(weight, apart);
  }
  return weight;
}

// The words of a key that lane `part` of its lanes scores: D / lanes_of(D) numbers, zeros for a dead key, not read.
template <int D, typename T>
METAL_FUNC void load_key(const device T* keys, int slot, bool live, uint part, thread float* own) {
  for (int word = 0; word < D / lanes_of(D) / WORD; word++) {
    const device T* from = keys + size_t(slot) * D + (word * lanes_of(D) + part) * WORD;
#pragma clang loop unroll(full)
    for (int half_word = 0; half_word < 2; half_word++) {
      vec<T, 4> four = vec<T, 4>(T(0));
      if (live) {
        four = ((const device vec<T, 4>*)from)[half_word];
      }
#pragma clang loop unroll(full)
      for (int i = 0; i < 4; i++) {
        own[word * WORD + half_word * 4 + i] = float(four[i]);
      }
    }
  }
}

template <int D>
METAL_FUNC float score_of(const thread float* own, const threadgroup float* query, uint part) {
  float sum = 0;
#pragma clang loop unroll(full)
  for (int word = 0; word < D / lanes_of(D) / WORD; word++) {
    const threadgroup float4* from = (const threadgroup float4*)(query + (word * lanes_of(D) + part) * WORD);
#pragma clang loop unroll(full)
    for (int half_word = 0; half_word < 2; half_word++) {
      const float4 four = from[half_word];
#pragma clang loop unroll(full)
      for (int i = 0; i < 4; i++) {
        sum = fma(four[i], own[word * WORD + half_word * 4 + i], sum);
      }
    }
  }
  for (ushort apart = 1; apart < lanes_of(D); apart *= 2) {
    sum += simd_shuffle_xor(sum, apart);
  }
  return sum;
}

// Query rows low .. high - 1 of one K/V head as float32; row r is head r % GQA of position r / GQA.
template <int D, int GQA, int THREADS, typename Q>
METAL_FUNC void stage_queries(
    const device Q* queries, int stride, int low, int high, threadgroup float* staged, uint thread_index) {
  for (int i = thread_index; i < (high - low) * D / 4; i += THREADS) {
    const int row = low + i * 4 / D;
    const device Q* from = queries + size_t(row / GQA) * stride + row % GQA * D + i * 4 % D;
    const vec<Q, 4> four = *(const device vec<Q, 4>*)from;
#pragma clang loop unroll(full)
    for (int k = 0; k < 4; k++) {
      staged[i * 4 + k] = float(four[k]);
    }
  }
}

// One more key in a sum. On an edge, where not every row sees every key, what a row does not see may be NaN: left out.
METAL_FUNC float with_key(float sum, float weight, float value, bool edge) {
  const float next = fma(weight, value, sum);
  return edge && weight == 0 ? sum : next;
}
