// Values: how they are loaded and stored, and moved to and from memory. Part of kernels.hpp.

// --- input and output types -----------------------------------------------------------------------------

inline float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float load(const float* x) { return *x; }
inline float load(const double* x) { return static_cast<float>(*x); }
inline float load(const BFloat16* x) { return bits_to_float(std::uint32_t{x->bits} << 16); }

inline float load(const Float16* x) {
  // Move exponent and mantissa to float's places, then correct the exponent: Inf and NaN need the larger
  // offset, and subnormals are renormalised by a float subtraction.
  constexpr std::uint32_t kExponent = 0x7c00u << 13;
  constexpr std::uint32_t kRebias = (127u - 15u) << 23;
  const std::uint32_t magnitude = (x->bits & 0x7fffu) << 13;
  const std::uint32_t exponent = magnitude & kExponent;
  const std::uint32_t rebiased = magnitude + kRebias + (exponent == kExponent ? kRebias : 0u);
  const float subnormal = bits_to_float(rebiased + (1u << 23)) - bits_to_float(113u << 23);
  const std::uint32_t unsigned_bits = exponent == 0 ? float_to_bits(subnormal) : rebiased;
  return bits_to_float(unsigned_bits | (x->bits & 0x8000u) << 16);
}

inline void store(float* out, float value) { *out = value; }
inline void store(double* out, float value) { *out = static_cast<double>(value); }

inline void store(BFloat16* out, float value) {  // to nearest, ties to even
  const std::uint32_t bits = float_to_bits(value);
  const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const std::uint32_t nan = bits >> 16 | 0x40u;
  out->bits = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

inline void store(Float16* out, float value) {  // to nearest, ties to even
  const std::uint32_t bits = float_to_bits(value);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Adding 0.5 leaves a subnormal half's mantissa, correctly rounded, in the low bits of the sum.
  const std::uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const std::uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const std::uint32_t finite = magnitude < 113u << 23 ? subnormal : normal;
  const std::uint32_t half = magnitude >= 143u << 23 ? special : finite;
  out->bits = static_cast<std::uint16_t>(half | (bits >> 16 & 0x8000u));
}

// --- moving data ----------------------------------------------------------------------------------------

// Values are read twice, for the norm and for the codes, in blocks of kBlock. Each reading fetches half a
// block that lies kAhead values further on, so that memory is never waited for and never idle.
constexpr std::uint64_t kBlock = 128;
constexpr std::uint64_t kAhead = 768;
enum class Half { kFirst, kSecond };

template <class T>
inline void fetch_ahead(const T* x, Half half) {
  constexpr std::uintptr_t kBytes = kBlock * sizeof(T) / 2;
  // An integer, because the address may lie beyond the array: fetching there does nothing.
  const std::uintptr_t start =
      reinterpret_cast<std::uintptr_t>(x) + kAhead * sizeof(T) + (half == Half::kFirst ? 0 : kBytes);
  for (std::uintptr_t at = 0; at < kBytes; at += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(start + at));
  }
}

// Copies to memory that will not be read soon, past the caches where the processor can: an ordinary store
// would first read what it overwrites.
inline void stream_out(void* out, const void* data, std::size_t size) {
#if defined(__x86_64__)
  auto* to = static_cast<char*>(out);
  const auto* from = static_cast<const char*>(data);
  const std::size_t head = std::min<std::size_t>(size, -reinterpret_cast<std::uintptr_t>(out) % 16);
  const std::size_t blocks_end = head + (size - head) / 16 * 16;
  std::memcpy(to, from, head);
  const auto stream_block = [&](std::size_t i) {
    __m128i block;
    std::memcpy(&block, from + i, 16);
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), block);
  };
  // Four blocks at a time: a loop over one is so short that it takes a third longer where it crosses a cache line.
  std::size_t i = head;
  for (; blocks_end - i >= 64; i += 64) {
    stream_block(i);
    stream_block(i + 16);
    stream_block(i + 32);
    stream_block(i + 48);
  }
  for (; i < blocks_end; i += 16) stream_block(i);
  std::memcpy(to + blocks_end, from + blocks_end, size - blocks_end);
#else
  std::memcpy(out, data, size);
#endif
}

inline void stream_end() {
#if defined(__x86_64__)
  _mm_sfence();  // streamed stores are ordered by nothing else
#endif
}
