// The body of rows_*.cpp, compiled once per vector width: kLanes floats, in namespace ENTMAXKV_ISA. Before it stand
// kLanes, Vector, and load() of float16, for which not every width has an instruction.
//
// dot: a tile of kLanes / H rows times H heads has one accumulator per (head, row) pair. Each stretch of a row is
// loaded once for all H heads. At the end the kLanes accumulators are folded pairwise into one vector whose lane
// i is the sum of accumulator i: log2(kLanes) rounds of "first halves + second halves".

namespace entmaxkv::cpu::ENTMAXKV_ISA {

typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

template <typename V>
inline V load_as(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

inline Vector load(const float* from) { return load_as<Vector>(from); }

inline Words load_words(const uint16_t* from) { return __builtin_convertvector(load_as<Halves>(from), Words); }

inline Vector load(const BFloat16* from) { return (Vector)(load_words(&from->bits) << 16); }

inline void store(float* to, Vector v) { std::memcpy(to, &v, sizeof(v)); }

// Pieces of kWidth lanes, a's before b's: the sum of each piece's first and second half.
template <int kWidth, int... kLane>
inline Vector fold(Vector a, Vector b, std::integer_sequence<int, kLane...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, (kLane / (kWidth / 2) * kWidth + kLane % (kWidth / 2))...) +
         __builtin_shufflevector(a, b, (kLane / (kWidth / 2) * kWidth + kLane % (kWidth / 2) + kWidth / 2)...);
#else
  constexpr Words kFirst = {(kLane / (kWidth / 2) * kWidth + kLane % (kWidth / 2))...};
  return __builtin_shuffle(a, b, kFirst) + __builtin_shuffle(a, b, kFirst + kWidth / 2);
#endif
}

template <int kCount>
inline Vector fold_all(const Vector* v) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    return fold<2 * kLanes / kCount>(fold_all<kCount / 2>(v), fold_all<kCount / 2>(v + kCount / 2),
                                     std::make_integer_sequence<int, kLanes>());
  }
}

constexpr int kAhead = 16;  // rows; what hardware prefetchers miss at the ends of pages

// One tile: rows[0 ... kLanes / kHeads), of which `count` exist, `left` counting on to the end of the list.
template <int kHeads, bool kSquares, typename T>
inline void dot_tile(const T* const* rows, int left, const float* q, int head_dim, float* out, int out_stride) {
  constexpr int kRows = kLanes / kHeads;
  const int count = left < kRows ? left : kRows;
  const T* row[kRows];
  const T* ahead[kRows];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    row[i] = rows[i < left ? i : left - 1];
    ahead[i] = rows[i + kAhead < left ? i + kAhead : left - 1];
  }
  Vector sums[kLanes] = {};
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    Vector query[kHeads];
#pragma GCC unroll 16
    for (int h = 0; h < kHeads; ++h) query[h] = load(q + h * head_dim + d);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      __builtin_prefetch(ahead[i] + d);
      Vector key = load(row[i] + d);
      if (kSquares) key *= key;
#pragma GCC unroll 16
      for (int h = 0; h < kHeads; ++h) sums[h * kRows + i] += query[h] * key;
    }
  }
  float total[kLanes];
  store(total, fold_all<kLanes>(sums));
  for (; d < head_dim; ++d) {
    for (int i = 0; i < kRows; ++i) {
      float key = to_float(row[i][d]);
      if (kSquares) key *= key;
      for (int h = 0; h < kHeads; ++h) total[h * kRows + i] += q[h * head_dim + d] * key;
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int i = 0; i < count; ++i) out[h * out_stride + i] = total[h * kRows + i];
  }
}

// As many heads at a time as there are lanes for, at most 8; returns how many.
template <int kHeads, bool kSquares, typename T>
int dot_heads(const T* const* rows, int count, int left, const float* q, int heads, int head_dim, float* out,
              int out_stride) {
  if constexpr (kHeads > 1) {
    if (heads < kHeads || kHeads > kLanes) {
      return dot_heads<kHeads / 2, kSquares>(rows, count, left, q, heads, head_dim, out, out_stride);
    }
  }
  if constexpr (kHeads <= kLanes) {
    for (int i = 0; i < count; i += kLanes / kHeads) {
      dot_tile<kHeads, kSquares>(rows + i, left - i, q, head_dim, out + i, out_stride);
    }
  }
  return kHeads;
}

template <typename T, bool kSquares>
void dot(const T* const* rows, int count, const float* q, int heads, int head_dim, float* out, int out_stride) {
  constexpr int kBlock = 64;  // rows that stay in the first-level cache from one set of heads to the next
  for (int first = 0; first < count; first += kBlock) {
    const int left = count - first;
    for (int h = 0; h < heads;) {
      h += dot_heads<8, kSquares>(rows + first, left < kBlock ? left : kBlock, left, q + h * head_dim, heads - h,
                                  head_dim, out + h * out_stride + first, out_stride);
    }
  }
}

template <int kHeads, typename T>
void accumulate_heads(const T* const* rows, int count, const float* weights, int weights_stride, int head_dim,
                      float* out) {
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    Vector sums[kHeads] = {};  // short sums added to long ones lose less than one long sum
    for (int i = 0; i < count; ++i) {
      const Vector value = load(rows[i] + d);
      for (int h = 0; h < kHeads; ++h) sums[h] += weights[i * weights_stride + h] * value;
    }
    for (int h = 0; h < kHeads; ++h) store(out + h * head_dim + d, load(out + h * head_dim + d) + sums[h]);
  }
  for (; d < head_dim; ++d) {
    for (int i = 0; i < count; ++i) {
      for (int h = 0; h < kHeads; ++h) {
        out[h * head_dim + d] += weights[i * weights_stride + h] * to_float(rows[i][d]);
      }
    }
  }
}

