// Messages: the payloads of several segments, encoded or decoded in one call.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "buffers.hpp"
#include "dispatch.hpp"
#include "entropy/read.hpp"
#include "entropy/write.hpp"
#include "payload.hpp"

namespace {

// --- the table of segments ------------------------------------------------------------------------------

// A row of it, as codec/message.py makes it.
struct Segment {
  std::int64_t tensor;  // which of the arrays
  std::int64_t start;   // the segment's first value in it
  std::int64_t count;
  std::int64_t dtype;  // index into kDtypes
  std::int64_t bits;
  std::int64_t norm;      // 0 max, 1 l2
  std::int64_t spacing;   // 0 uniform, 1 exponential
  std::int64_t rounding;  // 0 stochastic, 1 nearest
  std::int64_t bucket_size;
  std::int64_t offset;  // of its payload in the message; at most, where sizes vary
  std::int64_t coding;  // 0 packed, 1 elias, 2 huffman
};
constexpr std::int64_t kColumns = sizeof(Segment) / sizeof(std::int64_t);
constexpr std::uint64_t kWordSize = 4;

// Rows of memory that Python passes. Where it is not two-dimensional, there are none, of -1 columns.
template <class T>
struct Matrix {
  const T* data;
  std::int64_t rows;
  std::int64_t columns;
};

using Table = Matrix<std::int64_t>;
using Headers = Matrix<std::uint8_t>;

// Whether a table of the right shape has a segment that is coded.
bool has_coded(const Table& table) {
  if (table.columns != kColumns) return false;
  for (std::int64_t i = 0; i < table.rows; ++i) {
    if (table.data[(i + 1) * kColumns - 1] != 0) return true;
  }
  return false;
}

// Reads the table and compares every number in it with the buffers that it speaks of.
struct CheckedTable {
  std::vector<Segment> segments;
  std::vector<Layout> layouts;
  std::vector<std::uint8_t*> values;  // a segment's first value
  const std::uint8_t* headers;
  std::uint64_t checksum_at;  // in a header
  bool varies;  // some payload's size depends on its values: then payloads follow each other without a gap

  CheckedTable(const Table& table, const Headers& header_rows, const std::vector<Buffer>& arrays, bool writable,
               std::uint64_t message_size, std::uint64_t checksum_word)
      : headers(header_rows.data), checksum_at(checksum_word * kWordSize), varies(has_coded(table)) {
    if (table.columns != kColumns) throw std::invalid_argument("table has the wrong shape");
    if (header_rows.rows != table.rows || header_rows.columns != static_cast<std::int64_t>(kHeaderSize)) {
      throw std::invalid_argument("headers have the wrong shape");
    }
    if (checksum_word >= kHeaderSize / kWordSize) {
      throw std::invalid_argument("checksum_word is outside the header");
    }
    segments.resize(static_cast<std::size_t>(table.rows));
    std::uint64_t end = 0;  // of the payload before
    for (std::size_t i = 0; i < segments.size(); ++i) {
      std::memcpy(&segments[i], table.data + i * static_cast<std::size_t>(kColumns), sizeof(Segment));
      const Segment& segment = segments[i];
      if (segment.tensor < 0 || static_cast<std::size_t>(segment.tensor) >= arrays.size() || segment.dtype < 0 ||
          static_cast<std::size_t>(segment.dtype) >= kDtypes.size() || segment.start < 0 || segment.count < 0 ||
          segment.bits < kMinBits || segment.bits > kMaxBits || segment.norm < 0 || segment.norm > 1 ||
          segment.spacing < 0 || segment.spacing > 1 || segment.rounding < 0 || segment.rounding > 1 ||
          segment.coding < 0 || segment.coding > 2 || segment.bucket_size < 1 || segment.offset < 0) {
        refuse_row(i, "is out of range");
      }
      const Buffer& array = arrays[static_cast<std::size_t>(segment.tensor)];
      const std::size_t item_size = kItemSizes[static_cast<std::size_t>(segment.dtype)];
      std::uint8_t* const base = contiguous_bytes(array, item_size, writable, "values", true);
      const auto start = static_cast<std::uint64_t>(segment.start), count = static_cast<std::uint64_t>(segment.count);
      if (start > array.size || count > array.size - start) refuse_row(i, "reaches beyond its array");
      layouts.push_back(checked_layout(count, static_cast<std::uint64_t>(segment.bucket_size),
                                       static_cast<int>(segment.bits)));
      const std::uint64_t size =
          kHeaderSize + (segment.coding == 0 ? layouts[i].body_size() : max_coded_size(layouts[i]));
      const auto offset = static_cast<std::uint64_t>(segment.offset);
      if (offset > message_size || size > message_size - offset) refuse_row(i, "reaches beyond the message");
      values.push_back(base + start * item_size);
      // So that each payload ends before the next one's offset.
      if (offset < end && varies) refuse_row(i, "overlaps the one before");
      end = offset + size;
    }
  }

