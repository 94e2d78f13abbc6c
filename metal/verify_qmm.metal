// Quantised weights as MLX stores them, for the bodies in skinny.metal.
//
// A word of eight weights is one uint at 4 bits and two at 8, lowest bits first. Integers become floats without a
// conversion, which costs four times an addition: put into the mantissa of a half whose last place is worth one (1024,
// or 64 for a nibble four bits up), they are what is left when that half is subtracted again.

// The half2 whose parts hold the bits of `packed` under 0x00ff00ff, or under 0x000f000f: exactly those integers.
METAL_FUNC half2 low_integers(uint packed) {
  return as_type<half2>(packed | 0x64006400u) - half2(1024.0h);
}

METAL_FUNC half2 high_nibbles(uint packed) {
  return as_type<half2>((packed & 0x00f000f0u) | 0x54005400u) - half2(64.0h);
}

template <int BITS>
struct Packed;

template <>
struct Packed<4> {
  typedef uint Raw;
  const device uint* words;

  METAL_FUNC Raw raw(long at) const {
    return words[at];
  }

  METAL_FUNC void word(long at, thread float* q) const {
    integers(raw(at), q);
  }

  static METAL_FUNC void integers(Raw packed, thread float* q) {
    const half2 values[4] = {
        low_integers(packed & 0x000f000fu), high_nibbles(packed), low_integers(packed >> 8 & 0x000f000fu),
        high_nibbles(packed >> 8)};
#pragma clang loop unroll(full)
    for (int k = 0; k < 4; k++) {
      q[k] = float(values[k].x);
      q[k + 4] = float(values[k].y);
    }
  }

  // The two weights at `place` in each of a segment's four words, as codes at the low ends of both halves of a uint.
  // Four lanes share the segment: each reads one word of it and gets the others' from them.
  METAL_FUNC void pairs(long first, int place, uint lane, thread uint* codes) const {
    const uint own = words[first + place];
#pragma clang loop unroll(full)
    for (int u = 0; u < 4; u++) {
      const uint packed = simd_shuffle(own, ushort((lane & ~9u) | (u & 1) | (u & 2) << 2)) >> (8 * place);
      codes[u] = (packed & 0x0fu) | (packed & 0xf0u) << 12;
    }
  }

  // Eight weights as codes: k and k + 4 side by side.
  static METAL_FUNC void split(Raw packed, thread uint* codes) {
#pragma clang loop unroll(full)
    for (int k = 0; k < 4; k++) {
      codes[k] = packed >> (4 * k) & 0x000f000fu;
    }
  }

  static METAL_FUNC half2 floats(uint codes) {
    return as_type<half2>((codes & 0x00080008u) << 12 | (codes & 0x00070007u) << 9) * half2(16384.0h);
  }
};

template <>
struct Packed<8> {
  typedef uint2 Raw;
  const device uint* words;

  METAL_FUNC Raw raw(long at) const {
    return ((const device uint2*)words)[at];
  }

  METAL_FUNC void word(long at, thread float* q) const {
    integers(raw(at), q);
  }

  static METAL_FUNC void integers(Raw packed, thread float* q) {
#pragma clang loop unroll(full)
    for (int half_word = 0; half_word < 2; half_word++) {
      const half2 even = low_integers(packed[half_word] & 0x00ff00ffu);
      const half2 odd = low_integers(packed[half_word] >> 8 & 0x00ff00ffu);
      q[4 * half_word] = float(even.x);
      q[4 * half_word + 1] = float(odd.x);
      q[4 * half_word + 2] = float(even.y);
      q[4 * half_word + 3] = float(odd.y);
    }
  }

  // As above; of the segment's eight uints a lane reads two, and the four it needs are one of each lane's.
  METAL_FUNC void pairs(long first, int place, uint lane, thread uint* codes) const {
    const uint own[2] = {words[2 * first + place], words[2 * first + 4 + place]};
#pragma clang loop unroll(full)
    for (int u = 0; u < 4; u++) {
      const uint from = (2 * u & 2) | place >> 1;
      const uint packed =
          simd_shuffle(own[u >> 1], ushort((lane & ~9u) | (from & 1) | (from & 2) << 2)) >> (16 * (place & 1));
      codes[u] = (packed & 0xffu) | (packed & 0xff00u) << 8;
    }
  }

