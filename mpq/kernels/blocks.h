// Blocks of a row, each with a scale of its own: their largest magnitudes, and loops over elements with their block's scale.
#pragma once

#include <type_traits>

#include "grid.h"

namespace {

template <typename T>
inline uint32_t largest_bits(const T* x, int64_t k) {  // the bits of the largest magnitude
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < k; ++i) {
    const uint32_t size = size_bits(to_float(x[i]));
    largest = size > largest ? size : largest;
  }
  return largest;
}

// of(wide), short blocks' width a constant of compilation: the loops over them have no ends to look for
template <typename Of>
inline void of_width(int64_t wide, Of of) {
  if (wide == 16) return of(std::integral_constant<int64_t, 16>());
  if (wide == 32) return of(std::integral_constant<int64_t, 32>());
  of(wide);
}

// largest[b], raised to the largest magnitude in block b of a row
template <typename T>
inline void raise_largest(const T* x, int64_t k, int64_t columns, uint32_t* __restrict largest) {
  if (columns == 1) {
#pragma omp simd
    for (int64_t i = 0; i < k; ++i) {
      const uint32_t size = size_bits(to_float(x[i]));
      largest[i] = size > largest[i] ? size : largest[i];
    }
    return;
  }
  of_width(columns, [=](const auto given) {
    const int64_t wide = given;
    const auto to = [=](int64_t b, uint32_t size) { largest[b] = size > largest[b] ? size : largest[b]; };
    const int64_t whole = k / wide;
    for (int64_t b = 0; b < whole; ++b) to(b, largest_bits(x + b * wide, wide));
    if (whole * wide < k) to(whole, largest_bits(x + whole * wide, k - whole * wide));
  });
}

// of(first, count, scale_of) for pieces of a row whose blocks have these scales; scale_of(i) is that of element first + i
template <typename Of>
inline void by_piece(const float* scale, int64_t k, int64_t columns, Of of) {
  constexpr int64_t kPiece = 512;  // elements whose scales are written out, for one loop over many short blocks
  if (columns == 1) return of(int64_t{0}, k, [=](int64_t i) { return scale[i]; });
  if (columns != 16 && columns != 32) {
    for (int64_t first = 0; first < k; first += columns) {
      const float of_block = scale[first / columns];
      of(first, k - first < columns ? k - first : columns, [=](int64_t) { return of_block; });
    }
    return;
  }
  alignas(64) float each[kPiece];
  for (int64_t first = 0; first < k; first += kPiece) {
    const int64_t count = k - first < kPiece ? k - first : kPiece;
    of_width(columns, [&](const auto given) {
      const int64_t wide = given;
      for (int64_t b = 0; b * wide < count; ++b) {  // whole blocks: a short last one is within the piece all the same
#pragma omp simd
        for (int64_t i = 0; i < wide; ++i) each[b * wide + i] = scale[first / wide + b];
      }
    });
    of(first, count, [&each](int64_t i) { return each[i]; });
  }
}

}  // namespace
