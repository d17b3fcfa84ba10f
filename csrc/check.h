// How front doors turn tensors into the params of ops.h. They check ranks, sizes, dtypes, devices and values. Every
// error has the same form:
//     entmaxkv::op: argument: expected ..., got ...
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <limits>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "ops.h"
#include "sketch.h"

namespace entmaxkv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

#if defined(USE_CUDA) || defined(EMULATE_TRUST)
inline constexpr bool kOnHost = false;  // tensors lie on a device: their values cannot be looked at here
#else
inline constexpr bool kOnHost = true;
#endif

/// A new tensor on the device of `like`, with undefined values.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

/// The torch dtype of T: float, int32_t or uint8_t.
template <typename T>
constexpr ScalarType kScalarType = std::is_same_v<T, float>     ? ScalarType::Float
                                   : std::is_same_v<T, uint8_t> ? ScalarType::Byte
                                                                : ScalarType::Int;

/// A new tensor for results. `values` then points to its memory.
template <typename T>
Tensor new_values(const Tensor& like, const std::vector<int64_t>& sizes, T*& values) {
  Tensor tensor = new_tensor(like, sizes, kScalarType<T>);
  values = static_cast<T*>(tensor.data_ptr());
  return tensor;
}

/// What an error says of the page sizes that the kernels support.
inline const std::string& page_size_text() {
  static const std::string text =
      "a power of two in " + std::to_string(kMinPageSize) + " ... " + std::to_string(kMaxPageSize);
  return text;
}

/// What an error says of kMostTokens.
inline const std::string& most_tokens_text() {
  static const std::string text =
      "room for at most 2^31 - " + std::to_string((int64_t{1} << 31) - kMostTokens) + " tokens";
  return text;
}

/// The arguments of one call. Each tensor comes with a text, its name and the names of its dimensions: "k_pages [pages,
/// kv_heads, page_size, head_dim]". The first tensor that names a dimension determines its size. Later ones must agree.
class Arguments {
 public:
  explicit Arguments(const char* op) : op_(op) {}

  /// Checks rank, device, and sizes of known dimensions of a tensor, and learns the sizes of the others.
  void shape(const Tensor& tensor, std::string_view text) {
    const size_t bracket = text.find(" [");
    const auto name = text.substr(0, bracket);
    std::vector<std::string_view> dims;
    for (size_t at = bracket + 2; at < text.size();) {
      const size_t end = text.find_first_of(",]", at);
      dims.push_back(text.substr(at, end - at));
      at = end + 2;
    }
    if (tensor.dim() != static_cast<int64_t>(dims.size())) {
      fail(name, text.substr(bracket + 1), "shape " + sizes_of(tensor));
    }
    const std::pair<int, int> device{static_cast<int>(tensor.device().type()), tensor.get_device_index()};
    if (first_.empty()) {
      first_ = name;
      device_ = device;
    } else if (device != device_) {
      fail(name, "the device of " + std::string(first_), "another");
    }
    for (size_t i = 0; i < dims.size(); ++i) {
      const int64_t size = tensor.size(static_cast<int64_t>(i));
      const Dim* known = find(dims[i]);
      if (!known) {
        bind(dims[i], name, size);
      } else if (known->size != size) {
        fail(name,
             std::string(dims[i]) + " = " + std::to_string(known->size) + " (as in " + std::string(known->from) + ")",
             std::to_string(size) + " in shape " + sizes_of(tensor));
      }
    }
  }

  /// Determines the size of a dimension before any tensor names it.
  void know(std::string_view dim, int64_t size) { bind(dim, dim, size); }

  /// The size of a dimension; 0 if no tensor has named it.
  int operator[](std::string_view dim) const {
    const Dim* known = find(dim);
    return known ? static_cast<int>(known->size) : 0;
  }

  /// The sizes known by now. Checks that the kernels support them.
  Sizes sizes() const {
    Sizes sizes;
    sizes.batch = (*this)["batch"];
    sizes.tokens = (*this)["tokens"];
    sizes.q_heads = (*this)["q_heads"];
    sizes.kv_heads = (*this)["kv_heads"];
    sizes.head_dim = (*this)["head_dim"];
    sizes.page_size = (*this)["page_size"];
    sizes.max_pages = (*this)["max_pages"];
    sizes.pages = (*this)["pages"];
    expect(sizes.kv_heads >= 1, "kv_heads", "at least 1", sizes.kv_heads);
    expect(sizes.page_size >= kMinPageSize && sizes.page_size <= kMaxPageSize &&
               (sizes.page_size & (sizes.page_size - 1)) == 0,
           "page_size", page_size_text(), sizes.page_size);
    expect(int64_t{sizes.max_pages} * sizes.page_size <= kMostTokens, "max_pages", most_tokens_text(), sizes.max_pages);
    if (find("head_dim")) {
      expect(sizes.head_dim >= 1 && sizes.head_dim <= kMaxHeadDim, "head_dim", "1 ... " + std::to_string(kMaxHeadDim),
             sizes.head_dim);
    }
    if (find("q_heads")) {
      expect(sizes.q_heads >= 1 && sizes.q_heads % sizes.kv_heads == 0, "q_heads",
             "a multiple of kv_heads = " + std::to_string(sizes.kv_heads), sizes.q_heads);
      sizes.group = sizes.q_heads / sizes.kv_heads;
    }
    return sizes;
  }

