// Operator schemas of permattn_native. A plan arrives as core.packing.pack_plan made it.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(permattn_native, m) {
  m.def(
      "cpu_forward(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) lse, "
      "Tensor[] plan_tensors, int[] plan_ints, float scale, int isa) -> ()");
  m.def(
      "cpu_backward(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor dout, Tensor "
      "dlse, "
      "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor[] plan_tensors, "
      "Tensor[] transposed_tensors, int[] plan_ints, float scale, int isa) -> ()");
  m.def(
      "cpu_probe(Tensor q, Tensor k, Tensor first_position, Tensor first_coordinate, "
      "Tensor key_range, Tensor? order, Tensor? skip, bool lse_is_given, Tensor(a!) lse, "
      "Tensor(b!) column, Tensor(c!) square, Tensor(d!) diagonal, int isa) -> ()");
  m.def(
      "cpu_prepare(Tensor x, Tensor? token_of_slot, Tensor[] prologue_tensors, int[] "
      "prologue_ints, "
      "float[] prologue_floats, Tensor? mean, Tensor? factor, int format, int rows_per_scale, "
      "bool per_column, Tensor(a!) rows, Tensor(b!) scales, int isa) -> ()");
  m.def(
      "cpu_column_statistics(Tensor x, Tensor[] prologue_tensors, int[] prologue_ints, "
      "float[] prologue_floats, Tensor? seen, Tensor(a!) sum, Tensor(b!) lowest, "
      "Tensor(c!) highest, int isa) -> ()");
  m.def(
      "cpu_forward_quantised(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) lse, "
      "Tensor[] plan_tensors, int[] plan_ints, Tensor[] prologue_tensors, int[] prologue_ints, "
      "float[] prologue_floats, Tensor? mean, Tensor? k_factor, Tensor? q_factor, float scale, "
      "int isa) -> ()");
  m.def(
      "cpu_attend_regions(Tensor q, Tensor k, Tensor v, Tensor graph, Tensor? weights, "
      "Tensor(a!) out, Tensor(b!) lse, int[] boxes, bool count_padding, float scale, int isa) -> "
      "()");
  m.def(
      "cpu_attend_regions_backward(Tensor q, Tensor k, Tensor v, Tensor graph, Tensor? weights, "
      "Tensor out, Tensor lse, Tensor dout, Tensor dlse, Tensor(a!) dq, Tensor(b!) dk, "
      "Tensor(c!) dv, Tensor(d!)? dweights, int[] boxes, bool count_padding, float scale, "
      "int isa) -> ()");
  m.def(
      "cpu_route(Tensor q, Tensor k, int[] boxes, int topk, float scale, Tensor(a!) graph, "
      "Tensor(b!) values, int isa) -> ()");
  m.def("cpu_best_isa() -> int");
  m.def(
      "cuda_attend(Tensor q, Tensor? q_scale, Tensor? q_token, Tensor[] part_tensors, "
      "Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? acc, Tensor(d!)? high, Tensor(e!)? total, "
      "Tensor? order, int[] ints, float scale) -> ()");
  m.def("cuda_finish(Tensor acc, Tensor high, Tensor total, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "cuda_prepare(Tensor x, Tensor? token_of_slot, Tensor[] prologue_tensors, int[] "
      "prologue_ints, "
      "float[] prologue_floats, Tensor? mean, Tensor? factor, Tensor? against, Tensor(a!)? dots, "
      "int format, int rows_per_scale, bool per_column, int layout, Tensor(b!) rows, "
      "Tensor(c!)? scales) -> ()");
  m.def(
      "cuda_column_statistics(Tensor x, Tensor[] prologue_tensors, int[] prologue_ints, "
      "float[] prologue_floats, Tensor? seen, Tensor(a!) sum, Tensor(b!) lowest, "
      "Tensor(c!) highest) -> ()");
  m.def(
      "cuda_compact(Tensor mask, bool all_full, Tensor(a!) indices, Tensor(b!) row_offsets, "
      "Tensor(c!) num_full) -> ()");
  m.def(
      "cuda_transpose(Tensor kv_indices, Tensor row_offsets, Tensor kv_num_full, "
      "Tensor(a!) q_indices, Tensor(b!) key_offsets, Tensor(c!) q_num_full) -> ()");
  m.def(
      "cuda_probe(Tensor q, Tensor k, Tensor first_position, Tensor first_coordinate, "
      "Tensor key_range, Tensor? order, Tensor? skip, bool lse_is_given, int all_rows, "
      "Tensor(a!) lse, Tensor(b!) column, Tensor(c!) square, Tensor(d!) diagonal) -> ()");
  m.def("cuda_order(Tensor[] row_offsets, int[] ints, Tensor(a!) order) -> ()");
  m.def("cuda_pool(Tensor x, Tensor? token_of_slot, int block, Tensor(a!) means) -> ()");
  m.def("cuda_scores(Tensor q, Tensor k, float scale, Tensor(a!) scores) -> ()");
  m.def("cuda_strongest(Tensor scores, Tensor? stop, Tensor? budget, Tensor(a!) chosen) -> ()");
  m.def("cuda_why_not(int[] shape) -> str");
  m.def("cuda_config(int[] shape) -> int[]");
  m.def("cuda_archs() -> int[]");
  m.def("cuda_ptx_arch() -> int");
  m.def("cuda_version() -> int");
  m.def("cuda_driver_problem() -> str");
}