  // Where the first payload begins.
  std::uint64_t begin() const { return segments.empty() ? 0 : static_cast<std::uint64_t>(segments[0].offset); }

  const std::uint8_t* header(std::size_t segment) const { return headers + segment * kHeaderSize; }

  // The packed body of any segment that is coded, and its slack.
  std::uint64_t scratch_size() const {
    std::uint64_t size = 0;
    for (std::size_t i = 0; i < segments.size(); ++i) {
      if (segments[i].coding != 0) size = std::max(size, padded(layouts[i].body_size() + kSlack));
    }
    return size;
  }

 private:
  [[noreturn]] static void refuse_row(std::size_t row, const char* why) {
    throw std::invalid_argument("table row " + std::to_string(row) + " " + why);
  }
};

// A segment's residual, for each of them; or null, where there are none at all.
std::vector<float*> residuals_of(const CheckedTable& checked, const std::vector<Buffer>& residuals,
                                 const std::vector<Buffer>& arrays) {
  if (!residuals.empty() && residuals.size() != arrays.size()) {
    throw std::invalid_argument("there must be one residual an array, or none at all");
  }
  std::vector<float*> found(checked.segments.size(), nullptr);
  for (std::size_t i = 0; i < found.size() && !residuals.empty(); ++i) {
    const auto tensor = static_cast<std::size_t>(checked.segments[i].tensor);
    found[i] = residual_of(residuals[tensor], arrays[tensor]) + checked.segments[i].start;
  }
  return found;
}

// The noise of a segment in a step: `base` says whose it is, `uses` says when.
constexpr std::uint64_t step_seed(std::uint64_t base, std::uint64_t uses) { return mix64(base ^ mix64(uses + 1)); }

Spacing spacing_of(const Segment& segment) {
  return segment.spacing == 0 ? Spacing::kUniform : Spacing::kExponential;
}

std::uint32_t load_word(const std::uint8_t* from) {
  std::uint32_t word;
  std::memcpy(&word, from, kWordSize);
  return word;
}

// --- encode ---------------------------------------------------------------------------------------------

// Of seeds, shifts and residuals there is one a segment. Returns where the last payload ends.
std::uint64_t encode_message(const CheckedTable& checked, const Kernels& kernels, const std::uint64_t* seeds,
                             const std::uint32_t* shifts, const std::vector<float*>& residuals,
                             std::uint64_t first_word, std::uint8_t* message, std::int64_t threads) {
  const std::unique_ptr<std::uint8_t[]> packed = scratch(checked.scratch_size());
  std::uint64_t end = checked.begin();
  for (std::size_t i = 0; i < checked.segments.size(); ++i) {
    const Segment& segment = checked.segments[i];
    const Layout& layout = checked.layouts[i];
    const bool is_coded = segment.coding != 0;
    if (!checked.varies) end = static_cast<std::uint64_t>(segment.offset);
    std::uint8_t* const payload = message + end;
    std::uint8_t* const body = payload + kHeaderSize;
    const Encoding job{checked.values[i], layout, segment.norm == 0 ? Norm::kMax : Norm::kL2,
                       spacing_of(segment), seeds[i], shifts[i], segment.rounding == 1, first_word,
                       is_coded ? packed.get() : body, residuals[i]};
    std::uint32_t sum = run_encoding(job, kernels, static_cast<std::size_t>(segment.dtype), threads);
    std::uint64_t size = layout.body_size();
    if (is_coded) {
      size = entropy::compact(packed.get(), layout, static_cast<Coding>(segment.coding), body);
      sum = kernels.checksum(body, size, first_word);
    }
    std::memcpy(payload, checked.header(i), kHeaderSize);
    const std::uint32_t word = load_word(payload + checked.checksum_at) + sum;
    std::memcpy(payload + checked.checksum_at, &word, kWordSize);
    end += kHeaderSize + size;
  }
  return end;
}

// --- decode ---------------------------------------------------------------------------------------------

// A message that is read payload by payload.
struct Incoming {
  const std::uint8_t* bytes;
  std::uint64_t size;
  std::uint64_t at = 0;  // where the next payload begins

