// The Python module fastattn._C, which fastattn/backends call. Built without torch: tensors.h reads its
// tensors.
#include <pthread.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <stdexcept>

#include "isa.h"
#include "parallel.h"
#include "result_memory.h"
#include "tensors.h"

namespace py = pybind11;

namespace fastattn {
namespace {

// The thread that Python handles signals on.
unsigned long main_thread = 0;

void find_main_thread() {
  main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  // Of a child it is the one that forked.
  pthread_atfork(nullptr, nullptr, [] { main_thread = PyThread_get_thread_ident(); });
}

bool is_main_thread() { return PyThread_get_thread_ident() == main_thread; }

// Runs the handlers of signals that have come; true if one raises, as that of Ctrl-C does.
bool handlers_raise() {
  const py::gil_scoped_acquire locked;
  return PyErr_CheckSignals() != 0;
}

// Computes without Python's lock. What a signal's handler raised meanwhile is raised here.
template <class Computation>
auto unlocked(Computation&& computation) {
  const Engine& chosen = engine();
  try {
    const py::gil_scoped_release release;
    return computation(chosen);
  } catch (const Interrupted&) {
    throw py::error_already_set();
  }
}

Tensor4<uint8_t> read_tensor4(py::handle tensor) {
  return tensor.is_none() ? Tensor4<uint8_t>{} : read_tensor(tensor).as_tensor4();
}

void* read_data(py::handle tensor) { return tensor.is_none() ? nullptr : read_tensor(tensor).data; }

// What the backward is given of the forward may be another tensor than the forward wrote: hooks for saved
// tensors return what they like. Without a dtype it is int16.
TensorView read_saved(py::handle tensor, std::optional<DType> dtype, std::initializer_list<int64_t> shape) {
  if (tensor.is_none()) return {};
  const TensorView view = read_tensor(tensor);
  if (view.dtype != dtype || (!dtype && !view.is_int16) ||
      !std::equal(shape.begin(), shape.end(), view.shape, view.shape + view.rank))
    throw std::invalid_argument(
        "a saved or incoming tensor of the backward has not the forward's shape and dtype");
  return view;
}

DType engine_dtype(const TensorView& tensor) {
  if (!tensor.dtype) throw std::invalid_argument("the engine does not compute in this dtype");
  return *tensor.dtype;
}

Causal read_causal(py::handle mode) {
  if (mode.is_none()) return Causal::none;
  const bool upper = PyUnicode_CompareWithASCIIString(mode.ptr(), "upper_left") == 0;
  return upper ? Causal::upper_left : Causal::lower_right;
}

// Checked already by whoever makes a problem, but not if the operators are called by hand.
void check_fit(const TensorView& query, const TensorView& key, const TensorView& value) {
  const bool is_alike = query.dtype == key.dtype && query.dtype == value.dtype &&
                        query.shape[0] == key.shape[0] && query.shape[0] == value.shape[0] &&
                        key.shape[1] == value.shape[1] && key.shape[2] == value.shape[2] &&
                        query.shape[3] == key.shape[3];
  const int64_t kv_heads = key.shape[1];
  if (!is_alike || (kv_heads ? query.shape[1] % kv_heads : query.shape[1]))
    throw std::invalid_argument("query, key and value do not fit one another");
}

// A fastattn.problem.Problem, whose fields are read in their order.
Problem read_problem(const py::tuple& fields) {
  if (fields.size() != 12) throw std::invalid_argument("malformed problem");
  int position = 0;
  const auto next = [&] { return py::handle(PyTuple_GET_ITEM(fields.ptr(), position++)); };
  const auto next_window = [&] {
    const py::handle window = next();
    return window.is_none() ? -1 : window.cast<int64_t>();
  };
  const TensorView query = read_tensor(next());
  const TensorView key = read_tensor(next());
  const TensorView value = read_tensor(next());
  Problem p;
  p.dtype = engine_dtype(query);
  check_fit(query, key, value);
  p.batch = query.shape[0];
  p.query_heads = query.shape[1];
  p.queries = query.shape[2];
  p.head_dim = query.shape[3];
  p.kv_heads = key.shape[1];
  p.keys = key.shape[2];
  p.value_dim = value.shape[3];
  p.query = query.as_tensor4().as<const uint8_t>();
  p.key = key.as_tensor4().as<const uint8_t>();
  p.value = value.as_tensor4().as<const uint8_t>();
  p.scale = next().cast<double>();
  p.causal = read_causal(next());
  p.window_left = next_window();
  p.window_right = next_window();
  if (const py::handle lengths = next(); !lengths.is_none()) {
    const TensorView view = read_tensor(lengths);
    if (view.rank != 1 || view.shape[0] != p.batch)
      throw std::invalid_argument("key_lengths must have one length per sequence");
    p.key_lengths = static_cast<const int64_t*>(view.data);
  }
  p.mask = read_tensor4(next()).as<const uint8_t>();
  const py::handle bias = next();
  if (!bias.is_none()) {
    const TensorView view = read_tensor(bias);
    p.bias = view.as_tensor4().as<const uint8_t>();
    p.bias_dtype = engine_dtype(view);
  }
  p.dropout_p = next().cast<double>();
  if (p.dropout_p > 0) {
    const TensorView state = read_tensor(next());
    const auto* words = static_cast<const uint64_t*>(state.data);
    p.dropout_seed = words[0];
    p.dropout_offset = words[state.stride[0]];
  }
  return p;
}

void forward(const py::tuple& problem_fields, py::handle out, py::handle lse, py::handle residual,
             int threads) {
  const Problem problem = read_problem(problem_fields);
  ForwardOutput output{read_tensor4(out), read_data(lse), read_tensor4(residual)};
  // The kernels always write an lse; nobody may want it.
  const size_t size = problem.dtype == DType::f64 ? sizeof(double) : sizeof(float);
  const AlignedBuffer unwanted(lse.is_none() ? size * problem.batch * problem.query_heads * problem.queries
                                             : 0);
  if (lse.is_none()) output.lse = unwanted.data();
  unlocked([&](const Engine& chosen) { chosen.forward(problem, output, threads); });
}

void backward(const py::tuple& problem_fields, py::handle out, py::handle lse, py::handle residual,
              py::handle grad_out, py::handle grad_lse, py::handle grad_query, py::handle grad_key,
              py::handle grad_value, py::handle grad_bias, int threads) {
  const Problem problem = read_problem(problem_fields);
  BackwardArgs args;
  const auto read_output = [&](py::handle tensor, std::optional<DType> dtype) {
    const auto shape = {problem.batch, problem.query_heads, problem.queries, problem.value_dim};
    return read_saved(tensor, dtype, shape).as_tensor4().as<const uint8_t>();
  };
  const auto read_statistic = [&](py::handle tensor) {
    const DType dtype = problem.dtype == DType::f64 ? DType::f64 : DType::f32;
    return read_saved(tensor, dtype, {problem.batch, problem.query_heads, problem.queries}).data;
  };
  args.out = read_output(out, problem.dtype);
  args.lse = read_statistic(lse);
  args.residual = read_output(residual, std::nullopt);
  args.grad_out = read_output(grad_out, problem.dtype);
  args.grad_lse = read_statistic(grad_lse);
  args.grad_query = read_tensor4(grad_query);
  args.grad_key = read_tensor4(grad_key);
  args.grad_value = read_tensor4(grad_value);
  args.grad_bias = read_data(grad_bias);
  unlocked([&](const Engine& chosen) { chosen.backward(problem, args, threads); });
}

void weights(const py::tuple& problem_fields, py::handle lse, py::handle out, bool average, int threads) {
  const Problem problem = read_problem(problem_fields);
  const WeightsOutput output{read_data(lse), read_data(out), average};
  unlocked([&](const Engine& chosen) { chosen.weights(problem, output, threads); });
}

// The memory of a contiguous tensor of this dtype and shape, as the engine of additive attention takes them.
void* read_contiguous(py::handle tensor, DType dtype, std::initializer_list<int64_t> shape) {
  const TensorView view = read_tensor(tensor);
  int64_t stride = 1;
  bool fits = view.dtype == dtype && view.rank == static_cast<int>(shape.size()) &&
              std::equal(shape.begin(), shape.end(), view.shape);
  for (int i = view.rank - 1; i >= 0; i--) {
    fits = fits && (view.stride[i] == stride || view.shape[i] == 1);
    stride *= view.shape[i];
  }
  if (!fits)
    throw std::invalid_argument("a tensor of additive attention has not the dtype, shape or layout it needs");
  return view.data;
}

// (query, key, value, weight, mask or None, offset), as AdditiveProblem describes them.
AdditiveProblem read_additive(const py::tuple& fields) {
  if (fields.size() != 6) throw std::invalid_argument("malformed problem");
  const TensorView query = read_tensor(fields[0]), key = read_tensor(fields[1]),
                   value = read_tensor(fields[2]);
  AdditiveProblem p;
  p.dtype = engine_dtype(query);
  p.batch = query.shape[0];
  p.queries = query.shape[1];
  p.keys = key.shape[1];
  p.features = query.shape[2];
  p.value_dim = value.shape[2];
  if ((p.dtype != DType::f32 && p.dtype != DType::f64) || p.features % 16 || p.value_dim % 16)
    throw std::invalid_argument("additive attention takes float32 or float64, and sizes of whole vectors");
  p.query = read_contiguous(fields[0], p.dtype, {p.batch, p.queries, p.features});
  p.key = read_contiguous(fields[1], p.dtype, {p.batch, p.keys, p.features});
  p.value = read_contiguous(fields[2], p.dtype, {p.batch, p.keys, p.value_dim});
  p.weight = read_contiguous(fields[3], p.dtype, {p.features});
  if (const py::handle mask = fields[4]; !mask.is_none()) {
    const TensorView view = read_tensor(mask);
    const bool fits = view.is_bool && view.rank == 2 && view.shape[0] == p.batch && view.shape[1] == p.keys;
    if (!fits || view.stride[1] != 1 || view.stride[0] != p.keys)
      throw std::invalid_argument("the mask of additive attention must be bool [B, Lk] and contiguous");
    p.mask = static_cast<const uint8_t*>(view.data);
  }
  p.offset = fields[5].cast<double>();
  return p;
}

double additive_exponentials(py::handle input, py::handle output, int threads) {
  const TensorView in = read_tensor(input), out = read_tensor(output);
  AdditiveExponentials given;
  given.dtype = engine_dtype(in);
  if ((given.dtype != DType::f32 && given.dtype != DType::f64) || in.rank != 3 || out.rank != 3 ||
      out.shape[2] % 16 || out.shape[2] < in.shape[2])
    throw std::invalid_argument("additive attention takes float32 or float64, and sizes of whole vectors");
  given.rows = in.shape[0] * in.shape[1];
  given.features = in.shape[2];
  given.padded = out.shape[2];
  given.input = read_contiguous(input, given.dtype, {in.shape[0], in.shape[1], in.shape[2]});
  given.output = read_contiguous(output, given.dtype, {in.shape[0], in.shape[1], out.shape[2]});
  return unlocked([&](const Engine& chosen) { return chosen.additive_exponentials(given, threads); });
}

void additive_forward(const py::tuple& problem_fields, py::handle out, py::handle largest, py::handle sum,
                      int threads) {
  const AdditiveProblem p = read_additive(problem_fields);
  const AdditiveOutput output{read_contiguous(out, p.dtype, {p.batch, p.queries, p.value_dim}),
                              read_contiguous(largest, p.dtype, {p.batch, p.queries}),
                              read_contiguous(sum, p.dtype, {p.batch, p.queries})};
  unlocked([&](const Engine& chosen) { chosen.additive_forward(p, output, threads); });
}

void additive_backward(const py::tuple& problem_fields, py::handle lse, py::handle delta, py::handle grad_out,
                       py::handle grad_query, py::handle grad_key, py::handle grad_value,
                       py::handle grad_weight, int threads) {
  const AdditiveProblem p = read_additive(problem_fields);
  AdditiveGradients gradients;
  gradients.chunks = read_tensor(grad_query).shape[0];
  if (gradients.chunks < 1)
    throw std::invalid_argument("additive attention takes at least one chunk of keys");
  gradients.lse = read_contiguous(lse, p.dtype, {p.batch, p.queries});
  gradients.delta = read_contiguous(delta, p.dtype, {p.batch, p.queries});
  gradients.grad_out = read_contiguous(grad_out, p.dtype, {p.batch, p.queries, p.value_dim});
  gradients.grad_query =
      read_contiguous(grad_query, p.dtype, {gradients.chunks, p.batch, p.queries, p.features});
  gradients.grad_key = read_contiguous(grad_key, p.dtype, {p.batch, p.keys, p.features});
  gradients.grad_value = read_contiguous(grad_value, p.dtype, {p.batch, p.keys, p.value_dim});
  gradients.grad_weight = read_contiguous(grad_weight, p.dtype, {gradients.chunks, p.batch, p.features});
  unlocked([&](const Engine& chosen) { chosen.additive_backward(p, gradients, threads); });
}

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  if (name == "float64") return DType::f64;
  throw std::invalid_argument("dtype must be 'float32', 'bfloat16', 'float16' or 'float64', got '" + name +
                              "'");
}

double probe_multiply_add(const std::string& dtype, int threads, int64_t rounds) {
  const DType type = dtype_of(dtype);
  return unlocked([&](const Engine& chosen) { return chosen.probe_multiply_add(type, threads, rounds); });
}

void probe_read(py::handle tensor, int threads) {
  const int64_t count = read_tensor(tensor).shape[0];
  const auto* data = static_cast<const float*>(read_contiguous(tensor, DType::f32, {count}));
  unlocked([&](const Engine& chosen) { chosen.probe_read(data, count, threads); });
}

}  // namespace
}  // namespace fastattn

