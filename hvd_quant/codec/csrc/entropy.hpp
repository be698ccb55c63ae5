// Entropy coding of the codes of a payload: packed codes <-> an Elias or Huffman bit stream, without loss.
// docs/wire-format.md, "Coded codes", is its text. Included by native.cpp once: with
// AVX2, compilers turn the table look-ups into gathers, which are several times slower.
//
// Packed codes are handled in units, as many codes as fit into 8 bits; eight units fill kUnitBits bytes.
// Bit streams begin at the least significant bit of their first byte, and so do code words in them.

namespace entropy {

enum Form : std::uint64_t { kStored, kDense, kSparse };

constexpr int kMaxLength = 11;       // of a Huffman code word, and of the index of a decoding table
constexpr int kGapOctaves = 24;      // gaps are below 2^24
constexpr int kLevelOctaves = 7;     // levels are below 2^7
constexpr int kTokens = kGapOctaves * kLevelOctaves;
constexpr int kSymbols = 256;        // of a Huffman code at most

// What dense forms write: the values, and zeros up to a multiple of 4, so that the last unit is a whole one.
constexpr std::uint64_t filled(std::uint64_t count) { return (count + 3) / 4 * 4; }

constexpr int unit_values(int bits) { return bits == 2 ? 4 : bits <= 4 ? 2 : 1; }

inline std::uint64_t load64(const std::uint8_t* from) {
  std::uint64_t word;
  std::memcpy(&word, from, 8);
  return word;
}

inline void store64(std::uint8_t* to, std::uint64_t word) { std::memcpy(to, &word, 8); }

// The up to 8 bytes from `at` on of `size`, the rest zero.
inline std::uint64_t load_some(const std::uint8_t* bytes, std::uint64_t at, std::uint64_t size) {
  std::uint64_t word = 0;
  if (at < size) std::memcpy(&word, bytes + at, std::min<std::uint64_t>(8, size - at));
  return word;
}

inline int octave(std::uint64_t n) {  // floor(log2 n) of n >= 1
#if defined(__GNUC__)
  return 63 - __builtin_clzll(n);
#else
  int exponent = 0;
  while (n >>= 1) ++exponent;
  return exponent;
#endif
}

constexpr std::uint32_t reversed(std::uint32_t bits, int n) {  // the low n of them, 1 to 32
  bits = (bits >> 1 & 0x55555555u) | (bits & 0x55555555u) << 1;
  bits = (bits >> 2 & 0x33333333u) | (bits & 0x33333333u) << 2;
  bits = (bits >> 4 & 0x0f0f0f0fu) | (bits & 0x0f0f0f0fu) << 4;
  bits = (bits >> 8 & 0x00ff00ffu) | (bits & 0x00ff00ffu) << 8;
  return (bits >> 16 | bits << 16) >> (32 - n);
}

// Some bits of a stream.
struct Word {
  std::uint64_t bits = 0;
  int length = 0;

