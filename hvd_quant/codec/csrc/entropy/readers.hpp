// Bit streams -> packed codes, several symbols at a time, by tables.
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

constexpr const char* kBadStream = "its codes are not a valid bit stream";

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
      for (int symbol = 0; symbol < plan.symbols(coding); ++symbol) {
        fields[static_cast<std::size_t>(symbol)] = fields_of(symbol);
      }
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

}  // namespace entropy
}  // namespace
