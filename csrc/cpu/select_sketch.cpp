// select_sketch on the CPU (ops.h, SelectSketch). The tokens of each row are cut into spans.
//   1. code: per (row, query head), round the query to whole numbers (sketch.h, QueryCode).
//   2. scan: per (row, KV head, span), bound every score with plane 0, and find the tokens with the highest bounds.
//   3. floor: per (row, query head), read the keys of the tokens with the highest bounds in the row. The threshold of
//      their exact scores, rounded down, is the floor. Where alpha = 1 it comes from their logsumexp.
//   4. refine: per (row, KV head, span), tighten the bounds above the floor with plane 1. The candidates are the tokens
//      whose bound is still above the floor, for some head.
//   5. list: per (row, KV head), select the candidates, or those with the largest merit if there is not room for all,
//      and bound the weight of the other tokens.
#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "../entmax.h"
#include "kernels.h"
#include "pages.h"
#include "scores.h"
#include "sketches.h"
#include "spans.h"

namespace entmaxkv::cpu {

namespace {

/// The query of one head in one row.
struct Query {
  std::vector<float> q;
  sketch::QueryCode code;
  double norm = 0;     // ||scale q||
  bool known = false;  // the coordinates are small enough for a code; otherwise every token is a candidate
  float floor = kNothing;
};

/// A token, and the upper bound of its score for one head.
struct Bounded {
  float upper;
  int token;

  /// The order is from the highest bound to the lowest, equal bounds by token.
  bool operator<(const Bounded& other) const {
    return upper > other.upper || (upper == other.upper && token < other.token);
  }
};

/// Keeps only the sketch::kExact tokens with the highest bounds, in order.
void leave_highest(std::vector<Bounded>& tokens) {
  const auto count = std::min(tokens.size(), size_t{sketch::kExact});
  const auto end = tokens.begin() + static_cast<int64_t>(count);
  std::nth_element(tokens.begin(), end, tokens.end());
  std::sort(tokens.begin(), end);
  tokens.resize(count);
}

/// A table of sketch::step_of for every scale.
struct Steps {
  float of[256];

  Steps() {
    for (int scale = 0; scale < 256; ++scale) of[scale] = sketch::step_of(static_cast<float>(scale));
  }
};

struct Candidate {
  int32_t token;
  int merit;  // sketch::merit_of
};

template <typename T>
class Selector {
 public:
  explicit Selector(const SelectSketch& op)
      : op_(op),
        group_(op.group),
        dims_(sketch::dims_of(op.head_dim)),
        row_bytes_(sketch::row_bytes(op.head_dim)),
        spans_(op, kSpanTokens, [&](int64_t row_head) { return op.seq_lens[row_head / op.kv_heads]; }),
        queries_(int64_t{op.batch} * op.q_heads),
        numbers_(queries_.size() * dims_),
        highest_(spans_.count() * group_),
        candidates_(spans_.count()) {
    int64_t bounds = 0;
    for (int row = 0; row < op.batch; ++row) {
      first_upper_.push_back(bounds);
      bounds += int64_t{op.q_heads} * op.seq_lens[row];
    }
    uppers_.resize(bounds);
  }

  void run() {
    parallel_for(static_cast<int64_t>(queries_.size()), [&](int64_t head) { code(head); });
    parallel_for(spans_.count(), [&](int64_t span) { scan(span); });
    parallel_for(static_cast<int64_t>(queries_.size()), [&](int64_t head) { floor(head); });
    parallel_for(spans_.count(), [&](int64_t span) { refine(span); });
    parallel_for(int64_t{op_.batch} * op_.kv_heads, [&](int64_t row_head) { list(row_head); });
  }

 private:
  /// The queries of the group's heads: [group].
  Query* queries(const Span& span) { return queries_.data() + span.row * op_.q_heads + span.kv_head * group_; }

  /// The numbers of the group's queries: [group, dims].
  const int16_t* numbers(const Span& span) const {
    return numbers_.data() + (span.row * op_.q_heads + span.kv_head * group_) * dims_;
  }

  /// The bounds of one head of the group for all tokens of the row: [seq_len].
  float* uppers(const Span& span, int h) {
    const int64_t head = span.kv_head * group_ + h;
    return uppers_.data() + first_upper_[span.row] + head * op_.seq_lens[span.row];
  }

  /// The ALiBi slope of a head of the group, rounded so that biases are upper bounds.
  float slope(const Span& span, int h) const { return sketch::upward(op_.scoring.slope(span.kv_head * group_ + h)); }

