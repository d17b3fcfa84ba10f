// select_sketch on the CPU. The tokens of a row are cut into spans.
//   1. code:   per (row, query head) the query's numbers (sketch.h)
//   2. coarse: per (row, KV head, span) an upper bound of every score from plane 0, and the tokens with the highest
//   ones
//   3. floor:  per (row, query head) the exact scores of the highest of all, and their threshold, rounded down
//   4. fine:   per (row, KV head, span) the candidates: tokens with all bounds above the floor, for some head
//   5. choose: per (row, KV head) the candidates that there is room for, and a bound of the weight of the others
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../entmax.h"
#include "kernels.h"
#include "pages.h"
#include "sketches.h"

namespace entmaxkv::cpu {

namespace {

constexpr int kSpan = 2048;  // tokens
constexpr float kNothing = -std::numeric_limits<float>::infinity();

/// A query head of a row.
struct Query {
  std::vector<float> q;
  sketch::QueryCode code;
  double norm = 0;     // of scale q
  bool known = false;  // the code stands for q
  float floor = kNothing;
};

/// A token with its bound for one head.
struct Bounded {
  float upper;
  int token;

  /// Before another.
  bool operator<(const Bounded& other) const {
    return upper > other.upper || (upper == other.upper && token < other.token);
  }
};

/// Leaves the highest sketch::kExact of them, in order.
void leave_highest(std::vector<Bounded>& tokens) {
  const auto count = std::min(tokens.size(), size_t{sketch::kExact});
  std::partial_sort(tokens.begin(), tokens.begin() + static_cast<int64_t>(count), tokens.end());
  tokens.resize(count);
}

struct Candidate {
  int32_t token;
  int merit;
};

struct Span {
  int64_t row;
  int kv_head;
  int first, end;  // tokens
};

template <typename T>
class Selector {
 public:
  explicit Selector(const SelectSketch& op)
      : op_(op),
        group_(op.group),
        dims_(sketch::dims_of(op.head_dim)),
        row_bytes_(sketch::row_bytes(op.head_dim)),
        queries_(int64_t{op.batch} * op.q_heads) {
    int64_t tokens = 0;
    first_span_.push_back(0);
    for (int64_t row = 0; row < op.batch; ++row) {
      const int seq_len = op.seq_lens[row];
      for (int kv_head = 0; kv_head < op.kv_heads; ++kv_head) {
        for (int64_t first = 0; first < seq_len; first += kSpan) {
          const auto end = static_cast<int>(std::min<int64_t>(seq_len, first + kSpan));
          spans_.push_back({row, kv_head, static_cast<int>(first), end});
        }
        first_span_.push_back(static_cast<int64_t>(spans_.size()));
      }
      first_upper_.push_back(tokens);
      tokens += int64_t{op.q_heads} * seq_len;
    }
    numbers_.resize(queries_.size() * dims_);
    uppers_.resize(tokens);
    highest_.resize(spans_.size() * group_);
    candidates_.resize(spans_.size());
  }

  void run() {
    parallel_for(static_cast<int64_t>(queries_.size()), [&](int64_t head) { code(head); });
    parallel_for(static_cast<int64_t>(spans_.size()), [&](int64_t span) { coarse(span); });
    parallel_for(static_cast<int64_t>(queries_.size()), [&](int64_t head) { floor(head); });
    parallel_for(static_cast<int64_t>(spans_.size()), [&](int64_t span) { fine(span); });
    parallel_for(int64_t{op_.batch} * op_.kv_heads, [&](int64_t row_head) { choose(row_head); });
  }

 private:
  /// The group's.
  Query* queries(const Span& span) { return queries_.data() + span.row * op_.q_heads + span.kv_head * group_; }

  const int16_t* numbers(const Span& span) const {
    return numbers_.data() + (span.row * op_.q_heads + span.kv_head * group_) * dims_;
  }

  float* uppers(const Span& span, int h) {
    const int64_t head = span.kv_head * group_ + h;
    return uppers_.data() + first_upper_[span.row] + head * op_.seq_lens[span.row];
  }

  float bias(const Span& span, int h, int token) const {
    const float slope = op_.scoring.slope(span.kv_head * group_ + h);
    return sketch::upward(slope) * static_cast<float>(token - (op_.seq_lens[span.row] - 1));
  }

