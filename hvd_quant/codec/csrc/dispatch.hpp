// Which kernel does the work, by dtype, bits and instruction set, and on how many threads.
//
// The kernels are compiled once per instruction set, and the best one is chosen when the module is loaded.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "kernels/shared.hpp"
#include "payload.hpp"

namespace {

// --- one copy of the kernels per instruction set --------------------------------------------------------

// Of nothing else: with AVX2, compilers turn the table look-ups of entropy/ into gathers, which are several times
// slower.

namespace portable {
#include "kernels.hpp"
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HVD_QUANT_X86 1
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,fma,f16c")
namespace avx2 {
#include "kernels.hpp"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx2,bmi,bmi2,fma,f16c,prefer-vector-width=512")
namespace avx512 {
#include "kernels.hpp"
}
#pragma GCC pop_options
#elif defined(__x86_64__) && defined(__clang__)
#define HVD_QUANT_X86 1
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2,fma,f16c"))), apply_to = function)
namespace avx2 {
#include "kernels.hpp"
}
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx2,bmi,bmi2,fma,f16c"))), \
    apply_to = function)
namespace avx512 {
#include "kernels.hpp"
}
#pragma clang attribute pop
#endif

// --- choice of dtype, bits and instruction set ----------------------------------------------------------

using EncodeRange = std::uint32_t (*)(const Encoding&, std::uint64_t, std::uint64_t);
using DecodeRange = void (*)(const Decoding&, std::uint64_t, std::uint64_t, std::uint32_t*);
using AddToResidual = void (*)(const void*, std::uint64_t, float*, float*);
using SubtractEncoded = void (*)(const Encoding&, std::uint64_t, std::uint64_t, const float*);
using Checksum = std::uint32_t (*)(const std::uint8_t*, std::uint64_t, std::uint64_t);

constexpr int kBitWidths = kMaxBits - kMinBits + 1;
const std::array<std::string, 4> kDtypes = {"float32", "float64", "float16", "bfloat16"};
constexpr std::array<std::size_t, 4> kItemSizes = {4, 8, 2, 2};

struct Kernels {
  const char* name;
  bool supported;
  EncodeRange encode[kDtypes.size()][kBitWidths];
  DecodeRange decode[kDtypes.size()][kBitWidths];
  AddToResidual add_to_residual[kDtypes.size()];
  SubtractEncoded subtract_encoded[kBitWidths];
  Checksum checksum;
};

#define HVD_QUANT_ROW(isa, fn, T) \
  { isa::fn<T, 2>, isa::fn<T, 3>, isa::fn<T, 4>, isa::fn<T, 5>, isa::fn<T, 6>, isa::fn<T, 7>, isa::fn<T, 8> }
#define HVD_QUANT_TABLE(isa, fn)                                       \
  {                                                                    \
    HVD_QUANT_ROW(isa, fn, float), HVD_QUANT_ROW(isa, fn, double),     \
        HVD_QUANT_ROW(isa, fn, Float16), HVD_QUANT_ROW(isa, fn, BFloat16) \
  }
#define HVD_QUANT_BY_DTYPE(isa, fn) \
  { isa::fn<float>, isa::fn<double>, isa::fn<Float16>, isa::fn<BFloat16> }
#define HVD_QUANT_BY_BITS(isa, fn) \
  { isa::fn<2>, isa::fn<3>, isa::fn<4>, isa::fn<5>, isa::fn<6>, isa::fn<7>, isa::fn<8> }
#define HVD_QUANT_KERNELS(isa, supported)                                                                 \
  {                                                                                                       \
    #isa, supported, HVD_QUANT_TABLE(isa, encode_range), HVD_QUANT_TABLE(isa, decode_range),              \
        HVD_QUANT_BY_DTYPE(isa, add_to_residual), HVD_QUANT_BY_BITS(isa, subtract_encoded), isa::checksum \
  }

// Best last.
const std::vector<Kernels>& all_kernels() {
  static const std::vector<Kernels> kernels = {
      HVD_QUANT_KERNELS(portable, true),
#ifdef HVD_QUANT_X86
      HVD_QUANT_KERNELS(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
                                  __builtin_cpu_supports("fma")),
      HVD_QUANT_KERNELS(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                    __builtin_cpu_supports("avx512dq") &&
                                    __builtin_cpu_supports("avx512vl") &&
                                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("bmi2")),
#endif
  };
  return kernels;
}

const Kernels* chosen = nullptr;  // changed only under the GIL

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels& kernels : all_kernels()) {
    if (kernels.supported) names.emplace_back(kernels.name);
  }
  return names;
}

void choose_isa(const std::string& name) {
  for (const Kernels& kernels : all_kernels()) {
    if (kernels.supported && (name.empty() || name == kernels.name)) chosen = &kernels;
  }
  if (chosen == nullptr || (!name.empty() && name != chosen->name)) {
    std::string names;
    for (const std::string& one : available_isas()) names += (names.empty() ? "" : ", ") + one;
    throw std::invalid_argument("no instruction set '" + name + "' on this machine; available: " + names);
  }
}

std::size_t dtype_index(const std::string& dtype) {
  const auto found = std::find(kDtypes.begin(), kDtypes.end(), dtype);
  if (found == kDtypes.end()) throw std::invalid_argument("unsupported dtype '" + dtype + "'");
  return static_cast<std::size_t>(found - kDtypes.begin());
}

// --- work, on one thread or several ---------------------------------------------------------------------

// Calls work(part, begin, end) for `threads` parts of [0, count) that begin at multiples of `unit`.
template <class Work>
void in_parts(std::uint64_t count, std::uint64_t unit, std::size_t threads, const Work& work) {
  const std::uint64_t units = (count + unit - 1) / unit;
  const std::uint64_t part = (units + threads - 1) / threads * unit;
  std::vector<std::thread> others;
  for (std::size_t i = 1; i < threads && i * part < count; ++i) {
    const std::uint64_t begin = i * part;
    const std::uint64_t end = std::min(count, begin + part);
    try {
      others.emplace_back(work, i, begin, end);
    } catch (const std::system_error&) {  // no thread to be had: do it here
      work(i, begin, end);
    }
  }
  work(0, std::uint64_t{0}, std::min(count, part));
  for (std::thread& other : others) other.join();
}

std::size_t thread_count(std::int64_t asked, std::uint64_t count) {
  constexpr std::uint64_t kWorthwhile = 1 << 16;  // values a thread; fewer cost more to start than to do
  const std::uint64_t useful = std::max<std::uint64_t>(1, count / kWorthwhile);
  return static_cast<std::size_t>(std::clamp<std::int64_t>(asked, 1, static_cast<std::int64_t>(
                                      std::min<std::uint64_t>(useful, 256))));
}

// Encodes the values plus the residual, and keeps in the residual what that loses, block by block: a block is in
// the cache when it is read again, unless buckets are large or odd. `before` has room for a block.
std::uint32_t encode_with_feedback(const Encoding& job, const Kernels& kernels, std::size_t type, std::uint64_t block,
                                   std::uint64_t begin, std::uint64_t end, float* before) {
  const std::size_t bits_index = static_cast<std::size_t>(job.layout.bits - kMinBits);
  Encoding corrected = job;
  corrected.values = job.residual;
  std::uint32_t sum = 0;
  for (std::uint64_t at = begin; at < end; at += block) {
    const std::uint64_t n = std::min(block, end - at);
    const char* const values = static_cast<const char*>(job.values) + at * kItemSizes[type];
    kernels.add_to_residual[type](values, n, job.residual + at, before);
    sum += kernels.encode[0][bits_index](corrected, at, at + n);
    kernels.subtract_encoded[bits_index](corrected, at, at + n, before);
  }
  return sum;
}

// Values that are encoded at a time with error feedback: whole chunks and whole buckets.
std::uint64_t feedback_block(const Layout& layout) {
  const std::uint64_t whole = std::max<std::uint64_t>(1, (layout.count + kChunk - 1) / kChunk) * kChunk;
  return layout.bucket_size < layout.count ? std::min(whole, std::lcm(kChunk, layout.bucket_size)) : whole;
}

std::uint32_t run_encoding(const Encoding& job, const Kernels& kernels, std::size_t type, std::int64_t threads) {
  const Layout& layout = job.layout;
  std::memset(job.body + layout.used_size(), 0, layout.body_size() - layout.used_size());
  const std::uint64_t unit = job.residual == nullptr ? kChunk : feedback_block(layout);
  const std::size_t parts = thread_count(threads, layout.count);
  // Here, because a thread has nobody to tell that there is no memory.
  std::vector<std::vector<float>> before(job.residual == nullptr ? 0 : parts);
  for (std::vector<float>& one : before) one.resize(std::min(unit, layout.count));
  const auto range = [&](std::size_t part, std::uint64_t begin, std::uint64_t end) {
    if (job.residual == nullptr) return kernels.encode[type][layout.bits - kMinBits](job, begin, end);
    return encode_with_feedback(job, kernels, type, unit, begin, end, before[part].data());
  };
  if (parts == 1) return range(0, 0, layout.count);
  std::vector<std::uint32_t> sums(parts, 0);
  in_parts(layout.count, unit, parts, [&](std::size_t part, std::uint64_t begin, std::uint64_t end) {
    sums[part] = range(part, begin, end);
  });
  std::uint32_t sum = 0;
  for (const std::uint32_t one : sums) sum += one;
  return sum;
}

// The payloads' checksums, which count its padding as zero; in `ill_padded` one of which it is not, or their number.
std::vector<std::uint32_t> run_decoding(const Decoding& job, DecodeRange range, std::int64_t threads,
                                        std::size_t* ill_padded) {
  const Layout& layout = job.layout;
  const std::size_t parts = thread_count(threads, layout.count);
  std::vector<std::vector<std::uint32_t>> sums(parts, std::vector<std::uint32_t>(job.bodies.size(), 0));
  in_parts(layout.count, kChunk, parts, [&](std::size_t part, std::uint64_t begin, std::uint64_t end) {
    range(job, begin, end, sums[part].data());
  });
  for (std::size_t part = 1; part < parts; ++part) {
    for (std::size_t k = 0; k < job.bodies.size(); ++k) sums[0][k] += sums[part][k];
  }
  *ill_padded = job.bodies.size();
  for (std::size_t k = 0; k < job.bodies.size(); ++k) {
    for (std::uint64_t i = layout.used_size(); i < layout.body_size(); ++i) {
      if (job.bodies[k][i] != 0) *ill_padded = k;
    }
  }
  return sums[0];
}

}  // namespace
