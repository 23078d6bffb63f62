#include "tensors.h"

#include <algorithm>
#include <memory>
#include <new>
#include <stdexcept>

#include "result_memory.h"

namespace py = pybind11;

namespace fastattn {
namespace {

// The part of DLPack's ABI that is needed here (https://dmlc.github.io/dlpack/latest/c_api.html), by its
// layout.
namespace dlpack {

constexpr uint32_t major_version = 1;
constexpr int32_t cpu = 1;
enum Kind : uint8_t { integer = 0, floating = 2, brain_floating = 4, boolean = 6 };

struct Tensor {
  void* data;
  int32_t device_type, device_index;
  int32_t rank;
  uint8_t kind, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct Managed {
  uint32_t major, minor;
  void* context;
  void (*release)(Managed*);  // the deleter
  uint64_t flags;
  Tensor tensor;
};

struct ExchangeTable {
  uint32_t major, minor;
  const ExchangeTable* older;
  void (*allocate)();
  void (*from_object)();
  int (*to_object)(Managed* tensor, void** object);  // takes the tensor over
  int (*read_object)(void* object, Tensor* out);     // borrows; may be null
  void (*work_stream)();
};

}  // namespace dlpack

// What is known of torch. Its objects are never freed: they live as long as torch does.
struct Torch {
  const dlpack::ExchangeTable* table = nullptr;
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  PyObject* is_neg = nullptr;
  PyObject* dtypes[4] = {};  // in the order of DType
  PyObject *bool_dtype = nullptr, *int16_dtype = nullptr;
  // Names of attributes and methods.
  PyObject *shape = nullptr, *stride = nullptr, *data_ptr = nullptr, *dtype = nullptr, *is_cpu = nullptr;
} torch;

constexpr char not_on_cpu[] = "the engine takes tensors in CPU memory";

std::optional<DType> dtype_of(const dlpack::Tensor& tensor) {
  if (tensor.lanes != 1) return std::nullopt;
  if (tensor.kind == dlpack::brain_floating && tensor.bits == 16) return DType::bf16;
  if (tensor.kind != dlpack::floating) return std::nullopt;
  if (tensor.bits == 32) return DType::f32;
  if (tensor.bits == 16) return DType::f16;
  if (tensor.bits == 64) return DType::f64;
  return std::nullopt;
}

std::optional<DType> dtype_of(py::handle dtype) {
  for (int i = 0; i < 4; i++)
    if (dtype.ptr() == torch.dtypes[i]) return static_cast<DType>(i);
  return std::nullopt;
}

TensorView read_through_table(py::handle object) {
  dlpack::Tensor tensor;
  if (torch.table->read_object(object.ptr(), &tensor)) throw py::error_already_set();
  if (tensor.device_type != dlpack::cpu) throw std::invalid_argument(not_on_cpu);
  TensorView view;
  view.rank = tensor.rank;
  for (int i = 0; i < std::min(tensor.rank, 4); i++) {
    view.shape[i] = tensor.shape[i];
    view.stride[i] = tensor.strides[i];
  }
  if (tensor.data) view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.dtype = dtype_of(tensor);
  view.is_bool = tensor.kind == dlpack::boolean && tensor.bits == 8 && tensor.lanes == 1;
  view.is_int16 = tensor.kind == dlpack::integer && tensor.bits == 16 && tensor.lanes == 1;
  return view;
}

py::object owned(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

void read_integers(py::handle tuple, int count, int64_t* values) {
  for (int i = 0; i < count; i++) values[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i));
}

TensorView read_through_methods(py::handle object) {
  PyObject* const tensor = object.ptr();
  if (owned(PyObject_GetAttr(tensor, torch.is_cpu)).ptr() != Py_True) throw std::invalid_argument(not_on_cpu);
  const py::object shape = owned(PyObject_GetAttr(tensor, torch.shape));
  const py::object stride = owned(PyObject_CallMethodNoArgs(tensor, torch.stride));
  TensorView view;
  view.rank = static_cast<int>(PyTuple_GET_SIZE(shape.ptr()));
  read_integers(shape, std::min(view.rank, 4), view.shape);
  read_integers(stride, std::min(view.rank, 4), view.stride);
  view.data = PyLong_AsVoidPtr(owned(PyObject_CallMethodNoArgs(tensor, torch.data_ptr)).ptr());
  const py::object dtype = owned(PyObject_GetAttr(tensor, torch.dtype));
  view.dtype = dtype_of(dtype);
  view.is_bool = dtype.ptr() == torch.bool_dtype;
  view.is_int16 = dtype.ptr() == torch.int16_dtype;
  return view;
}

// Reads one of the tensors of plain_head_dims; false if it alone tells that they do not.
bool read_plain(py::handle object, dlpack::Tensor& tensor) {
  if (Py_TYPE(object.ptr()) != torch.tensor && Py_TYPE(object.ptr()) != torch.parameter) return false;
  if (torch.table->read_object(object.ptr(), &tensor)) throw py::error_already_set();
  if (tensor.device_type != dlpack::cpu || tensor.rank != 4 || tensor.strides[3] != 1) return false;
  if (!tensor.data) return false;  // empty, or known to be zero
  return owned(PyObject_CallOneArg(torch.is_neg, object.ptr())).ptr() == Py_False;
}

bool are_alike(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  return a.kind == b.kind && a.bits == b.bits && a.shape[0] == b.shape[0];
}

}  // namespace

void use_torch(py::module_ module, py::handle capsule) {
  const auto keep = [](py::object object) { return object.release().ptr(); };
  torch = Torch{};
  torch.is_neg = keep(module.attr("Tensor").attr("is_neg"));
  torch.tensor = reinterpret_cast<PyTypeObject*>(keep(module.attr("Tensor")));
  torch.parameter = reinterpret_cast<PyTypeObject*>(keep(module.attr("nn").attr("Parameter")));
  const char* const names[] = {"float32", "bfloat16", "float16", "float64"};
  for (int i = 0; i < 4; i++) torch.dtypes[i] = keep(module.attr(names[i]));
  torch.bool_dtype = keep(module.attr("bool"));
  torch.int16_dtype = keep(module.attr("int16"));
  torch.is_cpu = PyUnicode_InternFromString("is_cpu");
  torch.shape = PyUnicode_InternFromString("shape");
  torch.stride = PyUnicode_InternFromString("stride");
  torch.data_ptr = PyUnicode_InternFromString("data_ptr");
  torch.dtype = PyUnicode_InternFromString("dtype");
  if (capsule.is_none()) return;
  void* const pointer = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (!pointer) throw py::error_already_set();
  const auto* table = static_cast<const dlpack::ExchangeTable*>(pointer);
  while (table && table->major != dlpack::major_version) table = table->older;
  if (table && table->read_object) torch.table = table;
}

TensorView read_tensor(py::handle tensor) {
  const TensorView view = torch.table ? read_through_table(tensor) : read_through_methods(tensor);
  if (view.rank > 4) throw std::invalid_argument("the engine takes tensors of at most four dimensions");
  if (!view.data && std::count(view.shape, view.shape + view.rank, 0) == 0)
    throw std::invalid_argument("the engine takes tensors that have memory");
  return view;
}

py::object plain_head_dims(py::handle query, py::handle key, py::handle value, bool grouped) {
  if (!torch.table) return py::none();
  dlpack::Tensor q, k, v;
  try {
    if (!read_plain(query, q) || !read_plain(key, k) || !read_plain(value, v)) return py::none();
  } catch (const py::error_already_set&) {
    return py::none();  // sparse, nested, ...: the caller's business
  }
  if (!dtype_of(q) || !are_alike(q, k) || !are_alike(q, v)) return py::none();
  const bool heads_fit =
      k.shape[1] == v.shape[1] && (q.shape[1] == k.shape[1] || (grouped && q.shape[1] % k.shape[1] == 0));
  if (!heads_fit || q.shape[3] != k.shape[3] || k.shape[2] != v.shape[2]) return py::none();
  return py::make_tuple(q.shape[3], v.shape[3]);
}

namespace {

// What a tensor of result memory owns.
struct Result {
  dlpack::Managed managed{};
  int64_t shape[4], strides[4];
  size_t bytes = 0;