  void dtype(const Tensor& tensor, std::string_view name, ScalarType expected) const {
    if (tensor.scalar_type() != expected) fail(name, name_of(expected), name_of(tensor.scalar_type()));
  }

  /// The dtype of a tensor of the cache.
  Dtype element(const Tensor& tensor, std::string_view name) const {
    switch (tensor.scalar_type()) {
      case ScalarType::Float:
        return Dtype::kFloat32;
      case ScalarType::Half:
        return Dtype::kFloat16;
      case ScalarType::BFloat16:
        return Dtype::kBFloat16;
      default:
        fail(name, "float32, float16 or bfloat16", name_of(tensor.scalar_type()));
    }
  }

  /// A tensor of the dtype of `like` whose last dimension is contiguous. Other strides may be any.
  Rows rows(const Tensor& tensor, std::string_view text, const Tensor& like) {
    shape(tensor, text);
    const auto name = text.substr(0, text.find(' '));
    dtype(tensor, name, like.scalar_type());
    const int64_t last = tensor.dim() - 1;
    if (tensor.size(last) > 1 && tensor.stride(last) != 1) {
      fail(name, "a contiguous last dimension", "stride " + std::to_string(tensor.stride(last)));
    }
    Rows rows{tensor.data_ptr()};
    for (int64_t i = 0; i < last; ++i) rows.stride[i] = tensor.stride(i);
    return rows;
  }

  /// The same for a tensor that the op writes. Each element must have memory of its own.
  Rows written_rows(const Tensor& tensor, std::string_view text, const Tensor& like) {
    const Rows result = rows(tensor, text, like);
    for (int64_t i = 0; i < tensor.dim(); ++i) {
      if (tensor.size(i) > 1 && tensor.stride(i) == 0) {
        fail(text.substr(0, text.find(' ')), "memory of its own for every element", "an expanded dimension");
      }
    }
    return result;
  }

  /// A contiguous tensor of float, int32_t or uint8_t.
  template <typename T>
  T* values(const Tensor& tensor, std::string_view text) {
    shape(tensor, text);
    const auto name = text.substr(0, text.find(' '));
    dtype(tensor, name, kScalarType<std::remove_const_t<T>>);
    if (!tensor.is_contiguous()) fail(name, "a contiguous tensor", "strides that are not");
    return static_cast<T*>(tensor.data_ptr());
  }

  /// The same for a tensor of few values. On the host it returns a copy: another thread may write to the tensor while
  /// the op runs, and kernels must use the same values that were checked. Values are loaded with acquire: whoever reads
  /// a length here also sees the tokens that were written before it.
  template <typename T>
  T* snapshot(const Tensor& tensor, std::string_view text) {
    T* from = values<T>(tensor, text);
    if constexpr (kOnHost) {
      using Value = std::remove_const_t<T>;
      const int64_t count = tensor.numel();
      owned_.push_back(std::make_unique<std::byte[]>(count * sizeof(Value)));
      auto* to = reinterpret_cast<Value*>(owned_.back().get());
      for (int64_t i = 0; i < count; ++i) {
        to[i] = std::atomic_ref(const_cast<Value&>(from[i])).load(std::memory_order_acquire);
      }
      return to;
    }
    return from;
  }

  template <typename T>
  T* snapshot(const Optional& tensor, std::string_view text) {
    return tensor ? snapshot<T>(*tensor, text) : nullptr;
  }

  template <typename Value>
  void expect(bool holds, std::string_view name, const std::string& expected, const Value& got) const {
    if (holds) return;
    std::ostringstream text;
    text << got;
    fail(name, expected, text.str());
  }

  [[noreturn]] void fail(std::string_view name, std::string_view expected, std::string_view got) const {
    std::ostringstream text;
    text << "entmaxkv::" << op_ << ": " << name << ": expected " << expected << ", got " << got;
    throw std::runtime_error(text.str());
  }

