// Errors of the launchers, without any torch header.
#pragma once

// Text of a nonzero return value of a launcher.
extern "C" const char* d2v_error_text(int code);
