// Dense weights, for the bodies in skinny.metal.
template <typename W>
struct Dense {
  const device W* table;
  int depth;

  METAL_FUNC void word(int column, int word, thread float* w) const {
    load_word(table + long(column) * depth + word * WORD, w);
  }

  METAL_FUNC void pairs(int column, int segment, int place, thread float2* w) const {
    const device vec<W, 2>* from = (const device vec<W, 2>*)(table + long(column) * depth + segment * SEGMENT);
#pragma clang loop unroll(full)
    for (int u = 0; u < 4; u++) {
      w[u] = float2(from[u * (WORD / 2) + place]);
    }
  }
};