  static void release(dlpack::Managed* managed) {
    auto* const result = static_cast<Result*>(managed->context);
    give_back_result_memory(managed->tensor.data, result->bytes);
    delete result;
  }
};

size_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

py::object take_result(const int64_t* shape, const int64_t* strides, int rank, DType dtype) {
  auto result = std::make_unique<Result>();
  int64_t last = 0;
  for (int i = 0; i < rank; i++) {
    result->shape[i] = shape[i];
    result->strides[i] = strides[i];
    last += (shape[i] - 1) * strides[i];
  }
  result->bytes = (last + 1) * size_of(dtype);
  void* const data = take_result_memory(result->bytes);
  if (!data) throw std::bad_alloc();
  dlpack::Managed& managed = result->managed;
  managed.major = dlpack::major_version;
  managed.context = result.get();
  managed.release = &Result::release;
  managed.tensor = {data,
                    dlpack::cpu,
                    0,
                    rank,
                    dtype == DType::bf16 ? dlpack::brain_floating : dlpack::floating,
                    static_cast<uint8_t>(8 * size_of(dtype)),
                    1,
                    result->shape,
                    result->strides,
                    0};
  void* object = nullptr;
  if (torch.table->to_object(&managed, &object)) {
    Result::release(&result.release()->managed);
    throw py::error_already_set();
  }
  result.release();
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

}  // namespace

bool makes_results() { return torch.table && torch.table->to_object; }

py::object new_result(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                      py::handle dtype) {
  const std::optional<DType> type = dtype_of(dtype);
  if (!makes_results() || !type || shape.size() > 4 || strides.size() != shape.size())
    throw std::invalid_argument("a result has a dtype of the engine's and at most four dimensions");
  return take_result(shape.data(), strides.data(), static_cast<int>(shape.size()), *type);
}

py::object new_result_like(py::handle tensor, int64_t last_size, size_t least_bytes) {
  if (!makes_results()) return py::none();
  const TensorView view = read_tensor(tensor);
  if (view.rank != 4 || !view.dtype) return py::none();
  int64_t own = 1, count = 1, strides[4];
  const int64_t shape[4] = {view.shape[0], view.shape[1], view.shape[2], last_size};
  for (int i = 3; i >= 0; i--) {
    if (view.stride[i] != own) return py::none();
    strides[i] = count;
    own *= view.shape[i];
    count *= shape[i];
  }
  if (count * size_of(*view.dtype) < least_bytes) return py::none();
  return take_result(shape, strides, 4, *view.dtype);
}

}  // namespace fastattn
