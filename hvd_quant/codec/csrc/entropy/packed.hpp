// Packed codes, gone through from the first to the last: what is counted, and what is written, of them.
//
// They are handled in units, as many codes as fit into 8 bits; eight units fill kUnitBits bytes.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../payload.hpp"
#include "bits.hpp"

namespace {
namespace entropy {

// What dense forms write: the values, and zeros up to a multiple of 4, so that the last unit is a whole one.
constexpr std::uint64_t filled(std::uint64_t count) { return (count + 3) / 4 * 4; }

constexpr int unit_values(int bits) { return bits == 2 ? 4 : bits <= 4 ? 2 : 1; }

struct Packed {
  const std::uint8_t* bytes;
  std::uint64_t count;
  std::uint64_t size;  // in bytes
};

// Calls use(word, units) for eight units after another, and for the rest, which zeros fill up.
template <int kBits, class Use>
void for_words(const Packed& packed, const Use& use) {
  constexpr std::uint64_t kUnitBits = unit_values(kBits) * kBits;
  std::uint64_t at = 0;
  std::uint64_t units = filled(packed.count) / unit_values(kBits);
  for (; units >= 8 && at + 8 <= packed.size; units -= 8, at += kUnitBits) use(load64(packed.bytes + at), 8);
  for (; units > 0; at += kUnitBits) {
    const int some = static_cast<int>(std::min<std::uint64_t>(8, units));
    use(load_some(packed.bytes, at, packed.size), some);
    units -= static_cast<std::uint64_t>(some);
  }
}

// Several tables, because counting the same symbol twice running would wait for the first count.
template <int kBits>
void count_units(const Packed& packed, std::uint64_t* counts) {
  constexpr int kUnitBits = unit_values(kBits) * kBits;
  constexpr std::uint32_t kMask = (1u << kUnitBits) - 1;
  constexpr std::uint64_t kPart = std::uint64_t{8} << 24;  // values; less than 32-bit counts hold
  std::memset(counts, 0, kSymbols * sizeof *counts);
  for (std::uint64_t start = 0; start < packed.count; start += kPart) {
    std::uint32_t tables[4][kSymbols] = {};
    const std::uint64_t n = std::min(kPart, packed.count - start);
    const Packed part{packed.bytes + start / 8 * kBits, n, packed_size(n, kBits)};
    for_words<kBits>(part, [&](std::uint64_t word, int units) {
      if (units == 8) {
        for (int j = 0; j < 8; ++j) ++tables[j % 4][word >> j * kUnitBits & kMask];
      } else {
        for (int j = 0; j < units; ++j) ++tables[0][word >> j * kUnitBits & kMask];
      }
    });
    for (const auto& table : tables) {
      for (int i = 0; i < kSymbols; ++i) counts[i] += table[i];
    }
  }
}

// Calls use(gap, code) for each code that is not 0; gap is how far it is from the last one, or from -1.
template <int kBits, class Use>
void for_nonzero(const Packed& packed, const Use& use) {
  constexpr int kValues = unit_values(kBits) * 8;  // in a word
  constexpr std::uint64_t kMask = (1u << kBits) - 1;
  constexpr std::uint64_t kWhole = ~std::uint64_t{0} >> (64 - kValues * kBits);
  constexpr std::size_t kBatch = 1024;
  // They are collected first, each value of a word without a branch: which are zero cannot be predicted.
  std::uint64_t found[kBatch + 64];  // place and code
  std::size_t n = 0;
  std::uint64_t first = 1;  // one more than the place of the word's first value
  std::uint64_t last = 0;
  const auto use_found = [&] {
    std::uint64_t before = last;
    for (std::size_t i = 0; i < n; ++i) {
      const std::uint64_t place = found[i] >> 8;
      use(place - before, static_cast<std::uint32_t>(found[i] & 255));
      before = place;
    }
    last = before;
    n = 0;
  };
  for_words<kBits>(packed, [&](std::uint64_t word, int) {
    word &= kWhole;
    if (word != 0) {
      std::uint64_t* end = found + n;
      for (int i = 0; i < kValues; ++i) {
        const std::uint64_t code = word >> i * kBits & kMask;
        *end = (first + static_cast<std::uint64_t>(i)) << 8 | code;
        end += code != 0 ? 1 : 0;
      }
      n = static_cast<std::size_t>(end - found);
      if (n >= kBatch) use_found();
    }
    first += kValues;
  });
  use_found();
}

constexpr std::uint32_t magnitude_of(std::uint32_t code, int bits) {
  return (code >> (bits - 1)) != 0 ? (1u << bits) - code : code;
}

// A gap and a level, by octave, are a symbol of sparse forms.
constexpr int kTokens = kGapOctaves * kLevelOctaves;
constexpr int token_of(int gap_octave, int level_octave) { return gap_octave * kLevelOctaves + level_octave; }

// counts: of gaps and levels by octave, kTokens of them. Returns false where a gap is too long for the code.
template <int kBits>
bool count_tokens(const Packed& packed, std::uint64_t* counts) {
  std::memset(counts, 0, kSymbols * sizeof *counts);
  std::uint64_t longest = 0;
  for_nonzero<kBits>(packed, [&](std::uint64_t gap, std::uint32_t code) {
    longest = std::max(longest, gap);
    ++counts[token_of(octave(gap) % kGapOctaves, octave(magnitude_of(code, kBits)))];
  });
  return longest >> kGapOctaves == 0;
}

// A code's digit of `width` bits: its low bits, where they stand for it, else the escape -2^(width - 1).
inline std::uint32_t digit_of(std::uint32_t code, int bits, int width) {
  const std::uint32_t escape = 1u << (width - 1);
  if (width == bits) return code;
  return magnitude_of(code, bits) < escape ? code & (2 * escape - 1) : escape;
}

inline bool is_escape(std::uint32_t digit, int bits, int width) {
  return width < bits && digit == 1u << (width - 1);
}

// Calls use(symbol, codes) for each symbol of `digits` narrow digits and the codes that these stand for.
template <int kBits, class Use>
void for_narrow(const Packed& packed, int width, int digits, const Use& use) {
  constexpr std::uint64_t kMask = (1u << kBits) - 1;
  std::array<std::uint8_t, 1 << kBits> digit_table;
  for (std::uint32_t code = 0; code <= kMask; ++code) {
    digit_table[code] = static_cast<std::uint8_t>(digit_of(code, kBits, width));
  }
  const std::uint64_t count = filled(packed.count);
  for (std::uint64_t i = 0; i < count; i += 8) {
    const std::uint64_t at = i / 8 * kBits;
    std::uint64_t word = at + 8 <= packed.size ? load64(packed.bytes + at) : load_some(packed.bytes, at, packed.size);
    for (int j = 0; j < 8 && i + static_cast<std::uint64_t>(j) < count; j += digits) {
      std::uint32_t symbol = 0;
      const std::uint64_t codes = word;
      for (int digit = 0; digit < digits; ++digit, word >>= kBits) {
        symbol |= std::uint32_t{digit_table[word & kMask]} << digit * width;
      }
      use(symbol, codes);
    }
  }
}

template <int kBits>
void count_narrow(const Packed& packed, int width, int digits, std::uint64_t* counts) {
  std::memset(counts, 0, kSymbols * sizeof *counts);
  for_narrow<kBits>(packed, width, digits, [&](std::uint32_t symbol, std::uint64_t) { ++counts[symbol]; });
}

// Calls use(std::integral_constant<int, bits>).
template <class Use>
auto with_bits(int bits, const Use& use) {
  switch (bits) {
    case 2: return use(std::integral_constant<int, 2>{});
    case 3: return use(std::integral_constant<int, 3>{});
    case 4: return use(std::integral_constant<int, 4>{});
    case 5: return use(std::integral_constant<int, 5>{});
    case 6: return use(std::integral_constant<int, 6>{});
    case 7: return use(std::integral_constant<int, 7>{});
    default: return use(std::integral_constant<int, 8>{});
  }
}

}  // namespace entropy
}  // namespace
