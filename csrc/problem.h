// The attention problem as the engine sees it: raw pointers, element strides, no Python, no torch.
// The Python layer validates; nothing here is checked again.
#pragma once

#include <cstdint>

namespace fastattn {

enum class DType : int32_t { f32, bf16, f16, f64 };
enum class Causal : int32_t { none, upper_left, lower_right };

// 16-bit floats are storage only: every operation widens them to fp32.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// A 4-D tensor. Strides count elements, in the order of the dimensions; 0 where a dimension broadcasts.
template <class T>
struct Tensor4 {
  T* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};

  T* at(int64_t batch, int64_t head, int64_t row = 0, int64_t column = 0) const {
    return data + batch * stride[0] + head * stride[1] + row * stride[2] + column * stride[3];
  }
  template <class U>
  Tensor4<U> as() const {
    return {reinterpret_cast<U*>(data), {stride[0], stride[1], stride[2], stride[3]}};
  }
};

// query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv], all with a unit last stride.
// Query head h reads key head h / (Hq / Hkv). Mask and bias are [B, Hq, Lq, Lk] views.
struct Problem {
  DType dtype = DType::f32;
  int64_t batch = 0, query_heads = 0, kv_heads = 0, queries = 0, keys = 0, head_dim = 0, value_dim = 0;
  Tensor4<const uint8_t> query, key, value;  // strides count elements of `dtype`: read through as<const T>()
  double scale = 1;

  Causal causal = Causal::none;
  int64_t window_left = -1, window_right = -1;  // keys kept before and after the position; -1 = open
  const int64_t* key_lengths = nullptr;         // [B] or null
  Tensor4<const uint8_t> mask;                  // bool, true = attend; data null = none
  Tensor4<const uint8_t> bias;                  // added to the scaled score; data null = none
  DType bias_dtype = DType::f32;                // `dtype` or f32

  double dropout_p = 0;
  uint64_t dropout_seed = 0, dropout_offset = 0;

  int64_t group() const { return kv_heads ? query_heads / kv_heads : 0; }
  int64_t key_length(int64_t b) const { return key_lengths ? key_lengths[b] : keys; }
};

// What a forward call writes: out [B, Hq, Lq, Dv] in the problem's dtype (unit last stride) and the
// contiguous natural-log lse [B, Hq, Lq] in fp32 (fp64 for fp64). `residual`, like out or null, gets what
// rounding took from out, in 16 bits of its own (pack.h): only of a 16-bit dtype.
struct ForwardOutput {
  Tensor4<uint8_t> out;
  void* lse = nullptr;
  Tensor4<uint8_t> residual;
};

// The softmax weights, recomputed from lse: contiguous fp32 (fp64 for fp64) [B, Hq, Lq, Lk], or their mean
// over the heads, [B, Lq, Lk].
struct WeightsOutput {
  const void* lse = nullptr;
  void* weights = nullptr;
  bool average = false;
};

}  // namespace fastattn