 private:
  struct Dim {
    std::string_view name, from;
    int64_t size;
  };

  void bind(std::string_view dim, std::string_view from, int64_t size) {
    if (size < 0 || size > std::numeric_limits<int>::max()) {
      fail(from, std::string(dim) + " in 0 ... 2^31 - 1", std::to_string(size));
    }
    dims_.push_back({dim, from, size});
  }

  const Dim* find(std::string_view name) const {
    for (const Dim& dim : dims_) {
      if (dim.name == name) return &dim;
    }
    return nullptr;
  }

  static std::string sizes_of(const Tensor& tensor) {
    std::string text = "[";
    for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
    return text + "]";
  }

  static std::string name_of(ScalarType type) {
    switch (type) {
      case ScalarType::Float:
        return "float32";
      case ScalarType::Half:
        return "float16";
      case ScalarType::BFloat16:
        return "bfloat16";
      case ScalarType::Double:
        return "float64";
      case ScalarType::Int:
        return "int32";
      case ScalarType::Byte:
        return "uint8";
      case ScalarType::Long:
        return "int64";
      default:
        return "another dtype";
    }
  }

  const char* op_;
  std::string_view first_;
  std::pair<int, int> device_;
  std::vector<Dim> dims_;
  std::vector<std::unique_ptr<std::byte[]>> owned_;  // snapshots
};

// The rest of this file is for arguments that several ops have.

inline PageTable page_table_of(Arguments& args, const Tensor& page_table) {
  args.shape(page_table, "page_table [batch, max_pages]");
  args.dtype(page_table, "page_table", ScalarType::Int);
  if (page_table.size(1) > 1 && page_table.stride(1) != 1) {
    args.fail("page_table", "a contiguous last dimension", "stride " + std::to_string(page_table.stride(1)));
  }
  return {static_cast<const int32_t*>(page_table.data_ptr()), page_table.stride(0)};
}

/// On the host: checks that every row's length fits the page table. On a device, kernels cut lengths to fit. `when`
/// is a part of the error's text.
template <typename LengthOf>
void check_lengths(const Arguments& args, LengthOf length_of, const char* when = "") {
  if constexpr (kOnHost) {
    const int64_t capacity = int64_t{args["max_pages"]} * args["page_size"];
    for (int row = 0; row < args["batch"]; ++row) {
      const int64_t tokens = length_of(row);
      if (tokens >= 0 && tokens <= capacity) continue;
      args.fail("seq_lens", "0 ... " + std::to_string(capacity) + " tokens per row" + when, std::to_string(tokens));
    }
  }
}

/// On the host: checks that the pages of the tokens first(row) ... end(row) - 1 of each row lie in the pool. On a
/// device the decode kernels bound what they read of the page table; other kernels trust it.
template <typename First, typename End>
void check_pages(const Arguments& args, const PageTable& page_table, First first, End end) {
  if constexpr (kOnHost) {
    const int page_size = args["page_size"], pages = args["pages"];
    for (int row = 0; row < args["batch"]; ++row) {
      const int32_t* physical = page_table.row(row);
      for (int64_t page = first(row) / page_size; page * page_size < end(row); ++page) {
        if (physical[page] >= 0 && physical[page] < pages) continue;
        args.fail("page_table", "ids in 0 ... " + std::to_string(pages - 1), std::to_string(physical[page]));
      }
    }
  }
}

/// Both checks, for all tokens in the cache.
inline void check_cache(const Arguments& args, const PageTable& page_table, const int32_t* seq_lens) {
  const auto length = [=](int row) { return seq_lens[row]; };
  check_lengths(args, length);
  check_pages(args, page_table, [](int) { return 0; }, length);
}

/// Takes the keys of the cache, and with them the dtype.
template <typename Op>
void take_keys(Arguments& args, Op& op, const Tensor& k_pages) {
  op.dtype = args.element(k_pages, "k_pages");
  op.k_pages = args.rows(k_pages, "k_pages [pages, kv_heads, page_size, head_dim]", k_pages);
}

/// Takes the page table and the lengths of a cache, and the sizes of the call. Checks what is in the cache.
template <typename Op>
void take_cache(Arguments& args, Op& op, const Tensor& page_table, const Tensor& seq_lens) {
  op.page_table = page_table_of(args, page_table);
  op.seq_lens = args.snapshot<const int32_t>(seq_lens, "seq_lens [batch]");
  static_cast<Sizes&>(op) = args.sizes();
  check_cache(args, op.page_table, op.seq_lens);
}

