// What tests and reports can ask of the emulator.
#include "block.h"

// The order of threads and blocks follows from the seed; the same seed gives the same order.
extern "C" void d2v_emulator_seed(uint64_t seed) { d2v::emulator::state.seed = seed; }

// From now on launches are written down instead of run (1), or run again (0).
extern "C" void d2v_emulator_record(int on) {
  d2v::emulator::state.recording = on != 0;
  d2v::emulator::state.launches.clear();
}

// The launches written down, a line each: kernel, blocks, threads, bytes of shared memory, separated by tabs.
extern "C" const char* d2v_emulator_launches() { return d2v::emulator::state.launches.c_str(); }
