// Rotates keys on tensor cores and codes them (sketch.h), by one warp.
#pragma once

#include "../../sketch.h"
#include "../common/matrix_product.cuh"
#include "../common/reduce.cuh"

namespace entmaxkv::cuda {

/// Eight elements in a form that tensor cores multiply exactly: 16-bit elements, or a float as the sum of three bf16.
template <typename T>
struct Exact {
  using Element = std::conditional_t<std::is_same_v<T, float>, __nv_bfloat16, T>;
  static constexpr int kTerms = std::is_same_v<T, float> ? 3 : 1;
  static constexpr int kWords = sizeof(T) / 2;

  uint32_t terms[kTerms][4];

  __device__ explicit Exact(const uint4 (&words)[kWords]) {
    if constexpr (kTerms == 1) {
      memcpy(terms, words, sizeof(terms));
    } else {
      float left[8];
      memcpy(left, words, sizeof(left));
#pragma unroll
      for (auto& term : terms) {
        __nv_bfloat16 nearest[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          nearest[i] = __float2bfloat16_rn(left[i]);
          left[i] -= __bfloat162float(nearest[i]);
        }
        memcpy(term, nearest, sizeof(term));
      }
    }
  }
};

/// The address of a key (null: no key), and where its codes belong; page_head = page * kv_heads + kv_head.
template <typename T>
struct KeyPlace {
  const T* key = nullptr;
  int64_t page_head = 0;
  int slot = 0;
};

/// Rotates a warp's keys and codes them. Four lanes, j = 0 ... 3, work for a key, and a warp for kKeys keys. All lanes
/// call every function.
///
/// A Hadamard transform is a product of one factor for each bit of a dimension's index.
///   1. A tensor-core product of 16 rows of 16 elements with a 16 x 16 matrix applies four factors. Lane j holds the
///      dimensions whose bit 3 and top bit are j, in pieces of 8 successive dimensions. The product sums over j and
///      over bits 0 and 2: it applies the factors of bits 0, 2, 3 and the top bit.
///   2. Sums and differences of a lane's products apply the other factors.
/// The columns of the matrix may have any order. They are ordered so that lane j gets the coordinates whose bits 2 and
/// 3 are j, which form whole words of sketch::coordinate.
template <typename T, int kDims>
class KeyCoder {
 public:
  static constexpr int kParts = kDims <= 128 ? 1 : 2;  // matrix rows that a key takes
  static constexpr int kKeys = 16 / kParts;            // keys of a warp
  static constexpr int kOfLane = 2 / kParts;           // keys of a lane: lane / 4, and 8 + lane / 4 if there are two

  __device__ KeyCoder(int head_dim, bool vectors) : head_dim_(head_dim), vectors_(vectors) {
    signs_[0] = own_signs<0>();
    signs_[kParts - 1] = own_signs<kParts - 1>();
    constexpr uint32_t kOne = std::is_same_v<typename Exact<T>::Element, __half> ? 0x3c00 : 0x3f80;
    const int column = static_cast<int>(threadIdx.x % 32) / 4;
#pragma unroll
    for (int top = 0; top < 2; ++top) {
#pragma unroll
      for (int bit2 = 0; bit2 < 2; ++bit2) {
        uint32_t& word = matrix_[top][bit2] = 0;
        if (!kTopRotates && j() / 2 != top) continue;
#pragma unroll
        for (int bit0 = 0; bit0 < 2; ++bit0) {
          const int both =
              (bit0 & column) ^ (bit2 & column / 2) ^ (j() & column / 4) ^ (kTopRotates ? j() / 2 & top : 0);
          word |= (kOne | static_cast<uint32_t>(both & 1) << 15) << 16 * bit0;
        }
      }
    }
  }

