// The row kernels. Each rows_*.cpp includes this file, and compiles it for one vector width in namespace ENTMAXKV_ISA.
// Before that it defines kLanes, the floats of a vector; Vector; and load() of float16, for which some widths have an
// instruction.
//
// How dot works: a tile of kLanes / H rows times H heads has one accumulator, a vector, per (head, row) pair. Each
// piece of a row is loaded once for all H heads. At the end, the kLanes accumulators are folded pairwise into one
// vector whose lane i is the sum of accumulator i. That takes log2(kLanes) rounds, each of which adds first halves to
// second halves.

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

// Divides a and b into pieces of kWidth lanes. Returns each piece's first half plus its second half: a's, then b's.
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

constexpr int kAhead = 16;  // rows to prefetch ahead: hardware prefetchers do not go beyond the end of a page

// One tile: rows[0 ... kLanes / kHeads). `left` counts the rows from rows[0] to the end of the list: the tile has fewer
// rows at the end, and rows behind the tile are prefetched.
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

// Dot products of the first heads: of kHeads heads, or half as many until there are enough heads and lanes. Returns how
// many heads it took.
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

// Rounding errs in the first sum, and so in the mean. The mean distance from that mean, `drift`, corrects it, and
// corrects the variance for having been taken around the wrong mean.
template <typename T>
void summarise(const T* const* rows, int count, int head_dim, float* min, float* max, float* mean, float* std) {
  const float per_row = 1.0f / static_cast<float>(count);
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    Vector low = Vector{} + HUGE_VALF, high = -low, sum = {}, drift = {}, squares = {}, odd_squares = {};
    for (int i = 0; i < count; ++i) {
      const Vector key = load(rows[i] + d);
      low = (key < low) | (key != key) ? key : low;  // NaN remains: no key is less than it
      high = (key > high) | (key != key) ? key : high;
      sum += key;
    }
    const Vector centre = sum * per_row;
    for (int i = 0; i < count; ++i) {
      const Vector distance = load(rows[i] + d) - centre;
      drift += distance;
      (i % 2 ? odd_squares : squares) += distance * distance;  // two short sums round less than one long one
    }
    drift *= per_row;
    const Vector variance = (squares + odd_squares) * per_row - drift * drift;
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
    const float centre = sum * per_row;
    for (int i = 0; i < count; ++i) {
      const float distance = to_float(rows[i][d]) - centre;
      drift += distance;
      (i % 2 ? odd_squares : squares) += distance * distance;
    }
    drift *= per_row;
    const float variance = (squares + odd_squares) * per_row - drift * drift;
    min[d] = low;
    max[d] = high;
    mean[d] = centre + drift;
    std[d] = std::sqrt(variance > 0 ? variance : 0);
  }
}

typedef uint16_t Codes __attribute__((vector_size(16)));  // 16 bytes of codes, in pairs

// A plain loop in a function of its own, so that compilers use 16-bit multiply-and-add instructions.
template <int kDims>
int dot_numbers(const int16_t* numbers, const int16_t* codes) {
  int sum = 0;
  for (int d = 0; d < kDims; ++d) sum += numbers[d] * codes[d];
  return sum;
}

// Unpacks the codes of kAtOnce keys before it multiplies them: a load in wider vectors than those of a recent store
// waits for that store.
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
