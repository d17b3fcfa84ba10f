// sparse_decode on the CPU. The list of a (row, KV head), of pages or tokens, is cut into spans. Every key in the list
// is read once. A value is read at most once, and only if its token has weight for some head of the group.
//   1. score:  per (row, KV head, span), compute the scores of the group's heads. The candidates of a head are the
//              tokens whose score is less than beta below the best score so far (entmax.h).
//   2. solve:  per (row, query head), find the threshold of the candidates, and the weights of those above it.
//   3. gather: per (row, KV head, span), sum the weighted values.
//   4. merge:  per (row, query head), add up the sums of the spans, in order.
// Spans depend on their row alone. So neither the other rows nor the number of threads changes a bit of the result.
#include <cmath>
#include <vector>

#include "../entmax.h"
#include "kernels.h"
#include "pages.h"
#include "scores.h"
#include "spans.h"

namespace entmaxkv::cpu {

namespace {

constexpr int kTileTokens = 64;  // scores are filtered, and values added, in tiles of this many tokens

/// The candidates of one head, in ascending order. Once the threshold is known, only tokens with weight remain.
struct Candidates {
  float best = kNothing;  // the best score s of any token, or NaN if some score is NaN
  std::vector<int32_t> tokens;
  std::vector<float> scores;  // s; then the weights p

  void add(int32_t token, float score) {
    tokens.push_back(token);
    scores.push_back(score);
  }

  void clear() {
    tokens.clear();
    scores.clear();
  }
};

template <typename T>
class Decoder {
 public:
  explicit Decoder(const SparseDecode& op)
      : op_(op),
        group_(op.group),
        unit_tokens_(op.selection.by_token ? 1 : op.page_size),
        spans_(op, kSpanTokens / unit_tokens_, [this](int64_t row_head) { return unit_count(row_head); }),
        found_(spans_.count() * group_),
        heads_(int64_t{op.batch} * op.q_heads),
        sums_(spans_.count() * group_ * op.head_dim) {
    for (int64_t row_head = 0; row_head < int64_t{op.batch} * op.kv_heads; ++row_head) {
      op.tokens[row_head] = 0;
      for (int nth = 0; nth < unit_count(row_head); ++nth) {
        op.tokens[row_head] += tokens_in_page(unit(row_head, nth), op.seq_lens[row_head / op.kv_heads], unit_tokens_);
      }
    }
  }

  void run() {
    parallel_for(spans_.count(), [&](int64_t span) { score(span); });
    parallel_for(static_cast<int64_t>(heads_.size()), [&](int64_t head) { solve(head); });
    parallel_for(spans_.count(), [&](int64_t span) { gather(span); });
    parallel_for(static_cast<int64_t>(heads_.size()), [&](int64_t head) { merge(head); });
  }

 private:
  /// The units of a (row, KV head): selected tokens, selected pages or, without a selection, pages in use.
  int unit_count(int64_t row_head) const {
    if (op_.selection) return op_.selection.counts[row_head];
    return pages_in_use(op_.seq_lens[row_head / op_.kv_heads], op_.page_size);
  }

  /// The index, among all tokens or pages of the row, of the nth unit.
  int unit(int64_t row_head, int nth) const { return op_.selection ? op_.selection.row(row_head)[nth] : nth; }

  /// Calls body(token, physical page, slot) for the tokens of a span, in ascending order.
  template <typename Body>
  void for_each_token(const Span& span, Body body) const {
    const int64_t row_head = span.row * op_.kv_heads + span.kv_head;
    const int32_t* table = op_.page_table.row(span.row);
    for (int nth = span.first; nth < span.end; ++nth) {
      const int first = unit(row_head, nth) * unit_tokens_;
      const int end = std::min(first + unit_tokens_, op_.seq_lens[span.row]);
      const int64_t physical = table[first / op_.page_size];
      for (int token = first; token < end; ++token) body(token, physical, token % op_.page_size);
    }
  }

  void score(int64_t index) {
    const Span& span = spans_[index];
    const int first_head = span.kv_head * group_;
    const std::vector<float> q = queries_of<T>(op_, span.row, span.kv_head);
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
      for (int first = 0; first < count; first += kTileTokens) {
        add_candidates(found_[index * group_ + h], span.row, first_head + h, tokens + first,
                       scores.data() + h * count + first, std::min(kTileTokens, count - first));
      }
    }
  }

