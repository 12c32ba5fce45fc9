// Python's door to the kernels on the CPU, and to the pure functions that choose them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cuda/attend.h"
#include "cuda/sm80/dispatch.h"
#include "cuda/sm80/traits.cuh"
#include "cuda/sm80/estimate.h"
#include "cuda/sm90/estimate.h"
#include "cuda/sm90/launch.h"
#include "fixtures.h"

namespace py = pybind11;
using namespace permattn;
using cuda::AttentionArgs;
using cuda::Config;
using cuda::PartArgs;
using cuda::Shape;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

TensorView tensor_view(uintptr_t data, int64_t b, int64_t h, int64_t s) {
  return {pointer<void>(data), b, h, s};
}
IntView int_view(uintptr_t data, int64_t b, int64_t h, int64_t size) {
  return {pointer<const int32_t>(data), b, h, size};
}

// Runs the kernel of a config as a grid of blocks; those for sm_90a are recorded in its place.
void attend(const AttentionArgs& args, const Config& config) {
  const bool is_sm90 = config.family == cuda::Family::kSm90;
  const char* error = is_sm90 ? sm90::launch_attend(args, config, nullptr)
                              : sm80::launch_attend(args, config, nullptr);
  if (error != nullptr) throw std::runtime_error(error);
}

// Shared memory of the kernel of a config, without running it.
int64_t shared_bytes(const Config& config, Dtype dtype) {
  int64_t shared = 0;
  if (config.family == cuda::Family::kSm90) return sm90::shared_bytes(config, dtype);
  const char* error =
      sm80::visit_kernel(config, dtype,
                         [&]<Dtype kDtype, Format kQk, Format kPv, int kDim, int kRows>(
                             sm80::Kernel<kDtype, kQk, kPv, kDim, kRows>) -> const char* {
                           shared = sm80::Traits<kDtype, kQk, kPv, kDim, kRows>::kSharedBytes;
                           return nullptr;
                         });
  if (error != nullptr) throw std::invalid_argument(error);
  return shared;
}

py::dict sm80_tile_cycles(int capability, Format qk, Format pv, int dim, int rows) {
  const sm80::TileShape shape = sm80::tile_shape(qk, pv, dim, rows);
  if (shape.block_m == 0 || !sm80::has_kernel(qk, pv)) {
    throw std::invalid_argument("sm80: no kernel for these formats, head dim and rows");
  }
  const sm80::TileCycles c = sm80::tile_cycles(capability, qk, pv, dim, rows);
  return py::dict(py::arg("keys") = shape.block_n, py::arg("q_in_registers") = shape.q_in_registers,
                  py::arg("q_row") = sm80::row_bytes(qk, dim),
                  py::arg("read") = sm80::bytes_read(qk, pv, dim, rows),
                  py::arg("products") = c.products, py::arg("shared") = c.shared,
                  py::arg("exponentials") = c.exponentials, py::arg("floats") = c.floats,
                  py::arg("bound") = c.bound());
}

// `spans`: (all, floats, logic, special) of LoopCode's three.
py::dict sm90_step_cycles(Format qk, Format pv, int dim, int block_n, int tiles,
                          const std::array<std::array<int32_t, 4>, 3>& spans) {
  if (sm90::tile_shape(qk, pv, dim, block_n).block_n == 0) {
    throw std::invalid_argument("sm90: no kernel for these formats, head dim and keys");
  }
  const auto issued = [&](int i) {
    return sm90::Issued{spans[i][0], spans[i][1], spans[i][2], spans[i][3]};
  };
  const sm90::StepCycles c =
      sm90::step_cycles(qk, pv, dim, block_n, tiles, {issued(0), issued(1), issued(2)});
  return py::dict(py::arg("products") = c.products, py::arg("shared") = c.shared,
                  py::arg("instructions") = c.instructions, py::arg("l2") = c.l2,
                  py::arg("alone") = c.alone, py::arg("bound") = c.bound());
}

template <int kRowBytes>
int panel_offset(int row, int byte) {
  return ptx::PanelLayout<64, kRowBytes>::offset(row, byte);
}

