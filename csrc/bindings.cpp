// The Python module fastattn._C: raw pointers and strides, no torch. Only fastattn/backends/cpu.py calls it;
// that file describes the tuple that stands for a problem.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "isa.h"
#include "machine.h"
#include "parallel.h"

namespace py = pybind11;

namespace fastattn {
namespace {

// Reads the fields of a tuple one after the other.
class Fields {
 public:
  explicit Fields(const py::tuple& tuple) : tuple_(tuple.ptr()) {}

  int64_t integer() { return checked(PyLong_AsLongLong(next())); }
  uint64_t unsigned_bits() { return checked(PyLong_AsUnsignedLongLongMask(next())); }
  double real() { return checked(PyFloat_AsDouble(next())); }
  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(checked(PyLong_AsUnsignedLongLong(next()))));
  }
  void integers(int64_t* values, int count) {
    PyObject* inner = next();
    if (!PyTuple_Check(inner) || PyTuple_GET_SIZE(inner) != count)
      throw std::invalid_argument("malformed problem");
    for (int i = 0; i < count; i++) values[i] = checked(PyLong_AsLongLong(PyTuple_GET_ITEM(inner, i)));
  }
  template <class T>
  Tensor4<T> tensor() {
    Tensor4<T> t;
    t.data = pointer<T>();
    integers(t.stride, 4);
    return t;
  }

