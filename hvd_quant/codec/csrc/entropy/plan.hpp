// How the codes of a payload are written as an Elias or Huffman bit stream, without loss: what there is to choose
// from, and the choice. docs/wire-format.md, "Coded codes", is the text of all that is in this folder.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../payload.hpp"
#include "bits.hpp"
#include "elias.hpp"
#include "huffman.hpp"
#include "packed.hpp"

namespace {
namespace entropy {

enum Form : std::uint64_t { kStored, kDense, kSparse };

// Dense forms of long payloads are cut into lanes, streams of their own, that are decoded side by side: a single
// one would wait at each table for the length of the last code word.
constexpr int kLanes = 4;
constexpr std::uint64_t kLaneUnit = 32;  // values; lanes begin at multiples of it

constexpr int lanes_of(Form form, std::uint64_t count) { return form == kDense && count >= 1 << 14 ? kLanes : 1; }

constexpr std::uint64_t lane_values(std::uint64_t count, int lanes) {
  const std::uint64_t units = (count + kLaneUnit - 1) / kLaneUnit, n = static_cast<std::uint64_t>(lanes);
  return (units + n - 1) / n * kLaneUnit;
}

// Whether so many bytes of a payload may stand for so many values.
constexpr bool stands_for(std::uint64_t bytes, std::uint64_t count) { return count / kMaxValuesAByte <= bytes; }

// How codes are written; the head of the section says it.
struct Plan {
  Form form = kStored;
  int width = 0;      // of a digit of a Huffman symbol, in dense form
  int digits = 0;     // of such a symbol
  int lanes = 1;
  std::uint64_t stream_bits = 0;  // in all lanes
  std::uint64_t nonzero = 0;                      // in sparse form
  std::array<std::uint8_t, kSymbols> lengths{};  // of the Huffman code

  int symbols(Coding coding) const {
    if (coding != Coding::kHuffman || form == kStored) return 0;
    return form == kDense ? 1 << width * digits : kTokens;
  }
  std::uint64_t lanes_offset() const { return form == kSparse ? 16 : 8; }
  std::uint64_t table_offset() const {
    return lanes_offset() + (form == kStored ? 0 : 8 * static_cast<std::uint64_t>(lanes));
  }
  std::uint64_t stream_offset(Coding coding) const {
    return table_offset() + static_cast<std::uint64_t>(symbols(coding)) / 2;
  }
  // Of the section at most: each lane ends with a whole byte.
  std::uint64_t max_size(Coding coding) const {
    return stream_offset(coding) + stream_bits / 8 + static_cast<std::uint64_t>(lanes);
  }
};

inline std::array<Word, kSymbols> huffman_words(const Plan& plan) {
  std::array<Word, kSymbols> words{};
  canonical_code(plan.lengths.data(), plan.symbols(Coding::kHuffman), words.data());
  return words;
}

// --- choice of the form ---------------------------------------------------------------------------------

// log2 by sums and products alone, so that every machine makes the same choice.
inline double log2_of(double x) {
  std::uint64_t bits;
  std::memcpy(&bits, &x, 8);
  const auto exponent = static_cast<double>(static_cast<int>(bits >> 52) - 1023);
  bits = (bits & 0x000fffffffffffffu) | 0x3ff0000000000000u;
  double mantissa;
  std::memcpy(&mantissa, &bits, 8);
  const double t = (mantissa - 1) / (mantissa + 1), u = t * t;
  return exponent + 2.8853900817779268 * t * (1 + u * (1.0 / 3 + u * (1.0 / 5 + u * (1.0 / 7 + u / 9))));
}

// The bits of n symbols among `total` in an ideal code.
inline double ideal_bits(std::uint64_t n, std::uint64_t total) {
  return n == 0 ? 0.0
                : static_cast<double>(n) * (log2_of(static_cast<double>(total)) - log2_of(static_cast<double>(n)));
}

constexpr double kSymbolLoss = 0.03;  // bits that a Huffman code is about longer by than an ideal one, a symbol

struct Histogram {
  std::uint64_t count;  // of values, those that fill up included
  std::array<std::uint64_t, kSymbols> units;
  std::array<std::uint64_t, kSymbols> codes;  // a code is its `bits` bits

