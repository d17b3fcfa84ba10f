// select_sketch on the CPU. The tokens of a row are cut into spans.
//   1. code:   per (row, query head) the query's numbers (sketch.h)
//   2. coarse: per (row, KV head, span) an upper bound of every score from plane 0, and the tokens with the highest
//   ones
//   3. floor:  per (row, query head) the exact scores of the highest of all, and their threshold, rounded down; where
//   alpha = 1 and there is not room for all, a floor from their logsumexp
//   4. fine:   per (row, KV head, span) the candidates: tokens with all bounds above the floor, for some head
//   5. choose: per (row, KV head) the candidates that there is room for, and a bound of the weight of the others
#include <algorithm>
#include <cmath>
#include <functional>
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
  const auto end = tokens.begin() + static_cast<int64_t>(count);
  std::nth_element(tokens.begin(), end, tokens.end());
  std::sort(tokens.begin(), end);
  tokens.resize(count);
}

/// sketch::step_of for each scale.
struct Steps {
  float of[256];

  Steps() {
    for (int scale = 0; scale < 256; ++scale) of[scale] = sketch::step_of(static_cast<float>(scale));
  }
};

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

  /// The successive tokens of a span that lie in one page.
  struct Run {
    int token, count;   // the first, and how many
    int64_t page_head;  // page * kv_heads + kv_head
    int slot;           // of the first
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

  /// Calls body(run) for each, with the rows of those to come on their way from memory, where they lie scattered.
  template <typename Body>
  void for_each(const std::vector<Run>& runs, int planes, Body body) const {
    constexpr size_t kAhead = 4;
    constexpr int kLine = 64;
    for (size_t i = 0; i < runs.size(); ++i) {
      if (i + kAhead < runs.size()) {
        const Run& next = runs[i + kAhead];
        if (planes > 0) __builtin_prefetch(op_.sketch.norm(next.page_head, 0, op_.page_size) + next.slot);
        for (int plane = 0; plane < planes; ++plane) {
          const uint8_t* rows = codes(next.page_head, plane, next.slot);
          for (int byte = 0; byte < next.count * row_bytes_; byte += kLine) __builtin_prefetch(rows + byte);
        }
      }
      body(runs[i]);
    }
  }

  const uint8_t* codes(int64_t page_head, int plane, int slot) const {
    return op_.sketch.plane(page_head, plane, op_.page_size, row_bytes_) + slot * row_bytes_;
  }

  /// Steps of a run's tokens, and norms of what their codes lost, of plane 0 alone or of both.
  void look_up(const Run& run, int which, float* steps, float* distances) const {
    static const Steps all;
    const uint8_t* scales = op_.sketch.norm(run.page_head, 0, op_.page_size) + run.slot;
    const uint8_t* norms = op_.sketch.norm(run.page_head, which, op_.page_size) + run.slot;
    for (int i = 0; i < run.count; ++i) {
      steps[i] = all.of[scales[i]];
      distances[i] = sketch::distance_of(scales[i], norms[i]);
    }
  }

  void coarse(int64_t index) {
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
        const float its_slope = slope(span, h);
        float* upper = uppers(span, h) + run.token;
        for (int i = 0; i < run.count; ++i) {
          upper[i] = code.coarse_bound(products[i], steps[i], distances[i]) + bias(span, its_slope, run.token + i);
        }
      }
    });
    for (int h = 0; h < group_; ++h) {
      if (query[h].known) find_highest(uppers(span, h), span, highest_[index * group_ + h]);
    }
  }

  /// Of a span's bounds the sketch::kExact highest.
  static void find_highest(const float* upper, const Span& span, std::vector<Bounded>& highest) {
    constexpr int kSome = 16;
    std::vector<float> best;  // of every kSome: as many tokens are at least as high as the kExact-th of these
    for (int64_t first = span.first; first < span.end; first += kSome) {
      float its = kNothing;
      for (int64_t token = first; token < std::min<int64_t>(first + kSome, span.end); ++token) {
        its = upper[token] > its ? upper[token] : its;
      }
      best.push_back(its);
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
      x.push_back(scores[i] - best);
      double squares = 0;
      for (int d = 0; d < op_.head_dim; ++d) squares += double{to_float(keys[i][d])} * to_float(keys[i][d]);
      most_squares = std::max(most_squares, squares);
    }
    const double exact = best + (entmax.is_softmax() ? logsumexp(x) - sketch::kBelow : threshold(x, entmax));
    const double most_bias = std::fabs(double{op_.scoring.slope(head)}) * (op_.seq_lens[row] - 1);
    // Scores of fp32, here and in decoding, are off by half of that each.
    const double slack = 0x1p-15 * query.norm * std::sqrt(most_squares) + 0x1p-20 * (std::fabs(exact) + most_bias);
    query.floor = std::nextafter(static_cast<float>(exact - slack), kNothing);
  }

  static double logsumexp(const std::vector<double>& x) {
    double sum = 0;
    for (double value : x) sum += std::exp(value);
    return std::log(sum);
  }

  /// That of scores of which the best is 0.
  static double threshold(const std::vector<double>& x, const Entmax<double>& entmax) {
    double t = -1;
    constexpr int kMostSteps = 64;  // a guard: convergence is quadratic
    for (int step = 0; step < kMostSteps; ++step) {
      Excess<double> excess;
      for (double value : x) {
        if (entmax.gap * value > t) excess.add(entmax.gap * value - t, entmax.beta);
      }
      const double move = entmax.step(excess);
      if (!(move > 1e-12)) break;
      t += move;
    }
    return t / entmax.gap;
  }

  void fine(int64_t index) {
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
    std::vector<char> wanted(op_.page_size);
    std::vector<Run> left;
    for (Run run : runs_of(span)) {
      std::fill(wanted.begin(), wanted.end(), false);
      for (int h = 0; h < group_; ++h) {
        for (int i = 0; i < run.count; ++i) wanted[i] |= above(h, run.token + i);
      }
      int skipped = 0;
      while (skipped < run.count && !wanted[skipped]) ++skipped;
      while (skipped < run.count && !wanted[run.count - 1]) --run.count;
      if (skipped < run.count) {
        left.push_back({run.token + skipped, run.count - skipped, run.page_head, run.slot + skipped});
      }
    }
    for_each(left, op_.fine ? 2 : 0, [&](const Run& run) {
      if (op_.fine) {
        kernels_.dot_codes(codes(run.page_head, 0, run.slot), codes(run.page_head, 1, run.slot), run.count,
                           numbers(span), group_, dims_, sums.data(), op_.page_size);
        look_up(run, 2, steps.data(), distances.data());
      }
      for (int i = 0; i < run.count; ++i) {
        const int token = run.token + i;
        int merit = -1;
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

    double lost = 0;
    for (int merit = 0; merit < least; ++merit) {
      lost += static_cast<double>(counts[merit]) * sketch::most_weight(merit);
    }
    // A token that is left out may be below the floor of one head, and owe its merit to another.
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
