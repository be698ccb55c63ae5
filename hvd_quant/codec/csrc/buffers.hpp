// Memory that Python passes: what must hold of it before a byte is touched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace {

struct Buffer {
  std::uint8_t* data;  // nobody writes through it where is_writable is false
  std::uint64_t size;  // items
  std::size_t item_size;
  bool is_flat;  // one-dimensional
  bool is_contiguous;
  bool is_writable;
};

std::uint8_t* contiguous_bytes(const Buffer& buffer, std::size_t item_size, bool writable, const char* what,
                               bool any_shape = false) {
  if ((!buffer.is_flat && !any_shape) || !buffer.is_contiguous) {
    throw std::invalid_argument(std::string(what) + " must be a contiguous " +
                                (any_shape ? "" : "one-dimensional ") + "array");
  }
  if (buffer.item_size != item_size) throw std::invalid_argument(std::string(what) + " has items of the wrong size");
  if (reinterpret_cast<std::uintptr_t>(buffer.data) % item_size != 0) {
    throw std::invalid_argument(std::string(what) + " is not aligned");
  }
  if (writable && !buffer.is_writable) throw std::invalid_argument(std::string(what) + " is read-only");
  return buffer.data;
}

// A float for every value.
float* residual_of(const Buffer& residual, const Buffer& values) {
  std::uint8_t* const bytes = contiguous_bytes(residual, sizeof(float), true, "residual", true);
  if (residual.size != values.size) throw std::invalid_argument("residual has the wrong size");
  return reinterpret_cast<float*>(bytes);
}

}  // namespace