  void append(std::uint64_t more, int n) {
    bits |= more << length;
    length += n;
  }
  void append(const Word& other) { append(other.bits, other.length); }
};

// --- Elias omega ----------------------------------------------------------------------------------------

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
      if (n != 0 && length <= kOmegaBits) entries[i] = static_cast<std::uint16_t>(n << 4 | static_cast<std::uint32_t>(length));
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

// --- Huffman codes --------------------------------------------------------------------------------------

// The lengths of an optimal prefix code of words of at most `limit` bits, by package-merge (Larmore and
// Hirschberg, 1990). Symbols that do not occur get no word, except that there are always two words at least.
inline void huffman_lengths(const std::uint64_t* counts, int symbols, int limit, std::uint8_t* lengths) {
  std::memset(lengths, 0, static_cast<std::size_t>(symbols));
  std::array<std::pair<std::uint64_t, int>, kSymbols> leaves;
  int n = 0;
  for (int i = 0; i < symbols; ++i) {
    if (counts[i] != 0) leaves[static_cast<std::size_t>(n++)] = {counts[i], i};
  }
  for (int i = 0; n < 2; ++i) {
    if (counts[i] == 0) leaves[static_cast<std::size_t>(n++)] = {0, i};
  }
  std::sort(leaves.begin(), leaves.begin() + n);
  while ((1 << limit) < n) ++limit;
  // Each row merges the leaves with the pairs of the row before; what is a leaf in it is all that is kept.
  std::array<std::array<bool, 2 * kSymbols>, kMaxLength> is_leaf;
  std::array<std::uint64_t, 2 * kSymbols> row, previous;
  std::size_t size = 0;
  for (int level = 0; level < limit; ++level) {
    std::swap(row, previous);
    const std::size_t pairs = size / 2;
    std::size_t leaf = 0, pair = 0;
    for (size = 0; leaf < static_cast<std::size_t>(n) || pair < pairs; ++size) {
      const bool take_leaf =
          pair == pairs || (leaf < static_cast<std::size_t>(n) &&
                            leaves[leaf].first <= previous[2 * pair] + previous[2 * pair + 1]);
      row[size] = take_leaf ? leaves[leaf].first : previous[2 * pair] + previous[2 * pair + 1];
      is_leaf[static_cast<std::size_t>(level)][size] = take_leaf;
      ++(take_leaf ? leaf : pair);
    }
  }
  std::size_t taken = 2 * static_cast<std::size_t>(n) - 2;
  for (int level = limit; level-- > 0;) {
    std::size_t used = 0;
    for (std::size_t i = 0; i < taken; ++i) used += is_leaf[static_cast<std::size_t>(level)][i] ? 1 : 0;
    for (std::size_t i = 0; i < used; ++i) ++lengths[leaves[i].second];
    taken = 2 * (taken - used);
  }
}

// The canonical code of these lengths: words in the order of length, then of symbol, as binary numbers. Returns
// whether the lengths are those of a complete code.
inline bool canonical_code(const std::uint8_t* lengths, int symbols, Word* words) {
  std::array<std::uint32_t, kMaxLength + 1> of_length{}, next{};
  for (int i = 0; i < symbols; ++i) {
    if (lengths[i] > kMaxLength) return false;
    ++of_length[lengths[i]];
  }
  std::uint32_t code = 0;
  of_length[0] = 0;
  for (std::size_t length = 1; length <= kMaxLength; ++length) {
    code = (code + of_length[length - 1]) << 1;
    next[length] = code;
    if (code + of_length[length] > std::uint32_t{1} << length) return false;
  }
  if (code + of_length[kMaxLength] != std::uint32_t{1} << kMaxLength) return false;
  for (int i = 0; i < symbols; ++i) {
    words[i] = lengths[i] == 0 ? Word{} : Word{reversed(next[lengths[i]]++, lengths[i]), lengths[i]};
  }
  return true;
}

// --- the layout of a section of codes -------------------------------------------------------------------

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
  std::uint64_t table_offset() const { return lanes_offset() + (form == kStored ? 0 : 8 * static_cast<std::uint64_t>(lanes)); }
  std::uint64_t stream_offset(Coding coding) const {
    return table_offset() + static_cast<std::uint64_t>(symbols(coding)) / 2;
  }
  // Of the section at most: each lane ends with a whole byte.
  std::uint64_t max_size(Coding coding) const {
    return stream_offset(coding) + stream_bits / 8 + static_cast<std::uint64_t>(lanes);
  }
};

// --- reading packed codes -------------------------------------------------------------------------------

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
  return n == 0 ? 0.0 : static_cast<double>(n) * (log2_of(static_cast<double>(total)) - log2_of(static_cast<double>(n)));
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

// --- writing --------------------------------------------------------------------------------------------

struct Writer {
  std::uint8_t* out;
  std::uint64_t bits = 0;
  int length = 0;  // of them; below 8 after each flush

