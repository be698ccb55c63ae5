// The codec's loops. dispatch.hpp includes this file once per instruction set, each time inside another
// namespace and under another target, so there is no include guard. Plain loops over fixed-size blocks,
// written to be vectorised by the compiler: no intrinsics, and the same bits on every instruction set.
//
// Values are handled in chunks of kChunk, which stay in the first-level cache. Chunks and buckets need not
// start together: a chunk is cut into segments that each lie in one bucket.
//
// The two functions with the inner loops begin at cache lines: so where their loops cross one, which can cost a third
// of the speed, does not depend on what is compiled before them.

#include "kernels/packing.hpp"
#include "kernels/values.hpp"

// --- bucket norms ---------------------------------------------------------------------------------------

// Largest magnitude. Compared as integers: their order is that of the floats, with NaN above everything.
template <class T>
float max_norm(const T* x, std::uint64_t n) {
  std::uint32_t largest = 0;
  const auto take = [&](std::uint64_t i) {
    const std::uint32_t magnitude = float_to_bits(load(x + i)) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  };
  const std::uint64_t whole = n - n % kBlock;
  for (std::uint64_t i = 0; i < whole; i += kBlock) {
    fetch_ahead(x + i, Half::kFirst);
    for (std::uint64_t j = i; j < i + kBlock; ++j) take(j);
  }
  for (std::uint64_t i = whole; i < n; ++i) take(i);
  return bits_to_float(largest);
}

// Euclidean norm in double precision, where a float's square is exact and neither overflows nor vanishes.
// A fixed number of partial sums makes the result independent of the vector width. It is never below the
// largest magnitude, because every step of it is monotone.
template <class T>
float l2_norm(const T* x, std::uint64_t n) {
  constexpr std::uint64_t kLanes = 32;
  double sums[kLanes] = {};
  const std::uint64_t whole = n - n % kLanes;
  for (std::uint64_t i = 0; i < whole; i += kLanes) {
    if (i % kBlock == 0) fetch_ahead(x + i, Half::kFirst);
    for (std::uint64_t j = 0; j < kLanes; ++j) {
      const double value = load(x + i + j);
      sums[j] += value * value;
    }
  }
  for (std::uint64_t i = whole; i < n; ++i) {
    const double value = load(x + i);
    sums[i - whole] += value * value;
  }
  for (std::uint64_t width = kLanes / 2; width > 0; width /= 2) {
    for (std::uint64_t j = 0; j < width; ++j) sums[j] += sums[j + width];
  }
  return static_cast<float>(std::sqrt(sums[0]));
}

struct Bucket {
  float norm;      // as sent: NaN where the bucket holds a non-finite value
  float prescale;  // a power of two that lifts tiny buckets out of the subnormals
  float scale;     // to fixed point; 0 where all codes are 0
};

template <class T>
Bucket measure(const T* x, std::uint64_t n, Norm kind, std::int32_t levels) {
  Bucket bucket{kind == Norm::kMax ? max_norm(x, n) : l2_norm(x, n), 1.0f, 0.0f};
  if (!(bucket.norm < std::numeric_limits<float>::infinity())) {
    bucket.norm = std::numeric_limits<float>::quiet_NaN();
    return bucket;
  }
  if (bucket.norm == 0.0f) return bucket;
  if (bucket.norm < kTinyNorm) bucket.prescale = kTinyPrescale;
  // The largest scale with |x| * scale <= levels * 2^kFractionBits for all |x| <= norm, as floats multiply.
  const float norm = bucket.norm * bucket.prescale;
  const float top = static_cast<float>(levels) * static_cast<float>(1 << kFractionBits);
  bucket.scale = top / norm;
  while (norm * bucket.scale > top) bucket.scale = std::nextafter(bucket.scale, 0.0f);
  return bucket;
}

// --- stochastic rounding --------------------------------------------------------------------------------