void bind_structs(py::module_& m) {
  py::enum_<Dtype>(m, "Dtype")
      .value("float32", Dtype::kFloat32)
      .value("bfloat16", Dtype::kBFloat16)
      .value("float16", Dtype::kFloat16);
  py::enum_<Format>(m, "Format")
      .value("none", Format::kNone)
      .value("int8", Format::kInt8)
      .value("int4", Format::kInt4)
      .value("fp8", Format::kFp8);
  py::class_<TensorView>(m, "TensorView").def(py::init(&tensor_view));
  py::class_<IntView>(m, "IntView").def(py::init(&int_view));
  py::class_<PartArgs>(m, "PartArgs")
      .def(py::init([] { return PartArgs{}; }))
      .def_readwrite("k", &PartArgs::k)
      .def_readwrite("v", &PartArgs::v)
      .def_readwrite("k_heads", &PartArgs::k_heads)
      .def_readwrite("v_heads", &PartArgs::v_heads)
      .def_readwrite("k_in_slots", &PartArgs::k_in_slots)
      .def_readwrite("v_in_slots", &PartArgs::v_in_slots)
      .def_property("k_scale", nullptr,
                    [](PartArgs& p, uintptr_t x) { p.k_scale = pointer<const float>(x); })
      .def_property("v_tiles", nullptr,
                    [](PartArgs& p, uintptr_t x) { p.v_tiles = pointer<const void>(x); })
      .def_property("v_scale", nullptr,
                    [](PartArgs& p, uintptr_t x) { p.v_scale = pointer<const float>(x); })
      .def_readwrite("kv_token", &PartArgs::kv_token)
      .def_readwrite("kv_indices", &PartArgs::kv_indices)
      .def_readwrite("row_offsets", &PartArgs::row_offsets)
      .def_readwrite("num_full", &PartArgs::num_full)
      .def_readwrite("num_slots", &PartArgs::num_slots)
      .def_readwrite("block_q", &PartArgs::block_q)
      .def_readwrite("block_kv", &PartArgs::block_kv)
      .def("set_band",
           [](PartArgs& p, std::optional<int64_t> min_lag, std::optional<int64_t> max_lag) {
             p.band = lanes_are_queries(band_of(min_lag.has_value(), min_lag.value_or(0),
                                                max_lag.has_value(), max_lag.value_or(0)));
             p.has_band = min_lag.has_value() || max_lag.has_value();
             p.two_bounds = min_lag.has_value() && max_lag.has_value();
           });
  py::class_<AttentionArgs>(m, "AttentionArgs")
      .def(py::init([] { return AttentionArgs{}; }))
      .def_readwrite("batch", &AttentionArgs::batch)
      .def_readwrite("q_heads", &AttentionArgs::q_heads)
      .def_readwrite("num_q_tokens", &AttentionArgs::num_q_tokens)
      .def_readwrite("num_kv_tokens", &AttentionArgs::num_kv_tokens)
      .def_readwrite("head_dim", &AttentionArgs::head_dim)
      .def_readwrite("head_dim_v", &AttentionArgs::head_dim_v)
      .def_readwrite("scale_log2", &AttentionArgs::scale_log2)
      .def_readwrite("q", &AttentionArgs::q)
      .def_property("q_scale", nullptr,
                    [](AttentionArgs& a, uintptr_t x) { a.q_scale = pointer<const float>(x); })
      .def_readwrite("q_rows", &AttentionArgs::q_rows)
      .def_readwrite("kv_rows", &AttentionArgs::kv_rows)
      .def_readwrite("q_token", &AttentionArgs::q_token)
      .def_readwrite("num_q_slots", &AttentionArgs::num_q_slots)
      .def_readwrite("out_dtype", &AttentionArgs::out_dtype)
      .def_readwrite("out", &AttentionArgs::out)
      .def_property("lse", nullptr,
                    [](AttentionArgs& a, uintptr_t x) { a.lse = pointer<float>(x); })
      .def("set_state",
           [](AttentionArgs& a, uintptr_t acc, uintptr_t high, uintptr_t total) {
             a.acc = pointer<float>(acc);
             a.high = pointer<float>(high);
             a.total = pointer<float>(total);
           })
      .def_property("order", nullptr,
                    [](AttentionArgs& a, uintptr_t x) { a.order = pointer<const int32_t>(x); })
      .def_readwrite("unit", &AttentionArgs::unit)
      .def_readwrite("tiles_per_unit", &AttentionArgs::tiles_per_unit)
      .def_readwrite("num_tiles", &AttentionArgs::num_tiles)
      .def_readwrite("tiles_per_item", &AttentionArgs::tiles_per_item)
      .def("add_part", [](AttentionArgs& a, const PartArgs& part) {
        if (a.num_parts == cuda::kMaxParts) throw std::invalid_argument("too many parts");
        a.parts[a.num_parts++] = part;
      });
  py::class_<Shape>(m, "Shape")
      .def(py::init([](int32_t capability, Dtype dtype, Format qk, Format pv, int32_t head_dim,
                       int32_t head_dim_v, int32_t unit, int32_t block_kv, int32_t q_rows,
                       int32_t kv_rows) {
             return Shape{capability, dtype, qk,       pv,     head_dim,
                          head_dim_v, unit,  block_kv, q_rows, kv_rows};
           }),
           py::kw_only(), py::arg("capability"), py::arg("dtype"), py::arg("qk"), py::arg("pv"),
           py::arg("head_dim"), py::arg("head_dim_v"), py::arg("unit"), py::arg("block_kv"),
           py::arg("q_rows"), py::arg("kv_rows"));
  py::class_<Config>(m, "Config")
      .def_property_readonly("is_sm90",
                             [](const Config& c) { return c.family == cuda::Family::kSm90; })
      .def_readonly("dim", &Config::dim)
      .def_readonly("block_m", &Config::block_m)
      .def_readonly("block_n", &Config::block_n)
      .def_readonly("warps", &Config::warps)
      .def_readonly("stages", &Config::stages)
      .def_property_readonly("tiles_per_item",
                             [](const Config& c) { return cuda::tiles_per_item(c); })
      .def_readonly("qk", &Config::qk)
      .def_readonly("pv", &Config::pv);
}

}  // namespace

