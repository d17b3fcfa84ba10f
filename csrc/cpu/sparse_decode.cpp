// sparse_decode on the CPU. The selected units of a row, pages or tokens, are cut into spans of kSpanTokens; every key
// is read once, every value row at most once, and only where some head of the group gives it weight.
//   1. score:  per (row, KV head, span) the scores of the group's heads; a token stays a candidate of a head while it
//              is less than beta below the best score seen, in s (entmax.h)
//   2. solve:  per (row, query head) the threshold on the candidates, and the weights of those above it
//   3. gather: per (row, KV head, span) the weighted sum of value rows
//   4. merge:  per row the sum over its spans, in their order
// What a span does depends on its row alone: neither the other rows nor the number of threads changes a bit.
#include <cmath>
#include <limits>
#include <vector>

#include "../entmax.h"
#include "kernels.h"
#include "pages.h"

namespace entmaxkv::cpu {

namespace {

constexpr int kSpanTokens = 2048;
constexpr int kTile = 64;  // tokens that are looked at, or value rows that are added, together
constexpr float kNothing = -std::numeric_limits<float>::infinity();
constexpr float kUndefined = std::numeric_limits<float>::quiet_NaN();

/// The larger, or NaN if either is.
float larger(float a, float b) { return a != a || a > b ? a : b; }

/// Tokens that one head may give weight to, in ascending order.
struct Candidates {
  float best = kNothing;
  std::vector<int32_t> tokens;
  std::vector<float> scores;  // s; weights p once the threshold is known

  void add(int32_t token, float score) {
    tokens.push_back(token);
    scores.push_back(score);
  }

  void clear() {
    tokens.clear();
    scores.clear();
  }
};

struct Span {
  int64_t row;
  int kv_head;
  int first, units;  // of those that the row has selected
};

template <typename T>
class Decoder {
 public:
  explicit Decoder(const SparseDecode& op)
      : op_(op),
        group_(op.group),
        unit_tokens_(op.selection.by_token ? 1 : op.page_size),
        heads_(int64_t{op.batch} * op.q_heads) {
    first_span_.push_back(0);
    for (int64_t row_head = 0; row_head < int64_t{op.batch} * op.kv_heads; ++row_head) {
      const int64_t row = row_head / op.kv_heads;
      const int units = unit_count(row_head);
      const int span_units = kSpanTokens / unit_tokens_;
      for (int first = 0; first < units; first += span_units) {
        spans_.push_back({row, static_cast<int>(row_head % op.kv_heads), first, std::min(span_units, units - first)});
      }
      first_span_.push_back(static_cast<int64_t>(spans_.size()));
      op.tokens[row_head] = 0;
      for (int nth = 0; nth < units; ++nth) {
        op.tokens[row_head] += tokens_in_page(unit(row_head, nth), op.seq_lens[row], unit_tokens_);
      }
    }
    found_.resize(spans_.size() * group_);
    sums_.resize(spans_.size() * group_ * op.head_dim);
  }

  void run() {
    parallel_for(static_cast<int64_t>(spans_.size()), [&](int64_t span) { score(span); });
    parallel_for(static_cast<int64_t>(heads_.size()), [&](int64_t head) { solve(head); });
    parallel_for(static_cast<int64_t>(spans_.size()), [&](int64_t span) { gather(span); });
    parallel_for(static_cast<int64_t>(heads_.size()), [&](int64_t head) { merge(head); });
  }

 private:
  int unit_count(int64_t row_head) const {
    if (op_.selection) return op_.selection.counts[row_head];
    return pages_in_use(op_.seq_lens[row_head / op_.kv_heads], op_.page_size);
  }

  int unit(int64_t row_head, int nth) const { return op_.selection ? op_.selection.row(row_head)[nth] : nth; }

  /// Calls body(token, physical page, slot) for the tokens of a span, in ascending order.
  template <typename Body>
  void for_each_token(const Span& span, Body body) const {
    const int64_t row_head = span.row * op_.kv_heads + span.kv_head;
    const int32_t* table = op_.page_table.row(span.row);
    for (int nth = span.first; nth < span.first + span.units; ++nth) {
      const int first = unit(row_head, nth) * unit_tokens_;
      const int end = std::min(first + unit_tokens_, op_.seq_lens[span.row]);
      const int64_t physical = table[first / op_.page_size];
      for (int token = first; token < end; ++token) body(token, physical, token % op_.page_size);
    }
  }

