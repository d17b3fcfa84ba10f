// What the ops that write or read key sketches share.
#pragma once

#include <cstdint>

#include "../ops.h"
#include "../sketch.h"

namespace entmaxkv::cpu {

/// Rotates a key or query in place: x = H S x (sketch.h), by the fast Hadamard transform.
inline void rotate(float* x, int dims) {
  for (int d = 0; d < dims; ++d) x[d] *= sketch::sign_of(d);
  const int size = sketch::rotation_of(dims);
  for (int half = 1; half < size; half *= 2) {
    for (int first = 0; first < dims; first += 2 * half) {
      for (int d = first; d < first + half; ++d) {
        const float a = x[d], b = x[d + half];
        x[d] = a + b;
        x[d + half] = a - b;
      }
    }
  }
  const float unit = 1 / std::sqrt(static_cast<float>(size));
  for (int d = 0; d < dims; ++d) x[d] *= unit;
}

/// Computes the sketch of the key in a slot of a physical page, and writes it.
template <typename T>
void sketch_key(const Sizes& sizes, const Rows& k_pages, const Sketch& sketch, int64_t page, int kv_head, int slot);

}  // namespace entmaxkv::cpu
