// Elias omega codes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "bits.hpp"

namespace {
namespace entropy {

// n in binary, preceded by the code of its length less 1, and so on down to 1; then a 0.
inline Word omega(std::uint32_t n) {
  Word code{0, 1};
  while (n > 1) {
    const int length = octave(n) + 1;
    code.bits = code.bits << length | reversed(n, length);
    code.length += length;
    n = static_cast<std::uint32_t>(length - 1);
  }
  return code;
}

// Removes a code word from the front of `bits`; returns 0 where it stands for 2^24 or more.
inline std::uint32_t take_omega(std::uint64_t* bits, int* taken) {
  std::uint32_t n = 1;
  while ((*bits & 1) != 0) {
    if (n >= kGapOctaves) return 0;
    const int length = static_cast<int>(n) + 1;
    n = reversed(static_cast<std::uint32_t>(*bits), length);
    *bits >>= length;
    *taken += length;
  }
  *bits >>= 1;
  *taken += 1;
  return n;
}

// As take_omega; short words by a table of what the next kOmegaBits bits begin with: the number and, in the low 4
// bits, the word's length, or 0 for longer ones.
constexpr int kOmegaBits = 13;
inline std::uint32_t take_short_omega(std::uint64_t* bits, int* taken) {
  static const std::array<std::uint16_t, 1 << kOmegaBits> table = [] {
    std::array<std::uint16_t, 1 << kOmegaBits> entries{};
    for (std::size_t i = 0; i < entries.size(); ++i) {
      std::uint64_t rest = i;
      int length = 0;
      const std::uint32_t n = take_omega(&rest, &length);
      if (n != 0 && length <= kOmegaBits) {
        entries[i] = static_cast<std::uint16_t>(n << 4 | static_cast<std::uint32_t>(length));
      }
    }
    return entries;
  }();
  const std::uint16_t entry = table[*bits & ((1 << kOmegaBits) - 1)];
  if (entry == 0) return take_omega(bits, taken);
  *bits >>= entry & 15;
  *taken += entry & 15;
  return entry >> 4;
}

inline int omega_length(int exponent) { return omega(std::uint32_t{1} << exponent).length; }

}  // namespace entropy
}  // namespace