 private:
  PyObject* next() {
    if (position_ >= PyTuple_GET_SIZE(tuple_)) throw std::invalid_argument("malformed problem");
    return PyTuple_GET_ITEM(tuple_, position_++);
  }
  template <class T>
  static T checked(T value) {
    if (value == static_cast<T>(-1) && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  PyObject* tuple_;
  Py_ssize_t position_ = 0;
};

Problem read_problem(const py::tuple& tuple) {
  Fields fields(tuple);
  Problem p;
  int64_t query[4], key[4], value[4];
  p.dtype = static_cast<DType>(fields.integer());
  fields.integers(query, 4);
  fields.integers(key, 4);
  fields.integers(value, 4);
  p.batch = query[0];
  p.query_heads = query[1];
  p.queries = query[2];
  p.head_dim = query[3];
  p.kv_heads = key[1];
  p.keys = key[2];
  p.value_dim = value[3];
  p.query = fields.tensor<const uint8_t>();
  p.key = fields.tensor<const uint8_t>();
  p.value = fields.tensor<const uint8_t>();
  p.scale = fields.real();
  p.causal = static_cast<Causal>(fields.integer());
  p.window_left = fields.integer();
  p.window_right = fields.integer();
  p.key_lengths = fields.pointer<const int64_t>();
  p.mask = fields.tensor<const uint8_t>();
  p.bias = fields.tensor<const uint8_t>();
  p.bias_dtype = static_cast<DType>(fields.integer());
  p.dropout_p = fields.real();
  p.dropout_seed = fields.unsigned_bits();
  p.dropout_offset = fields.unsigned_bits();
  return p;
}

Tensor4<uint8_t> read_tensor(const py::tuple& tuple) { return Fields(tuple).tensor<uint8_t>(); }

void* address(uintptr_t pointer) { return reinterpret_cast<void*>(pointer); }

void forward(const py::tuple& problem_tuple, const py::tuple& out, uintptr_t lse, int threads) {
  const Problem problem = read_problem(problem_tuple);
  // The kernels always write an lse; nobody may want it.
  const size_t size = problem.dtype == DType::f64 ? sizeof(double) : sizeof(float);
  const AlignedBuffer unwanted(lse ? 0 : size * problem.batch * problem.query_heads * problem.queries);
  const ForwardOutput output{read_tensor(out), lse ? address(lse) : unwanted.data()};
  const Engine& chosen = engine();
  const py::gil_scoped_release unlocked;
  chosen.forward(problem, output, threads);
}

void backward(const py::tuple& problem_tuple, const py::tuple& out, uintptr_t lse, const py::tuple& grad_out,
              uintptr_t grad_lse, const py::tuple& grad_query, const py::tuple& grad_key,
              const py::tuple& grad_value, uintptr_t grad_bias, int threads) {
  const Problem problem = read_problem(problem_tuple);
  BackwardArgs args;
  args.out = read_tensor(out).as<const uint8_t>();
  args.lse = address(lse);
  args.grad_out = read_tensor(grad_out).as<const uint8_t>();
  args.grad_lse = address(grad_lse);
  args.grad_query = read_tensor(grad_query);
  args.grad_key = read_tensor(grad_key);
  args.grad_value = read_tensor(grad_value);
  args.grad_bias = address(grad_bias);
  const Engine& chosen = engine();
  const py::gil_scoped_release unlocked;
  chosen.backward(problem, args, threads);
}

void weights(const py::tuple& problem_tuple, uintptr_t lse, uintptr_t out, bool average, int threads) {
  const Problem problem = read_problem(problem_tuple);
  const WeightsOutput output{address(lse), address(out), average};
  const Engine& chosen = engine();
  const py::gil_scoped_release unlocked;
  chosen.weights(problem, output, threads);
}

AdditiveProblem read_additive(const py::tuple& tuple) {
  Fields fields(tuple);
  AdditiveProblem p;
  p.dtype = static_cast<DType>(fields.integer());
  p.batch = fields.integer();
  p.queries = fields.integer();
  p.keys = fields.integer();
  p.features = fields.integer();
  p.value_dim = fields.integer();
  p.query = fields.pointer<const void>();
  p.key = fields.pointer<const void>();
  p.value = fields.pointer<const void>();
  p.weight = fields.pointer<const void>();
  p.mask = fields.pointer<const uint8_t>();
  p.offset = fields.real();
  return p;
}

void additive_forward(const py::tuple& problem_tuple, uintptr_t out, uintptr_t largest, uintptr_t sum,
                      int threads) {
  const AdditiveProblem problem = read_additive(problem_tuple);
  const AdditiveOutput output{address(out), address(largest), address(sum)};
  const Engine& chosen = engine();
  const py::gil_scoped_release unlocked;
  chosen.additive_forward(problem, output, threads);
}

void additive_backward(const py::tuple& problem_tuple, int64_t chunks, uintptr_t lse, uintptr_t delta,
                       uintptr_t grad_out, uintptr_t grad_query, uintptr_t grad_key, uintptr_t grad_value,
                       uintptr_t grad_weight, int threads) {
  const AdditiveProblem problem = read_additive(problem_tuple);
  const AdditiveGradients gradients{chunks,
                                    address(lse),
                                    address(delta),
                                    address(grad_out),
                                    address(grad_query),
                                    address(grad_key),
                                    address(grad_value),
                                    address(grad_weight)};
  const Engine& chosen = engine();
  const py::gil_scoped_release unlocked;
  chosen.additive_backward(problem, gradients, threads);
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
  const Engine& chosen = engine();
  const py::gil_scoped_release unlocked;
  return chosen.probe_multiply_add(type, threads, rounds);
}

void probe_read(uintptr_t data, int64_t count, int threads) {
  const Engine& chosen = engine();
  const py::gil_scoped_release unlocked;
  chosen.probe_read(static_cast<const float*>(address(data)), count, threads);
}

}  // namespace
}  // namespace fastattn

PYBIND11_MODULE(_C, m) {
  using namespace fastattn;
  m.doc() = "The C++ engine of fastattn. Use fastattn.backends.cpu.";
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("weights", &weights);
  m.def("additive_forward", &additive_forward);
  m.def("additive_backward", &additive_backward);
  m.def(
      "prefer_huge_pages", [](uintptr_t data, size_t bytes) { prefer_huge_pages(address(data), bytes); },
      "Ask for huge pages under large memory that is about to be written for the first time.");
  m.def("isa", [] { return engine().name; }, "The instruction set in use.");
  m.def("set_isa", &select_engine,
        "Use an instruction set by name; ValueError if that is not possible here.");
  m.def("available_isas", &available_engines, "The instruction sets that can be used here, the best first.");
  m.def("probe_multiply_add", &probe_multiply_add,
        "Do `rounds` rounds of independent multiply-adds on each thread; returns the floating-point "
        "operations.");
  m.def("probe_read", &probe_read, "Read `count` floats once, all threads together.");
}
