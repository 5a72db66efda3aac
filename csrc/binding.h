// What every binding needs: registration, argument checks, device guard and stream, on the stable ABI of torch 2.11.
//
//   void scale(const Tensor& x, Tensor y, double factor) {
//     const d2v::Call call("scale_cuda", x);
//     call.check("x", x, {ScalarType::Float}, {d2v::ANY_SIZE, 64});
//     call.check("y", y, {ScalarType::Float}, {x.size(0), 64});
//     call.launched(d2v_scale(d2v::ptr<const float>(x), d2v::ptr<float>(y), x.numel(), factor, call.stream()));
//   }
//   D2V_SCHEMAS(m) { m.def("scale_cuda(Tensor x, Tensor(a!) y, float factor) -> ()"); }
//   D2V_KERNELS(m) { m.impl("scale_cuda", TORCH_BOX(&scale)); }
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "runtime.h"

// The emulated build registers the same functions for CPU tensors, in a namespace of its own: both may be loaded.
#ifdef D2V_EMULATE
#define D2V_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(d2v_fast_emulated, m)
#define D2V_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(d2v_fast_emulated, CPU, m)
#define D2V_KERNELS_ANYWHERE(m) STABLE_TORCH_LIBRARY_IMPL(d2v_fast_emulated, CompositeExplicitAutograd, m)
#else
#define D2V_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(d2v_fast, m)
#define D2V_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(d2v_fast, CUDA, m)
#define D2V_KERNELS_ANYWHERE(m) STABLE_TORCH_LIBRARY_IMPL(d2v_fast, CompositeExplicitAutograd, m)
#endif

namespace d2v {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t ANY_SIZE = -1;  // in a shape: any size

// Looked up by name: it lives in libtorch_cuda, without which the extension must still load.
constexpr const char* STREAM_FUNCTION = "aoti_torch_get_current_cuda_stream";

inline std::string name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return "dtype " + std::to_string(static_cast<int>(dtype));
  }
}

inline std::string shape_of(const Tensor& x) {
  std::ostringstream text;
  for (int64_t i = 0; i < x.dim(); ++i) text << (i ? ", " : "[") << x.size(i);
  return x.dim() ? text.str() + "]" : "[]";
}

template <typename T>
T* ptr(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

template <typename T>
T* ptr(const std::optional<Tensor>& x) {
  return x.has_value() ? ptr<T>(*x) : nullptr;
}

// One call of an op: makes the device of `first` current, holds its stream, and checks the arguments against both.
class Call {
 public:
  Call(const char* op, const Tensor& first)
      : op_(op), device_(device_of(op, first)), guard_(device_), stream_(current_stream(op, device_)) {}

  void* stream() const { return stream_; }

  // `x` is contiguous on this device, with one of `dtypes` and the sizes `shape` (ANY_SIZE: any size).
  void check(const char* name, const Tensor& x, std::initializer_list<ScalarType> dtypes,
             std::initializer_list<int64_t> shape) const {
    check_rows(name, x, dtypes, shape);
    if (!x.is_contiguous()) fail(name, "must be contiguous");
  }

  // The same, but only the last dimension need be contiguous.
  void check_rows(const char* name, const Tensor& x, std::initializer_list<ScalarType> dtypes,
                  std::initializer_list<int64_t> shape) const {
    if (!on_device(x)) {
      fail(name, std::string("must be on the device of the first argument (") + DEVICE + " " +
                     std::to_string(device_) + ")");
    }
    if (!has_dtype(x, dtypes)) fail(name, expected(dtypes) + ", got " + name_of(x.scalar_type()));
    if (!has_shape(x, shape)) fail(name, expected(shape) + ", got " + shape_of(x));
    const int64_t last = x.dim() - 1;
    if (last >= 0 && x.size(last) > 1 && x.stride(last) != 1) fail(name, "must be contiguous in its last dimension");
  }

  // Vector loads and stores of `bytes` bytes start at the first element of `x`.
  void check_aligned(const char* name, const Tensor& x, uintptr_t bytes) const {
    if (reinterpret_cast<uintptr_t>(x.data_ptr()) % bytes) {
      fail(name, "must start at a multiple of " + std::to_string(bytes) + " bytes");
    }
  }

  // For whatever is not about one dtype or shape: "scale_cuda: factor must be positive".
  template <class Text>
  void require(bool good, const char* name, const Text& what) const {
    if (!good) fail(name, what);
  }
  [[noreturn]] void fail(const char* name, const std::string& what) const {
    throw std::runtime_error(std::string(op_) + ": " + name + " " + what);
  }

  // The return value of a launcher: 0, or the error of the launch.
  void launched(int code) const {
    if (code != 0) throw std::runtime_error(std::string(op_) + ": " + d2v_error_text(code));
  }

 private:
#ifdef D2V_EMULATE
  static constexpr const char* DEVICE = "cpu";
  struct Guard {
    explicit Guard(int32_t) {}
  };
  static bool right_kind(const Tensor& x) { return x.is_cpu(); }
  static void* current_stream(const char*, int32_t) { return nullptr; }
#else
  static constexpr const char* DEVICE = "cuda";
  using Guard = torch::stable::accelerator::DeviceGuard;
  static bool right_kind(const Tensor& x) { return x.is_cuda(); }

  static void* current_stream(const char* op, int32_t device) {
    using Function = AOTITorchError (*)(int32_t, void**);
    static const auto get = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, STREAM_FUNCTION));
    void* stream = nullptr;
    if (get == nullptr || get(device, &stream) != AOTI_TORCH_SUCCESS) {
      throw std::runtime_error(std::string(op) + ": this torch gives no access to its current CUDA stream");
    }
    return stream;
  }
#endif

  static int32_t device_of(const char* op, const Tensor& first) {
    if (!right_kind(first)) {
      throw std::runtime_error(std::string(op) + ": the first argument must be a " + DEVICE + " tensor");
    }
    return first.get_device_index();
  }

  bool on_device(const Tensor& x) const { return right_kind(x) && x.get_device_index() == device_; }

  static bool has_dtype(const Tensor& x, std::initializer_list<ScalarType> dtypes) {
    return std::find(dtypes.begin(), dtypes.end(), x.scalar_type()) != dtypes.end();
  }

  static bool has_shape(const Tensor& x, std::initializer_list<int64_t> shape) {
    if (x.dim() != static_cast<int64_t>(shape.size())) return false;
    int64_t i = 0;
    for (const int64_t size : shape) {
      if (x.size(i++) != size && size != ANY_SIZE) return false;
    }
    return true;
  }

  static std::string expected(std::initializer_list<ScalarType> dtypes) {
    std::string text;
    for (const ScalarType dtype : dtypes) text += (text.empty() ? "must be " : " or ") + name_of(dtype);
    return text;
  }

  static std::string expected(std::initializer_list<int64_t> shape) {
    std::string text = "must have shape [";
    const char* separator = "";
    for (const int64_t size : shape) {
      text += separator + (size == ANY_SIZE ? std::string("*") : std::to_string(size));
      separator = ", ";
    }
    return text + "]";
  }

  const char* op_;
  int32_t device_;
  Guard guard_;
  void* stream_;
};

}  // namespace d2v