/// New tensors (selected, counts) for a selection of up to max_selected pages or tokens for each row and KV head.
inline std::tuple<Tensor, Tensor> new_selection(const Tensor& like, const Sizes& sizes, int64_t max_selected,
                                                Selection& selection) {
  Tensor selected = new_values(like, {sizes.batch, sizes.kv_heads, max_selected}, selection.selected);
  Tensor counts = new_values(like, {sizes.batch, sizes.kv_heads}, selection.counts);
  selection.max_selected = static_cast<int>(max_selected);
  return {selected, counts};
}

inline Alpha alpha_of(Arguments& args, double alpha, const Optional& head_alpha) {
  args.expect(alpha >= 1 && alpha <= 2, "alpha", "a number in 1 ... 2", alpha);
  Alpha result{alpha, args.snapshot<const float>(head_alpha, "head_alpha [q_heads]")};
  if (kOnHost && result.per_head) {
    for (int head = 0; head < args["q_heads"]; ++head) {
      args.expect(result.per_head[head] >= 1 && result.per_head[head] <= 2, "head_alpha", "numbers in 1 ... 2",
                  result.per_head[head]);
    }
  }
  return result;
}

inline Scoring scoring_of(Arguments& args, std::optional<double> scale, const Optional& alibi_slopes) {
  const double standard = 1 / std::sqrt(static_cast<double>(args["head_dim"]));
  const Scoring result{static_cast<float>(scale.value_or(standard)),
                       args.snapshot<const float>(alibi_slopes, "alibi_slopes [q_heads]")};
  args.expect(std::isfinite(result.scale), "scale", "a finite float32 number", scale.value_or(standard));
  if (kOnHost && result.alibi_slopes) {
    for (int head = 0; head < args["q_heads"]; ++head) {
      args.expect(std::isfinite(result.alibi_slopes[head]), "alibi_slopes", "finite numbers",
                  result.alibi_slopes[head]);
    }
  }
  return result;
}

/// Takes the queries of an op, with the cache whose keys, or statistics of keys, are `like`.
template <typename Op>
void take_queries(Arguments& args, Op& op, const Tensor& q, const Tensor& page_table, const Tensor& seq_lens,
                  const Tensor& like, std::optional<double> scale, const Optional& alibi_slopes) {
  // The page table comes before q, so that a wrong batch in q is reported against the page table.
  args.shape(page_table, "page_table [batch, max_pages]");
  op.q = args.rows(q, "q [batch, q_heads, head_dim]", like);
  take_cache(args, op, page_table, seq_lens);
  op.scoring = scoring_of(args, scale, alibi_slopes);
}

/// Takes the statistics of pages, which the op writes. Each pair is given or absent as a whole.
inline PageStatistics statistics_of(Arguments& args, const Tensor& like, const Optional& k_min, const Optional& k_max,
                                    const Optional& k_mean, const Optional& k_std) {
  args.expect(k_min.has_value() == k_max.has_value(), "k_min, k_max", "both or neither", "one of them");
  args.expect(k_mean.has_value() == k_std.has_value(), "k_mean, k_std", "both or neither", "one of them");
  PageStatistics statistics;
  if (k_min) statistics.k_min = args.written_rows(*k_min, "k_min [pages, kv_heads, head_dim]", like);
  if (k_max) statistics.k_max = args.written_rows(*k_max, "k_max [pages, kv_heads, head_dim]", like);
  if (k_mean) statistics.k_mean = args.written_rows(*k_mean, "k_mean [pages, kv_heads, head_dim]", like);
  if (k_std) statistics.k_std = args.written_rows(*k_std, "k_std [pages, kv_heads, head_dim]", like);
  return statistics;
}

/// Takes the codes and norms of a sketch: both or neither.
inline Sketch sketch_of(Arguments& args, const Optional& codes, const Optional& norms) {
  args.expect(codes.has_value() == norms.has_value(), "codes, norms", "both or neither", "one of them");
  if (!codes) return {};
  args.know("2", 2);
  args.know("3", 3);
  args.know("ceil(head_dim / 64) * 16", sketch::row_bytes(args["head_dim"]));
  const Sketch sketch{args.values<uint8_t>(*codes, "codes [pages, kv_heads, 2, page_size, ceil(head_dim / 64) * 16]"),
                      args.values<uint8_t>(*norms, "norms [pages, kv_heads, 3, page_size]")};
  const auto addresses = reinterpret_cast<uintptr_t>(sketch.codes) | reinterpret_cast<uintptr_t>(sketch.norms);
  args.expect(addresses % 16 == 0, "codes, norms", "memory aligned to 16 bytes", "another alignment");
  return sketch;
}

}  // namespace entmaxkv
