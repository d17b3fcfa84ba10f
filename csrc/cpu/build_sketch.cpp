// build_sketch on the CPU: one task per (row, KV head, page in use). For each key (sketch.h):
//   1. Rotate it.
//   2. Choose its step by its root mean square. If the norms then exceed a byte, choose the step by its largest
//      coordinate. If they still do, the key has no sketch: all three bytes are kUnknown.
//   3. Write its codes, in two planes.
#include <algorithm>

#include "../dtype.h"
#include "kernels.h"
#include "pages.h"
#include "sketches.h"

namespace entmaxkv::cpu {

namespace {

constexpr int kLanes = 16;  // partial sums, so that the compiler can use vector instructions

/// The norms of a rotated key with the step of `scale`. norm = ||x||.
sketch::Norms norms_of(const float* x, int dims, float norm, int scale) {
  const float per_place = 4 * sketch::steps_of(scale);
  sketch::Distances squares[kLanes];
  for (int d = 0; d < dims; ++d) {
    const float place = x[d] * per_place + sketch::kMiddle;
    squares[d % kLanes].add(place, sketch::rounded(place));
  }
  for (int lane = 1; lane < kLanes; ++lane) squares[0] = squares[0] + squares[lane];
  return {scale, norm, squares[0], dims};
}

}  // namespace

template <typename T>
void sketch_key(const Sizes& sizes, const Rows& k_pages, const Sketch& sketch, int64_t page, int kv_head, int slot) {
  const int dims = sketch::dims_of(sizes.head_dim);
  const int row_bytes = sketch::row_bytes(sizes.head_dim);
  const T* key = k_pages.at<T>(page, kv_head, slot);
  float x[sketch::kMaxDims] = {};
  for (int d = 0; d < sizes.head_dim; ++d) x[d] = to_float(key[d]);
  rotate(x, dims);

  float squares[kLanes] = {}, largest[kLanes] = {};
  for (int d = 0; d < dims; ++d) {
    squares[d % kLanes] += x[d] * x[d];
    largest[d % kLanes] = std::max(largest[d % kLanes], std::fabs(x[d]));
  }
  for (int lane = 1; lane < kLanes; ++lane) squares[0] += squares[lane];
  const float norm = std::sqrt(squares[0]);
  const float mean = norm / std::sqrt(static_cast<float>(dims));
  sketch::Norms norms = norms_of(x, dims, norm, sketch::scale_of(sketch::kSpread * mean, false));
  if (!norms.fits()) {
    const float most = *std::max_element(largest, largest + kLanes);
    norms = norms_of(x, dims, norm, sketch::scale_of(most / 2, true));
  }
  const bool fits = norms.fits();

  const int64_t page_head = page * sizes.kv_heads + kv_head;
  const int kept[3] = {norms.scale, norms.coarse, norms.fine};
  for (int which = 0; which < 3; ++which) {
    sketch.norm(page_head, which, sizes.page_size)[slot] = static_cast<uint8_t>(fits ? kept[which] : sketch::kUnknown);
  }
  uint8_t* planes[2];
  for (int plane = 0; plane < 2; ++plane) {
    planes[plane] = sketch.plane(page_head, plane, sizes.page_size, row_bytes) + slot * row_bytes;
  }
  const float per_place = 4 * sketch::steps_of(norms.scale);
  for (int byte = 0; byte < row_bytes; ++byte) {
    uint32_t high = 0, low = 0;
    for (int nth = 0; fits && nth < 4; ++nth) {
      const float place = x[sketch::coordinate(byte, nth)] * per_place + sketch::kMiddle;
      const uint32_t code = sketch::bits_of(sketch::rounded(place)) & 15;
      high |= code >> 2 << 2 * nth;
      low |= (code & 3) << 2 * nth;
    }
    planes[0][byte] = static_cast<uint8_t>(high);
    planes[1][byte] = static_cast<uint8_t>(low);
  }
}

template void sketch_key<float>(const Sizes&, const Rows&, const Sketch&, int64_t, int, int);
template void sketch_key<Float16>(const Sizes&, const Rows&, const Sketch&, int64_t, int, int);
template void sketch_key<BFloat16>(const Sizes&, const Rows&, const Sketch&, int64_t, int, int);

void build_sketch(const BuildSketch& op) {
  dispatch(op.dtype, [&](auto element) {
    for_each_page(op, [&](int64_t page, int kv_head, int tokens) {
      for (int slot = 0; slot < tokens; ++slot) {
        sketch_key<decltype(element)>(op, op.k_pages, op.sketch, page, kv_head, slot);
      }
    });
  });
}

}  // namespace entmaxkv::cpu