  void code(int64_t head_index) {
    const T* from = op_.q.template at<T>(head_index / op_.q_heads, head_index % op_.q_heads);
    Query& query = queries_[head_index];
    query.q.resize(op_.head_dim);
    int16_t* numbers = numbers_.data() + head_index * dims_;
    float x[sketch::kMaxDims] = {};
    bool known = true;
    for (int d = 0; d < op_.head_dim; ++d) {
      query.q[d] = to_float(from[d]);
      x[d] = op_.scoring.scale * query.q[d];
      known &= std::fabs(query.q[d]) <= sketch::kMostQuery && std::fabs(x[d]) <= sketch::kMostQuery;
    }
    query.known = known;
    if (!known) return;
    rotate(x, dims_);
    float largest = 0;
    for (int d = 0; d < dims_; ++d) largest = std::max(largest, std::fabs(x[d]));
    const float unit = sketch::unit_of(largest);
    int sum = 0;
    double squares = 0, lost = 0;
    for (int d = 0; d < dims_; ++d) {
      constexpr float kMost = sketch::QueryCode::kMost;
      const float number = unit > 0 ? std::clamp(std::rint(x[d] / unit), -kMost, kMost) : 0;
      numbers[d] = static_cast<int16_t>(number);
      sum += numbers[d];
      const double left = x[d] - double{unit} * number;
      squares += double{x[d]} * x[d];
      lost += left * left;
    }
    query.norm = std::sqrt(squares);
    query.code = {unit, sum, static_cast<float>(query.norm), static_cast<float>(std::sqrt(lost)), dims_, op_.certain};
  }

  /// Calls body(token, page * kv_heads + kv_head, slot) for first ... end - 1.
  template <typename Body>
  void for_each_token(const Span& span, int first, int end, Body body) const {
    const int32_t* table = op_.page_table.row(span.row);
    for (int token = first; token < end;) {
      const int page = token / op_.page_size;
      const int stop = std::min<int64_t>(end, (int64_t{page} + 1) * op_.page_size);
      const int64_t page_head = int64_t{table[page]} * op_.kv_heads + span.kv_head;
      for (int slot = token % op_.page_size; token < stop; ++token, ++slot) body(token, page_head, slot);
    }
  }

  const uint8_t* codes(int64_t page_head, int plane, int slot) const {
    return op_.sketch.plane(page_head, plane, op_.page_size, row_bytes_) + slot * row_bytes_;
  }

  float norm(int64_t page_head, int which, int slot) const {
    return op_.sketch.norm(page_head, which, op_.page_size)[slot];
  }

  float distance(int64_t page_head, int which, int slot) const {
    return sketch::distance_of(norm(page_head, 0, slot), norm(page_head, which, slot));
  }

  void coarse(int64_t index) {
    const Span& span = spans_[index];
    const Query* query = queries(span);
    std::vector<int> sums(group_);
    for_each_token(span, span.first, span.end, [&](int token, int64_t page_head, int slot) {
      kernels_.dot_codes(codes(page_head, 0, slot), nullptr, numbers(span), group_, dims_, sums.data());
      const float step = sketch::step_of(norm(page_head, 0, slot)), its_distance = distance(page_head, 1, slot);
      for (int h = 0; h < group_; ++h) {
        uppers(span, h)[token] = query[h].code.coarse_bound(sums[h], step, its_distance) + bias(span, h, token);
      }
    });
    for (int h = 0; h < group_; ++h) {
      if (!query[h].known) continue;
      std::vector<Bounded>& highest = highest_[index * group_ + h];
      const float* upper = uppers(span, h);
      for (int token = span.first; token < span.end; ++token) {
        if (upper[token] > kNothing) highest.push_back({upper[token], token});
      }
      leave_highest(highest);
    }
  }

  void floor(int64_t head_index) {
    const int64_t row = head_index / op_.q_heads;
    const int head = static_cast<int>(head_index % op_.q_heads), kv_head = head / group_;
    const int64_t row_head = row * op_.kv_heads + kv_head;
    const Entmax<double> entmax(op_.alpha.of(head));
    Query& query = queries_[head_index];
    if (!query.known || entmax.is_softmax()) return;
    std::vector<Bounded> highest;
    for (int64_t span = first_span_[row_head]; span < first_span_[row_head + 1]; ++span) {
      const std::vector<Bounded>& its = highest_[span * group_ + head % group_];
      highest.insert(highest.end(), its.begin(), its.end());
    }
    leave_highest(highest);
    const auto count = static_cast<int>(highest.size());

    const T* keys[sketch::kExact];
    float scores[sketch::kExact];
    for (int i = 0; i < count; ++i) {
      const int token = highest[i].token;
      const int32_t page = op_.page_table.row(row)[token / op_.page_size];
      keys[i] = op_.k_pages.template at<T>(page, kv_head, token % op_.page_size);
    }
    kernels_.dot(keys, count, query.q.data(), 1, op_.head_dim, scores, sketch::kExact);
    double best = kNothing;
    for (int i = 0; i < count; ++i) {
      const int distance = highest[i].token - (op_.seq_lens[row] - 1);
      scores[i] = op_.scoring.scale * scores[i] + op_.scoring.slope(head) * static_cast<float>(distance);
      if (!(scores[i] < -kNothing)) return;  // NaN or infinite
      best = std::max<double>(best, scores[i]);
    }
    if (best == kNothing) return;
    std::vector<double> x;  // of those that can have weight: no other key's rounding moves their threshold
    double most_squares = 0;
    for (int i = 0; i < count; ++i) {
      if (!(scores[i] > best - entmax.beta)) continue;
      x.push_back(entmax.gap * (scores[i] - best));
      double squares = 0;
      for (int d = 0; d < op_.head_dim; ++d) squares += double{to_float(keys[i][d])} * to_float(keys[i][d]);
      most_squares = std::max(most_squares, squares);
    }
    double threshold = -1;
    constexpr int kMostSteps = 64;  // a guard: convergence is quadratic
    for (int step = 0; step < kMostSteps; ++step) {
      Excess<double> excess;
      for (double value : x) {
        if (value > threshold) excess.add(value - threshold, entmax.beta);
      }
      const double move = entmax.step(excess);
      if (!(move > 1e-12)) break;
      threshold += move;
    }
    const double exact = threshold / entmax.gap + best;
    const double most_bias = std::fabs(double{op_.scoring.slope(head)}) * (op_.seq_lens[row] - 1);
    // Scores of fp32, here and in decoding, are off by half of that each.
    const double slack = 0x1p-15 * query.norm * std::sqrt(most_squares) + 0x1p-20 * (std::fabs(exact) + most_bias);
    query.floor = std::nextafter(static_cast<float>(exact - slack), kNothing);
  }