  /// Codes the warp's keys and writes their codes and norms.
  __device__ void code(const Sketch& to, const KeyPlace<T> (&places)[kOfLane], int page_size) const {
    float x[kOfLane][kParts * kOwnOfRow];
    rotate(places, x);
    float norms[kOfLane];
    int scales[kOfLane];
#pragma unroll
    for (int n = 0; n < kOfLane; ++n) {
      float square = 0;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) square = fmaf(x[n][i], x[n][i], square);
      norms[n] = kRoot * sqrtf(over_key(square, [](float a, float b) { return a + b; }));
      scales[n] = sketch::scale_of(norms[n] * static_cast<float>(sketch::kSpread / root(kDims)), false);
    }
    sketch::Norms kept[kOfLane];
    uint32_t codes[kOfLane][kOwn / 4];  // four codes per word
#pragma unroll 1
    for (int attempt = 0; attempt < 2; ++attempt) {
      bool fit = true;
#pragma unroll
      for (int n = 0; n < kOfLane; ++n) {
        kept[n] = {scales[n], norms[n], code(x[n], scales[n], codes[n]), kDims};
        fit &= kept[n].fits();
      }
      if (attempt > 0 || __ballot_sync(kAllLanes, !fit) == 0) break;
#pragma unroll
      for (int n = 0; n < kOfLane; ++n) {
        float largest = 0;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) largest = larger(largest, fabsf(x[n][i]));
        largest = over_key(largest, [](float a, float b) { return larger(a, b); });
        if (!kept[n].fits()) scales[n] = sketch::scale_of(largest * (kRoot / 2), true);
      }
    }
#pragma unroll
    for (int n = 0; n < kOfLane; ++n) {
      if (places[n].key) store(to, places[n], page_size, kept[n], codes[n]);
    }
  }

 private:
  static constexpr int kRow = kDims / kParts <= 64 ? 64 : 128;  // dimensions of a matrix row
  static constexpr int kPieces = kRow / 32;                     // pieces of 8 dimensions that a lane has of a row
  static constexpr int kOwnOfRow = kRow / 4, kOwn = kDims / 4;  // coordinates that a lane gets of a row, of a key
  static constexpr bool kTopRotates = kDims != 192;

  static constexpr double root(int rotation) {
    return rotation == 64 ? 8 : rotation == 128 ? 11.313708498984761 : rotation == 192 ? 13.856406460551018 : 16;
  }

  static constexpr float kRoot = static_cast<float>(1 / root(sketch::rotation_of(kDims)));

  /// Returns this lane's index among the four of a key.
  static __device__ int j() { return threadIdx.x % 4; }

  /// Returns the index in the key of the first dimension of a piece of lane j.
  static __host__ __device__ constexpr int first_of(int j, int part, int piece) {
    return kRow * part + kRow / 2 * (j / 2) + 16 * piece + 8 * (j % 2);
  }

  /// Returns the signs of lane j's elements as bits: bit 4 piece + word for the first element of a 2-element word, and
  /// 16 bits higher for the second.
  static __host__ __device__ constexpr uint32_t signs_of(int j, int part) {
    uint32_t signs = 0;
    for (int i = 0; i < 8 * kPieces; ++i) {
      const bool minus = sketch::sign_of(first_of(j, part, i / 8) + i % 8) < 0;
      signs |= uint32_t{minus} << (4 * (i / 8) + i % 8 / 2 + 16 * (i % 2));
    }
    return signs;
  }

  /// Returns signs_of this lane.
  template <int kPart>
  static __device__ uint32_t own_signs() {
    constexpr uint32_t k0 = signs_of(0, kPart), k1 = signs_of(1, kPart), k2 = signs_of(2, kPart),
                       k3 = signs_of(3, kPart);
    return j() / 2 ? (j() % 2 ? k3 : k2) : (j() % 2 ? k1 : k0);
  }

  /// Loads this lane's pieces of the matrix rows; zeros where there is no key.
  template <bool kVectors>
  __device__ void load(const KeyPlace<T> (&places)[kOfLane], uint4 (&words)[2][kPieces][Exact<T>::kWords]) const {
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const T* key = places[w % kOfLane].key;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
        for (int i = 0; i < Exact<T>::kWords; ++i) {
          const int d = first_of(j(), w % kParts, piece) + i * static_cast<int>(16 / sizeof(T));
          words[w][piece][i] = key ? load_word<kVectors>(key, d, head_dim_) : uint4{};
        }
      }
    }
  }

  /// Sets x[n][i] to coordinate i % 4 + 4 j + i / 4 * 16 of the lane's nth key, times 1 / kRoot.
  __device__ void rotate(const KeyPlace<T> (&places)[kOfLane], float (&x)[kOfLane][kParts * kOwnOfRow]) const {
    uint4 words[2][kPieces][Exact<T>::kWords];
    if (vectors_) {
      load<true>(places, words);
    } else {
      load<false>(places, words);
    }
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      Exact<T> rows[2] = {Exact<T>(words[0][piece]), Exact<T>(words[1][piece])};
#pragma unroll
      for (int w = 0; w < 2; ++w) {
#pragma unroll
        for (auto& term : rows[w].terms) {
#pragma unroll
          for (int i = 0; i < 4; ++i) term[i] ^= signs_[w % kParts] << (15 - 4 * piece - i) & 0x80008000u;
        }
      }
#pragma unroll
      for (int bit1 = 0; bit1 < 2; ++bit1) {
#pragma unroll
        for (int top = 0; top < 2; ++top) {
          float products[4] = {};
#pragma unroll
          for (int term = Exact<T>::kTerms - 1; term >= 0;
               --term) {  // small terms first, because tensor cores truncate sums
            const auto& a = rows[0].terms[term];
            const auto& b = rows[1].terms[term];
            multiply_fragments<typename Exact<T>::Element>(products, {a[bit1], b[bit1], a[2 + bit1], b[2 + bit1]},
                                                           matrix_[top][0], matrix_[top][1], products);
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int at = i % 2 + 2 * bit1 + 4 * piece + 4 * kPieces * top;
            x[i / 2 % kOfLane][i / 2 / kOfLane * kOwnOfRow + at] = products[i];
          }
        }
      }
    }