  float bias(const Span& span, float slope, int token) const {
    return slope * static_cast<float>(token - (op_.seq_lens[span.row] - 1));
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
    double norm_squares = 0, distance_squares = 0;
    for (int d = 0; d < dims_; ++d) {
      constexpr float kMost = sketch::QueryCode::kMost;
      const float number = unit > 0 ? std::clamp(std::rint(x[d] / unit), -kMost, kMost) : 0;
      numbers[d] = static_cast<int16_t>(number);
      sum += numbers[d];
      const double difference = x[d] - double{unit} * number;
      norm_squares += double{x[d]} * x[d];
      distance_squares += difference * difference;
    }
    query.norm = std::sqrt(norm_squares);
    query.code = {unit,
                  sum,
                  static_cast<float>(query.norm),
                  static_cast<float>(std::sqrt(distance_squares)),
                  dims_,
                  op_.error_factor};
  }

  /// Successive tokens of a span in one page.
  struct Run {
    int token, count;   // the first token, and the number of tokens
    int64_t page_head;  // physical page * kv_heads + kv_head
    int slot;           // slot of the first token in its page
  };

  std::vector<Run> runs_of(const Span& span) const {
    const int32_t* table = op_.page_table.row(span.row);
    std::vector<Run> runs;
    for (int token = span.first; token < span.end; token += runs.back().count) {
      const int page = token / op_.page_size, slot = token % op_.page_size;
      const int count = std::min(span.end - token, op_.page_size - slot);
      runs.push_back({token, count, int64_t{table[page]} * op_.kv_heads + span.kv_head, slot});
    }
    return runs;
  }

  /// Calls body(run) for each run. Runs lie scattered in memory, so the first `planes` planes of the codes of later
  /// runs are prefetched. If `planes` is 0, nothing is prefetched.
  template <typename Body>
  void for_each(const std::vector<Run>& runs, int planes, Body body) const {
    constexpr size_t kAhead = 4;    // runs
    constexpr int kCacheLine = 64;  // bytes
    for (size_t i = 0; i < runs.size(); ++i) {
      if (i + kAhead < runs.size()) {
        const Run& next = runs[i + kAhead];
        if (planes > 0) __builtin_prefetch(op_.sketch.norm(next.page_head, 0, op_.page_size) + next.slot);
        for (int plane = 0; plane < planes; ++plane) {
          const uint8_t* rows = codes(next.page_head, plane, next.slot);
          for (int byte = 0; byte < next.count * row_bytes_; byte += kCacheLine) __builtin_prefetch(rows + byte);
        }
      }
      body(runs[i]);
    }
  }

  /// The row of codes in a plane of the token in a slot.
  const uint8_t* codes(int64_t page_head, int plane, int slot) const {
    return op_.sketch.plane(page_head, plane, op_.page_size, row_bytes_) + slot * row_bytes_;
  }

  /// The steps of a run's tokens, and distance_of their coarse norms (which = 1) or fine norms (which = 2).
  void look_up(const Run& run, int which, float* steps, float* distances) const {
    static const Steps all;
    const uint8_t* scales = op_.sketch.norm(run.page_head, 0, op_.page_size) + run.slot;
    const uint8_t* norms = op_.sketch.norm(run.page_head, which, op_.page_size) + run.slot;
    for (int i = 0; i < run.count; ++i) {
      steps[i] = all.of[scales[i]];
      distances[i] = sketch::distance_of(scales[i], norms[i]);
    }
  }

  void scan(int64_t index) {
    const Span& span = spans_[index];
    const Query* query = queries(span);
    std::vector<int> sums(int64_t{group_} * op_.page_size);
    std::vector<float> steps(op_.page_size), distances(op_.page_size);
    for_each(runs_of(span), 1, [&](const Run& run) {
      kernels_.dot_codes(codes(run.page_head, 0, run.slot), nullptr, run.count, numbers(span), group_, dims_,
                         sums.data(), op_.page_size);
      look_up(run, 1, steps.data(), distances.data());
      for (int h = 0; h < group_; ++h) {
        const sketch::QueryCode& code = query[h].code;
        const int* products = sums.data() + int64_t{h} * op_.page_size;
        const float head_slope = slope(span, h);
        float* upper = uppers(span, h) + run.token;
        for (int i = 0; i < run.count; ++i) {
          upper[i] = code.coarse_bound(products[i], steps[i], distances[i]) + bias(span, head_slope, run.token + i);
        }
      }
    });
    for (int h = 0; h < group_; ++h) {
      if (query[h].known) find_highest(uppers(span, h), span, highest_[index * group_ + h]);
    }
  }