template <typename T>
void accumulate(const T* const* rows, int count, const float* weights, int heads, int head_dim, float* out) {
  int h = 0;
  for (; h + 4 <= heads; h += 4) {
    accumulate_heads<4>(rows, count, weights + h, heads, head_dim, out + h * head_dim);
  }
  for (; h < heads; ++h) accumulate_heads<1>(rows, count, weights + h, heads, head_dim, out + h * head_dim);
}

// The mean is corrected by the mean distance from it, and the spread for that correction: what the first sum has lost
// to rounding comes back.
template <typename T>
void summarise(const T* const* rows, int count, int head_dim, float* min, float* max, float* mean, float* std) {
  const float share = 1.0f / static_cast<float>(count);
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    Vector low = Vector{} + HUGE_VALF, high = -low, sum = {}, drift = {}, squares = {}, odd_squares = {};
    for (int i = 0; i < count; ++i) {
      const Vector key = load(rows[i] + d);
      low = (key < low) | (key != key) ? key : low;  // NaN stays
      high = (key > high) | (key != key) ? key : high;
      sum += key;
    }
    const Vector centre = sum * share;
    for (int i = 0; i < count; ++i) {
      const Vector distance = load(rows[i] + d) - centre;
      drift += distance;
      (i % 2 ? odd_squares : squares) += distance * distance;  // two short sums round less than one long one
    }
    drift *= share;
    const Vector variance = (squares + odd_squares) * share - drift * drift;
    store(min + d, low);
    store(max + d, high);
    store(mean + d, centre + drift);
    for (int lane = 0; lane < kLanes; ++lane) std[d + lane] = std::sqrt(variance[lane] > 0 ? variance[lane] : 0);
  }
  for (; d < head_dim; ++d) {
    float low = HUGE_VALF, high = -low, sum = 0, drift = 0, squares = 0, odd_squares = 0;
    for (int i = 0; i < count; ++i) {
      const float key = to_float(rows[i][d]);
      low = key < low || key != key ? key : low;
      high = key > high || key != key ? key : high;
      sum += key;
    }
    const float centre = sum * share;
    for (int i = 0; i < count; ++i) {
      const float distance = to_float(rows[i][d]) - centre;
      drift += distance;
      (i % 2 ? odd_squares : squares) += distance * distance;
    }
    drift *= share;
    const float variance = (squares + odd_squares) * share - drift * drift;
    min[d] = low;
    max[d] = high;
    mean[d] = centre + drift;
    std[d] = std::sqrt(variance > 0 ? variance : 0);
  }
}

typedef uint16_t Codes __attribute__((vector_size(16)));  // two bytes each

// A plain loop in a function of its own: of that, compilers make 16-bit multiply-and-add instructions.
template <int kDims>
int dot_numbers(const int16_t* numbers, const int16_t* codes) {
  int sum = 0;
  for (int d = 0; d < kDims; ++d) sum += numbers[d] * codes[d];
  return sum;
}

// Some keys at a time: what has just been stored cannot be loaded at once in wider vectors.
template <int kDims>
void dot_codes_of(const uint8_t* high, const uint8_t* low, int count, const int16_t* numbers, int heads, int* out,
                  int out_stride) {
  constexpr int kRowBytes = kDims / 4, kAtOnce = 8;
  alignas(64) uint8_t bytes[kAtOnce][kDims];
  alignas(64) int16_t codes[kAtOnce][kDims];
  for (int first = 0; first < count; first += kAtOnce) {
    const int some = count - first < kAtOnce ? count - first : kAtOnce;
    for (int i = 0; i < some; ++i) {
      for (int byte = 0; byte < kRowBytes; byte += 16) {
        const int64_t at = int64_t{first + i} * kRowBytes + byte;
        const Codes highs = load_as<Codes>(high + at), lows = low ? load_as<Codes>(low + at) : Codes{};
#pragma GCC unroll 4
        for (int nth = 0; nth < 4; ++nth) {
          Codes code = highs >> 2 * nth & 0x0303;
          if (low) code = code << 2 | (lows >> 2 * nth & 0x0303);
          std::memcpy(bytes[i] + sketch::coordinate(byte, nth), &code, sizeof(code));
        }
      }
    }
    for (int i = 0; i < some; ++i) {
      for (int d = 0; d < kDims; ++d) codes[i][d] = bytes[i][d];
    }
    for (int h = 0; h < heads; ++h) {
      for (int i = 0; i < some; ++i) {
        out[h * out_stride + first + i] = dot_numbers<kDims>(numbers + h * kDims, codes[i]);
      }
    }
  }
}

inline void dot_codes(const uint8_t* high, const uint8_t* low, int count, const int16_t* numbers, int heads, int dims,
                      int* out, int out_stride) {
  sketch::dispatch_blocks(dims, [&](auto blocks) {
    dot_codes_of<blocks * sketch::kBlock>(high, low, count, numbers, heads, out, out_stride);
  });
}

template <typename T>
constexpr RowKernels<T> kRowKernels = {dot<T, false>, dot<T, true>, accumulate<T>, summarise<T>, dot_codes};

const RowKernels<float>& kernels(float) { return kRowKernels<float>; }
const RowKernels<Float16>& kernels(Float16) { return kRowKernels<Float16>; }
const RowKernels<BFloat16>& kernels(BFloat16) { return kRowKernels<BFloat16>; }

}  // namespace entmaxkv::cpu::ENTMAXKV_ISA