// kFractionBits random bits a value, a pure function of (seed, chunk, place in the chunk), plus `shift`, modulo
// 2^kFractionBits. One 32-bit hash serves two values, the second with its halves exchanged: both are uniform,
// and independent down to 2^-16.
inline void fill_noise(std::int32_t* noise, std::uint64_t seed, std::uint32_t shift, std::uint64_t chunk) {
  const std::uint64_t key = mix64(seed ^ mix64(chunk + 0x9e3779b97f4a7c15u));
  const auto key_low = static_cast<std::uint32_t>(key);
  const auto key_high = static_cast<std::uint32_t>(key >> 32);
  constexpr std::int32_t kMask = (1 << kFractionBits) - 1;
  for (std::uint32_t i = 0; i < kChunk / 2; ++i) {
    std::uint32_t hash = kWeyl[i] + key_low;
    hash = (hash ^ hash >> 16) * 0x21f0aaadu;
    hash = ((hash ^ hash >> 15) + key_high) * 0x735a2d97u;
    hash ^= hash >> 15;
    noise[i] = static_cast<std::int32_t>(hash + shift) & kMask;
    noise[i + kChunk / 2] = static_cast<std::int32_t>((hash << 16 | hash >> 16) + shift) & kMask;
  }
}

// A value in units of 2^-kFractionBits of a level, plus as many random bits, floored to a level.
inline std::int8_t round_down(float value, std::int32_t noise) {
  return static_cast<std::int8_t>((static_cast<std::int32_t>(value) + noise) >> kFractionBits);
}

// A value in units of 2^-kFractionBits of the norm, rounded to a power of two, 1 to 2^-(s - 1) of the norm, or
// to 0. Between two powers, the probability of the upper one is what the float's mantissa says: so random bits
// are added to that, and the exponent is kept. Below the lowest power l_1, value + l_1 has that mantissa.
template <int kBits>
inline std::int8_t round_to_power(float value, std::int32_t noise) {
  constexpr std::uint32_t kMantissaBits = 23;
  constexpr std::uint32_t kSteps = (1u << (kBits - 1)) - 1;
  constexpr std::uint32_t kLowest = 127 + kFractionBits - (kSteps - 1);  // l_1's exponent
  const std::uint32_t bits = float_to_bits(value);
  const float magnitude = bits_to_float(bits & 0x7fffffffu);
  const float lowest = bits_to_float(kLowest << kMantissaBits);
  const bool below = magnitude < lowest;
  const std::uint32_t lifted = float_to_bits(below ? magnitude + lowest : magnitude);
  const std::uint32_t random = static_cast<std::uint32_t>(noise) >> (kFractionBits - kMantissaBits);
  const auto exponent = static_cast<std::int32_t>((lifted + random) >> kMantissaBits);
  const std::int32_t level = exponent - static_cast<std::int32_t>(kLowest) + (below ? 0 : 1);
  const std::int32_t sign = static_cast<std::int32_t>(bits) >> 31;
  return static_cast<std::int8_t>((level ^ sign) - sign);
}

// round(value, noise) is one of the two above.
template <class T, class Round>
void quantize(const T* x, std::uint64_t n, const Bucket& bucket, const std::int32_t* noise, std::int8_t* codes,
              Round round) {
  const float prescale = bucket.prescale;
  const float scale = bucket.scale;
  if (scale == 0.0f) {
    std::memset(codes, 0, n);
  } else if (prescale != 1.0f) {
    for (std::uint64_t i = 0; i < n; ++i) codes[i] = round(load(x + i) * prescale * scale, noise[i]);
  } else {
    const std::uint64_t whole = n - n % kBlock;
    for (std::uint64_t i = 0; i < whole; i += kBlock) {
      fetch_ahead(x + i, Half::kSecond);
      for (std::uint64_t j = i; j < i + kBlock; ++j) codes[j] = round(load(x + j) * scale, noise[j]);
    }
    for (std::uint64_t i = whole; i < n; ++i) codes[i] = round(load(x + i) * scale, noise[i]);
  }
}

// --- encode ---------------------------------------------------------------------------------------------