  void append(std::uint64_t more, int n) {
    bits |= more << length;
    length += n;
  }
  std::uint64_t written(const std::uint8_t* from) const {  // in bits
    return static_cast<std::uint64_t>(out - from) * 8 + static_cast<std::uint64_t>(length);
  }
  void skip(std::uint64_t n) {  // bits, where the memory is zero; after a flush
    store64(out, bits);
    n += static_cast<std::uint64_t>(length);
    bits = n < 8 ? bits : 0;
    out += n >> 3;
    length = static_cast<int>(n & 7);
  }
  void flush() {  // of up to 63 bits; writes 8 bytes
    store64(out, bits);
    out += length >> 3;
    bits >>= length & 56;
    length &= 7;
  }
};

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

inline std::array<Word, kSymbols> huffman_words(const Plan& plan) {
  std::array<Word, kSymbols> words{};
  canonical_code(plan.lengths.data(), plan.symbols(Coding::kHuffman), words.data());
  return words;
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

// --- reading --------------------------------------------------------------------------------------------

constexpr const char* kBadStream = "its codes are not a valid bit stream";

// A bit stream that is read. Between its end and that of the section, anything may be read, but not used.
struct Stream {
  const std::uint8_t* bytes;
  std::uint64_t readable;  // to the end of the section
  std::uint64_t end;       // in bits
  std::uint64_t at = 0;    // in bits

  bool has_word() const { return (at >> 3) + 8 <= readable; }
  // The bits from `at` on, 57 of them at least; zeros after the end of what is readable.
  std::uint64_t next() const {
    const std::uint64_t word = has_word() ? load64(bytes + (at >> 3)) : load_some(bytes, at >> 3, readable);
    return word >> (at & 7);
  }
};

// An entry of a table that is indexed by the next bits of a stream: how many of them to take, in its low 6 bits,
// or 0 where the table does not say; then what the reader in question needs.
using Entry = std::uint64_t;
using Table = std::array<Entry, 1 << kMaxLength>;

// The symbol that a stream's next kMaxLength bits begin with: its length in the low 4 bits, and itself.
using SymbolTable = std::array<std::uint16_t, 1 << kMaxLength>;

inline void fill_symbol_table(const Word* words, int symbols, int index_bits, SymbolTable& table) {
  for (int symbol = 0; symbol < symbols; ++symbol) {
    const Word& word = words[symbol];
    if (word.length == 0) continue;
    const auto entry = static_cast<std::uint16_t>(word.length | symbol << 4);
    for (std::uint64_t i = word.bits; i >> index_bits == 0; i += std::uint64_t{1} << word.length) {
      table[i] = entry;
    }
  }
}

// Packed codes that are written bit by bit, as it were.
struct Fields {
  std::uint64_t bits = 0;
  int length = 0;
};

template <int kBits>
class DenseReader {
 public:
  DenseReader(const Plan& plan, Coding coding, std::uint64_t count) : plan_(plan), coding_(coding) {
    if (coding == Coding::kHuffman) {
      const std::array<Word, kSymbols> words = huffman_words(plan);
      const int longest = *std::max_element(plan.lengths.begin(), plan.lengths.end());
      index_bits_ = std::clamp(octave(count + 1) - 5, longest, kMaxLength);
      fill_symbol_table(words.data(), plan.symbols(coding), index_bits_, symbols_);
      std::array<Fields, kSymbols> fields;
      for (int symbol = 0; symbol < plan.symbols(coding); ++symbol) fields[static_cast<std::size_t>(symbol)] = fields_of(symbol);
      fill_table(index_bits_, own_table_, [&](std::uint64_t bits, int* taken) {
        *taken = symbols_[bits] & 15;
        return fields[symbols_[bits] >> 4];
      });
      table_ = own_table_.data();
    } else {
      static const Table elias_table = [] {
        Table table;
        fill_table(kMaxLength, table, elias);
        return table;
      }();
      table_ = elias_table.data();
    }
  }
  DenseReader(const DenseReader&) = delete;
  DenseReader& operator=(const DenseReader&) = delete;

  // Writes the packed codes of `count` values and up to kSlack bytes more. Returns what is wrong, or null.
  const char* read(const Stream* streams, std::uint64_t count, std::uint8_t* out) const {
    const std::uint64_t step = lane_values(count, plan_.lanes);
    std::array<Lane, kLanes> lanes;
    for (std::size_t i = 0; i < static_cast<std::size_t>(plan_.lanes); ++i) {
      const std::uint64_t start = i * step, n = std::min(step, count - start);
      std::uint8_t* const begin = out + start / 8 * kBits;
      lanes[i] = {streams[i], {begin}, begin, n, filled(n) * kBits};
    }
    if (plan_.lanes == kLanes) {
      while (lanes[0].goes_on() && lanes[1].goes_on() && lanes[2].goes_on() && lanes[3].goes_on()) {
        for (Lane& lane : lanes) {
          if (!read_four(lane) && !read_one(lane)) return kBadStream;
        }
      }
    }
    for (std::size_t i = 0; i < static_cast<std::size_t>(plan_.lanes); ++i) {
      Lane& lane = lanes[i];
      // The last store of a lane may reach into the next one, which has been written already.
      std::uint8_t* const next = lane.begin + packed_size(lane.count, kBits);
      const bool is_last = i + 1 == static_cast<std::size_t>(plan_.lanes);
      const std::uint64_t kept = is_last ? 0 : load64(next);
      while (lane.writer.written(lane.begin) < lane.out_bits) {
        if (lane.goes_on() && read_four(lane)) continue;
        if (!read_one(lane)) return kBadStream;
      }
      lane.writer.flush();
      if (lane.writer.length > 0) *lane.writer.out = static_cast<std::uint8_t>(lane.writer.bits);
      if (lane.stream.at != lane.stream.end) return kBadStream;
      // The values that fill up must be zero.
      for (std::uint64_t bit = lane.count * kBits; bit < lane.out_bits; ++bit) {
        if ((lane.begin[bit >> 3] >> (bit & 7) & 1) != 0) return kBadStream;
      }
      if (!is_last) store64(next, kept);
    }
    return nullptr;
  }

 private:
  static constexpr int kMaxFields = 48;  // bits of codes in an entry

  struct Lane {
    Stream stream;
    Writer writer;
    std::uint8_t* begin;  // of what is written
    std::uint64_t count;
    std::uint64_t out_bits;  // with the values that fill up

    // Whether there is enough of everything for read_four.
    bool goes_on() const { return writer.written(begin) + 4 * kMaxFields + 64 <= out_bits && stream.has_word(); }
  };

  Plan plan_;
  Coding coding_;
  int index_bits_ = kMaxLength;
  const Entry* table_;
  Table own_table_;
  SymbolTable symbols_;

  // Four entries of the table; false where one does not say, the ones before it being read.
  bool read_four(Lane& lane) const {
    const std::uint64_t mask = (std::uint64_t{1} << index_bits_) - 1;
    const Entry* const table = table_;
    std::uint64_t bits = lane.stream.next(), taken = 0;
    Writer writer = lane.writer;  // in registers
    bool known = true;
    for (int i = 0; i < 4; ++i) {
      const Entry entry = table[bits & mask];
      bits >>= entry & 63;
      taken += entry & 63;
      writer.append(entry >> 12, static_cast<int>(entry >> 6 & 63));
      writer.flush();
      known = (entry & 63) != 0;
      if (!known) break;
    }
    lane.stream.at += taken;
    lane.writer = writer;
    return known;
  }

  // One symbol; false where there is none.
  bool read_one(Lane& lane) const {
    int taken = 0;
    const Fields fields = one(lane.stream.next(), &taken);
    lane.stream.at += static_cast<std::uint64_t>(taken);
    if (fields.length == 0 || lane.stream.at > lane.stream.end) return false;
    if (lane.writer.written(lane.begin) + static_cast<std::uint64_t>(fields.length) > lane.out_bits) return false;
    lane.writer.append(fields.bits, fields.length);
    lane.writer.flush();
    return true;
  }

  // The codes of a Huffman symbol; of none, where an escape is in it.
  Fields fields_of(int symbol) const {
    Fields fields;
    for (int i = 0; i < plan_.digits; ++i) {
      const auto digit = static_cast<std::uint32_t>(symbol) >> i * plan_.width & ((1u << plan_.width) - 1);
      if (is_escape(digit, kBits, plan_.width)) return {};
      const std::uint32_t sign = 1u << (plan_.width - 1);
      fields.bits |= std::uint64_t{((digit ^ sign) - sign) & ((1u << kBits) - 1)} << i * kBits;
      fields.length += kBits;
    }
    return fields;
  }

  static Fields elias(std::uint64_t bits, int* taken) {
    const std::uint32_t level = take_short_omega(&bits, taken) - 1;
    if (level >= 1u << (kBits - 1)) return {};
    if (level == 0) return {0, kBits};
    *taken += 1;
    return {(bits & 1) != 0 ? (1u << kBits) - level : level, kBits};
  }

  // The codes of the next symbol.
  Fields one(std::uint64_t bits, int* taken) const {
    if (coding_ == Coding::kElias) return elias(bits, taken);
    const std::uint16_t entry = symbols_[bits & ((std::uint64_t{1} << index_bits_) - 1)];
    *taken = entry & 15;
    bits >>= *taken;
    Fields fields;
    for (int i = 0; i < plan_.digits; ++i) {
      const std::uint32_t digit = static_cast<std::uint32_t>(entry >> 4) >> i * plan_.width & ((1u << plan_.width) - 1);
      const std::uint32_t sign = 1u << (plan_.width - 1);
      std::uint32_t code = (digit ^ sign) - sign;
      if (is_escape(digit, kBits, plan_.width)) {
        code = static_cast<std::uint32_t>(bits);
        bits >>= kBits;
        *taken += kBits;
      }
      fields.bits |= std::uint64_t{code & ((1u << kBits) - 1)} << i * kBits;
      fields.length += kBits;
    }
    return fields;
  }

  // As many symbols an entry as its index holds whole.
  template <class One>
  static void fill_table(int index_bits, Table& table, const One& one_symbol) {
    for (std::uint64_t i = 0; i >> index_bits == 0; ++i) {
      int taken = 0;
      Fields all;
      while (taken < index_bits && all.length < kMaxFields) {
        int more = 0;
        const Fields fields = one_symbol(i >> taken, &more);
        if (fields.length == 0 || taken + more > index_bits || all.length + fields.length > kMaxFields) break;
        all.bits |= fields.bits << all.length;
        all.length += fields.length;
        taken += more;
      }
      table[i] = all.bits << 12 | static_cast<Entry>(all.length) << 6 | static_cast<Entry>(taken);
    }
  }
};

template <int kBits>
class SparseReader {
 public:
  SparseReader(const Plan& plan, Coding coding, std::uint64_t count) : coding_(coding) {
    if (coding == Coding::kHuffman) {
      const std::array<Word, kSymbols> words = huffman_words(plan);
      const int longest = *std::max_element(plan.lengths.begin(), plan.lengths.end());
      index_bits_ = std::clamp(octave(count + 1) - 5, longest, kMaxLength);
      fill_symbol_table(words.data(), kTokens, index_bits_, symbols_);
      fill_table(index_bits_, own_table_, [this](std::uint64_t bits) { return huffman(bits); });
      table_ = own_table_.data();
    } else {
      static const Table elias_table = [] {
        Table table;
        fill_table(kMaxLength, table, elias);
        return table;
      }();
      table_ = elias_table.data();
    }
  }
  SparseReader(const SparseReader&) = delete;
  SparseReader& operator=(const SparseReader&) = delete;

  // Writes the packed codes of `count` values and up to kSlack bytes more. Returns what is wrong, or null.
  const char* read(Stream stream, std::uint64_t nonzero, std::uint64_t count, std::uint8_t* out) const {
    std::memset(out, 0, packed_size(count, kBits));
    const std::uint64_t mask = (std::uint64_t{1} << index_bits_) - 1;
    const std::uint64_t out_bits = count * kBits;
    Writer writer{out};
    std::uint64_t left = nonzero;
    while (left > 0) {
      // Four entries of the table, as long as there is enough of everything.
      if (left >= 4 * kMaxTokens && stream.has_word() && writer.written(out) + 4 * kMaxFields + 64 <= out_bits) {
        std::uint64_t bits = stream.next();
        const std::uint64_t before = stream.at;
        for (int i = 0; i < 4; ++i) {
          const Entry entry = table_[bits & mask];
          if ((entry & 63) == 0) break;
          bits >>= entry & 63;
          stream.at += entry & 63;
          writer.append(entry >> 16, static_cast<int>(entry >> 6 & 63));
          writer.flush();
          left -= entry >> 12 & 15;
        }
        if (stream.at != before) continue;
      }
      const Token token = one(stream.next());
      if (token.gap == 0 || writer.written(out) + std::uint64_t{token.gap} * kBits > out_bits) return kBadStream;
      stream.at += static_cast<std::uint64_t>(token.taken);
      if (stream.at > stream.end) return kBadStream;
      writer.skip(std::uint64_t{token.gap - 1} * kBits);
      writer.append(token.code, kBits);
      writer.flush();
      --left;
    }
    return stream.at == stream.end ? nullptr : kBadStream;
  }

 private:
  static constexpr int kMaxFields = 48;            // bits of codes in an entry
  static constexpr int kMaxTokens = kMaxLength / 2;  // in an entry: each has a word and a sign

  struct Token {
    int taken = 0;
    std::uint32_t code = 0;
    std::uint32_t gap = 0;  // 0 where it is none
  };

  Coding coding_;
  int index_bits_ = kMaxLength;
  const Entry* table_;
  Table own_table_;
  SymbolTable symbols_;

  template <class One>
  static void fill_table(int index_bits, Table& table, const One& one_token) {
    for (std::uint64_t i = 0; i >> index_bits == 0; ++i) {
      Fields all;
      int taken = 0;
      Entry tokens = 0;
      while (taken < index_bits) {
        const Token token = one_token(i >> taken);
        const std::uint64_t zeros = (std::uint64_t{token.gap} - 1) * kBits;  // bits of them
        if (token.gap == 0 || taken + token.taken > index_bits) break;
        if (zeros + static_cast<std::uint64_t>(all.length) + kBits > kMaxFields) break;
        all.length += static_cast<int>(zeros);
        all.bits |= std::uint64_t{token.code} << all.length;
        all.length += kBits;
        taken += token.taken;
        ++tokens;
      }
      table[i] = all.bits << 16 | tokens << 12 | static_cast<Entry>(all.length) << 6 | static_cast<Entry>(taken);
    }
  }

  Token one(std::uint64_t bits) const { return coding_ == Coding::kElias ? elias(bits) : huffman(bits); }

  static Token elias(std::uint64_t bits) {
    int taken = 1;  // the sign
    const std::uint32_t gap = take_short_omega(&bits, &taken);
    const bool negative = (bits & 1) != 0;
    bits >>= 1;
    const std::uint32_t level = take_short_omega(&bits, &taken);
    return token_of(taken, gap, negative, level);
  }

  Token huffman(std::uint64_t bits) const {
    const std::uint16_t entry = symbols_[bits & ((std::uint64_t{1} << index_bits_) - 1)];
    const int length = entry & 15, symbol = entry >> 4;
    const int gap_octave = symbol / kLevelOctaves, level_octave = symbol % kLevelOctaves;
    bits >>= length;
    const bool negative = (bits & 1) != 0;
    bits >>= 1;
    const std::uint32_t gap = with_low_bits(gap_octave, bits);
    bits >>= gap_octave;
    return token_of(length + 1 + gap_octave + level_octave, gap, negative, with_low_bits(level_octave, bits));
  }

  // 2^n, and the low n of the bits.
  static std::uint32_t with_low_bits(int n, std::uint64_t bits) {
    return static_cast<std::uint32_t>((std::uint64_t{1} << n) | (bits & ((std::uint64_t{1} << n) - 1)));
  }

  static Token token_of(int taken, std::uint32_t gap, bool negative, std::uint32_t level) {
    if (level == 0 || level >= 1u << (kBits - 1)) return {};
    return {taken, negative ? (1u << kBits) - level : level, gap};
  }
};

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

// --- payloads' bodies -----------------------------------------------------------------------------------

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

// Writes the coded body of a packed one, at most max_body_size(layout) bytes; returns its size.
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
