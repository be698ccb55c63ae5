// The codec's kernels for a GPU, in one pass over memory. NVRTC compiles them at run time (cuda.py), without any
// header; the tests compile them as C++ too (tests/support/emulator.hpp), where there is no GPU. They compute what
// kernels.hpp computes, to the same bits, noise included: with floating-point operations that are not fused. Only the
// squares of a Euclidean norm are added in another order, so that very rarely its last bit is another one.
//
// A warp encodes or decodes a bucket, in tiles that its lanes' registers hold: 2 vectors of 8 values each. Buckets of all
// tensors of a message are numbered through, and each warp has a range of them. Integer arithmetic limits the speed as
// much as memory does, so what is the same for a vector is not done for each of its values.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

enum Dtype : u32 { kFloat32, kFloat64, kFloat16, kBFloat16 };
enum Flag : u32 { kL2 = 1, kPowers = 2, kNearest = 4 };

// A row of the table: a tensor's range of values, and the payload that has them.
struct Segment {
  u64 values;        // address of the first one
  u64 residual;      // address, of float32; 0 without error feedback
  u64 payload;       // where it begins in a message
  u64 count;
  u64 bucket_size;   // a multiple of 8, or all values
  u64 first_bucket;  // of the whole message's
  u64 seed;
  u32 shift, dtype;
  u32 bits, flags;
};

constexpr u32 kWarp = 32, kVector = 8, kVectors = 2, kTile = kWarp * kVector * kVectors;
constexpr u32 kFractionBits = 24, kMantissaBits = 23, kChunk = 2048;
constexpr u32 kHeaderWords = 8, kChecksumWord = 3;
constexpr float kTinyNorm = 0x1p-90f, kTinyPrescale = 0x1p60f;
constexpr u32 kInfinity = 0x7f800000u, kNaN = 0x7fc00000u;

// --- numbers --------------------------------------------------------------------------------------------

__device__ inline float from_half(u32 bits) {
  const u32 magnitude = (bits & 0x7fffu) << 13, exponent = magnitude & 0x0f800000u;
  const u32 rebias = 112u << 23;
  const u32 rebiased = magnitude + rebias + (exponent == 0x0f800000u ? rebias : 0u);
  const float subnormal = __uint_as_float(rebiased + (1u << 23)) - __uint_as_float(113u << 23);
  return __uint_as_float((exponent == 0 ? __float_as_uint(subnormal) : rebiased) | (bits & 0x8000u) << 16);
}

// --- noise ----------------------------------------------------------------------------------------------

