// Facts about the build and its errors, without any torch header.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

// Text of an error returned by a launcher. Valid until the next launch of the same thread.
const char* d2v_error_text(int code);

// CUDA_VERSION of the compiler, such as 13000; 0 in the emulated build.
int d2v_cuda_version();

#ifdef __cplusplus
}
#endif
