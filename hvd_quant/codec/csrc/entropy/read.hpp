// A section of codes, as it was received -> packed codes. Nothing in it is taken for granted.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../payload.hpp"
#include "bits.hpp"
#include "huffman.hpp"
#include "packed.hpp"
#include "plan.hpp"
#include "readers.hpp"

namespace {
namespace entropy {

// Reads a section of codes of `size` bytes, padding included, into packed codes: packed_size(count, kBits)
// bytes and up to kSlack more. Returns what is wrong, or null.
template <int kBits>
const char* read_codes(const std::uint8_t* section, std::uint64_t size, std::uint64_t count, Coding coding,
                       std::uint8_t* out, std::uint64_t* used) {
  constexpr const char* kShort = "it ends before its codes";
  if (size < 8) return kShort;
  const std::uint64_t head = load64(section);
  const auto shape = static_cast<int>(head >> 8 & 255);
  if ((head & 255) > kSparse) return "its codes have an unknown form";
  Plan plan;
  plan.form = static_cast<Form>(head & 255);
  plan.width = shape & 15;
  plan.digits = shape >> 4;
  plan.lanes = lanes_of(plan.form, count);
  const bool has_shape = plan.form == kDense && coding == Coding::kHuffman;
  const bool valid = has_shape ? plan.width >= 2 && plan.width <= kBits && plan.digits >= 1 && plan.digits <= 4 &&
                                     plan.digits != 3 && plan.width * plan.digits <= 8
                               : shape == 0;
  if (!valid || head >> 16 != 0) return "the head of its codes holds undefined values";
  if (plan.form == kStored) {
    const std::uint64_t packed = packed_size(count, kBits);
    if (size - 8 < packed) return kShort;
    std::memcpy(out, section + 8, packed);
    *used = 8 + packed;
    return nullptr;
  }
  const std::uint64_t offset = plan.stream_offset(coding);
  if (size < offset) return kShort;
  Stream streams[kLanes];
  std::uint64_t at = offset;
  for (int i = 0; i < plan.lanes; ++i) {
    const std::uint64_t bits = load64(section + plan.lanes_offset() + 8 * i);
    if (bits > 8 * (size - at)) return kShort;
    streams[i] = {section + at, size - at, bits};
    if (bits % 8 != 0 && section[at + bits / 8] >> bits % 8 != 0) return "its padding is not zero";
    at += (bits + 7) / 8;
  }
  *used = at;
  if (coding == Coding::kHuffman) {
    const std::uint8_t* const table = section + plan.table_offset();
    const auto symbols = static_cast<std::size_t>(plan.symbols(coding));
    for (std::size_t i = 0; i < symbols; ++i) plan.lengths[i] = table[i / 2] >> i % 2 * 4 & 15;
    std::array<Word, kSymbols> words;
    if (!canonical_code(plan.lengths.data(), plan.symbols(coding), words.data())) {
      return "its code lengths are no complete prefix code";
    }
  }
  if (plan.form == kDense) return DenseReader<kBits>(plan, coding, count).read(streams, count, out);
  plan.nonzero = load64(section + 8);
  if (plan.nonzero > count) return kBadStream;
  return SparseReader<kBits>(plan, coding, count).read(streams[0], plan.nonzero, count, out);
}

// Writes the packed body of the coded one that `size` bytes, which are plausible, begin with: layout.body_size()
// bytes, and up to kSlack more. *taken is the coded one's size.
// Returns what is wrong, or null.
inline const char* expand(const std::uint8_t* body, std::uint64_t size, const Layout& layout, Coding coding,
                          std::uint8_t* out, std::uint64_t* taken) {
  const std::uint64_t norms = layout.codes_offset();
  std::memcpy(out, body, norms);
  std::uint64_t used = 0;
  const char* const wrong = with_bits(layout.bits, [&](auto bits) {
    return read_codes<bits>(body + norms, size - norms, layout.count, coding, out + norms, &used);
  });
  if (wrong != nullptr) return wrong;
  *taken = padded(norms + used);
  if (*taken > size) return "it ends before its codes";
  for (std::uint64_t i = norms + used; i < *taken; ++i) {
    if (body[i] != 0) return "its padding is not zero";
  }
  std::memset(out + layout.used_size(), 0, layout.body_size() - layout.used_size());
  return nullptr;
}

}  // namespace entropy
}  // namespace