  void fine(int64_t index) {
    const Span& span = spans_[index];
    const Query* query = queries(span);
    std::vector<float> gaps(group_);
    for (int h = 0; h < group_; ++h) {
      gaps[h] = static_cast<float>(Entmax<double>(op_.alpha.of(span.kv_head * group_ + h)).gap);
    }
    std::vector<int> sums(group_);
    for_each_token(span, span.first, span.end, [&](int token, int64_t page_head, int slot) {
      bool wanted = false, summed = false;
      int merit = 0;
      for (int h = 0; h < group_; ++h) {
        float upper = uppers(span, h)[token];
        if (upper <= query[h].floor) continue;
        if (op_.fine) {
          if (!summed) {
            kernels_.dot_codes(codes(page_head, 0, slot), codes(page_head, 1, slot), numbers(span), group_, dims_,
                               sums.data());
            summed = true;
          }
          const float step = sketch::step_of(norm(page_head, 0, slot));
          upper = query[h].code.fine_bound(sums[h], step, distance(page_head, 2, slot)) + bias(span, h, token);
          if (upper <= query[h].floor) continue;
        }
        wanted = true;
        merit = std::max(merit, sketch::merit_of(gaps[h] * (upper - query[h].floor)));
      }
      if (!wanted) return;
      candidates_[index].push_back({token, merit});
    });
  }

  void choose(int64_t row_head) {
    int64_t counts[sketch::kMerits] = {};
    for (int64_t span = first_span_[row_head]; span < first_span_[row_head + 1]; ++span) {
      for (const Candidate& candidate : candidates_[span]) ++counts[candidate.merit];
    }
    int64_t left = op_.selection.max_selected;  // room behind the whole merits
    int least = sketch::kMerits;                // the lowest merit that is taken whole
    while (least > 0 && counts[least - 1] <= left) left -= counts[--least];
    const bool part = left == op_.selection.max_selected;  // of the top merit only its first tokens fit

    int32_t* selected = op_.selection.row(row_head);
    int count = 0;
    for (int64_t span = first_span_[row_head]; span < first_span_[row_head + 1]; ++span) {
      for (const Candidate& candidate : candidates_[span]) {
        const bool first = part && candidate.merit == least - 1 && left > 0;
        if (candidate.merit < least && !first) continue;
        if (first) {
          --left;
          --counts[candidate.merit];
        }
        selected[count++] = candidate.token;
      }
    }
    std::fill(selected + count, selected + op_.selection.max_selected, -1);
    op_.selection.counts[row_head] = count;

    for (int h = 0; h < group_; ++h) {
      const int64_t head_index = row_head * group_ + h;
      const Entmax<double> entmax(op_.alpha.of(static_cast<int>(head_index % op_.q_heads)));
      double lost = 0;
      for (int merit = 0; merit < least; ++merit) {
        lost += static_cast<double>(counts[merit]) * sketch::most_weight(merit, entmax);
      }
      op_.delta_bound[head_index] = sketch::rounded_up(lost);
    }
  }

  const SelectSketch& op_;
  const RowKernels<T>& kernels_ = row_kernels<T>();
  const int group_, dims_, row_bytes_;
  std::vector<Span> spans_;
  std::vector<int64_t> first_span_;                 // of each (row, KV head), and behind the last
  std::vector<int64_t> first_upper_;                // of each row
  std::vector<float> uppers_;                       // per row [q_heads, seq_len]
  std::vector<Query> queries_;                      // per (row, query head)
  std::vector<int16_t> numbers_;                    // per (row, query head) [dims]
  std::vector<std::vector<Bounded>> highest_;       // per (span, head of the group)
  std::vector<std::vector<Candidate>> candidates_;  // per span
};

}  // namespace

void select_sketch(const SelectSketch& op) {
  dispatch(op.dtype, [&](auto element) { Selector<decltype(element)>(op).run(); });
}

}  // namespace entmaxkv::cpu
