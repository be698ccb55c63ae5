// The CPU codec: numbers <-> the body of a payload (norms and codes). Headers are wire.py's.
//
// The loops live in kernels.hpp, compiled once per instruction set and chosen when the module is loaded.
// Nothing here trusts its arguments: every size is checked against the buffers before a byte is touched.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "payload.hpp"
#include "entropy/read.hpp"
#include "entropy/write.hpp"

namespace py = pybind11;

namespace {

// --- what every instruction set shares ------------------------------------------------------------------

constexpr std::uint64_t kChunk = 2048;  // values; see kernels.hpp
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

// --- one copy of the loops per instruction set ----------------------------------------------------------

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
    throw py::value_error("no instruction set '" + name + "' on this machine; available: " + names);
  }
}

// --- checks ---------------------------------------------------------------------------------------------

std::size_t dtype_index(const std::string& dtype) {
  const auto found = std::find(kDtypes.begin(), kDtypes.end(), dtype);
  if (found == kDtypes.end()) throw py::value_error("unsupported dtype '" + dtype + "'");
  return static_cast<std::size_t>(found - kDtypes.begin());
}

std::uint8_t* contiguous_bytes(const py::array& array, std::size_t item_size, bool writable, const char* what,
                               bool any_shape = false) {
  if ((array.ndim() != 1 && !any_shape) || !(array.flags() & py::array::c_style)) {
    throw py::value_error(std::string(what) + " must be a contiguous " + (any_shape ? "" : "one-dimensional ") +
                          "array");
  }
  if (static_cast<std::size_t>(array.itemsize()) != item_size) {
    throw py::value_error(std::string(what) + " has items of the wrong size");
  }
  if (reinterpret_cast<std::uintptr_t>(array.data()) % item_size != 0) {
    throw py::value_error(std::string(what) + " is not aligned");
  }
  if (writable && !array.writeable()) throw py::value_error(std::string(what) + " is read-only");
  // The array may be read-only where writable is false; nobody writes through the pointer then.
  return static_cast<std::uint8_t*>(const_cast<void*>(array.data()));
}

// A float for every value.
float* residual_of(const py::array& residual, const py::array& values) {
  std::uint8_t* const bytes = contiguous_bytes(residual, sizeof(float), true, "residual", true);
  if (residual.size() != values.size()) throw py::value_error("residual has the wrong size");
  return reinterpret_cast<float*>(bytes);
}

