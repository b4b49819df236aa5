// papo_kernels._C: pointers come in as integers, errors go out as exceptions. The caller owns the
// tensors, and has checked them.
//
// A struct that differs from call to call is a tuple of integers in Python, one for each member;
// one that calls share is an object.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstddef>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "papo/launch.h"

namespace py = pybind11;
using namespace papo;

namespace {

// Python's integer as the member of a struct that it stands for: a pointer, a number or an enum.
struct Member {
  long long value;

  template <typename T>
  operator T() const {
    if constexpr (std::is_pointer_v<T>) {
      return reinterpret_cast<T>(static_cast<uintptr_t>(value));
    } else {
      return static_cast<T>(value);
    }
  }
};

// Takes a tuple of `kMembers` integers for a `Struct`.
template <typename Struct, size_t kMembers>
struct TupleCaster {
  PYBIND11_TYPE_CASTER(Struct, py::detail::const_name("tuple"));

  bool load(py::handle source, bool) {
    PyObject* tuple = source.ptr();
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != static_cast<Py_ssize_t>(kMembers)) {
      return false;
    }
    fill(tuple, std::make_index_sequence<kMembers>());
    if (PyErr_Occurred() == nullptr) return true;
    PyErr_Clear();
    return false;
  }

 private:
  template <size_t... i>
  void fill(PyObject* tuple, std::index_sequence<i...>) {
    value = Struct{Member{PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i))}...};
  }
};

}  // namespace

namespace pybind11::detail {
template <>
struct type_caster<Matrix> : TupleCaster<Matrix, 5> {};
template <>
struct type_caster<TokenStatsOut> : TupleCaster<TokenStatsOut, 5> {};
template <>
struct type_caster<TokenStatsGrads> : TupleCaster<TokenStatsGrads, 4> {};
template <>
struct type_caster<TokenInputs> : TupleCaster<TokenInputs, 9> {};
template <>
struct type_caster<PolicyLossOut> : TupleCaster<PolicyLossOut, 8> {};
}  // namespace pybind11::detail

namespace {

template <typename T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message);
}

#if defined(PAPO_WITH_CUDA)
constexpr bool kHasCuda = true;
#define PAPO_DISPATCH(launch, function, ...) \
  ((launch).device >= 0 ? cuda::function(__VA_ARGS__) : cpu::function(__VA_ARGS__))
#else
constexpr bool kHasCuda = false;
constexpr const char* kWithoutCuda = "papo_kernels was built without CUDA";
#define PAPO_DISPATCH(launch, function, ...) \
  ((launch).device >= 0 ? Status{kWithoutCuda} : cpu::function(__VA_ARGS__))
#endif

void token_stats_fwd(const Matrix& logits, uintptr_t targets, uintptr_t state,
                     const RowParams& row, const TokenStatsOut& out, const Launch& launch) {
  const py::gil_scoped_release release;
  check(PAPO_DISPATCH(launch, launch_token_stats_fwd, logits, pointer<int64_t>(targets),
                      pointer<double>(state), row, out, launch));
}

void token_stats_bwd(const Matrix& logits, uintptr_t targets, uintptr_t state,
                     const TokenStatsGrads& grads, const RowParams& row, const Matrix& dlogits,
                     const Launch& launch) {
  const py::gil_scoped_release release;
  check(PAPO_DISPATCH(launch, launch_token_stats_bwd, logits, pointer<int64_t>(targets),
                      pointer<double>(state), grads, row, dlogits, launch));
}

void policy_loss(const Matrix& logits, const TokenInputs& tokens, const Objective& objective,
                 const Weighting& weighting, const RowParams& row, const PolicyLossOut& out,
                 const Matrix& dlogits, const Launch& launch) {
  const py::gil_scoped_release release;
  check(PAPO_DISPATCH(launch, launch_policy_loss, logits, tokens, objective, weighting, row, out,
                      dlogits, launch));
}

void scale(const Matrix& matrix, uintptr_t factor, const Launch& launch) {
  const py::gil_scoped_release release;
  check(PAPO_DISPATCH(launch, launch_scale, matrix, pointer(factor), launch));
}

// Raises a ValueError where the device cannot cut logits of `columns` as `choice` says.
void check_tile([[maybe_unused]] int64_t columns, [[maybe_unused]] int dtype,
                [[maybe_unused]] int device, [[maybe_unused]] const TileChoice& choice) {
#if defined(PAPO_WITH_CUDA)
  const Status status = cuda::check_tile(columns, static_cast<DType>(dtype), device, choice);
  if (!status.ok()) throw py::value_error(status.message);
#else
  throw py::value_error(kWithoutCuda);
#endif
}