__device__ inline u64 mix64(u64 x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

// Of a payload's noise. Its key is made anew for each chunk.
struct Generator {
  u64 seed, chunk, key;
  u32 shift;

  __device__ Generator(u64 seed, u32 shift) : seed(seed), chunk(~u64{0}), key(0), shift(shift) {}

  // kFractionBits random bits for each of 8 values, from the `at`th on, a multiple of 8.
  __device__ void draw(u64 at, u32* random) {
    if (chunk != at / kChunk) {
      chunk = at / kChunk;
      key = mix64(seed ^ mix64(chunk + 0x9e3779b97f4a7c15u));
    }
    const u32 first = static_cast<u32>(at) % (kChunk / 2) * 0x9e3779b1u + static_cast<u32>(key);
    const u32 second = static_cast<u32>(key >> 32) * 0x735a2d97u;
    _Pragma("unroll") for (u32 k = 0; k < kVector; ++k) {
      u32 hash = first + k * 0x9e3779b1u;
      hash = (hash ^ hash >> 16) * 0x21f0aaadu;
      hash = (hash ^ hash >> 15) * 0x735a2d97u + second;
      random[k] = hash ^ hash >> 15;
    }
    if (at % kChunk >= kChunk / 2) {
      _Pragma("unroll") for (u32 k = 0; k < kVector; ++k) random[k] = random[k] << 16 | random[k] >> 16;
    }
    _Pragma("unroll") for (u32 k = 0; k < kVector; ++k) random[k] = (random[k] + shift) & ((1u << kFractionBits) - 1);
  }
};

// --- rounding -------------------------------------------------------------------------------------------

struct Bucket {
  float norm, prescale, scale;
};

__device__ inline Bucket measure(float norm, u32 steps) {
  Bucket bucket{norm, 1.0f, 0.0f};
  if (!(norm < __uint_as_float(kInfinity))) {
    bucket.norm = __uint_as_float(kNaN);
    return bucket;
  }
  if (norm == 0.0f) return bucket;
  if (norm < kTinyNorm) bucket.prescale = kTinyPrescale;
  const float lifted = norm * bucket.prescale;
  const float top = static_cast<float>(steps) * static_cast<float>(1u << kFractionBits);
  bucket.scale = top / lifted;
  while (lifted * bucket.scale > top) bucket.scale = __uint_as_float(__float_as_uint(bucket.scale) - 1);
  return bucket;
}

__device__ inline int round_down(float value, u32 random) {
  return (static_cast<int>(value) + static_cast<int>(random)) >> kFractionBits;
}

__device__ inline int round_to_power(float value, u32 random, u32 steps) {
  const u32 lowest = 127 + kFractionBits - (steps - 1);
  const float magnitude = fabsf(value), low = __uint_as_float(lowest << kMantissaBits);
  const bool below = magnitude < low;
  const u32 lifted = __float_as_uint(below ? magnitude + low : magnitude);
  const int exponent = static_cast<int>((lifted + (random >> (kFractionBits - kMantissaBits))) >> kMantissaBits);
  const int level = exponent - static_cast<int>(lowest) + (below ? 0 : 1);
  return __float_as_uint(value) >> 31 ? -level : level;
}

// What a code stands for, norm given; see docs/wire-format.md.
struct Levels {
  u32 steps;
  float norm, step, unscale;

  __device__ Levels(u32 steps, float norm) : steps(steps), norm(norm) {
    const bool tiny = fabsf(norm) < kTinyNorm;
    step = (tiny ? norm * kTinyPrescale : norm) / static_cast<float>(steps);
    unscale = tiny ? 1.0f / kTinyPrescale : 1.0f;
  }

  __device__ float uniform(int code) const { return static_cast<float>(code) * step * unscale; }

  __device__ float power(int code) const {
    const u32 level = static_cast<u32>(code < 0 ? -code : code);
    const u32 exponent = level == 0 ? 0 : level + 127 - steps;
    return __uint_as_float(exponent << 23 | (code < 0 ? 0x80000000u : 0u)) * norm;
  }
};

// --- payloads -------------------------------------------------------------------------------------------

// Payloads lie at multiples of 4 bytes, so that a whole vector of 2, 4 or 8 bits a value can be accessed in few steps.

// Writes the codes of a vector's first `n` values to `at` bytes into a payload; the others are 0. Returns their share of
// the checksum.
template <u32 kBits>
__device__ inline u32 pack(const int* codes, u32 n, u8* payload, u64 at) {
  u64 word = 0;
  _Pragma("unroll") for (u32 k = 0; k < kVector; ++k) word |= static_cast<u64>(codes[k] & ((1 << kBits) - 1)) << kBits * k;
  u8* out = payload + at;
  if (kBits == 8 && n == kVector) {
    reinterpret_cast<u32*>(out)[0] = static_cast<u32>(word);
    reinterpret_cast<u32*>(out)[1] = static_cast<u32>(word >> 32);
  } else if (kBits == 4 && n == kVector) {
    *reinterpret_cast<u32*>(out) = static_cast<u32>(word);
  } else if (kBits == 2 && n == kVector) {
    *reinterpret_cast<u16*>(out) = static_cast<u16>(word);
  } else {
    _Pragma("unroll") for (u32 k = 0; k < kBits; ++k) if (8 * k < n * kBits) out[k] = static_cast<u8>(word >> 8 * k);
  }
  const u32 shift = 8 * (static_cast<u32>(at) % 4), weight = 2 * static_cast<u32>(at / 4) + 1;
  const u64 low = word << shift;
  const u32 high = shift == 0 ? 0 : static_cast<u32>(word >> (64 - shift));
  return weight * static_cast<u32>(low) + (weight + 2) * static_cast<u32>(low >> 32) + (weight + 4) * high;
}

// Reads a vector's codes.
template <u32 kBits>
__device__ inline u64 read(const u8* in) {
  if (kBits == 8) return reinterpret_cast<const u32*>(in)[0] | u64{reinterpret_cast<const u32*>(in)[1]} << 32;
  if (kBits == 4) return *reinterpret_cast<const u32*>(in);
  if (kBits == 2) return *reinterpret_cast<const u16*>(in);
  u64 word = 0;
  _Pragma("unroll") for (u32 k = 0; k < kBits; ++k) word |= u64{in[k]} << 8 * k;
  return word;
}

__device__ inline int code_of(u64 word, u32 bits, u32 k) {
  return static_cast<int>(static_cast<u32>(word >> bits * k) << (32 - bits)) >> (32 - bits);
}

// With the number of bits as a constant, shifts are few.
__device__ inline u32 pack(u32 bits, const int* codes, u32 n, u8* payload, u64 at) {
  switch (bits) {
    case 2: return pack<2>(codes, n, payload, at);
    case 3: return pack<3>(codes, n, payload, at);
    case 4: return pack<4>(codes, n, payload, at);
    case 5: return pack<5>(codes, n, payload, at);
    case 6: return pack<6>(codes, n, payload, at);
    case 7: return pack<7>(codes, n, payload, at);
    default: return pack<8>(codes, n, payload, at);
  }
}

// The last segment of which a member, which grows from one to the next, is at most `value`.
__device__ inline u32 find(const Segment* segments, u32 n, u64 Segment::*member, u64 value) {
  u32 low = 0;
  for (u32 high = n; high - low > 1;) {
    const u32 middle = (low + high) / 2;
    (segments[middle].*member <= value ? low : high) = middle;
  }
  return low;
}

__device__ inline u32 steps_of(const Segment& s) { return (1u << (s.bits - 1)) - 1; }

__device__ inline u64 buckets_of(const Segment& s) { return (s.count + s.bucket_size - 1) / s.bucket_size; }

__device__ inline u64 codes_at(const Segment& s) { return 4 * (kHeaderWords + buckets_of(s)); }

__device__ inline u64 used_size(const Segment& s) { return codes_at(s) + (s.count * s.bits + 7) / 8; }

__device__ inline u64 smaller(u64 a, u64 b) { return a < b ? a : b; }

// What a warp is to do of something that is numbered through: nothing, if it ends before it begins.
struct Share {
  u64 begin, end;

  __device__ explicit Share(u64 all) {
    const u64 warp = (u64{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp, warps = u64{gridDim.x} * blockDim.x / kWarp;
    const u64 size = (all + warps - 1) / warps;
    begin = warp * size, end = smaller(begin + size, all);
  }
};

// Adds up what a warp's lanes have.
template <class T>
__device__ inline T sum_of_warp(T value) {
  for (u32 width = kWarp / 2; width > 0; width /= 2) value += __shfl_xor_sync(0xffffffffu, value, width);
  return value;
}

__device__ inline void add_to(u32* at, u32 sum, u32 lane) {
  sum = sum_of_warp(sum);
  if (lane == 0 && sum != 0) atomicAdd(at, sum);
}

// The values of a bucket.
struct Range {
  u64 start, index;  // its first value; its number among the segment's buckets
  u32 n;

  __device__ Range(const Segment& s, u64 bucket) : index(bucket - s.first_bucket) {
    start = index * s.bucket_size;
    n = static_cast<u32>(smaller(s.bucket_size, s.count - start));
  }

  // For a vector that begins at `i`: that, or another one's beginning if the range has no such.
  __device__ u32 within(u32 i) const { return i < n ? i : 0; }

  // How many values it has.
  __device__ u32 size_of(u32 i) const { return i < n ? (n - i < kVector ? n - i : kVector) : 0; }
};

__device__ inline u32 vector_of(u32 tile, u32 vector, u32 lane) { return tile + (vector * kWarp + lane) * kVector; }

// --- encode ---------------------------------------------------------------------------------------------

__device__ inline float to_float(const Segment& s, u16 raw) {
  return s.dtype == kFloat16 ? from_half(raw) : __uint_as_float(u32{raw} << 16);
}

__device__ inline float value_at(const Segment& s, u64 at) {
  if (s.dtype == kFloat32) return reinterpret_cast<const float*>(s.values)[at];
  if (s.dtype == kFloat64) return static_cast<float>(reinterpret_cast<const double*>(s.values)[at]);
  return to_float(s, reinterpret_cast<const u16*>(s.values)[at]);
}

// Loads values, with what error feedback has kept of them, and zeros in the place of those beyond the range.
__device__ inline void load_tile(const Segment& s, const Range& range, u32 tile, u32 lane, float (*x)[kVector]) {
  const bool aligned = range.n % kVector == 0 && s.values % 16 == 0;
  if (aligned && s.dtype == kFloat32) {
    const float4* v = reinterpret_cast<const float4*>(reinterpret_cast<const float*>(s.values) + range.start);
    _Pragma("unroll") for (u32 j = 0; j < kVectors; ++j) {
      const u32 i = range.within(vector_of(tile, j, lane)) / 4;
      const float4 low = v[i], high = v[i + 1];
      x[j][0] = low.x, x[j][1] = low.y, x[j][2] = low.z, x[j][3] = low.w;
      x[j][4] = high.x, x[j][5] = high.y, x[j][6] = high.z, x[j][7] = high.w;
    }
  } else if (aligned && s.dtype != kFloat64) {
    const uint4* v = reinterpret_cast<const uint4*>(reinterpret_cast<const u16*>(s.values) + range.start);
    uint4 raw[kVectors];
    _Pragma("unroll") for (u32 j = 0; j < kVectors; ++j) raw[j] = v[range.within(vector_of(tile, j, lane)) / kVector];
    _Pragma("unroll") for (u32 j = 0; j < kVectors; ++j) {
      const u32 words[4] = {raw[j].x, raw[j].y, raw[j].z, raw[j].w};
      _Pragma("unroll") for (u32 k = 0; k < kVector; ++k) x[j][k] = to_float(s, static_cast<u16>(words[k / 2] >> 16 * (k % 2)));
    }
  } else {
    _Pragma("unroll") for (u32 j = 0; j < kVectors; ++j) {
      const u32 i = vector_of(tile, j, lane), size = range.size_of(i);
      _Pragma("unroll") for (u32 k = 0; k < kVector; ++k) x[j][k] = k < size ? value_at(s, range.start + i + k) : 0.0f;
    }
  }
  _Pragma("unroll") for (u32 j = 0; j < kVectors; ++j) {
    const u32 i = vector_of(tile, j, lane), size = range.size_of(i);
    if (size == 0) {
      _Pragma("unroll") for (u32 k = 0; k < kVector; ++k) x[j][k] = 0.0f;
    } else if (s.residual != 0) {
      const float* r = reinterpret_cast<const float*>(s.residual) + range.start + i;
      _Pragma("unroll") for (u32 k = 0; k < kVector; ++k) if (k < size) x[j][k] = r[k] + x[j][k];
    }
  }
}

__device__ inline void round_vector(const Segment& s, const Bucket& b, Generator& noise, u64 at, const float* x, int* codes) {
  u32 random[kVector];
  if (s.flags & kNearest) {
    _Pragma("unroll") for (u32 k = 0; k < kVector; ++k) random[k] = 1u << (kFractionBits - 1);
  } else {
    noise.draw(at, random);
  }
  if (b.scale == 0.0f) {
    _Pragma("unroll") for (u32 k = 0; k < kVector; ++k) codes[k] = 0;
  } else if (s.flags & kPowers) {
    const u32 steps = steps_of(s);
    _Pragma("unroll") for (u32 k = 0; k < kVector; ++k) codes[k] = round_to_power(x[k] * b.prescale * b.scale, random[k], steps);
  } else {
    _Pragma("unroll") for (u32 k = 0; k < kVector; ++k) codes[k] = round_down(x[k] * b.prescale * b.scale, random[k]);
  }
}

// Keeps in the residual what the codes of values are short of, where that is finite.
__device__ inline void keep(const Segment& s, float norm, u64 at, u32 n, const float* x, const int* codes) {
  const Levels levels(steps_of(s), -norm);
  _Pragma("unroll") for (u32 k = 0; k < kVector; ++k) if (k < n) {
    const float left = x[k] + (s.flags & kPowers ? levels.power(codes[k]) : levels.uniform(codes[k]));
    if (fabsf(left) <= 0x1.fffffep127f) reinterpret_cast<float*>(s.residual)[at + k] = left;
  }
}

// Returns a lane's share of the checksum.
__device__ inline u32 encode(const Segment& s, const Range& range, Generator& noise, u8* payload, u32 lane) {
  float x[kVectors][kVector];
  u32 largest = 0;
  double squares = 0.0;
  for (u32 tile = 0; tile < range.n; tile += kTile) {
    load_tile(s, range, tile, lane, x);
    _Pragma("unroll") for (u32 v = 0; v < kVectors; ++v) {
      if (s.flags & kL2) {
        _Pragma("unroll") for (u32 k = 0; k < kVector; ++k) squares += static_cast<double>(x[v][k]) * x[v][k];
      } else {
        _Pragma("unroll") for (u32 k = 0; k < kVector; ++k) {
          const u32 magnitude = __float_as_uint(x[v][k]) & 0x7fffffffu;
          largest = magnitude > largest ? magnitude : largest;
        }
      }
    }
  }
  float norm;
  if (s.flags & kL2) {
    norm = static_cast<float>(sqrt(sum_of_warp(squares)));
  } else {
    for (u32 width = kWarp / 2; width > 0; width /= 2) {
      const u32 other = __shfl_xor_sync(0xffffffffu, largest, width);
      largest = other > largest ? other : largest;
    }
    norm = __uint_as_float(largest);
  }
  const Bucket b = measure(norm, s.flags & kPowers ? 1 : steps_of(s));
  u32 sum = 0;
  if (lane == 0) {
    reinterpret_cast<float*>(payload)[kHeaderWords + range.index] = b.norm;
    sum = static_cast<u32>(2 * (kHeaderWords + range.index) + 1) * __float_as_uint(b.norm);
  }
  for (u32 tile = 0; tile < range.n; tile += kTile) {
    if (range.n > kTile) load_tile(s, range, tile, lane, x);  // the only tile is there still
    _Pragma("unroll") for (u32 v = 0; v < kVectors; ++v) {
      const u32 i = vector_of(tile, v, lane), size = range.size_of(i);
      if (size == 0) continue;
      const u64 at = range.start + i;
      int codes[kVector];  // 0 beyond the last value
      round_vector(s, b, noise, at, x[v], codes);
      if (s.residual != 0) keep(s, b.norm, at, size, x[v], codes);
      sum += pack(s.bits, codes, size, payload, codes_at(s) + at / kVector * s.bits);
    }
  }
  return sum;
}

// Headers and padding are there already, with the header's own checksum; the body's is added to it. `replay` is 0, but
// in CUDA graphs, which have other noise in every replay.
extern "C" __global__ __launch_bounds__(256, 3) void hvd_quant_encode(const Segment* segments, u32 n_segments,
                                                                      u32 n_buckets, u8* message, const u64* replay) {
  const u32 lane = threadIdx.x % kWarp;
  const Share share(n_buckets);
  if (share.begin >= share.end) return;
  u64 bucket = share.begin;
  for (u32 current = find(segments, n_segments, &Segment::first_bucket, bucket); bucket < share.end; ++current) {
    const Segment s = segments[current];
    const u64 last = smaller(share.end, s.first_bucket + buckets_of(s));
    if (bucket >= last) continue;  // it has no values
    u8* payload = message + s.payload;
    Generator noise(s.seed + *replay * 0x9e3779b97f4a7c15u, s.shift);
    u32 sum = 0;
    for (; bucket < last; ++bucket) sum += encode(s, Range(s, bucket), noise, payload, lane);
    add_to(reinterpret_cast<u32*>(payload) + kChecksumWord, sum, lane);
  }
}

// --- decode ---------------------------------------------------------------------------------------------

__device__ inline u16 to_half(float value) {  // to nearest, ties to even
  const u32 bits = __float_as_uint(value), magnitude = bits & 0x7fffffffu;
  const u32 normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const u32 subnormal = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
  const u32 special = magnitude > kInfinity ? 0x7e00u : 0x7c00u;
  const u32 finite = magnitude < 113u << 23 ? subnormal : normal;
  return static_cast<u16>((magnitude >= 143u << 23 ? special : finite) | (bits >> 16 & 0x8000u));
}

__device__ inline u16 to_bfloat(float value) {  // likewise
  const u32 bits = __float_as_uint(value);
  const u32 rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return static_cast<u16>((bits & 0x7fffffffu) > kInfinity ? bits >> 16 | 0x40u : rounded);
}

__device__ inline u16 to_16_bits(const Segment& s, float value) {
  return s.dtype == kFloat16 ? to_half(value) : to_bfloat(value);
}

__device__ inline void store(const Segment& s, u64 at, u32 n, const float* x) {
  const bool aligned = n == kVector && (s.values + at * (s.dtype == kFloat32 ? 4 : 2)) % 16 == 0;
  if (aligned && s.dtype == kFloat32) {
    float4* v = reinterpret_cast<float4*>(reinterpret_cast<float*>(s.values) + at);
    __stcg(v, make_float4(x[0], x[1], x[2], x[3]));  // by assignment, it would become four stores
    __stcg(v + 1, make_float4(x[4], x[5], x[6], x[7]));
  } else if (aligned && s.dtype != kFloat64) {
    u32 words[kVector / 2];
    _Pragma("unroll") for (u32 k = 0; k < kVector / 2; ++k) words[k] = to_16_bits(s, x[2 * k]) | u32{to_16_bits(s, x[2 * k + 1])} << 16;
    __stcg(reinterpret_cast<uint4*>(reinterpret_cast<u16*>(s.values) + at), make_uint4(words[0], words[1], words[2], words[3]));
  } else {
    _Pragma("unroll") for (u32 k = 0; k < kVector; ++k) if (k < n) {
      if (s.dtype == kFloat32) reinterpret_cast<float*>(s.values)[at + k] = x[k];
      else if (s.dtype == kFloat64) reinterpret_cast<double*>(s.values)[at + k] = x[k];
      else reinterpret_cast<u16*>(s.values)[at + k] = to_16_bits(s, x[k]);
    }
  }
}

// Where a message has a segment's norms and codes.
struct Source {
  const u8* payload;
  const u8* codes;

  __device__ Source(const Segment& s, u64 message) : payload(reinterpret_cast<const u8*>(message) + s.payload) {
    codes = payload + codes_at(s);
  }

  __device__ float norm(const Range& range) const {
    return reinterpret_cast<const float*>(payload)[kHeaderWords + range.index];
  }
};

// Adds to `total` what a vector's codes stand for.
__device__ inline void add(const Segment& s, const Levels& levels, u64 word, u32 bits, float* total) {
  if (s.flags & kPowers) {
    _Pragma("unroll") for (u32 k = 0; k < kVector; ++k) total[k] += levels.power(code_of(word, bits, k));
  } else {
    _Pragma("unroll") for (u32 k = 0; k < kVector; ++k) total[k] += levels.uniform(code_of(word, bits, k));
  }
}

// Adds a tile of whole vectors. Reads of several messages are under way at a time.
template <u32 kBits>
__device__ inline void add_whole(const Segment& s, const Range& range, u32 tile, u32 lane, const u64* messages,
                                 u32 n_messages, float (*total)[kVector]) {
  constexpr u32 kGroup = 8 % kBits == 0 ? 4 : 2;
  for (u32 first = 0; first < n_messages; first += kGroup) {
    float norm[kGroup];
    u64 words[kGroup][kVectors];
    _Pragma("unroll") for (u32 m = 0; m < kGroup; ++m) {
      const Source source(s, messages[first + m < n_messages ? first + m : first]);
      norm[m] = source.norm(range);
      _Pragma("unroll") for (u32 v = 0; v < kVectors; ++v) {
        words[m][v] = read<kBits>(source.codes + (range.start + range.within(vector_of(tile, v, lane))) / kVector * kBits);
      }
    }
    _Pragma("unroll") for (u32 m = 0; m < kGroup; ++m) if (first + m < n_messages) {
      const Levels levels(steps_of(s), norm[m]);
      _Pragma("unroll") for (u32 v = 0; v < kVectors; ++v) add(s, levels, words[m][v], kBits, total[v]);
    }
  }
}

// Adds a tile whose last vector is of fewer values.
__device__ inline void add_partial(const Segment& s, const Range& range, u32 tile, u32 lane, const u64* messages,
                                   u32 n_messages, float (*total)[kVector]) {
  for (u32 message = 0; message < n_messages; ++message) {
    const Source source(s, messages[message]);
    const Levels levels(steps_of(s), source.norm(range));
    _Pragma("unroll") for (u32 v = 0; v < kVectors; ++v) {
      const u32 i = vector_of(tile, v, lane), size = (range.size_of(i) * s.bits + 7) / 8;
      const u8* in = source.codes + (range.start + i) / kVector * s.bits;
      u64 word = 0;
      for (u32 k = 0; k < size; ++k) word |= u64{in[k]} << 8 * k;
      add(s, levels, word, s.bits, total[v]);
    }
  }
}

__device__ inline void decode(const Segment& s, const Range& range, const u64* messages, u32 n_messages, float weight,
                              u32 lane) {
  for (u32 tile = 0; tile < range.n; tile += kTile) {
    float total[kVectors][kVector];
    // To which adding anything gives just that.
    _Pragma("unroll") for (u32 j = 0; j < kVectors * kVector; ++j) total[j / kVector][j % kVector] = -0.0f;
    switch (range.n % kVector == 0 ? s.bits : 0) {
      case 2: add_whole<2>(s, range, tile, lane, messages, n_messages, total); break;
      case 3: add_whole<3>(s, range, tile, lane, messages, n_messages, total); break;
      case 4: add_whole<4>(s, range, tile, lane, messages, n_messages, total); break;
      case 5: add_whole<5>(s, range, tile, lane, messages, n_messages, total); break;
      case 6: add_whole<6>(s, range, tile, lane, messages, n_messages, total); break;
      case 7: add_whole<7>(s, range, tile, lane, messages, n_messages, total); break;
      case 8: add_whole<8>(s, range, tile, lane, messages, n_messages, total); break;
      default: add_partial(s, range, tile, lane, messages, n_messages, total);
    }
    _Pragma("unroll") for (u32 v = 0; v < kVectors; ++v) {
      const u32 i = vector_of(tile, v, lane);
      _Pragma("unroll") for (u32 k = 0; k < kVector; ++k) total[v][k] *= weight;
      store(s, range.start + i, range.size_of(i), total[v]);
    }
  }
}

// `weight` times the sum of what the messages have, written to the segments' values.
extern "C" __global__ __launch_bounds__(256, 3) void hvd_quant_decode(const Segment* segments, u32 n_segments,
                                                                      const u64* messages, u32 n_messages,
                                                                      u32 n_buckets, float weight) {
  const u32 lane = threadIdx.x % kWarp;
  const Share share(n_buckets);
  if (share.begin >= share.end) return;
  u64 bucket = share.begin;
  for (u32 current = find(segments, n_segments, &Segment::first_bucket, bucket); bucket < share.end; ++current) {
    const Segment& s = segments[current];
    const u64 last = smaller(share.end, s.first_bucket + buckets_of(s));
    for (; bucket < last; ++bucket) {
      decode(s, Range(s, bucket), messages, n_messages, weight, lane);
    }
  }
}

// --- check ----------------------------------------------------------------------------------------------

constexpr u32 kPairs = 4;                               // of words, that a lane reads at once
constexpr u32 kPieceWords = 2 * kPairs * kWarp;  // that a warp does

// What is wrong with messages. `expected` is the preamble, of `n_preamble` words, and the header of each segment.
// excess[message][segment] becomes 0 where the checksum is right; found grows where anything else is not.
extern "C" __global__ __launch_bounds__(256, 3) void hvd_quant_check(const Segment* segments, u32 n_segments,
                                                                     const u64* messages, u32 n_messages,
                                                                     const u32* expected, u32 n_preamble, u32* excess,
                                                                     u32* found) {
  const u64 thread = u64{blockIdx.x} * blockDim.x + threadIdx.x;
  const u32 lane = threadIdx.x % kWarp;
  const Segment tail = segments[n_segments - 1];
  const u64 beginning = segments[0].payload / 4, all = (tail.payload + used_size(tail) + 7) / 8 * 2;
  u32 wrong = 0;
  for (u64 message = thread; message < n_messages; message += u64{gridDim.x} * blockDim.x) {
    const u32* words = reinterpret_cast<const u32*>(messages[message]);
    for (u32 at = 0; at < n_preamble; ++at) wrong |= words[at] ^ expected[at];
  }
  const u64 pieces = (all - beginning + kPieceWords - 1) / kPieceWords;  // of a message
  const Share share(pieces * n_messages);
  for (u64 piece = share.begin; piece < share.end;) {
    const u64 message = piece / pieces, past = smaller(share.end, (message + 1) * pieces);
    const uint2* pairs = reinterpret_cast<const uint2*>(messages[message]);
    u64 first = beginning + (piece - message * pieces) * kPieceWords;
    u32 current = find(segments, n_segments, &Segment::payload, 4 * first), sum = 0;
    Segment s = segments[current];
    for (; piece < past; ++piece, first += kPieceWords) {
      uint2 pair[kPairs];
      _Pragma("unroll") for (u32 j = 0; j < kPairs; ++j) {
        const u64 at = first + 2 * (kWarp * j + lane);
        pair[j] = at < all ? pairs[at / 2] : uint2{0, 0};
      }
      const u64 last = smaller(first + kPieceWords, all);
      for (;;) {
        const u64 payload = s.payload / 4, next = current + 1 < n_segments ? segments[current + 1].payload / 4 : all;
        const u64 used = used_size(s);
        if (first >= payload + kHeaderWords && 4 * (first + kPieceWords - payload) <= used) {
          const u32 weight = 2 * static_cast<u32>(first - payload + 2 * lane) + 1;
          _Pragma("unroll") for (u32 j = 0; j < kPairs; ++j) {
            sum += (weight + 4 * kWarp * j) * pair[j].x + (weight + 4 * kWarp * j + 2) * pair[j].y;
          }
        } else {
          _Pragma("unroll") for (u32 j = 0; j < 2 * kPairs; ++j) {
            const u64 at = first + 2 * (kWarp * (j / 2) + lane) + j % 2;
            if (at < payload || at >= next) continue;
            const u32 word = j % 2 == 0 ? pair[j / 2].x : pair[j / 2].y;
            const u64 place = at - payload;
            sum += place == kChecksumWord ? 0u - word : (2 * static_cast<u32>(place) + 1) * word;
            if (place < kHeaderWords && place != kChecksumWord) {
              wrong |= word ^ expected[n_preamble + current * kHeaderWords + place];
            }
            if (4 * place + 4 > used) wrong |= 4 * place >= used ? word : word >> 8 * (used - 4 * place);
          }
        }
        if (next >= last) break;
        add_to(excess + message * n_segments + current, sum, lane);
        sum = 0;
        s = segments[++current];
      }
    }
    add_to(excess + message * n_segments + current, sum, lane);
  }
  if (wrong != 0) atomicAdd(found, 1u);
}