  /// Finds the sketch::kExact tokens of a span with the highest bounds.
  static void find_highest(const float* upper, const Span& span, std::vector<Bounded>& highest) {
    // The best bound of every kChunk tokens. At least kExact tokens have bounds at or above the kExact-th largest of
    // these, `least`, so tokens below it need not be sorted.
    constexpr int kChunk = 16;
    std::vector<float> best;
    for (int64_t first = span.first; first < span.end; first += kChunk) {
      float chunk_best = kNothing;
      for (int64_t token = first; token < std::min<int64_t>(first + kChunk, span.end); ++token) {
        chunk_best = upper[token] > chunk_best ? upper[token] : chunk_best;
      }
      best.push_back(chunk_best);
    }
    float least = kNothing;
    if (best.size() > size_t{sketch::kExact}) {
      std::nth_element(best.begin(), best.begin() + sketch::kExact - 1, best.end(), std::greater<float>());
      least = best[sketch::kExact - 1];
    }
    for (int token = span.first; token < span.end; ++token) {
      if (upper[token] >= least && upper[token] > kNothing) highest.push_back({upper[token], token});
    }
    leave_highest(highest);
  }

  void floor(int64_t head_index) {
    const int64_t row = head_index / op_.q_heads;
    const int head = static_cast<int>(head_index % op_.q_heads), kv_head = head / group_;
    const int64_t row_head = row * op_.kv_heads + kv_head;
    const Entmax<double> entmax(op_.alpha.of(head));
    Query& query = queries_[head_index];
    if (!query.known || (entmax.is_softmax() && op_.seq_lens[row] <= op_.selection.max_selected)) return;
    std::vector<Bounded> highest;
    spans_.for_each_of(row_head, [&](int64_t span) {
      const std::vector<Bounded>& of_span = highest_[span * group_ + head % group_];
      highest.insert(highest.end(), of_span.begin(), of_span.end());
    });
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
    // s - best of the tokens that can have weight. The rounding of other tokens' scores does not move the threshold.
    std::vector<double> x;
    double most_squares = 0;
    for (int i = 0; i < count; ++i) {
      if (!(scores[i] > best - entmax.beta)) continue;
      x.push_back(scores[i] - best);
      double squares = 0;
      for (int d = 0; d < op_.head_dim; ++d) squares += double{to_float(keys[i][d])} * to_float(keys[i][d]);
      most_squares = std::max(most_squares, squares);
    }
    const double exact = best + (entmax.is_softmax() ? logsumexp(x) - sketch::kBelow : threshold(x, entmax));
    const double most_bias = std::fabs(double{op_.scoring.slope(head)}) * (op_.seq_lens[row] - 1);
    // Scores in fp32 have rounding errors, here and in sparse_decode. Half of the slack allows for each.
    const double slack = 0x1p-15 * query.norm * std::sqrt(most_squares) + 0x1p-20 * (std::fabs(exact) + most_bias);
    query.floor = std::nextafter(static_cast<float>(exact - slack), kNothing);
  }

  static double logsumexp(const std::vector<double>& x) {
    double sum = 0;
    for (double value : x) sum += std::exp(value);
    return std::log(sum);
  }

  /// The threshold, in units of s, of scores x, the best of which is 0.
  static double threshold(const std::vector<double>& x, const Entmax<double>& entmax) {
    const auto solution = find_threshold(entmax, -1.0, kLeastMove, [&](double t) {
      Excess<double> excess;
      for (double value : x) {
        if (entmax.gap * value > t) excess.add(entmax.gap * value - t, entmax.beta);
      }
      return excess;
    });
    return solution.threshold / entmax.gap;
  }

