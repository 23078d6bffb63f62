// Torch's tensors as the bindings read them, without building against torch: from PyObjects, through the
// table of C functions that torch 2.10 and later publish on the Tensor type (the exchange API of DLPack 1.x,
// 40 ns a tensor). Where there is no table, the tensor's own methods are called (300 ns).
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "problem.h"

namespace fastattn {

// What a tensor of at most four dimensions tells of itself. It belongs to the tensor: valid while that lives
// unchanged.
struct TensorView {
  void* data = nullptr;
  int rank = 0;
  int64_t shape[4] = {0, 0, 0, 0}, stride[4] = {0, 0, 0, 0};  // in elements
  std::optional<DType> dtype;                                 // none: not one that the engine computes in
  bool is_bool = false, is_int16 = false;

  // The tensor in four dimensions.
  Tensor4<uint8_t> as_tensor4() const {
    return {static_cast<uint8_t*>(data), {stride[0], stride[1], stride[2], stride[3]}};
  }
};

// To be called first, with the module torch and the capsule torch.Tensor.__dlpack_c_exchange_api__. Without
// it (None), or with a table of another major version, tensors are read through their methods.
void use_torch(pybind11::module_ torch, pybind11::handle exchange_table);

// Reads a tensor; throws if it is not in CPU memory or has more than four dimensions.
TensorView read_tensor(pybind11::handle tensor);

// Can the engine read these where they lie, one like the other? torch.Tensor or Parameter itself, [B, Hq, Lq,
// D], [B, Hkv, Lk, D] and [B, Hkv, Lk, Dv] with elements, in CPU memory with a unit last stride, of one
// dtype, stored as they are (no lazy negation), and Hkv = Hq or, if grouped, a divisor. If so, (D, Dv); None
// in any doubt, and without an exchange table.
pybind11::object plain_head_dims(pybind11::handle query, pybind11::handle key, pybind11::handle value,
                                 bool grouped);

// Whether torch's table makes tensors of memory that is not its own.
bool makes_results();

// An uninitialised tensor in result memory (result_memory.h), of up to four dimensions and these strides in
// elements. Throws std::bad_alloc.
pybind11::object new_result(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                            pybind11::handle dtype);

// The same, contiguous, for a contiguous CPU tensor [B, H, L, D] and another last size; None for any other
// tensor, and for less than `least_bytes`.
pybind11::object new_result_like(pybind11::handle tensor, int64_t last_size, size_t least_bytes);

}  // namespace fastattn
