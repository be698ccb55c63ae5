// Huffman codes: the lengths of their words, and the words that follow from these.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "bits.hpp"

namespace {
namespace entropy {

constexpr int kMaxLength = 11;  // of a code word, and of the index of a decoding table

// The lengths of an optimal prefix code of words of at most `limit` bits, by package-merge (Larmore and
// Hirschberg, 1990). Symbols that do not occur get no word, except that there are always two words at least.
inline void huffman_lengths(const std::uint64_t* counts, int symbols, int limit, std::uint8_t* lengths) {
  std::memset(lengths, 0, static_cast<std::size_t>(symbols));
  std::array<std::pair<std::uint64_t, int>, kSymbols> leaves;
  int n = 0;
  for (int i = 0; i < symbols; ++i) {
    if (counts[i] != 0) leaves[static_cast<std::size_t>(n++)] = {counts[i], i};
  }
  for (int i = 0; n < 2; ++i) {
    if (counts[i] == 0) leaves[static_cast<std::size_t>(n++)] = {0, i};
  }
  std::sort(leaves.begin(), leaves.begin() + n);
  while ((1 << limit) < n) ++limit;
  // Each row merges the leaves with the pairs of the row before; what is a leaf in it is all that is kept.
  std::array<std::array<bool, 2 * kSymbols>, kMaxLength> is_leaf;
  std::array<std::uint64_t, 2 * kSymbols> row, previous;
  std::size_t size = 0;
  for (int level = 0; level < limit; ++level) {
    std::swap(row, previous);
    const std::size_t pairs = size / 2;
    std::size_t leaf = 0, pair = 0;
    for (size = 0; leaf < static_cast<std::size_t>(n) || pair < pairs; ++size) {
      const bool take_leaf =
          pair == pairs || (leaf < static_cast<std::size_t>(n) &&
                            leaves[leaf].first <= previous[2 * pair] + previous[2 * pair + 1]);
      row[size] = take_leaf ? leaves[leaf].first : previous[2 * pair] + previous[2 * pair + 1];
      is_leaf[static_cast<std::size_t>(level)][size] = take_leaf;
      ++(take_leaf ? leaf : pair);
    }
  }
  std::size_t taken = 2 * static_cast<std::size_t>(n) - 2;
  for (int level = limit; level-- > 0;) {
    std::size_t used = 0;
    for (std::size_t i = 0; i < taken; ++i) used += is_leaf[static_cast<std::size_t>(level)][i] ? 1 : 0;
    for (std::size_t i = 0; i < used; ++i) ++lengths[leaves[i].second];
    taken = 2 * (taken - used);
  }
}

// The canonical code of these lengths: words in the order of length, then of symbol, as binary numbers. Returns
// whether the lengths are those of a complete code.
inline bool canonical_code(const std::uint8_t* lengths, int symbols, Word* words) {
  std::array<std::uint32_t, kMaxLength + 1> of_length{}, next{};
  for (int i = 0; i < symbols; ++i) {
    if (lengths[i] > kMaxLength) return false;
    ++of_length[lengths[i]];
  }
  std::uint32_t code = 0;
  of_length[0] = 0;
  for (std::size_t length = 1; length <= kMaxLength; ++length) {
    code = (code + of_length[length - 1]) << 1;
    next[length] = code;
    if (code + of_length[length] > std::uint32_t{1} << length) return false;
  }
  if (code + of_length[kMaxLength] != std::uint32_t{1} << kMaxLength) return false;
  for (int i = 0; i < symbols; ++i) {
    words[i] = lengths[i] == 0 ? Word{} : Word{reversed(next[lengths[i]]++, lengths[i]), lengths[i]};
  }
  return true;
}

}  // namespace entropy
}  // namespace
