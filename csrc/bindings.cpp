// What this library was built from and for. The ops are in *_bindings.cpp.
#include "binding.h"

#ifndef D2V_FACTS
#error "the build defines D2V_FACTS (d2v_fast/ops/_build.py)"
#endif

// Read from the file, before it is loaded.
extern "C" __attribute__((visibility("default"), used)) const char d2v_facts[] = D2V_FACTS;

namespace {

// Without it an op cannot run on torch's stream; false on a torch without CUDA.
bool finds_stream() {
#ifdef D2V_EMULATE
  return true;
#else
  return dlsym(RTLD_DEFAULT, d2v::STREAM_FUNCTION) != nullptr;
#endif
}

}  // namespace

D2V_SCHEMAS(m) { m.def("finds_stream() -> bool"); }

D2V_KERNELS_ANYWHERE(m) { m.impl("finds_stream", TORCH_BOX(&finds_stream)); }
