// A payload's body: norms, then codes, and how many bytes they take. Headers are wire.py's.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <stdexcept>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the wire format is little-endian, and this codec copies words as they are"
#endif

namespace {

constexpr std::uint64_t kHeaderSize = 32;
constexpr int kMinBits = 2;
constexpr int kMaxBits = 8;

enum class Norm { kMax, kL2 };
enum class Spacing { kUniform, kExponential };  // of the levels
enum class Coding { kPacked, kElias, kHuffman };  // of the codes; what is not packed is entropy/'s

constexpr std::uint64_t packed_size(std::uint64_t n, int bits) {
  const auto b = static_cast<std::uint64_t>(bits);
  return n / 8 * b + (n % 8 * b + 7) / 8;
}

struct Layout {
  std::uint64_t count;
  std::uint64_t bucket_size;
  int bits;

  std::uint64_t buckets() const { return count / bucket_size + (count % bucket_size != 0); }
  std::uint64_t codes_offset() const { return 4 * buckets(); }
  std::uint64_t used_size() const { return codes_offset() + packed_size(count, bits); }
  std::uint64_t body_size() const { return (used_size() + 7) / 8 * 8; }
};

inline Layout checked_layout(std::uint64_t count, std::uint64_t bucket_size, int bits) {
  if (bits < kMinBits || bits > kMaxBits) throw std::invalid_argument("bits must be 2 to 8");
  if (bucket_size == 0) throw std::invalid_argument("bucket_size must be positive");
  // No real buffer is that large; below it, no size computed from count overflows.
  if (count > std::numeric_limits<std::uint64_t>::max() / 16) throw std::invalid_argument("count is too large");
  return Layout{count, bucket_size, bits};
}

// --- coded bodies ---------------------------------------------------------------------------------------

constexpr std::uint64_t kMaxValuesAByte = 4096;  // of a coded payload: what a decoder makes room for
constexpr std::uint64_t kSlack = 16;  // bytes that entropy decoding may write to beyond a packed body

constexpr std::uint64_t padded(std::uint64_t size) { return (size + 7) / 8 * 8; }

// The most that the coded body of such a payload takes: the packed codes and a head.
inline std::uint64_t max_coded_size(const Layout& layout) { return padded(layout.used_size() + 8); }

// Whether a coded body of `size` bytes may stand for so many values: to be asked before room is made for them.
inline bool is_plausible(const Layout& layout, std::uint64_t size) {
  const std::uint64_t least = layout.count / kMaxValuesAByte + (layout.count % kMaxValuesAByte != 0 ? 1 : 0);
  return least <= size + kHeaderSize && layout.codes_offset() + 8 <= size;
}

inline std::unique_ptr<std::uint8_t[]> scratch(std::uint64_t size) {  // uninitialised, with slack
  return std::unique_ptr<std::uint8_t[]>(new std::uint8_t[size + kSlack]);
}

}  // namespace
