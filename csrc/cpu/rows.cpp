// Row kernels for any CPU (rows.h), and the choice between the vector widths.
#include "rows.h"

#include <cmath>
#include <cstdlib>
#include <string>
#include <utility>

#define ENTMAXKV_ISA any

namespace entmaxkv::cpu::any {
constexpr int kLanes = 4;
typedef float Vector __attribute__((vector_size(4 * kLanes)));

inline Vector load(const Float16* from) {
  return Vector{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])};
}
}  // namespace entmaxkv::cpu::any

#include "rows.inl"

namespace entmaxkv::cpu {

#if defined(__x86_64__)
namespace avx2 {
const RowKernels<float>& kernels(float);
const RowKernels<Float16>& kernels(Float16);
const RowKernels<BFloat16>& kernels(BFloat16);
}  // namespace avx2
namespace avx512 {
const RowKernels<float>& kernels(float);
const RowKernels<Float16>& kernels(Float16);
const RowKernels<BFloat16>& kernels(BFloat16);
}  // namespace avx512

namespace {
enum class Isa { kAny, kAvx2, kAvx512 };

const Isa kIsa = [] {
  __builtin_cpu_init();
  const auto avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // every CPU with these has f16c, too
  // This variable limits the width of torch's own kernels.
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string limit = variable ? variable : "avx512";
  const auto avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512 && limit == "avx512") return Isa::kAvx512;
  return avx2 && limit != "default" ? Isa::kAvx2 : Isa::kAny;
}();
}  // namespace

template <typename T>
const RowKernels<T>& row_kernels() {
  return kIsa == Isa::kAvx512 ? avx512::kernels(T{}) : kIsa == Isa::kAvx2 ? avx2::kernels(T{}) : any::kernels(T{});
}

#else
template <typename T>
const RowKernels<T>& row_kernels() {
  return any::kernels(T{});
}
#endif

template const RowKernels<float>& row_kernels();
template const RowKernels<Float16>& row_kernels();
template const RowKernels<BFloat16>& row_kernels();

}  // namespace entmaxkv::cpu