  void score(int64_t index) {
    const Span& span = spans_[index];
    const int first_head = span.kv_head * group_;
    std::vector<float> q(group_ * op_.head_dim);
    for (int h = 0; h < group_; ++h) {
      const T* from = op_.q.template at<T>(span.row, first_head + h);
      for (int d = 0; d < op_.head_dim; ++d) q[h * op_.head_dim + d] = to_float(from[d]);
    }
    const T* keys[kSpanTokens];
    int32_t tokens[kSpanTokens];
    int count = 0;
    for_each_token(span, [&](int32_t token, int64_t physical, int slot) {
      tokens[count] = token;
      keys[count++] = op_.k_pages.template at<T>(physical, span.kv_head, slot);
    });
    std::vector<float> scores(group_ * count);
    kernels_.dot(keys, count, q.data(), group_, op_.head_dim, scores.data(), count);
    for (int h = 0; h < group_; ++h) {
      for (int first = 0; first < count; first += kTile) {
        keep(found_[index * group_ + h], span.row, first_head + h, tokens + first, scores.data() + h * count + first,
             std::min(kTile, count - first));
      }
    }
  }

  /// Adds those of a tile's tokens that are within reach of the best score so far.
  void keep(Candidates& found, int64_t row, int head, const int32_t* tokens, float* scores, int count) const {
    const float slope = op_.scoring.slope(head);
    const int position = op_.seq_lens[row] - 1;
    float tile_best = kNothing;
    bool undefined = false;
    for (int i = 0; i < count; ++i) {
      scores[i] = op_.scoring.scale * scores[i] + slope * static_cast<float>(tokens[i] - position);
      tile_best = scores[i] > tile_best ? scores[i] : tile_best;
      undefined |= scores[i] != scores[i];
    }
    found.best = larger(found.best, undefined ? kUndefined : tile_best);
    // Rounded down: what is kept here in vain falls to the exact test in solve.
    const float floor =
        std::nextafter(static_cast<float>(found.best - Entmax<double>(op_.alpha.of(head)).beta), kNothing);
    if (!(tile_best >= floor)) return;
    for (int i = 0; i < count; ++i) {
      if (scores[i] >= floor) found.add(tokens[i], scores[i]);
    }
  }

  void solve(int64_t head_index) {
    const int64_t row = head_index / op_.q_heads;
    const int head = static_cast<int>(head_index % op_.q_heads);
    const int64_t row_head = row * op_.kv_heads + head / group_;
    const Entmax<double> entmax(op_.alpha.of(head));
    Candidates& all = heads_[head_index];
    std::vector<double> x;  // (alpha-1)(s - best); s - best where alpha = 1
    for (int64_t span = first_span_[row_head]; span < first_span_[row_head + 1]; ++span) {
      all.best = larger(all.best, found_[span * group_ + head % group_].best);
    }
    for (int64_t span = first_span_[row_head]; span < first_span_[row_head + 1]; ++span) {
      Candidates& part = found_[span * group_ + head % group_];
      for (size_t i = 0; i < part.tokens.size(); ++i) {
        const double below = double{part.scores[i]} - all.best;
        if (below > -entmax.beta) {
          all.add(part.tokens[i], 0);
          x.push_back(entmax.is_softmax() ? below : entmax.gap * below);
        }
      }
      part = {};
    }
    op_.support[head_index] = 0;
    op_.tau[head_index] = 0;
    if (op_.tokens[row_head] == 0) return;
    if (x.empty()) {  // some score is no number
      op_.tau[head_index] = kUndefined;
      return;
    }

    double threshold = entmax.is_softmax() ? 0 : -1;
    double mass = 0;
    if (entmax.is_softmax()) {
      for (double& value : x) mass += value = std::exp(value);
      op_.tau[head_index] = static_cast<float>(all.best + std::log(mass));
    } else {
      constexpr int kMostSteps = 64;  // a guard: convergence is quadratic
      for (int step = 0; step < kMostSteps; ++step) {
        Excess<double> excess;
        size_t alive = 0;  // what is at or below a lower bound of the threshold never comes back
        for (size_t i = 0; i < x.size(); ++i) {
          if (!(x[i] > threshold)) continue;
          excess.add(x[i] - threshold, entmax.beta);
          x[alive] = x[i];
          all.tokens[alive++] = all.tokens[i];
        }
        x.resize(alive);
        mass = excess.mass;
        const double move = entmax.step(excess);
        if (!(move > 1e-12)) break;
        threshold += move;
      }
      for (double& value : x) value = power(value - threshold, entmax.beta);
      op_.tau[head_index] = static_cast<float>(threshold + entmax.gap * all.best);
    }
    all.scores.clear();
    size_t alive = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const auto p = static_cast<float>(x[i] / mass);
      if (!(p > 0)) continue;
      all.scores.push_back(p);
      all.tokens[alive++] = all.tokens[i];
    }
    all.tokens.resize(alive);
    op_.support[head_index] = static_cast<int32_t>(alive);
  }