Spacing spacing_of(const std::string& name) {
  if (name == "uniform") return Spacing::kUniform;
  if (name == "exponential") return Spacing::kExponential;
  throw py::value_error("spacing must be 'uniform' or 'exponential'");
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

// --- one payload ----------------------------------------------------------------------------------------

std::uint32_t encode(const py::array& values, const std::string& dtype, int bits, const std::string& norm,
                     const std::string& spacing, std::uint64_t bucket_size, std::uint64_t seed, std::uint32_t shift,
                     bool nearest, std::uint64_t first_word, const py::array& body, const std::optional<py::array>& residual,
                     std::int64_t threads) {
  const std::size_t type = dtype_index(dtype);
  const auto count = static_cast<std::uint64_t>(values.size());
  const Layout layout = checked_layout(count, bucket_size, bits);
  if (norm != "max" && norm != "l2") throw py::value_error("norm must be 'max' or 'l2'");
  Encoding job{contiguous_bytes(values, kItemSizes[type], false, "values"),
               layout,
               norm == "max" ? Norm::kMax : Norm::kL2,
               spacing_of(spacing),
               seed,
               shift,
               nearest,
               first_word,
               contiguous_bytes(body, 1, true, "body"),
               residual ? residual_of(*residual, values) : nullptr};
  if (static_cast<std::uint64_t>(body.size()) != layout.body_size()) {
    throw py::value_error("body has the wrong size");
  }
  const Kernels& kernels = *chosen;
  py::gil_scoped_release release;
  return run_encoding(job, kernels, type, threads);
}

std::vector<std::uint32_t> decode_sum(const std::vector<py::array>& bodies, std::uint64_t bucket_size, int bits,
                                      const std::string& spacing, float weight, std::uint64_t first_word, const py::array& out,
                                      const std::string& dtype, std::int64_t threads) {
  const std::size_t type = dtype_index(dtype);
  const auto count = static_cast<std::uint64_t>(out.size());
  const Layout layout = checked_layout(count, bucket_size, bits);
  if (bodies.empty()) throw py::value_error("no payloads to decode");
  Decoding job{{}, layout, spacing_of(spacing), weight, first_word, contiguous_bytes(out, kItemSizes[type], true, "out")};
  for (const py::array& body : bodies) {
    job.bodies.push_back(contiguous_bytes(body, 1, false, "body"));
    if (static_cast<std::uint64_t>(body.size()) != layout.body_size()) {
      throw py::value_error("body has the wrong size");
    }
  }
  const DecodeRange range = chosen->decode[type][bits - kMinBits];
  std::size_t ill_padded = 0;
  std::vector<std::uint32_t> sums;
  {
    py::gil_scoped_release release;
    sums = run_decoding(job, range, threads, &ill_padded);
  }
  if (ill_padded != job.bodies.size()) throw py::value_error("payload is damaged: its padding is not zero");
  return sums;
}

// --- coded payloads -------------------------------------------------------------------------------------

Coding coding_of(std::int64_t number) {
  if (number == 1) return Coding::kElias;
  if (number == 2) return Coding::kHuffman;
  throw py::value_error("coding must be 1 (elias) or 2 (huffman)");
}

// The coded body of a packed one, after `head` bytes that are left to the caller; and its checksum.
std::pair<py::array, std::uint32_t> compact(const py::array& body, std::uint64_t count, std::uint64_t bucket_size,
                                            int bits, std::int64_t coding, std::uint64_t first_word, std::uint64_t head) {
  const Layout layout = checked_layout(count, bucket_size, bits);
  const Coding checked_coding = coding_of(coding);
  const std::uint8_t* const packed = contiguous_bytes(body, 1, false, "body");
  if (static_cast<std::uint64_t>(body.size()) != layout.body_size()) throw py::value_error("body has the wrong size");
  if (head > 1 << 20) throw py::value_error("head is too large");
  const Kernels& kernels = *chosen;
  std::unique_ptr<std::uint8_t[]> room;
  std::uint64_t size = 0;
  std::uint32_t sum = 0;
  {
    py::gil_scoped_release release;
    room = scratch(max_coded_size(layout));
    size = entropy::compact(packed, layout, checked_coding, room.get());
    sum = kernels.checksum(room.get(), size, first_word);
  }
  py::array_t<std::uint8_t> payload(static_cast<py::ssize_t>(head + size));
  std::memset(payload.mutable_data(), 0, head);
  std::memcpy(payload.mutable_data() + head, room.get(), size);
  return {payload, sum};
}

// The packed body of the coded one that `body` begins with, after `head` bytes that are left to the caller; the
// coded one's checksum and its size.
std::tuple<py::array, std::uint32_t, std::uint64_t> expand(const py::array& body, std::uint64_t count, std::uint64_t bucket_size,
                                           int bits, std::int64_t coding, std::uint64_t first_word, std::uint64_t head) {
  const Layout layout = checked_layout(count, bucket_size, bits);
  const Coding checked_coding = coding_of(coding);
  const std::uint8_t* const coded = contiguous_bytes(body, 1, false, "body");
  const auto size = static_cast<std::uint64_t>(body.size());
  if (head > 1 << 20) throw py::value_error("head is too large");
  if (!is_plausible(layout, size)) throw py::value_error("payload is damaged: it is too short for its values");
  py::array_t<std::uint8_t> room(static_cast<py::ssize_t>(head + layout.body_size() + kSlack));
  std::uint8_t* const out = room.mutable_data();
  const Kernels& kernels = *chosen;
  const char* wrong = nullptr;
  std::uint32_t sum = 0;
  std::uint64_t taken = 0;
  {
    py::gil_scoped_release release;
    std::memset(out, 0, head);
    wrong = entropy::expand(coded, size, layout, checked_coding, out + head, &taken);
    if (wrong == nullptr) sum = kernels.checksum(coded, taken, first_word);
  }
  if (wrong != nullptr) throw py::value_error(std::string("payload is damaged: ") + wrong);
  const auto end = static_cast<py::ssize_t>(head + layout.body_size());
  return {py::array(room[py::slice(0, end, 1)]), sum, taken};
}

// --- many payloads in one call --------------------------------------------------------------------------

// A row of the table of segments, as codec/message.py makes it.
struct Segment {
  std::int64_t tensor;  // which of the arrays
  std::int64_t start;   // the segment's first value in it
  std::int64_t count;
  std::int64_t dtype;  // index into kDtypes
  std::int64_t bits;
  std::int64_t norm;     // 0 max, 1 l2
  std::int64_t spacing;   // 0 uniform, 1 exponential
  std::int64_t rounding;  // 0 stochastic, 1 nearest
  std::int64_t bucket_size;
  std::int64_t offset;  // of its payload in the message; at most, where sizes vary
  std::int64_t coding;  // 0 packed, 1 elias, 2 huffman
};
constexpr py::ssize_t kColumns = sizeof(Segment) / sizeof(std::int64_t);
constexpr std::uint64_t kWordSize = 4;

using Table = py::array_t<std::int64_t, py::array::c_style>;
using Headers = py::array_t<std::uint8_t, py::array::c_style>;
using Seeds = py::array_t<std::uint64_t, py::array::c_style>;
using Shifts = py::array_t<std::uint32_t, py::array::c_style>;

// Whether a table of the right shape has a segment that is coded.
bool has_coded(const Table& table) {
  if (table.ndim() != 2 || table.shape(1) != kColumns) return false;
  for (py::ssize_t i = 0; i < table.shape(0); ++i) {
    if (*table.data(i, kColumns - 1) != 0) return true;
  }
  return false;
}

// Reads the table and compares every number in it with the buffers that it speaks of.
struct CheckedTable {
  std::vector<Segment> segments;
  std::vector<Layout> layouts;
  std::vector<std::uint8_t*> values;  // a segment's first value
  const std::uint8_t* headers;
  bool varies;  // some payload's size depends on its values: then payloads follow each other without a gap

  CheckedTable(const Table& table, const Headers& headers_array, const std::vector<py::array>& arrays,
               bool writable, std::uint64_t message_size, std::uint64_t checksum_word)
      : headers(headers_array.data()), varies(has_coded(table)) {
    if (table.ndim() != 2 || table.shape(1) != kColumns) throw py::value_error("table has the wrong shape");
    const auto rows = static_cast<std::size_t>(table.shape(0));
    if (headers_array.ndim() != 2 || static_cast<std::size_t>(headers_array.shape(0)) != rows ||
        static_cast<std::uint64_t>(headers_array.shape(1)) != kHeaderSize) {
      throw py::value_error("headers have the wrong shape");
    }
    if (checksum_word >= kHeaderSize / kWordSize) throw py::value_error("checksum_word is outside the header");
    segments.resize(rows);
    std::uint64_t end = 0;  // of the payload before
    for (std::size_t i = 0; i < rows; ++i) {
      std::memcpy(&segments[i], table.data(static_cast<py::ssize_t>(i), 0), sizeof(Segment));
      const Segment& segment = segments[i];
      if (segment.tensor < 0 || static_cast<std::size_t>(segment.tensor) >= arrays.size() || segment.dtype < 0 ||
          static_cast<std::size_t>(segment.dtype) >= kDtypes.size() || segment.start < 0 || segment.count < 0 ||
          segment.bits < kMinBits || segment.bits > kMaxBits || segment.norm < 0 || segment.norm > 1 ||
          segment.spacing < 0 || segment.spacing > 1 || segment.rounding < 0 || segment.rounding > 1 ||
          segment.coding < 0 || segment.coding > 2 || segment.bucket_size < 1 || segment.offset < 0) {
        throw py::value_error("table row " + std::to_string(i) + " is out of range");
      }
      const py::array& array = arrays[static_cast<std::size_t>(segment.tensor)];
      const std::size_t item_size = kItemSizes[static_cast<std::size_t>(segment.dtype)];
      std::uint8_t* const base = contiguous_bytes(array, item_size, writable, "values", true);
      if (segment.start > array.size() || segment.count > array.size() - segment.start) {
        throw py::value_error("table row " + std::to_string(i) + " reaches beyond its array");
      }
      layouts.push_back(checked_layout(static_cast<std::uint64_t>(segment.count),
                                       static_cast<std::uint64_t>(segment.bucket_size),
                                       static_cast<int>(segment.bits)));
      const std::uint64_t size =
          kHeaderSize + (segment.coding == 0 ? layouts[i].body_size() : max_coded_size(layouts[i]));
      const auto offset = static_cast<std::uint64_t>(segment.offset);
      if (offset > message_size || size > message_size - offset) {
        throw py::value_error("table row " + std::to_string(i) + " reaches beyond the message");
      }
      values.push_back(base + static_cast<std::size_t>(segment.start) * item_size);
      // So that each payload ends before the next one's offset.
      if (offset < end && varies) throw py::value_error("table row " + std::to_string(i) + " overlaps the one before");
      end = offset + size;
    }
  }

  // The packed body of any segment that is coded, and its slack.
  std::uint64_t scratch_size() const {
    std::uint64_t size = 0;
    for (std::size_t i = 0; i < segments.size(); ++i) {
      if (segments[i].coding != 0) size = std::max(size, padded(layouts[i].body_size() + kSlack));
    }
    return size;
  }
};

Spacing spacing_of(const Segment& segment) {
  return segment.spacing == 0 ? Spacing::kUniform : Spacing::kExponential;
}

std::uint32_t load_word(const std::uint8_t* from) {
  std::uint32_t word;
  std::memcpy(&word, from, kWordSize);
  return word;
}

// Of segment i in a step: base[i], which says whose noise it is, mixed with uses[tensors[i]], which says when.
Seeds step_seeds(const Seeds& base, const py::array_t<std::int64_t, py::array::c_style>& tensors,
                 const Seeds& uses) {
  if (base.ndim() != 1 || tensors.ndim() != 1 || uses.ndim() != 1 || base.size() != tensors.size()) {
    throw py::value_error("seeds have the wrong shape");
  }
  Seeds mixed(base.size());
  std::uint64_t* const out = mixed.mutable_data();
  for (py::ssize_t i = 0; i < base.size(); ++i) {
    const std::int64_t tensor = tensors.data()[i];
    if (tensor < 0 || tensor >= uses.size()) throw py::value_error("seeds are of a tensor that is not there");
    out[i] = mix64(base.data()[i] ^ mix64(uses.data()[tensor] + 1));
  }
  return mixed;
}

// Returns where the last payload ends.
std::uint64_t encode_segments(const std::vector<py::array>& arrays, const Table& table, const Headers& headers,
                              const Seeds& seeds, const Shifts& shifts, std::uint64_t first_word,
                              std::uint64_t checksum_word, const py::array& message,
                              const std::vector<py::array>& residuals, std::int64_t threads) {
  std::uint8_t* const out = contiguous_bytes(message, 1, true, "message");
  const CheckedTable checked(table, headers, arrays, false, static_cast<std::uint64_t>(message.size()),
                             checksum_word);
  if (seeds.ndim() != 1 || static_cast<std::size_t>(seeds.size()) != checked.segments.size() ||
      shifts.ndim() != 1 || shifts.size() != seeds.size()) {
    throw py::value_error("there must be one seed and one shift a table row");
  }
  if (!residuals.empty() && residuals.size() != arrays.size()) {
    throw py::value_error("there must be one residual an array, or none at all");
  }
  const std::uint64_t* const seed = seeds.data();
  const std::uint32_t* const shift = shifts.data();
  std::vector<float*> residual(checked.segments.size(), nullptr);
  for (std::size_t i = 0; i < checked.segments.size() && !residuals.empty(); ++i) {
    const auto tensor = static_cast<std::size_t>(checked.segments[i].tensor);
    residual[i] = residual_of(residuals[tensor], arrays[tensor]) + checked.segments[i].start;
  }
  const Kernels& kernels = *chosen;
  py::gil_scoped_release release;
  const std::unique_ptr<std::uint8_t[]> packed = scratch(checked.scratch_size());
  std::uint64_t end = checked.segments.empty() ? 0 : static_cast<std::uint64_t>(checked.segments[0].offset);
  for (std::size_t i = 0; i < checked.segments.size(); ++i) {
    const Segment& segment = checked.segments[i];
    const bool is_coded = segment.coding != 0;
    if (!checked.varies) end = static_cast<std::uint64_t>(segment.offset);
    std::uint8_t* const payload = out + end;
    const Encoding job{checked.values[i], checked.layouts[i], segment.norm == 0 ? Norm::kMax : Norm::kL2,
                       spacing_of(segment), seed[i], shift[i], segment.rounding == 1, first_word,
                       is_coded ? packed.get() : payload + kHeaderSize, residual[i]};
    std::uint32_t sum = run_encoding(job, kernels, static_cast<std::size_t>(segment.dtype), threads);
    std::uint64_t size = checked.layouts[i].body_size();
    if (is_coded) {
      size = entropy::compact(packed.get(), checked.layouts[i], static_cast<Coding>(segment.coding), payload + kHeaderSize);
      sum = kernels.checksum(payload + kHeaderSize, size, first_word);
    }
    std::memcpy(payload, checked.headers + i * kHeaderSize, kHeaderSize);
    const std::uint32_t word = load_word(payload + checksum_word * kWordSize) + sum;
    std::memcpy(payload + checksum_word * kWordSize, &word, kWordSize);
    end += kHeaderSize + size;
  }
  return end;
}

void decode_segments(const std::vector<py::array>& messages, const Table& table, const Headers& headers,
                     std::uint64_t first_word, std::uint64_t checksum_word, float weight,
                     const std::vector<py::array>& outs, std::int64_t threads) {
  if (messages.empty()) throw py::value_error("no messages to decode");
  std::vector<const std::uint8_t*> sources;
  std::vector<std::uint64_t> sizes;
  for (const py::array& message : messages) {
    sources.push_back(contiguous_bytes(message, 1, false, "message"));
    sizes.push_back(static_cast<std::uint64_t>(message.size()));
    if (!has_coded(table) && sizes.back() != sizes[0]) throw py::value_error("messages differ in size");
  }
  // Where sizes vary, the table says where payloads end at most; what is there is compared with that below.
  const std::uint64_t most = has_coded(table) ? std::numeric_limits<std::int64_t>::max() : sizes[0];
  const CheckedTable checked(table, headers, outs, true, most, checksum_word);
  const std::uint64_t begin = checked.segments.empty() ? 0 : static_cast<std::uint64_t>(checked.segments[0].offset);
  std::vector<std::uint64_t> ends(sources.size(), begin);  // of the payloads read so far
  const Kernels& kernels = *chosen;
  // What is wrong with which message, told once the GIL is held again.
  const char* wrong = nullptr;
  std::size_t wrong_message = 0;
  {
    py::gil_scoped_release release;
    const std::uint64_t scratch_size = checked.scratch_size();
    std::unique_ptr<std::uint8_t[]> packed;
    for (std::size_t i = 0; i < checked.segments.size() && wrong == nullptr; ++i) {
      const Segment& segment = checked.segments[i];
      const Layout& layout = checked.layouts[i];
      const bool is_coded = segment.coding != 0;
      const std::uint8_t* const header = checked.headers + i * kHeaderSize;
      Decoding job{{}, checked.layouts[i], spacing_of(segment), weight, first_word, checked.values[i]};
      std::vector<std::uint32_t> coded_sums;
      std::vector<const std::uint8_t*> payloads;
      for (std::size_t k = 0; k < sources.size() && wrong == nullptr; ++k) {
        if (!checked.varies) ends[k] = static_cast<std::uint64_t>(segment.offset);
        const std::uint64_t left = ends[k] <= sizes[k] ? sizes[k] - ends[k] : 0;
        const std::uint64_t room = left < kHeaderSize ? 0 : std::min(left - kHeaderSize, max_coded_size(layout));
        if (left < kHeaderSize || (is_coded ? !is_plausible(layout, room) : left - kHeaderSize < layout.body_size())) {
          wrong = "is too short";
          wrong_message = k;
          break;
        }
        const std::uint8_t* const payload = sources[k] + ends[k];
        const std::uint64_t split = checksum_word * kWordSize;
        if (std::memcmp(payload, header, split) != 0 ||
            std::memcmp(payload + split + kWordSize, header + split + kWordSize,
                        kHeaderSize - split - kWordSize) != 0) {
          wrong = "holds another payload than was expected";
          wrong_message = k;
          break;
        }
        payloads.push_back(payload);
        std::uint64_t size = layout.body_size();
        if (is_coded) {
          if (packed == nullptr) packed = scratch(scratch_size * sources.size());
          std::uint8_t* const body = packed.get() + k * scratch_size;
          const auto coding = static_cast<Coding>(segment.coding);
          wrong = entropy::expand(payload + kHeaderSize, room, layout, coding, body, &size);
          if (wrong == nullptr && !is_plausible(layout, size)) wrong = "has codes that are too short for their values";
          wrong_message = k;
          if (wrong != nullptr) break;
          coded_sums.push_back(kernels.checksum(payload + kHeaderSize, size, first_word));
          job.bodies.push_back(body);
        } else {
          job.bodies.push_back(payload + kHeaderSize);
        }
        ends[k] += kHeaderSize + size;
      }
      if (wrong != nullptr) break;
      std::size_t ill_padded = 0;
      std::vector<std::uint32_t> sums =
          run_decoding(job, kernels.decode[segment.dtype][segment.bits - kMinBits], threads, &ill_padded);
      if (is_coded) sums = coded_sums;
      for (std::size_t k = 0; k < sums.size(); ++k) {
        const std::uint32_t own = load_word(header + checksum_word * kWordSize) + sums[k];
        if (own != load_word(payloads[k] + checksum_word * kWordSize)) {
          wrong = "is damaged: its checksum does not match its bytes";
          wrong_message = k;
        }
      }
      if (ill_padded != sources.size()) {
        wrong = "is damaged: its padding is not zero";
        wrong_message = ill_padded;
      }
    }
    for (std::size_t k = 0; k < sources.size() && wrong == nullptr && checked.varies; ++k) {
      if (ends[k] != sizes[k]) {
        wrong = "has bytes left over";
        wrong_message = k;
      }
    }
  }
  if (wrong != nullptr) throw py::value_error("message " + std::to_string(wrong_message) + " " + wrong);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "CPU codec of hvd_quant; see hvd_quant.codec.native for the checked interface.";
  const char* wanted = std::getenv("HVD_QUANT_ISA");
  choose_isa(wanted == nullptr ? "" : wanted);
  module.def("isa", [] { return std::string(chosen->name); });
  module.def("available_isas", &available_isas);
  module.def("choose_isa", &choose_isa, py::arg("name"));
  module.def("encode", &encode, py::arg("values"), py::arg("dtype"), py::arg("bits"), py::arg("norm"),
             py::arg("spacing"), py::arg("bucket_size"), py::arg("seed"), py::arg("shift"), py::arg("nearest"),
             py::arg("first_word"), py::arg("body"), py::arg("residual"), py::arg("threads"));
  module.def("decode_sum", &decode_sum, py::arg("bodies"), py::arg("bucket_size"), py::arg("bits"),
             py::arg("spacing"), py::arg("weight"), py::arg("first_word"), py::arg("out"), py::arg("dtype"), py::arg("threads"));
  module.def("compact", &compact, py::arg("body"), py::arg("count"), py::arg("bucket_size"), py::arg("bits"),
             py::arg("coding"), py::arg("first_word"), py::arg("head"));
  module.def("expand", &expand, py::arg("body"), py::arg("count"), py::arg("bucket_size"), py::arg("bits"),
             py::arg("coding"), py::arg("first_word"), py::arg("head"));
  module.def("step_seeds", &step_seeds, py::arg("base"), py::arg("tensors"), py::arg("uses"));
  module.def("encode_segments", &encode_segments, py::arg("arrays"), py::arg("table"), py::arg("headers"),
             py::arg("seeds"), py::arg("shifts"), py::arg("first_word"), py::arg("checksum_word"),
             py::arg("message"), py::arg("residuals"), py::arg("threads"));
  module.def("decode_segments", &decode_segments, py::arg("messages"), py::arg("table"), py::arg("headers"),
             py::arg("first_word"), py::arg("checksum_word"), py::arg("weight"), py::arg("outs"),
             py::arg("threads"));
}