PYBIND11_MODULE(_C, m) {
  using namespace fastattn;
  m.doc() = "The C++ engine of fastattn. Use fastattn.backends.cpu.";
  find_main_thread();
  set_interrupt_source({is_main_thread, handlers_raise});
  m.def("use_torch", &use_torch, "The module torch and its exchange table, or None; to be called first.");
  m.def("plain_head_dims", &plain_head_dims,
        "(D, Dv) if the engine can read query, key and value where they lie, one like the other; None in any "
        "doubt.");
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("weights", &weights);
  m.def("additive_exponentials", &additive_exponentials,
        "exp(2 input) into output, padded by ones; the largest magnitude, NaN where one is not finite.");
  m.def("additive_forward", &additive_forward);
  m.def("additive_backward", &additive_backward);
  m.def("makes_results", &makes_results, "Can new_result and new_result_like make tensors of this torch?");
  m.def("new_result", &new_result, "An uninitialised tensor in memory for large results.");
  m.def("new_result_like", &new_result_like, "The same, like a contiguous one; None if it is not, or small.");
  m.def("limit_kept_result_memory", &limit_kept_result_memory,
        "How many bytes of former results to keep for the next ones.");
  m.def("kept_result_memory", &kept_result_memory, "How many bytes are kept now.");
  m.def("isa", [] { return engine().name; }, "The instruction set in use.");
  m.def("set_isa", &select_engine,
        "Use an instruction set by name; ValueError if that is not possible here.");
  m.def("available_isas", &available_engines, "The instruction sets that can be used here, the best first.");
  m.def("probe_multiply_add", &probe_multiply_add,
        "Do `rounds` rounds of independent multiply-adds on each thread; returns the floating-point "
        "operations.");
  m.def("probe_read", &probe_read, "Read a float32 [count] once, all threads together.");
}