#pragma unroll
    for (int step = 2; step < kOwn; step *= 2) {
      if (step == 4 * kPieces || (step == kOwnOfRow && !kTopRotates)) continue;
#pragma unroll
      for (auto& coordinates : x) {
#pragma unroll
        for (int i = 0; i < kParts * kOwnOfRow; ++i) {
          if (i & step) continue;
          const float sum = coordinates[i] + coordinates[i | step];
          coordinates[i | step] = coordinates[i] - coordinates[i | step];
          coordinates[i] = sum;
        }
      }
    }
  }

  /// Sets this lane's codes of a key with a given scale. Returns the squared distances, summed over the whole key.
  static __device__ sketch::Distances code(const float (&x)[kParts * kOwnOfRow], int scale,
                                           uint32_t (&codes)[kOwn / 4]) {
    const float per_place = 4 * kRoot * sketch::steps_of(scale);
    sketch::Distances squares;
#pragma unroll
    for (int i = 0; i < kOwn; i += 4) {
      uint32_t bits[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float place = fmaf(x[i + n], per_place, sketch::kMiddle), rounded = sketch::rounded(place);
        squares.add(place, rounded);
        bits[n] = sketch::bits_of(rounded);
      }
      codes[i / 4] =
          __byte_perm(__byte_perm(bits[0], bits[1], 0x40), __byte_perm(bits[2], bits[3], 0x40), 0x5410) & 0x0f0f0f0fu;
    }
    return over_key(squares, [](const sketch::Distances& a, const sketch::Distances& b) { return a + b; });
  }

  /// Writes this lane's codes of a key, and norms of the key. Codes of a key without a sketch are 0.
  static __device__ void store(const Sketch& to, const KeyPlace<T>& place, int page_size, const sketch::Norms& norms,
                               const uint32_t (&codes)[kOwn / 4]) {
    constexpr int kRowBytes = kDims / 4;
#pragma unroll
    for (int plane = 0; plane < 2; ++plane) {
      uint8_t* row = to.plane(place.page_head, plane, page_size, kRowBytes) + place.slot * kRowBytes + 4 * j();
#pragma unroll
      for (int block = 0; block < kDims / sketch::kBlock; ++block) {
        uint32_t word = 0;
#pragma unroll
        for (int nth = 0; nth < 4; ++nth) {
          word |= (codes[4 * block + nth] >> (plane ? 0 : 2) & 0x03030303u) << 2 * nth;
        }
        *reinterpret_cast<uint32_t*>(row + 16 * block) = norms.fits() ? word : 0;
      }
    }
    if (j() < 3) {
      const int kept = j() == 0 ? norms.scale : j() == 1 ? norms.coarse : norms.fine;
      to.norm(place.page_head, j(), page_size)[place.slot] =
          static_cast<uint8_t>(norms.fits() ? kept : sketch::kUnknown);
    }
  }

  /// Combines the values of the four lanes of a key. All four get the result.
  template <typename Value, typename Combine>
  static __device__ Value over_key(Value value, Combine combine) {
    value = combine(value, shuffle_xor(value, 1));
    return combine(value, shuffle_xor(value, 2));
  }

  int head_dim_;
  bool vectors_;
  uint32_t signs_[kParts];  // as signs_of returns them
  uint32_t matrix_[2][2];   // [top bit of the coordinate][bit 2 of the dimension]: two elements of the matrix
};

}  // namespace entmaxkv::cuda