// Encodes the values [begin, end), begin being a multiple of kChunk, and returns their share of the
// checksum. A bucket that begins before `begin` is measured again; its norm is written by its owner alone.
template <class T, int kBits>
[[gnu::aligned(64)]] std::uint32_t encode_range(const Encoding& job, std::uint64_t begin, std::uint64_t end) {
  const T* x = static_cast<const T*>(job.values);
  const Layout& layout = job.layout;
  const bool uniform = job.spacing == Spacing::kUniform;
  const std::int32_t levels = uniform ? (1 << (kBits - 1)) - 1 : 1;  // that the norm is the topmost of
  alignas(64) std::int32_t noise[kChunk];
  alignas(64) std::int8_t codes[kChunk];
  alignas(64) std::uint8_t packed[kChunk];
  const bool streamed = layout.body_size() >= kStreamedSize && job.residual == nullptr;  // else read back at once
  if (job.nearest) std::fill_n(noise, kChunk, 1 << (kFractionBits - 1));
  std::uint32_t sum = 0;
  Bucket bucket{};
  std::uint64_t bucket_end = begin;  // of the bucket measured last
  for (std::uint64_t at = begin; at < end; at += kChunk) {
    const std::uint64_t n = std::min(kChunk, end - at);
    if (!job.nearest) fill_noise(noise, job.seed, job.shift, at / kChunk);
    for (std::uint64_t i = 0; i < n;) {
      if (at + i == bucket_end) {
        const std::uint64_t index = bucket_end / layout.bucket_size;
        const std::uint64_t start = index * layout.bucket_size;
        bucket_end = start + std::min(layout.bucket_size, layout.count - start);
        bucket = measure(x + start, bucket_end - start, job.norm, levels);
        if (start >= begin) {
          std::memcpy(job.body + 4 * index, &bucket.norm, 4);
          sum += static_cast<std::uint32_t>(2 * (job.first_word + index) + 1) * float_to_bits(bucket.norm);
        }
      }
      const std::uint64_t m = std::min(n - i, bucket_end - (at + i));
      if (uniform) {
        quantize(x + at + i, m, bucket, noise + i, codes + i,
                 [](float value, std::int32_t random) { return round_down(value, random); });
      } else {
        quantize(x + at + i, m, bucket, noise + i, codes + i,
                 [](float value, std::int32_t random) { return round_to_power<kBits>(value, random); });
      }
      i += m;
    }
    const std::uint64_t codes_at = layout.codes_offset() + at / 8 * kBits;
    const std::uint64_t size = packed_size(n, kBits);
    pack<kBits>(codes, n, packed);
    sum += checksum(packed, size, job.first_word + codes_at / 4);
    if (streamed) {
      stream_out(job.body + codes_at, packed, size);
    } else {
      std::memcpy(job.body + codes_at, packed, size);
    }
  }
  if (streamed) stream_end();
  return sum;
}

// --- decode ---------------------------------------------------------------------------------------------

// total[i] += codes[i] * (norm / levels), or = for the first payload. Tiny norms are scaled up and the values
// down again, because the step would be a subnormal with few bits left.
inline void add_values(const std::int8_t* codes, std::uint64_t n, float norm, float levels, bool first,
                       float* total) {
  if (std::fabs(norm) < kTinyNorm) {
    const float step = norm * kTinyPrescale / levels;
    for (std::uint64_t i = 0; i < n; ++i) {
      const float value = static_cast<float>(codes[i]) * step * (1.0f / kTinyPrescale);
      total[i] = first ? value : total[i] + value;
    }
    return;
  }
  const float step = norm / levels;
  if (first) {
    for (std::uint64_t i = 0; i < n; ++i) total[i] = static_cast<float>(codes[i]) * step;
  } else {
    for (std::uint64_t i = 0; i < n; ++i) total[i] += static_cast<float>(codes[i]) * step;
  }
}

// As add_values, for powers of two: code c stands for sign(c) * 2^(|c| - s) * norm, 0 for 0.
template <int kBits>
inline void add_powers(const std::int8_t* codes, std::uint64_t n, float norm, bool first, float* total) {
  constexpr std::int32_t kOffset = 127 - ((1 << (kBits - 1)) - 1);
  const auto power = [](std::int8_t code) {
    const std::int32_t level = code < 0 ? -code : code;
    const auto exponent = static_cast<std::uint32_t>(level == 0 ? 0 : level + kOffset);
    return bits_to_float(exponent << 23 | (code < 0 ? 0x80000000u : 0u));
  };
  if (first) {
    for (std::uint64_t i = 0; i < n; ++i) total[i] = power(codes[i]) * norm;
  } else {
    for (std::uint64_t i = 0; i < n; ++i) total[i] += power(codes[i]) * norm;
  }
}

