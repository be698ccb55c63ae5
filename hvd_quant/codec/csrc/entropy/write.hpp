// Packed codes -> a bit stream.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../payload.hpp"
#include "bits.hpp"
#include "elias.hpp"
#include "huffman.hpp"
#include "packed.hpp"
#include "plan.hpp"

namespace {
namespace entropy {

// All codes of a unit by one table: a word in the low 24 bits, its length in the high 8.
template <int kBits>
std::uint64_t write_units(const Packed& packed, const std::array<std::uint32_t, kSymbols>& table, std::uint8_t* out) {
  constexpr int kUnitBits = unit_values(kBits) * kBits;
  constexpr std::uint64_t kMask = (1u << kUnitBits) - 1;
  Writer writer{out};
  const bool is_short = *std::max_element(table.begin(), table.end()) >> 24 <= kMaxLength;
  for_words<kBits>(packed, [&](std::uint64_t word, int units) {
    if (units == 8) {
      for (int j = 0; j < 8; ++j) {
        const std::uint32_t entry = table[word >> j * kUnitBits & kMask];
        writer.append(entry & 0xffffff, static_cast<int>(entry >> 24));
        if (j % 4 == 3 || (j % 4 == 1 && !is_short)) writer.flush();
      }
    } else {
      for (int j = 0; j < units; ++j) {
        const std::uint32_t entry = table[word >> j * kUnitBits & kMask];
        writer.append(entry & 0xffffff, static_cast<int>(entry >> 24));
        writer.flush();
      }
    }
  });
  writer.flush();
  return writer.written(out);
}

// The writers return how many bits they have written.

template <int kBits>
std::uint64_t write_narrow(const Packed& packed, const Plan& plan, const std::array<Word, kSymbols>& words,
                           std::uint8_t* out) {
  constexpr std::uint32_t kMask = (1u << kBits) - 1;
  const std::uint32_t digit_mask = (1u << plan.width) - 1;
  std::array<bool, kSymbols> has_escape{};
  for (std::uint32_t symbol = 0; symbol < kSymbols; ++symbol) {
    for (int i = 0; i < plan.digits; ++i) {
      has_escape[symbol] |= is_escape(symbol >> i * plan.width & digit_mask, kBits, plan.width);
    }
  }
  Writer writer{out};
  for_narrow<kBits>(packed, plan.width, plan.digits, [&](std::uint32_t symbol, std::uint64_t codes) {
    writer.append(words[symbol].bits, words[symbol].length);
    if (has_escape[symbol]) {
      for (int i = 0; i < plan.digits; ++i, codes >>= kBits) {
        if (is_escape(symbol >> i * plan.width & digit_mask, kBits, plan.width)) writer.append(codes & kMask, kBits);
      }
    }
    writer.flush();
  });
  writer.flush();
  return writer.written(out);
}

// The words of all units, for write_units.
template <int kBits>
std::array<std::uint32_t, kSymbols> unit_words(const Plan& plan, Coding coding) {
  constexpr int kValues = unit_values(kBits);
  constexpr std::uint32_t kMask = (1u << kBits) - 1;
  std::array<Word, kSymbols> words{};
  if (coding == Coding::kHuffman) {
    words = huffman_words(plan);
  } else {
    for (std::uint32_t code = 0; code <= kMask; ++code) {
      words[code] = omega(magnitude_of(code, kBits) + 1);
      if (code != 0) words[code].append(code >> (kBits - 1), 1);
    }
  }
  std::array<std::uint32_t, kSymbols> table{};
  for (std::uint32_t unit = 0; unit < 1u << kValues * kBits; ++unit) {
    Word word;
    if (plan.digits == kValues) {
      word = words[unit];
    } else {
      for (int i = 0; i < kValues; ++i) word.append(words[unit >> i * kBits & kMask]);
    }
    table[unit] = static_cast<std::uint32_t>(word.bits) | static_cast<std::uint32_t>(word.length) << 24;
  }
  return table;
}

// Writes the lanes one after another, and their bits to `sizes`; returns their bytes.
template <int kBits>
std::uint64_t write_dense(const Packed& packed, const Plan& plan, Coding coding, std::uint8_t* out,
                          std::uint64_t* sizes) {
  const bool narrow = coding == Coding::kHuffman && plan.width != kBits;
  std::array<Word, kSymbols> words;
  std::array<std::uint32_t, kSymbols> table;
  if (narrow) {
    words = huffman_words(plan);
  } else {
    table = unit_words<kBits>(plan, coding);
  }
  std::uint64_t at = 0;
  const std::uint64_t step = lane_values(packed.count, plan.lanes);
  for (int i = 0; i < plan.lanes; ++i) {
    const std::uint64_t start = static_cast<std::uint64_t>(i) * step;
    const std::uint64_t n = std::min(step, packed.count - start);
    const Packed lane{packed.bytes + start / 8 * kBits, n, packed_size(n, kBits)};
    sizes[i] = narrow ? write_narrow<kBits>(lane, plan, words, out + at) : write_units<kBits>(lane, table, out + at);
    at += (sizes[i] + 7) / 8;
  }
  return at;
}

template <int kBits>
std::uint64_t write_sparse_huffman(const Packed& packed, const Plan& plan, std::uint8_t* out) {
  Writer writer{out};
  const std::array<Word, kSymbols> words = huffman_words(plan);
  for_nonzero<kBits>(packed, [&](std::uint64_t gap, std::uint32_t code) {
    const std::uint32_t level = magnitude_of(code, kBits);
    const int gap_octave = octave(gap), level_octave = octave(level);
    const Word& word = words[static_cast<std::size_t>(token_of(gap_octave, level_octave))];
    writer.append(word.bits, word.length);
    writer.append(code >> (kBits - 1), 1);
    writer.append(gap ^ std::uint64_t{1} << gap_octave, gap_octave);
    writer.append(level ^ 1u << level_octave, level_octave);
    writer.flush();
  });
  writer.flush();
  return writer.written(out);
}

// What a unit's nonzero values are written as, but for the gap before the first one.
struct UnitTokens {
  std::uint32_t bits = 0;
  std::uint8_t length = 0;
  std::uint8_t zeros_before = 0, zeros_after = 0;
};

template <int kBits>
std::array<UnitTokens, kSymbols> elias_unit_tokens() {
  constexpr int kValues = unit_values(kBits);
  std::array<UnitTokens, kSymbols> table{};
  table[0].zeros_after = kValues;
  for (std::uint32_t unit = 1; unit < 1u << kValues * kBits; ++unit) {
    UnitTokens& tokens = table[unit];
    Word word;
    std::uint8_t zeros = 0;
    bool is_first = true;
    for (int i = 0; i < kValues; ++i) {
      const std::uint32_t code = unit >> i * kBits & ((1u << kBits) - 1);
      if (code == 0) {
        ++zeros;
        continue;
      }
      if (is_first) {
        tokens.zeros_before = zeros;
      } else {
        word.append(omega(zeros + 1u));
      }
      word.append(code >> (kBits - 1), 1);
      word.append(omega(magnitude_of(code, kBits)));
      is_first = false;
      zeros = 0;
    }
    tokens.bits = static_cast<std::uint32_t>(word.bits);
    tokens.length = static_cast<std::uint8_t>(word.length);
    tokens.zeros_after = zeros;
  }
  return table;
}

constexpr std::uint64_t kTooLong = ~std::uint64_t{0};

// Returns kTooLong where a gap is too long, or the stream would take more than `limit` bits.
template <int kBits>
std::uint64_t write_sparse_elias(const Packed& packed, std::uint64_t limit, std::uint8_t* out) {
  constexpr int kUnitBits = unit_values(kBits) * kBits;
  constexpr std::uint64_t kMask = (1u << kUnitBits) - 1;
  constexpr std::uint64_t kWhole = ~std::uint64_t{0} >> (64 - 8 * kUnitBits);
  constexpr std::uint64_t kWordBits = 8 * 64;  // that eight units add at most
  static const std::array<UnitTokens, kSymbols> table = elias_unit_tokens<kBits>();
  static const std::array<Word, 256> gap_words = [] {
    std::array<Word, 256> words{};
    for (std::uint32_t gap = 1; gap < words.size(); ++gap) words[gap] = omega(gap);
    return words;
  }();
  Writer writer{out};
  std::uint64_t zeros = 0;  // since the last value that is not
  bool fits = true;
  for_words<kBits>(packed, [&](std::uint64_t word, int units) {
    if (!fits) return;
    if ((word & kWhole) == 0) {
      zeros += static_cast<std::uint64_t>(units * unit_values(kBits));
      return;
    }
    const bool near_limit = writer.written(out) + kWordBits > limit;
    for (int j = 0; j < units; ++j) {
      const std::uint64_t unit = word >> j * kUnitBits & kMask;
      const UnitTokens& tokens = table[unit];
      const std::uint64_t gap = zeros + tokens.zeros_before + 1;
      Word gap_word = gap_words[std::min<std::uint64_t>(gap, 255)];
      if (gap >= 255) {
        if (gap >> kGapOctaves != 0) {
          fits = false;
          return;
        }
        gap_word = omega(static_cast<std::uint32_t>(gap));
      }
      // Without a branch, because which units are zero cannot be predicted.
      const bool is_zero = unit == 0;
      gap_word.bits = is_zero ? 0 : gap_word.bits;
      gap_word.length = is_zero ? 0 : gap_word.length;
      if (near_limit && writer.written(out) + static_cast<std::uint64_t>(gap_word.length + tokens.length) > limit) {
        fits = false;
        return;
      }
      writer.append(gap_word.bits, gap_word.length);
      writer.append(tokens.bits, tokens.length);
      writer.flush();
      zeros = tokens.zeros_after + (is_zero ? zeros : 0);
    }
  });
  if (!fits) return kTooLong;
  writer.flush();
  return writer.written(out);
}

// Writes the section of codes, and up to 8 bytes more; returns its size, or kTooLong, for a sparse Elias plan alone.
template <int kBits>
std::uint64_t write_codes(const Packed& packed, const Plan& plan, Coding coding, std::uint8_t* out) {
  store64(out, plan.form | static_cast<std::uint64_t>(plan.width | plan.digits << 4) << 8);
  if (plan.form == kStored) {
    std::memcpy(out + 8, packed.bytes, packed.size);
    return 8 + packed.size;
  }
  std::uint8_t* const table = out + plan.table_offset();
  for (std::size_t i = 0; i < static_cast<std::size_t>(plan.symbols(coding)); i += 2) {
    table[i / 2] = static_cast<std::uint8_t>(plan.lengths[i] | plan.lengths[i + 1] << 4);
  }
  const std::uint64_t stream = plan.stream_offset(coding);
  std::uint64_t sizes[kLanes];
  std::uint64_t size;
  if (plan.form == kDense) {
    size = write_dense<kBits>(packed, plan, coding, out + stream, sizes);
  } else {
    store64(out + 8, plan.nonzero);
    if (coding == Coding::kElias) {
      if (stream + 9 > packed.size) return kTooLong;
      sizes[0] = write_sparse_elias<kBits>(packed, 8 * (packed.size - 9 - stream), out + stream);
      if (sizes[0] == kTooLong) return kTooLong;
    } else {
      sizes[0] = write_sparse_huffman<kBits>(packed, plan, out + stream);
    }
    size = (sizes[0] + 7) / 8;
  }
  for (int i = 0; i < plan.lanes; ++i) store64(out + plan.lanes_offset() + 8 * i, sizes[i]);
  return stream + size;
}

// Writes the coded body of a packed one, at most max_coded_size(layout) bytes; returns its size.
inline std::uint64_t compact(const std::uint8_t* body, const Layout& layout, Coding coding, std::uint8_t* out) {
  const std::uint64_t norms = layout.codes_offset();
  const Packed packed{body + norms, layout.count, packed_size(layout.count, layout.bits)};
  std::memcpy(out, body, norms);
  const std::uint64_t used = norms + with_bits(layout.bits, [&](auto bits) {
    const std::uint64_t size =
        write_codes<bits>(packed, choose_plan<bits>(packed, coding, norms, true), coding, out + norms);
    if (size != kTooLong && stands_for(norms + size, packed.count)) return size;
    return write_codes<bits>(packed, choose_plan<bits>(packed, coding, norms, false), coding, out + norms);
  });
  std::memset(out + used, 0, padded(used) - used);
  return padded(used);
}

}  // namespace entropy
}  // namespace
