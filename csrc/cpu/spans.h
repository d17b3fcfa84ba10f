// How the ops on tokens divide their work, so that several threads can share a long row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../ops.h"

namespace entmaxkv::cpu {

constexpr int kSpanTokens = 2048;  // the most tokens of a span

/// The units first ... end - 1 of one row and KV head. A unit is a token, or an entry of a list of pages or tokens.
struct Span {
  int64_t row;
  int kv_head;
  int first, end;
};

/// The spans of every (row, KV head), one after the other.
class Spans {
 public:
  /// Cuts the units of each (row, KV head) into spans of at most span_units. count_of(row * kv_heads + kv_head) returns
  /// how many units there are.
  template <typename CountOf>
  Spans(const Sizes& sizes, int span_units, CountOf count_of) : first_{0} {
    for (int64_t row_head = 0; row_head < int64_t{sizes.batch} * sizes.kv_heads; ++row_head) {
      const int64_t units = count_of(row_head);
      for (int64_t first = 0; first < units; first += span_units) {
        const int64_t end = std::min(units, first + span_units);
        spans_.push_back({row_head / sizes.kv_heads, static_cast<int>(row_head % sizes.kv_heads),
                          static_cast<int>(first), static_cast<int>(end)});
      }
      first_.push_back(count());
    }
  }

  int64_t count() const { return static_cast<int64_t>(spans_.size()); }
  const Span& operator[](int64_t span) const { return spans_[span]; }

  /// Calls body(span) with the index of each span of a (row, KV head), in order.
  template <typename Body>
  void for_each_of(int64_t row_head, Body body) const {
    for (int64_t span = first_[row_head]; span < first_[row_head + 1]; ++span) body(span);
  }

 private:
  std::vector<Span> spans_;
  std::vector<int64_t> first_;  // the first span of each (row, KV head), and the number of all spans
};

}  // namespace entmaxkv::cpu
