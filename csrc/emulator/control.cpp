// What tests can ask of the emulator.
#include "block.h"

// The order of threads and blocks follows from the seed; the same seed gives the same order.
extern "C" void d2v_emulator_seed(uint64_t seed) { d2v::emulator::state.seed = seed; }