// out[i] = weight * (sum over the payloads of their value i), for i in [begin, end), begin being a multiple
// of kChunk. sums[k] grows by this range's share of payload k's checksum.
template <class T, int kBits>
[[gnu::aligned(64)]] void decode_range(const Decoding& job, std::uint64_t begin, std::uint64_t end, std::uint32_t* sums) {
  T* out = static_cast<T*>(job.out);
  constexpr float kLevels = (1 << (kBits - 1)) - 1;
  const Layout& layout = job.layout;
  alignas(64) std::int8_t codes[kChunk];
  alignas(64) float total[kChunk];
  alignas(64) T result[kChunk];
  const bool streamed = layout.count * sizeof(T) >= kStreamedSize;
  for (std::uint64_t at = begin; at < end; at += kChunk) {
    const std::uint64_t n = std::min(kChunk, end - at);
    const std::uint64_t codes_at = layout.codes_offset() + at / 8 * kBits;
    for (std::size_t k = 0; k < job.bodies.size(); ++k) {
      const std::uint8_t* body = job.bodies[k];
      sums[k] += checksum(body + codes_at, packed_size(n, kBits), job.first_word + codes_at / 4);
      unpack<kBits>(body + codes_at, n, codes);
      for (std::uint64_t i = 0; i < n;) {
        const std::uint64_t index = (at + i) / layout.bucket_size;
        const std::uint64_t start = index * layout.bucket_size;
        const std::uint64_t m = std::min(n - i, layout.bucket_size - (at + i - start));
        float norm;
        std::memcpy(&norm, body + 4 * index, 4);
        if (start >= begin && start == at + i) {
          sums[k] += static_cast<std::uint32_t>(2 * (job.first_word + index) + 1) * float_to_bits(norm);
        }
        if (job.spacing == Spacing::kUniform) {
          add_values(codes + i, m, norm, kLevels, k == 0, total + i);
        } else {
          add_powers<kBits>(codes + i, m, norm, k == 0, total + i);
        }
        i += m;
      }
    }
    if (streamed) {
      for (std::uint64_t i = 0; i < n; ++i) store(result + i, total[i] * job.weight);
      stream_out(out + at, result, n * sizeof(T));
    } else {
      for (std::uint64_t i = 0; i < n; ++i) store(out + at + i, total[i] * job.weight);
    }
  }
  if (streamed) stream_end();
}

// --- error feedback -------------------------------------------------------------------------------------

// before[i] = residual[i] and residual[i] += x[i], for n values.
template <class T>
void add_to_residual(const void* values, std::uint64_t n, float* residual, float* before) {
  const T* const x = static_cast<const T*>(values);
  const std::uint64_t whole = n - n % kBlock;
  for (std::uint64_t i = 0; i < whole; i += kBlock) {
    for (const Half half : {Half::kFirst, Half::kSecond}) {
      fetch_ahead(x + i, half);
      fetch_ahead(residual + i, half);
    }
    for (std::uint64_t j = i; j < i + kBlock; ++j) {
      before[j] = residual[j];
      residual[j] += load(x + j);
    }
  }
  for (std::uint64_t i = whole; i < n; ++i) {
    before[i] = residual[i];
    residual[i] += load(x + i);
  }
}

// What was encoded of the values [begin, end), which are the residual's own, is subtracted from them: what is left
// is to be sent later. Where nothing finite is, the residual becomes what it was, `before` (of `begin`). `begin` is a
// multiple of kChunk and begins a bucket.
template <int kBits>
void subtract_encoded(const Encoding& job, std::uint64_t begin, std::uint64_t end, const float* before) {
  constexpr float kLevels = (1 << (kBits - 1)) - 1;
  const Layout& layout = job.layout;
  alignas(64) std::int8_t codes[kChunk];
  for (std::uint64_t at = begin; at < end; at += kChunk) {
    const std::uint64_t n = std::min(kChunk, end - at);
    float* const residual = job.residual + at;
    unpack<kBits>(job.body + layout.codes_offset() + at / 8 * kBits, n, codes);
    for (std::uint64_t i = 0; i < n;) {
      const std::uint64_t index = (at + i) / layout.bucket_size;
      const std::uint64_t m = std::min(n - i, layout.bucket_size - (at + i - index * layout.bucket_size));
      float norm;
      std::memcpy(&norm, job.body + 4 * index, 4);
      if (job.spacing == Spacing::kUniform) {
        add_values(codes + i, m, -norm, kLevels, false, residual + i);
      } else {
        add_powers<kBits>(codes + i, m, -norm, false, residual + i);
      }
      i += m;
    }
    const float* const old = before + (at - begin);
    for (std::uint64_t i = 0; i < n; ++i) {
      residual[i] = std::fabs(residual[i]) <= std::numeric_limits<float>::max() ? residual[i] : old[i];
    }
  }
}
