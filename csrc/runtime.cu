#include "runtime.h"

#include "launch.h"

#ifdef D2V_EMULATE

const char* d2v_error_text(int) { return "invalid argument"; }
int d2v_cuda_version() { return 0; }

#else

const char* d2v_error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
int d2v_cuda_version() { return CUDART_VERSION; }

#endif
