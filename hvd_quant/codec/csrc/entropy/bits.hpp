// Bits: words of them, and the streams that entropy coding writes and reads.
//
// Bit streams begin at the least significant bit of their first byte, and so do code words in them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {
namespace entropy {

// What the format has room for.
constexpr int kGapOctaves = 24;   // gaps between values that are not 0 are below 2^24
constexpr int kLevelOctaves = 7;  // levels are below 2^7
constexpr int kSymbols = 256;     // of a Huffman code at most

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

// A bit stream that is written.
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

}  // namespace entropy
}  // namespace
