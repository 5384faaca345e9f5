// Round trips of numbers through a format, in one sweep over rows that stay in cache: what quantize.fake_quantize does in a
// dozen, bit for bit. Called through ctypes (rounding.py).
#include <algorithm>
#include <vector>

#include "blocks.h"

namespace {

constexpr int64_t kFew = 16384;  // elements that one thread rounds sooner than two

// x (n, rows, k), a scale for each block of f's rows and columns; those at the ends may have fewer
template <typename T, bool kInteger>
void by_block(const T* x, T* y, int64_t n, int64_t rows, int64_t k, const Format& f, float share, float perturb) {
  const Grid<kInteger> grid(f);
  const int64_t high = f.rows > 0 ? f.rows : rows, wide = f.columns > 0 ? f.columns : k;
  const int64_t strips = up(rows, high) / high, across = up(k, wide) / wide;
#pragma omp parallel if (n * rows * k > kFew)
  {
    std::vector<uint32_t> largest(across);
    std::vector<float> scale(across);
#pragma omp for schedule(static)
    for (int64_t s = 0; s < n * strips; ++s) {
      const int64_t above = s % strips * high, count = rows - above < high ? rows - above : high;
      const int64_t first = (s / strips * rows + above) * k, end = first + count * k;
      std::fill(largest.begin(), largest.end(), 0u);
      for (int64_t at = first; at < end; at += k) raise_largest(x + at, k, wide, largest.data());
      grid.scales(largest.data(), scale.data(), across, share, perturb);
      for (int64_t at = first; at < end; at += k) {
        by_piece(scale.data(), k, wide, [=](int64_t begin, int64_t length, auto scale_of) {
          const T* __restrict from = x + at + begin;
          T* __restrict to = y + at + begin;
#pragma omp simd
          for (int64_t i = 0; i < length; ++i) store(to + i, grid.saturated(to_float(from[i]) / scale_of(i)) * scale_of(i));
        });
      }
    }
  }
}

template <typename T>
float largest(const T* x, int64_t count) {
  uint32_t bits = 0;
#pragma omp parallel for simd if (parallel : count > kFew) schedule(static) reduction(max : bits)
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t size = size_bits(to_float(x[i]));
    bits = size > bits ? size : bits;
  }
  return from_bits(bits);
}

// formats of 16 bits take no scale, and overflow to infinity
template <typename T>
void unscaled(const T* x, T* y, int64_t count, const Grid<false> grid) {
#pragma omp parallel for simd if (parallel : count > kFew) schedule(static)
  for (int64_t i = 0; i < count; ++i) store(y + i, grid.overflowing(to_float(x[i])));
}

}  // namespace

#define MPQ_ENTRIES(name, T)                                                                                                \
  void float_##name(const T* x, T* y, int64_t n, int64_t rows, int64_t k, const Format* f, float share, float perturb) {   \
    by_block<T, false>(x, y, n, rows, k, *f, share, perturb);                                                              \
  }                                                                                                                        \
  void int_##name(const T* x, T* y, int64_t n, int64_t rows, int64_t k, const Format* f, float share, float perturb) {     \
    by_block<T, true>(x, y, n, rows, k, *f, share, perturb);                                                               \
  }                                                                                                                        \
  void unscaled_##name(const T* x, T* y, int64_t count, const Format* f) { unscaled(x, y, count, Grid<false>(*f)); }       \
  float largest_##name(const T* x, int64_t count) { return largest(x, count); }

extern "C" {
MPQ_ENTRIES(f32, float)
MPQ_ENTRIES(bf16, uint16_t)
void bf16_f32(const float* x, float* y, int64_t count) {  // BF16 ends where FP32 does: no room above for the trick
#pragma omp parallel for simd if (parallel : count > kFew) schedule(static)
  for (int64_t i = 0; i < count; ++i) y[i] = to_float(static_cast<uint16_t>(to_bf16(x[i])));
}
}