  static METAL_FUNC void split(Raw packed, thread uint* codes) {
#pragma clang loop unroll(full)
    for (int k = 0; k < 4; k++) {
      codes[k] = ((packed.x >> (8 * k) & 0xffu) | (packed.y >> (8 * k) & 0xffu) << 16);
    }
  }

  static METAL_FUNC half2 floats(uint codes) {
    return as_type<half2>((codes & 0x00800080u) << 8 | (codes & 0x007f007fu) << 7) * half2(256.0h);
  }
};

// w = scale * q + bias, one scale and one bias for GROUP weights of a column.
template <typename S, int BITS, int GROUP>
struct Affine {
  Packed<BITS> packed;
  const device S* scales;
  const device S* biases;
  int depth;
  uint lane;

  METAL_FUNC void word(int column, int word, thread float* w) const {
    const long group = long(column) * (depth / GROUP) + word * WORD / GROUP;
    const float scale = float(scales[group]);
    const float bias = float(biases[group]);
    packed.word(long(column) * (depth / WORD) + word, w);
#pragma clang loop unroll(full)
    for (int k = 0; k < WORD; k++) {
      w[k] = metal::fma(w[k], scale, bias);
    }
  }

  METAL_FUNC void pairs(int column, int segment, int place, thread float2* w) const {
    const long group = long(column) * (depth / GROUP) + segment * SEGMENT / GROUP;
    const float scale = float(scales[group]);
    const float bias = float(biases[group]);
    uint codes[4];
    packed.pairs(long(column) * (depth / WORD) + segment * (SEGMENT / WORD), place, lane, codes);
#pragma clang loop unroll(full)
    for (int u = 0; u < 4; u++) {
      const half2 q = low_integers(codes[u]);
      w[u] = float2(metal::fma(float(q.x), scale, bias), metal::fma(float(q.y), scale, bias));
    }
  }
};

// mxfp4, mxfp8 and nvfp4: w = scale * value. Values are e2m1 at 4 bits and e4m3 at 8, whose exponent and mantissa lie
// as a half's do, off by a power of two; scales are powers of two, or e4m3 for groups of 16. Halves too small to be
// normal must count. The one code of e4m3 that is no number counts as 480: MLX writes none.
template <int BITS, int GROUP>
struct BlockFloat {
  Packed<BITS> packed;
  const device uchar* scales;
  int depth;
  uint lane;

  METAL_FUNC float scale(int column, int word) const {
    const uint code = scales[long(column) * (depth / GROUP) + word * WORD / GROUP];
    if (GROUP == 16) {
      return float(Packed<8>::floats(code).x);
    }
    return as_type<float>(code << 23);
  }

  METAL_FUNC void word(int column, int word, thread float* w) const {
    const float factor = scale(column, word);
    uint codes[4];
    Packed<BITS>::split(packed.raw(long(column) * (depth / WORD) + word), codes);
#pragma clang loop unroll(full)
    for (int k = 0; k < 4; k++) {
      const half2 values = Packed<BITS>::floats(codes[k]);
      w[k] = float(values.x) * factor;
      w[k + 4] = float(values.y) * factor;
    }
  }

  METAL_FUNC void pairs(int column, int segment, int place, thread float2* w) const {
    const int first = segment * (SEGMENT / WORD);
    uint codes[4];
    packed.pairs(long(column) * (depth / WORD) + first, place, lane, codes);
    float factor = scale(column, first);
#pragma clang loop unroll(full)
    for (int u = 0; u < 4; u++) {
      if (u > 0 && u * WORD % GROUP == 0) {
        factor = scale(column, first + u);
      }
      const half2 values = Packed<BITS>::floats(codes[u]);
      w[u] = float2(float(values.x) * factor, float(values.y) * factor);
    }
  }
};
