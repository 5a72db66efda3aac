#include "runtime.h"

#include "launch.h"

const char* d2v_error_text(int code) {
#ifdef D2V_EMULATE
  return d2v::emulator::error_text(code);
#else
  return cudaGetErrorString(static_cast<cudaError_t>(code));
#endif
}