PYBIND11_MODULE(permattn_cuda_shim, m) {
  bind_structs(m);
  m.def("why_not", [](const Shape& s) -> std::optional<std::string> {
    const char* why = cuda::why_not(s);
    return why == nullptr ? std::nullopt : std::optional<std::string>(why);
  });
  m.def("select_config", [](const Shape& s) {
    const char* why = cuda::why_not(s);
    if (why != nullptr) throw std::invalid_argument(why);
    return cuda::select_config(s);
  });
  m.def("shared_bytes", &shared_bytes);
  m.def("sm80_tile_cycles", &sm80_tile_cycles);
  m.def("sm90_step_cycles", &sm90_step_cycles);
  m.def("shared_limit", &cuda::shared_limit);
  m.def("attend", &attend);
  m.def("panel_offset", [](int row_bytes, int row, int byte) {
    switch (row_bytes) {
      case 32:
        return panel_offset<32>(row, byte);
      case 64:
        return panel_offset<64>(row, byte);
      case 96:
        return panel_offset<96>(row, byte);
      case 128:
        return panel_offset<128>(row, byte);
      case 192:
        return panel_offset<192>(row, byte);
      case 256:
        return panel_offset<256>(row, byte);
      default:
        throw std::invalid_argument("row_bytes: wants 32, 64, 96, 128, 192 or 256");
    }
  });
  m.def("rotate", &fixtures::rotate);
  m.def("product", &fixtures::product);
  m.def("load_matrices", &fixtures::load_matrices);
  m.def("e4m3_bits", &shim::e4m3_bits);
  // (kernel, blocks, threads, bytes of shared memory, parameters) of launches since the last call.
  const auto as_tuple = [](const shim::Recorded& r) {
    return py::make_tuple(r.kernel, r.blocks, r.threads, r.shared_bytes, py::bytes(r.parameters));
  };
  // Called from operators, which hold no lock of the interpreter.
  m.def("run_launches_with", [as_tuple](const py::object& run) {
    if (run.is_none()) {
      shim::run_launch = nullptr;
      return;
    }
    shim::run_launch = [as_tuple, run](const shim::Recorded& launch) {
      const py::gil_scoped_acquire lock;
      run(*as_tuple(launch));
    };
  });
  m.def("take_recorded", [as_tuple] {
    py::list taken;
    for (const shim::Recorded& r : shim::recorded) taken.append(as_tuple(r));
    shim::recorded.clear();
    return taken;
  });
  m.def("set_processors", [](int32_t count) { shim::recorded_processors = count; });
  m.def("set_options", [](uint64_t seed, bool eager) {
    shim::options.seed = seed;
    shim::options.eager = eager;
  });
  m.def("refuse_launches", [](const std::string& why) { shim::options.refusal = why; });
  m.def("set_recording", [](bool records, bool runs) {
    shim::options.records = records;
    shim::options.runs = runs;
  });
  m.def("take_statistics", [] {
    const auto taken = std::pair(shim::statistics.matrix_loads, shim::statistics.bank_conflicts);
    shim::statistics = {};
    return taken;
  });
}