  std::uint64_t nonzero() const { return count - codes[0]; }
};

template <int kBits>
Histogram histogram_of(const Packed& packed) {
  constexpr int kValues = unit_values(kBits);
  Histogram histogram{filled(packed.count), {}, {}};
  count_units<kBits>(packed, histogram.units.data());
  for (std::size_t unit = 0; unit < kSymbols; ++unit) {
    for (int i = 0; i < kValues; ++i) {
      histogram.codes[unit >> i * kBits & ((1u << kBits) - 1)] += histogram.units[unit];
    }
  }
  return histogram;
}

// Of gaps between values that are each nonzero with the same probability: the share of each octave.
inline std::array<double, kGapOctaves> gap_octaves(const Histogram& histogram) {
  std::array<double, kGapOctaves> shares{};
  const double zero = static_cast<double>(histogram.codes[0]) / static_cast<double>(histogram.count);
  double longer = 1.0;  // share of the gaps of 2^i and more: zero^(2^i - 1)
  for (double& share : shares) {
    share = longer * (1 - longer * zero);
    longer *= longer * zero;
  }
  return shares;
}

inline double expected_sparse_bits(const Histogram& histogram, Coding coding, int bits) {
  const auto nonzero = static_cast<double>(histogram.nonzero());
  std::array<std::uint64_t, kLevelOctaves> levels{};
  for (std::uint32_t code = 1; code < 1u << bits; ++code) {
    levels[static_cast<std::size_t>(octave(magnitude_of(code, bits)) % kLevelOctaves)] += histogram.codes[code];
  }
  double sum = nonzero;  // signs
  const std::array<double, kGapOctaves> shares = gap_octaves(histogram);
  for (int i = 0; i < kGapOctaves; ++i) {
    const double share = shares[static_cast<std::size_t>(i)];
    if (share <= 0) continue;
    sum += nonzero * share * (coding == Coding::kElias ? omega_length(i) : i - log2_of(share));
  }
  for (int i = 0; i < kLevelOctaves; ++i) {
    const std::uint64_t n = levels[static_cast<std::size_t>(i)];
    sum += coding == Coding::kElias ? static_cast<double>(n) * omega_length(i)
                                    : static_cast<double>(n) * i + ideal_bits(n, histogram.nonzero());
  }
  return coding == Coding::kElias ? sum : sum + kSymbolLoss * nonzero + 4 * kTokens;
}

inline double expected_narrow_bits(const Histogram& histogram, int bits, int width, int digits) {
  std::uint64_t escapes = 0;
  double sum = 0;
  for (std::uint32_t code = 0; code < 1u << bits; ++code) {
    if (is_escape(digit_of(code, bits, width), bits, width)) {
      escapes += histogram.codes[code];
    } else {
      sum += ideal_bits(histogram.codes[code], histogram.count);
    }
  }
  const auto count = static_cast<double>(histogram.count);
  sum += ideal_bits(escapes, histogram.count) + static_cast<double>(escapes) * bits;
  double zeros = 1;  // share of the symbols that are all zeros; their word has one bit at least
  for (int i = 0; i < digits; ++i) zeros *= static_cast<double>(histogram.codes[0]) / count;
  double loss = kSymbolLoss;
  if (zeros > 0.5) loss += zeros * (1 + log2_of(zeros));
  return sum + loss * count / digits + 4 * (1 << width * digits);
}

inline std::uint64_t exact_bits(const std::uint64_t* counts, const Plan& plan, int symbols) {
  std::uint64_t sum = 0;
  for (int i = 0; i < symbols; ++i) sum += counts[i] * plan.lengths[static_cast<std::size_t>(i)];
  return sum;
}

// Short payloads get short words, so that their decoder's table is small.
inline int length_limit(std::uint64_t count) { return std::clamp(octave(count + 1) - 3, 8, kMaxLength); }

template <int kBits>
Plan dense_plan(const Packed& packed, const Histogram& histogram, Coding coding, int width, int digits) {
  Plan plan;
  plan.form = kDense;
  plan.lanes = lanes_of(kDense, packed.count);
  if (coding == Coding::kElias) {
    for (std::uint32_t code = 0; code < 1u << kBits; ++code) {
      const std::uint32_t level = magnitude_of(code, kBits);
      plan.stream_bits += histogram.codes[code] * static_cast<std::uint64_t>(omega(level + 1).length + (level != 0));
    }
    return plan;
  }
  plan.width = width;
  plan.digits = digits;
  std::array<std::uint64_t, kSymbols> counts = width == kBits && digits == 1 ? histogram.codes : histogram.units;
  if (width != kBits) count_narrow<kBits>(packed, width, digits, counts.data());
  const int symbols = plan.symbols(coding);
  huffman_lengths(counts.data(), symbols, length_limit(packed.count), plan.lengths.data());
  plan.stream_bits = exact_bits(counts.data(), plan, symbols);
  for (std::uint32_t code = 0; code < 1u << kBits; ++code) {
    if (is_escape(digit_of(code, kBits, width), kBits, width)) plan.stream_bits += kBits * histogram.codes[code];
  }
  return plan;
}

// A plan of form kStored where a gap is too long. How long an Elias stream gets is seen when it is written.
template <int kBits>
Plan sparse_plan(const Packed& packed, const Histogram& histogram, Coding coding) {
  Plan plan;
  plan.nonzero = histogram.nonzero();
  if (coding == Coding::kElias) {
    plan.form = kSparse;
    return plan;
  }
  std::array<std::uint64_t, kSymbols> counts;
  if (!count_tokens<kBits>(packed, counts.data())) return plan;
  plan.form = kSparse;
  huffman_lengths(counts.data(), kTokens, length_limit(packed.count), plan.lengths.data());
  plan.stream_bits = plan.nonzero + exact_bits(counts.data(), plan, kTokens);  // signs and words
  for (int gap = 0; gap < kGapOctaves; ++gap) {
    for (int level = 0; level < kLevelOctaves; ++level) {
      const std::uint64_t n = counts[static_cast<std::size_t>(token_of(gap, level))];
      plan.stream_bits += n * static_cast<std::uint64_t>(gap + level);
    }
  }
  return plan;
}

// How to write these codes; `rest` is what the payload takes besides, of bytes. In sparse form only if that
// `sparse_may_be`.
template <int kBits>
Plan choose_plan(const Packed& packed, Coding coding, std::uint64_t rest, bool sparse_may_be) {
  const Plan stored;
  const Histogram histogram = histogram_of<kBits>(packed);
  // Encoders never write the code -s - 1, and only packed codes can hold it.
  if (packed.count == 0 || histogram.codes[std::size_t{1} << (kBits - 1)] != 0) return stored;
  struct Option {
    int width, digits;
    double bits;
  };
  std::vector<Option> dense;
  if (coding == Coding::kElias) {
    const Plan plan = dense_plan<kBits>(packed, histogram, coding, 0, 0);
    dense.push_back({0, 0, static_cast<double>(plan.stream_bits)});
  } else {
    for (const int width : {kBits, 2, 3, 4}) {
      if (width > kBits || (width == kBits && !dense.empty())) continue;
      dense.push_back({width, unit_values(width), expected_narrow_bits(histogram, kBits, width, unit_values(width))});
    }
    if (unit_values(kBits) > 1) {
      dense.push_back({kBits, 1, expected_narrow_bits(histogram, kBits, kBits, 1)});
    }
  }
  const Option best = *std::min_element(dense.begin(), dense.end(),
                                        [](const Option& a, const Option& b) { return a.bits < b.bits; });
  const double sparse_bits = expected_sparse_bits(histogram, coding, kBits);
  Plan plan;
  if (sparse_may_be && sparse_bits + 64 < best.bits) {
    plan = sparse_plan<kBits>(packed, histogram, coding);
    if (coding == Coding::kHuffman && !stands_for(rest + plan.max_size(coding), packed.count)) plan.form = kStored;
  }
  const auto packed_bits = static_cast<double>(8 * packed.size);
  if (plan.form == kStored && best.bits < packed_bits) {
    plan = dense_plan<kBits>(packed, histogram, coding, best.width, best.digits);
  }
  // Writing ends up to 8 bytes beyond the end, which must not be beyond what the stored form takes.
  return plan.max_size(coding) + 8 <= packed.size ? plan : stored;
}

}  // namespace entropy
}  // namespace
