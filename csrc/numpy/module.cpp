// The core as a numpy module, without torch. It has just enough functions for tests to run the CPU kernels under
// sanitizers (tests/test_core.py), and is no public interface. Arrays are float32 and contiguous, and are not checked.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>

#include "cpu/kernels.h"

namespace py = pybind11;

namespace entmaxkv {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

Rows rows_of(Array<float>& array) {
  Rows rows{array.mutable_data()};
  for (py::ssize_t i = 0; i + 1 < array.ndim(); ++i) rows.stride[i] = array.strides(i) / sizeof(float);
  return rows;
}

/// A cache of pages with their statistics, which append_kv fills.
class Cache {
 public:
  Cache(int batch, int max_tokens, int kv_heads, int head_dim, int page_size) {
    sizes_.batch = batch;
    sizes_.kv_heads = kv_heads;
    sizes_.head_dim = head_dim;
    sizes_.page_size = page_size;
    sizes_.max_pages = (max_tokens + page_size - 1) / page_size;
    const py::ssize_t pages = sizes_.pages = batch * sizes_.max_pages;
    k_pages_ = Array<float>({pages, py::ssize_t{kv_heads}, py::ssize_t{page_size}, py::ssize_t{head_dim}});
    v_pages_ = Array<float>({pages, py::ssize_t{kv_heads}, py::ssize_t{page_size}, py::ssize_t{head_dim}});
    for (auto& statistic : statistics_) {
      statistic = Array<float>({pages, py::ssize_t{kv_heads}, py::ssize_t{head_dim}});
    }
    page_table_ = Array<int32_t>({py::ssize_t{batch}, py::ssize_t{sizes_.max_pages}});
    for (py::ssize_t page = 0; page < pages; ++page) page_table_.mutable_data()[page] = pages - 1 - page;
    seq_lens_ = Array<int32_t>(batch);
    std::fill_n(seq_lens_.mutable_data(), batch, 0);
  }

  void append(Array<float> k, Array<float> v) {
    auto op = on_cache<AppendKv>(sizes_);
    op.tokens = static_cast<int>(k.shape(1));
    op.k = rows_of(k);
    op.v = rows_of(v);
    op.lengths = nullptr;
    op.k_pages = rows_of(k_pages_);
    op.v_pages = rows_of(v_pages_);
    op.statistics = statistics();
    op.new_seq_lens = seq_lens_.mutable_data();
    cpu::append_kv(op);
  }

  void renew_statistics() {
    auto op = on_cache<PageStats>(sizes_);
    op.k_pages = rows_of(k_pages_);
    op.statistics = statistics();
    cpu::page_stats(op);
  }

  /// Decodes over every page (budget = 0), or over those that select_pages (> 0) or select_gaussian (< 0) selects.
  Array<float> decode(Array<float> q, double alpha, int64_t budget) {
    Sizes sizes = sizes_;
    sizes.q_heads = static_cast<int>(q.shape(1));
    sizes.group = sizes.q_heads / sizes.kv_heads;
    const Scoring scoring{1 / std::sqrt(static_cast<float>(sizes.head_dim)), nullptr};
    Array<int32_t> selected({sizes.batch, sizes.kv_heads, sizes.max_pages}), counts({sizes.batch, sizes.kv_heads});
    const Selection selection{selected.mutable_data(), counts.mutable_data(), sizes.max_pages};
    Array<float> first({sizes.batch, sizes.q_heads, sizes.max_pages}), second(first.request().shape);
    if (budget > 0) {
      auto score = on_cache<ScorePages>(sizes);
      score.q = rows_of(q);
      score.k_min = statistics().k_min;
      score.k_max = statistics().k_max;
      score.scoring = scoring;
      score.lower = kRankLower;
      score.scores = first.mutable_data();
      cpu::score_pages(score);
      SelectPages select;
      static_cast<Sizes&>(select) = sizes;
      select.scores = first.data();
      select.seq_lens = seq_lens_.data();
      select.budget = budget;
      select.selection = selection;
      cpu::select_pages(select);
    } else if (budget < 0) {
      auto score = on_cache<ScoreGaussian>(sizes);
      score.q = rows_of(q);
      score.k_mean = statistics().k_mean;
      score.k_std = statistics().k_std;
      score.scoring = scoring;
      score.mean = first.mutable_data();
      score.std = second.mutable_data();
      cpu::score_gaussian(score);
      SelectGaussian select;
      static_cast<Sizes&>(select) = sizes;
      select.mean = first.data();
      select.std = second.data();
      select.seq_lens = seq_lens_.data();
      select.alpha = {alpha, nullptr};
      select.page_best = 3;
      select.margin = 0;
      select.selection = selection;
      cpu::select_gaussian(select);
    }
    Array<float> out(q.request().shape), tau({sizes.batch, sizes.q_heads});
    Array<int32_t> support({sizes.batch, sizes.q_heads}), tokens({sizes.batch, sizes.kv_heads});
    auto op = on_cache<SparseDecode>(sizes);
    op.q = rows_of(q);
    op.k_pages = rows_of(k_pages_);
    op.v_pages = rows_of(v_pages_);
    op.selection = budget ? selection : Selection{};
    op.alpha = {alpha, nullptr};
    op.scoring = scoring;
    op.out = rows_of(out);
    op.tau = tau.mutable_data();
    op.support = support.mutable_data();
    op.tokens = tokens.mutable_data();
    cpu::sparse_decode(op);
    return out;
  }

 private:
  /// The params of an op, with what the ops on this cache have in common.
  template <typename Op>
  Op on_cache(const Sizes& sizes) const {
    Op op;
    static_cast<Sizes&>(op) = sizes;
    op.dtype = Dtype::kFloat32;
    op.page_table = {page_table_.data(), sizes.max_pages};
    op.seq_lens = seq_lens_.data();
    return op;
  }

  PageStatistics statistics() {
    return {rows_of(statistics_[0]), rows_of(statistics_[1]), rows_of(statistics_[2]), rows_of(statistics_[3])};
  }

  Sizes sizes_;
  Array<float> k_pages_, v_pages_, statistics_[4];
  Array<int32_t> page_table_, seq_lens_;
};

}  // namespace
}  // namespace entmaxkv

PYBIND11_MODULE(entmaxkv_core_numpy, m) {
  using entmaxkv::Cache;
  py::class_<Cache>(m, "Cache")
      .def(py::init<int, int, int, int, int>(), py::arg("batch"), py::arg("max_tokens"), py::arg("kv_heads"),
           py::arg("head_dim"), py::arg("page_size") = 16)
      .def("append", &Cache::append, py::arg("k"), py::arg("v"))
      .def("renew_statistics", &Cache::renew_statistics)
      .def("decode", &Cache::decode, py::arg("q"), py::arg("alpha") = 1.5, py::arg("budget") = 0);
}