  /// Turns a tile's products q.k into scores, and adds the tokens whose scores are less than beta below the best score
  /// of this span so far.
  void add_candidates(Candidates& found, int64_t row, int head, const int32_t* tokens, float* scores, int count) const {
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
    // The floor is rounded down. The exact test, in solve, rules out what is a candidate for that reason only.
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
    spans_.for_each_of(row_head,
                       [&](int64_t span) { all.best = larger(all.best, found_[span * group_ + head % group_].best); });
    spans_.for_each_of(row_head, [&](int64_t span) {
      Candidates& part = found_[span * group_ + head % group_];
      for (size_t i = 0; i < part.tokens.size(); ++i) {
        const double below = double{part.scores[i]} - all.best;
        if (below > -entmax.beta) {
          all.add(part.tokens[i], 0);
          x.push_back(entmax.is_softmax() ? below : entmax.gap * below);
        }
      }
      part = {};  // frees its memory
    });
    op_.support[head_index] = 0;
    op_.tau[head_index] = 0;
    if (op_.tokens[row_head] == 0) return;
    if (x.empty()) {  // some score is NaN or infinite
      op_.tau[head_index] = kUndefined;
      return;
    }

    double mass = 0;
    if (entmax.is_softmax()) {
      for (double& value : x) mass += value = std::exp(value);
      op_.tau[head_index] = static_cast<float>(all.best + std::log(mass));
    } else {
      const auto solution = find_threshold(entmax, -1.0, kLeastMove, [&](double threshold) {
        Excess<double> excess;
        size_t above = 0;  // the others are never above a later trial threshold: they are removed
        for (size_t i = 0; i < x.size(); ++i) {
          if (!(x[i] > threshold)) continue;
          excess.add(x[i] - threshold, entmax.beta);
          x[above] = x[i];
          all.tokens[above++] = all.tokens[i];
        }
        x.resize(above);
        return excess;
      });
      mass = solution.mass;
      for (double& value : x) value = power(value - solution.threshold, entmax.beta);
      op_.tau[head_index] = static_cast<float>(solution.threshold + entmax.gap * all.best);
    }
    all.scores.clear();
    size_t support = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const auto p = static_cast<float>(x[i] / mass);
      if (!(p > 0)) continue;
      all.scores.push_back(p);
      all.tokens[support++] = all.tokens[i];
    }
    all.tokens.resize(support);
    op_.support[head_index] = static_cast<int32_t>(support);
  }

  void gather(int64_t index) {
    const Span& span = spans_[index];
    const int64_t first_head = span.row * op_.q_heads + span.kv_head * group_;
    const int64_t row_head = span.row * op_.kv_heads + span.kv_head;
    std::vector<size_t> next(group_);  // per head, the first of its tokens with weight that is still to be added
    for (int h = 0; h < group_; ++h) {
      const auto& tokens = heads_[first_head + h].tokens;
      const int32_t begin = unit(row_head, span.first) * unit_tokens_;
      next[h] = std::lower_bound(tokens.begin(), tokens.end(), begin) - tokens.begin();
    }
    const int32_t end = (unit(row_head, span.end - 1) + 1) * unit_tokens_;
    const int32_t* table = op_.page_table.row(span.row);
    std::vector<float> weights(group_ * kTileTokens);
    const T* values[kTileTokens];
    int count = 0;
    float* sum = sums_.data() + index * group_ * op_.head_dim;
    while (true) {
      int32_t token = end;
      for (int h = 0; h < group_; ++h) {
        const auto& tokens = heads_[first_head + h].tokens;
        if (next[h] < tokens.size()) token = std::min(token, tokens[next[h]]);
      }
      if (token == end || count == kTileTokens) {
        kernels_.accumulate(values, count, weights.data(), group_, op_.head_dim, sum);
        count = 0;
        if (token == end) return;
      }
      for (int h = 0; h < group_; ++h) {
        const Candidates& head = heads_[first_head + h];
        const bool has_weight = next[h] < head.tokens.size() && head.tokens[next[h]] == token;
        weights[count * group_ + h] = has_weight ? head.scores[next[h]++] : 0;
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
    spans_.for_each_of(row_head, [&](int64_t span) {
      const float* sum = sums_.data() + (span * group_ + head % group_) * op_.head_dim;
      for (int d = 0; d < op_.head_dim; ++d) total[d] += sum[d];
    });
    T* out = op_.out.template at<T>(row, head);
    for (int d = 0; d < op_.head_dim; ++d) out[d] = from_float<T>(total[d]);
  }

  const SparseDecode& op_;
  const RowKernels<T>& kernels_ = row_kernels<T>();
  const int group_;
  const int unit_tokens_;          // tokens of a unit
  const Spans spans_;              // spans of units
  std::vector<Candidates> found_;  // [spans, group]
  std::vector<Candidates> heads_;  // [batch, q_heads]
  std::vector<float> sums_;        // [spans, group, head_dim]
};

}  // namespace

void sparse_decode(const SparseDecode& op) {
  dispatch(op.dtype, [&](auto element) { Decoder<decltype(element)>(op).run(); });
}

}  // namespace entmaxkv::cpu