  const std::uint8_t* payload() const { return bytes + at; }
  std::uint64_t left() const { return at <= size ? size - at : 0; }
  // Of which a coded body takes what it needs.
  std::uint64_t body_room(const Layout& layout) const {
    return left() < kHeaderSize ? 0 : std::min(left() - kHeaderSize, max_coded_size(layout));
  }
};

// What is wrong with a message's next payload, as far as its size and header say, or null.
const char* header_fault(const Incoming& message, const CheckedTable& checked, std::size_t segment) {
  const Layout& layout = checked.layouts[segment];
  if (message.left() < kHeaderSize) return "is too short";
  if (checked.segments[segment].coding != 0 ? !is_plausible(layout, message.body_room(layout))
                                            : message.left() - kHeaderSize < layout.body_size()) {
    return "is too short";
  }
  const std::uint8_t* const header = checked.header(segment);
  const std::uint64_t after = checked.checksum_at + kWordSize;
  if (std::memcmp(message.payload(), header, checked.checksum_at) != 0 ||
      std::memcmp(message.payload() + after, header + after, kHeaderSize - after) != 0) {
    return "holds another payload than was expected";
  }
  return nullptr;
}

[[noreturn]] void refuse_message(std::size_t message, const char* why) {
  throw std::invalid_argument("message " + std::to_string(message) + " " + why);
}

// The values of the table's segments become `weight` times the sum of the messages'.
void decode_messages(std::vector<Incoming> messages, const CheckedTable& checked, const Kernels& kernels,
                     std::uint64_t first_word, float weight, std::int64_t threads) {
  for (Incoming& message : messages) message.at = checked.begin();
  const std::uint64_t scratch_size = checked.scratch_size();
  std::unique_ptr<std::uint8_t[]> packed;  // of each message
  for (std::size_t i = 0; i < checked.segments.size(); ++i) {
    const Segment& segment = checked.segments[i];
    const Layout& layout = checked.layouts[i];
    const bool is_coded = segment.coding != 0;
    Decoding job{{}, layout, spacing_of(segment), weight, first_word, checked.values[i]};
    std::vector<std::uint32_t> coded_sums;
    std::vector<const std::uint8_t*> payloads;
    for (std::size_t k = 0; k < messages.size(); ++k) {
      Incoming& message = messages[k];
      if (!checked.varies) message.at = static_cast<std::uint64_t>(segment.offset);
      if (const char* const wrong = header_fault(message, checked, i)) refuse_message(k, wrong);
      payloads.push_back(message.payload());
      const std::uint8_t* body = message.payload() + kHeaderSize;
      std::uint64_t size = layout.body_size();
      if (is_coded) {
        if (packed == nullptr) packed = scratch(scratch_size * messages.size());
        std::uint8_t* const expanded = packed.get() + k * scratch_size;
        const char* const wrong = entropy::expand(body, message.body_room(layout), layout,
                                                  static_cast<Coding>(segment.coding), expanded, &size);
        if (wrong != nullptr) refuse_message(k, wrong);
        if (!is_plausible(layout, size)) refuse_message(k, "has codes that are too short for their values");
        coded_sums.push_back(kernels.checksum(body, size, first_word));
        body = expanded;
      }
      job.bodies.push_back(body);
      message.at += kHeaderSize + size;
    }
    std::size_t ill_padded = 0;
    std::vector<std::uint32_t> sums =
        run_decoding(job, kernels.decode[segment.dtype][segment.bits - kMinBits], threads, &ill_padded);
    if (ill_padded != messages.size()) refuse_message(ill_padded, "is damaged: its padding is not zero");
    if (is_coded) sums = coded_sums;
    for (std::size_t k = messages.size(); k-- > 0;) {
      const std::uint32_t own = load_word(checked.header(i) + checked.checksum_at) + sums[k];
      if (own != load_word(payloads[k] + checked.checksum_at)) {
        refuse_message(k, "is damaged: its checksum does not match its bytes");
      }
    }
  }
  for (std::size_t k = 0; k < messages.size() && checked.varies; ++k) {
    if (messages[k].at != messages[k].size) refuse_message(k, "has bytes left over");
  }
}

}  // namespace