// The position of the first target that is neither a column nor ignored, or -1.
int64_t first_bad_target(uintptr_t targets, int64_t count, int64_t vocab_size) {
  const int64_t* t = pointer<int64_t>(targets);
  for (int64_t i = 0; i < count; ++i) {
    if ((t[i] < 0 || t[i] >= vocab_size) && t[i] != kIgnoreIndex) return i;
  }
  return -1;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("has_cuda") = kHasCuda;
  m.def("cpu_isa", &cpu::isa_name);

  py::class_<RowParams>(m, "RowParams")
      .def(py::init([](double temperature, double softcap, int64_t vocab_size, bool sharded,
                       uintptr_t temperatures) {
             return RowParams{temperature, softcap, vocab_size, sharded, pointer(temperatures)};
           }),
           py::arg("temperature"), py::arg("softcap"), py::arg("vocab_size"),
           py::arg("sharded") = false, py::arg("temperatures") = 0);
  // The numbers of objective.py's `Objective.numbers`.
  py::class_<Objective>(m, "Objective")
      .def(py::init([](int surrogate, int kl_estimator, bool kl_slope_of_k2, bool kl_ratio,
                       const std::array<double, 14>& x) {
             return Objective{static_cast<Surrogate>(surrogate),
                              static_cast<KlEstimator>(kl_estimator),
                              kl_slope_of_k2,
                              kl_ratio,
                              x[0], x[1], x[2], x[3], x[4], x[5], x[6],
                              x[7], x[8], x[9], x[10], x[11], x[12], x[13]};
           }),
           py::arg("surrogate"), py::arg("kl_estimator"), py::arg("kl_slope_of_k2"),
           py::arg("kl_ratio"), py::arg("numbers"));
  py::class_<Weighting>(m, "Weighting")
      .def(py::init([](int shape, double strength, double dead_zone, uintptr_t phase,
                       uintptr_t sigma, uintptr_t scale_) {
             return Weighting{static_cast<WeightShape>(shape), strength, dead_zone,
                              pointer(phase), pointer(sigma), pointer(scale_)};
           }),
           py::arg("shape"), py::arg("strength"), py::arg("dead_zone"), py::arg("phase"),
           py::arg("sigma"), py::arg("scale"));
  py::class_<TileChoice>(m, "TileChoice")
      .def(py::init([](int kernel, int cluster, int warps, int stages, int ring, int blocks,
                       int stats, int stats_teams, int stats_ring, int stats_blocks) {
             return TileChoice{kernel, cluster, warps,       stages,     ring,
                               blocks, stats,   stats_teams, stats_ring, stats_blocks};
           }),
           py::arg("kernel") = 0, py::arg("cluster") = 0, py::arg("warps") = 0,
           py::arg("stages") = 0, py::arg("ring") = 0, py::arg("blocks") = 0, py::arg("stats") = 0,
           py::arg("stats_teams") = 0, py::arg("stats_ring") = 0, py::arg("stats_blocks") = 0);
  // Device -1 is the CPU.
  py::class_<Launch>(m, "Launch")
      .def(py::init([](int threads, int device, uintptr_t stream, const TileChoice& choice) {
             return Launch{threads, device, pointer(stream), choice};
           }),
           py::arg("threads") = 1, py::arg("device") = -1, py::arg("stream") = 0,
           py::arg("choice") = TileChoice{});

  m.def("token_stats_fwd", &token_stats_fwd, py::arg("logits"), py::arg("targets"),
        py::arg("state"), py::arg("row"), py::arg("out"), py::arg("launch"));
  m.def("token_stats_bwd", &token_stats_bwd, py::arg("logits"), py::arg("targets"),
        py::arg("state"), py::arg("grads"), py::arg("row"), py::arg("dlogits"), py::arg("launch"));
  m.def("policy_loss", &policy_loss, py::arg("logits"), py::arg("tokens"), py::arg("objective"),
        py::arg("weighting"), py::arg("row"), py::arg("out"), py::arg("dlogits"),
        py::arg("launch"));
  m.def("first_bad_target", &first_bad_target, py::arg("targets"), py::arg("count"),
        py::arg("vocab_size"));
  m.def("check_tile", &check_tile, py::arg("columns"), py::arg("dtype"), py::arg("device"),
        py::arg("choice"));
  m.def("scale", &scale, py::arg("matrix"), py::arg("factor"), py::arg("launch"));
}