  void gather(int64_t index) {
    const Span& span = spans_[index];
    const int64_t first_head = span.row * op_.q_heads + span.kv_head * group_;
    const int64_t row_head = span.row * op_.kv_heads + span.kv_head;
    std::vector<size_t> next(group_);  // per head, its first candidate that is still to come
    for (int h = 0; h < group_; ++h) {
      const auto& tokens = heads_[first_head + h].tokens;
      const int32_t begin = unit(row_head, span.first) * unit_tokens_;
      next[h] = std::lower_bound(tokens.begin(), tokens.end(), begin) - tokens.begin();
    }
    const int32_t end = (unit(row_head, span.first + span.units - 1) + 1) * unit_tokens_;
    const int32_t* table = op_.page_table.row(span.row);
    std::vector<float> weights(group_ * kTile);
    const T* values[kTile];
    int count = 0;
    float* sum = sums_.data() + index * group_ * op_.head_dim;
    while (true) {
      int32_t token = end;
      for (int h = 0; h < group_; ++h) {
        const auto& tokens = heads_[first_head + h].tokens;
        if (next[h] < tokens.size()) token = std::min(token, tokens[next[h]]);
      }
      if (token == end || count == kTile) {
        kernels_.accumulate(values, count, weights.data(), group_, op_.head_dim, sum);
        count = 0;
        if (token == end) return;
      }
      for (int h = 0; h < group_; ++h) {
        const Candidates& head = heads_[first_head + h];
        const bool weighs = next[h] < head.tokens.size() && head.tokens[next[h]] == token;
        weights[count * group_ + h] = weighs ? head.scores[next[h]++] : 0;
      }
      values[count++] = op_.v_pages.template at<T>(table[token / op_.page_size], span.kv_head, token % op_.page_size);
    }
  }

  void merge(int64_t head_index) {
    const int64_t row = head_index / op_.q_heads;
    const int head = static_cast<int>(head_index % op_.q_heads);
    const int64_t row_head = row * op_.kv_heads + head / group_;
    const bool undefined = op_.tokens[row_head] > 0 && op_.support[head_index] == 0;
    std::vector<float> total(op_.head_dim, undefined ? kUndefined : 0.0f);
    for (int64_t span = first_span_[row_head]; span < first_span_[row_head + 1]; ++span) {
      const float* sum = sums_.data() + (span * group_ + head % group_) * op_.head_dim;
      for (int d = 0; d < op_.head_dim; ++d) total[d] += sum[d];
    }
    T* out = op_.out.template at<T>(row, head);
    for (int d = 0; d < op_.head_dim; ++d) out[d] = from_float<T>(total[d]);
  }

  const SparseDecode& op_;
  const RowKernels<T>& kernels_ = row_kernels<T>();
  const int group_;
  const int unit_tokens_;
  std::vector<Span> spans_;
  std::vector<int64_t> first_span_;  // of each (row, KV head), and behind the last
  std::vector<Candidates> found_;    // per (span, head of the group)
  std::vector<Candidates> heads_;    // per (row, query head)
  std::vector<float> sums_;          // per (span, head of the group) [head_dim]
};

}  // namespace

void sparse_decode(const SparseDecode& op) {
  dispatch(op.dtype, [&](auto element) { Decoder<decltype(element)>(op).run(); });
}

}  // namespace entmaxkv::cpu
