// What this library was built for. The ops are in *_bindings.cpp.
#include "binding.h"

#ifndef D2V_ARCHITECTURES
#error "the build defines D2V_ARCHITECTURES, such as \"8.0;9.0+PTX\""
#endif

namespace {

// Without it an op cannot run on torch's stream; false on a torch without CUDA.
bool finds_stream() {
#ifdef D2V_EMULATE
  return true;
#else
  return dlsym(RTLD_DEFAULT, d2v::kStreamFunction) != nullptr;
#endif
}

int64_t cuda_version() { return d2v_cuda_version(); }

std::string architectures() { return D2V_ARCHITECTURES; }

}  // namespace

D2V_SCHEMAS(m) {
  m.def("cuda_version() -> int");
  m.def("architectures() -> str");
  m.def("finds_stream() -> bool");
}

D2V_KERNELS_ANYWHERE(m) {
  m.impl("cuda_version", TORCH_BOX(&cuda_version));
  m.impl("architectures", TORCH_BOX(&architectures));
  m.impl("finds_stream", TORCH_BOX(&finds_stream));
}
