// Codes, packed and unpacked, and the checksum of what is packed. Part of kernels.hpp.
//
// Value i takes bits [i * kBits, (i + 1) * kBits) of the codes, least significant first, so eight values are
// kBits bytes. In a 64-bit word of eight codes, neighbours are drawn together, or apart, in three steps.

constexpr std::uint64_t field_mask(int bits, int stride) {
  std::uint64_t mask = 0;
  for (int at = 0; at < 64; at += stride) mask |= (~std::uint64_t{0} >> (64 - bits)) << at;
  return mask;
}

// What moves is masked apart from what stays: above 4 bits, a field's old and new places overlap.
template <int kBits>
std::uint64_t fold(std::uint64_t word) {
  constexpr int kGap = 8 - kBits;
  constexpr std::uint64_t kOnes = field_mask(kBits, 16);
  constexpr std::uint64_t kTwos = field_mask(2 * kBits, 32);
  constexpr std::uint64_t kFours = field_mask(4 * kBits, 64);
  word = (word & kOnes) | (word >> kGap & kOnes << kBits);
  word = (word & kTwos) | (word >> 2 * kGap & kTwos << 2 * kBits);
  return (word & kFours) | (word >> 4 * kGap & kFours << 4 * kBits);
}

template <int kBits>
std::uint64_t unfold(std::uint64_t word) {
  constexpr int kGap = 8 - kBits;
  constexpr std::uint64_t kOnes = field_mask(kBits, 16);
  constexpr std::uint64_t kTwos = field_mask(2 * kBits, 32);
  constexpr std::uint64_t kFours = field_mask(4 * kBits, 64);
  word = (word & kFours) | (word << 4 * kGap & kFours << 32);
  word = (word & kTwos) | (word << 2 * kGap & kTwos << 16);
  return (word & kOnes) | (word << kGap & kOnes << 8);
}

// Integer with the width of eight codes, where there is one: lets the compiler narrow whole vectors.
template <int kBits>
struct Octet {
  using type = void;
};
template <>
struct Octet<2> {
  using type = std::uint16_t;
};
template <>
struct Octet<4> {
  using type = std::uint32_t;
};

// codes holds n codes and is padded to a multiple of 8; n codes take size = ceil(n * kBits / 8) bytes.
template <int kBits>
void pack(const std::int8_t* codes, std::uint64_t n, std::uint8_t* packed) {
  const std::uint64_t size = packed_size(n, kBits);
  if constexpr (kBits == 8) {
    std::memcpy(packed, codes, size);
  } else {
    using Narrow = typename Octet<kBits>::type;
    const std::uint64_t octets = n / 8;
    std::uint64_t done = 0;
    if constexpr (!std::is_void_v<Narrow>) {
      for (; done < octets; ++done) {
        std::uint64_t word;
        std::memcpy(&word, codes + 8 * done, 8);
        const auto narrow = static_cast<Narrow>(fold<kBits>(word));
        std::memcpy(packed + kBits * done, &narrow, kBits);
      }
    } else {
      // Each store writes 8 bytes, of which the next one overwrites the last 8 - kBits.
      std::uint64_t words[kChunk / 8];
      for (std::uint64_t i = 0; i < octets; ++i) {
        std::uint64_t word;
        std::memcpy(&word, codes + 8 * i, 8);
        words[i] = fold<kBits>(word);
      }
      for (; done < octets && kBits * done + 8 <= size; ++done) {
        std::memcpy(packed + kBits * done, &words[done], 8);
      }
    }
    for (; kBits * done < size; ++done) {  // the last, perhaps incomplete, groups
      std::uint64_t word = 0;
      std::memcpy(&word, codes + 8 * done, std::min<std::uint64_t>(8, n - 8 * done));
      word = fold<kBits>(word);
      std::memcpy(packed + kBits * done, &word, std::min<std::uint64_t>(kBits, size - kBits * done));
    }
  }
}

// codes has room for n codes, rounded up to a multiple of 8. Codes are two's complement.
template <int kBits>
void unpack(const std::uint8_t* packed, std::uint64_t n, std::int8_t* codes) {
  const std::uint64_t size = packed_size(n, kBits);
  if constexpr (kBits == 8) {
    std::memcpy(codes, packed, size);
  } else {
    using Narrow = typename Octet<kBits>::type;
    std::uint64_t done = 0;
    if constexpr (!std::is_void_v<Narrow>) {
      for (; done < n / 8; ++done) {
        Narrow narrow;
        std::memcpy(&narrow, packed + kBits * done, kBits);
        const std::uint64_t word = unfold<kBits>(narrow);
        std::memcpy(codes + 8 * done, &word, 8);
      }
    } else {
      std::uint64_t words[kChunk / 8];
      std::uint64_t whole = 0;
      for (; kBits * whole + 8 <= size; ++whole) std::memcpy(&words[whole], packed + kBits * whole, 8);
      for (; done < whole; ++done) {
        const std::uint64_t word = unfold<kBits>(words[done]);
        std::memcpy(codes + 8 * done, &word, 8);
      }
    }
    for (; kBits * done < size; ++done) {
      std::uint64_t word = 0;
      std::memcpy(&word, packed + kBits * done, std::min<std::uint64_t>(kBits, size - kBits * done));
      word = unfold<kBits>(word);
      std::memcpy(codes + 8 * done, &word, 8);
    }
    constexpr int kSign = 1 << (kBits - 1);
    for (std::uint64_t i = 0; i < n; ++i) codes[i] = static_cast<std::int8_t>((codes[i] ^ kSign) - kSign);
  }
}

// --- checksum -------------------------------------------------------------------------------------------

// Sum of (2 i + 1) * w_i mod 2^32 over the 32-bit words w_i, the last one padded with zeros; word 0 of these
// bytes is word `first` of the payload. Odd weights: no flipped bit goes unnoticed.
inline std::uint32_t checksum(const std::uint8_t* bytes, std::uint64_t size, std::uint64_t first) {
  const auto weight = static_cast<std::uint32_t>(2 * first + 1);
  const std::uint64_t words = size / 4;
  std::uint32_t sum = 0;
  for (std::uint32_t i = 0; i < words; ++i) {
    std::uint32_t word;
    std::memcpy(&word, bytes + 4 * std::uint64_t{i}, 4);
    sum += (weight + 2 * i) * word;
  }
  if (size % 4 != 0) {
    std::uint32_t word = 0;
    std::memcpy(&word, bytes + 4 * words, size % 4);
    sum += (weight + 2 * static_cast<std::uint32_t>(words)) * word;
  }
  return sum;
}
