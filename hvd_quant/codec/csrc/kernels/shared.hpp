// What the kernels of every instruction set share, and what they are asked to do.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../payload.hpp"

namespace {

constexpr std::uint64_t kChunk = 2048;  // values; see ../kernels.hpp
constexpr int kFractionBits = 24;       // of a level, in stochastic rounding
constexpr float kTinyNorm = 0x1p-90f;   // below it, values are scaled by kTinyPrescale
constexpr float kTinyPrescale = 0x1p60f;
constexpr std::size_t kStreamedSize = std::size_t{1} << 22;  // outputs from this size on bypass the caches

struct Float16 {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

struct Encoding {
  const void* values;
  Layout layout;
  Norm norm;
  Spacing spacing;
  std::uint64_t seed;
  std::uint32_t shift;  // added to the noise
  bool nearest;         // rounding, without noise
  std::uint64_t first_word;
  std::uint8_t* body;
  float* residual;  // of error feedback, or null
};

struct Decoding {
  std::vector<const std::uint8_t*> bodies;
  Layout layout;
  Spacing spacing;
  float weight;
  std::uint64_t first_word;
  void* out;
};

constexpr std::uint64_t mix64(std::uint64_t x) {  // the finalizer of splitmix64
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

// The multiples of 2^32 / phi, the counters that the noise is hashed from: quicker read than multiplied.
constexpr std::array<std::uint32_t, kChunk / 2> kWeyl = [] {
  std::array<std::uint32_t, kChunk / 2> multiples{};
  for (std::uint32_t i = 0; i < multiples.size(); ++i) multiples[i] = i * 0x9e3779b1u;
  return multiples;
}();

}  // namespace
