// The kernels as functions of a shared library.
#include "emulator.hpp"

#include "kernels.cu"

extern "C" {
void hvd_quant_encode_emulated(unsigned blocks, const Segment* segments, u32 n, u32 n_buckets, u8* message,
                               const u64* replay) {
  emulator::launch(blocks, [&] { hvd_quant_encode(segments, n, n_buckets, message, replay); });
}
void hvd_quant_decode_emulated(unsigned blocks, const Segment* segments, u32 n, const u64* messages, u32 n_messages,
                               u32 n_buckets, float weight) {
  emulator::launch(blocks, [&] { hvd_quant_decode(segments, n, messages, n_messages, n_buckets, weight); });
}
void hvd_quant_check_emulated(unsigned blocks, const Segment* segments, u32 n, const u64* messages, u32 n_messages,
                              const u32* expected, u32 n_preamble, u32* excess, u32* found) {
  emulator::launch(
      blocks, [&] { hvd_quant_check(segments, n, messages, n_messages, expected, n_preamble, excess, found); });
}
}