  void refine(int64_t index) {
    const Span& span = spans_[index];
    const Query* query = queries(span);
    std::vector<sketch::Worth> worth(group_);
    std::vector<float> slopes(group_);
    std::vector<const float*> upper(group_);
    for (int h = 0; h < group_; ++h) {
      worth[h] = sketch::Worth(Entmax<double>(op_.alpha.of(span.kv_head * group_ + h)));
      slopes[h] = slope(span, h);
      upper[h] = uppers(span, h);
    }
    std::vector<int> sums(int64_t{group_} * op_.page_size);
    std::vector<float> steps(op_.page_size), distances(op_.page_size);
    const auto above = [&](int h, int token) { return !(upper[h][token] <= query[h].floor); };
    // Runs without the tokens at either end that plane 0 rules out for every head.
    std::vector<Run> shortened;
    std::vector<char> is_candidate(op_.page_size);
    for (Run run : runs_of(span)) {
      std::fill(is_candidate.begin(), is_candidate.end(), false);
      for (int h = 0; h < group_; ++h) {
        for (int i = 0; i < run.count; ++i) is_candidate[i] |= above(h, run.token + i);
      }
      int skipped = 0;
      while (skipped < run.count && !is_candidate[skipped]) ++skipped;
      while (skipped < run.count && !is_candidate[run.count - 1]) --run.count;
      if (skipped < run.count) {
        shortened.push_back({run.token + skipped, run.count - skipped, run.page_head, run.slot + skipped});
      }
    }
    for_each(shortened, op_.fine ? 2 : 0, [&](const Run& run) {
      if (op_.fine) {
        kernels_.dot_codes(codes(run.page_head, 0, run.slot), codes(run.page_head, 1, run.slot), run.count,
                           numbers(span), group_, dims_, sums.data(), op_.page_size);
        look_up(run, 2, steps.data(), distances.data());
      }
      for (int i = 0; i < run.count; ++i) {
        const int token = run.token + i;
        int merit = -1;  // the token is a candidate of no head
        for (int h = 0; h < group_; ++h) {
          if (!above(h, token)) continue;
          float bound = upper[h][token];
          if (op_.fine) {
            const int product = sums[int64_t{h} * op_.page_size + i];
            bound = query[h].code.fine_bound(product, steps[i], distances[i]) + bias(span, slopes[h], token);
            if (bound <= query[h].floor) continue;
          }
          merit = std::max(merit, sketch::merit_of(worth[h].of(bound - query[h].floor)));
        }
        if (merit >= 0) candidates_[index].push_back({token, merit});
      }
    });
  }

  void list(int64_t row_head) {
    int64_t counts[sketch::kMerits] = {};
    spans_.for_each_of(row_head, [&](int64_t span) {
      for (const Candidate& candidate : candidates_[span]) ++counts[candidate.merit];
    });
    // From the largest merit down, all candidates of a merit are selected while there is room for them. If the largest
    // merit alone has too many candidates, only its first ones are selected.
    int64_t room = op_.selection.max_selected;
    int least = sketch::kMerits;  // the lowest merit whose candidates are all selected
    while (least > 0 && counts[least - 1] <= room) room -= counts[--least];
    const bool cut = room == op_.selection.max_selected;

    int32_t* selected = op_.selection.row(row_head);
    int count = 0;
    spans_.for_each_of(row_head, [&](int64_t span) {
      for (const Candidate& candidate : candidates_[span]) {
        const bool is_first = cut && candidate.merit == least - 1 && room > 0;
        if (candidate.merit < least && !is_first) continue;
        if (is_first) {
          --room;
          --counts[candidate.merit];
        }
        selected[count++] = candidate.token;
      }
    });
    end_list(op_.selection, row_head, count);

    double lost = 0;  // an upper bound of the weight of the candidates that are not selected
    for (int merit = 0; merit < least; ++merit) {
      lost += static_cast<double>(counts[merit]) * sketch::most_weight(merit);
    }
    // A candidate's merit may come from one head, while it is below the floor of another. So every token that is not
    // selected counts with most_below, too.
    const double others = op_.seq_lens[row_head / op_.kv_heads] - count;
    for (int h = 0; h < group_; ++h) {
      const int64_t head_index = row_head * group_ + h;
      const Entmax<double> entmax(op_.alpha.of(static_cast<int>(head_index % op_.q_heads)));
      op_.delta_bound[head_index] = sketch::rounded_up(lost + others * sketch::most_below(entmax));
    }
  }

  const SelectSketch& op_;
  const RowKernels<T>& kernels_ = row_kernels<T>();
  const int group_, dims_, row_bytes_;
  const Spans spans_;                               // spans of tokens
  std::vector<Query> queries_;                      // [batch, q_heads]
  std::vector<int16_t> numbers_;                    // [batch, q_heads, dims] the queries' numbers
  std::vector<float> uppers_;                       // the bounds, for each row [q_heads, seq_len]
  std::vector<int64_t> first_upper_;                // [batch] where a row begins in uppers_
  std::vector<std::vector<Bounded>> highest_;       // [spans, group] the tokens with the highest bounds
  std::vector<std::vector<Candidate>> candidates_;  // [spans]
};

}  // namespace

void select_sketch(const SelectSketch& op) {
  dispatch(op.dtype, [&](auto element) { Selector<decltype(element)>(op).run(); });
}

}  // namespace entmaxkv::cpu
