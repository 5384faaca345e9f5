// Round trips of numbers through a format, in one sweep over rows that stay in cache: what quantize.fake_quantize does in a
// dozen, bit for bit. Called through ctypes (rounding.py).
#include <vector>

#include "grid.h"

namespace {

constexpr int64_t kFew = 16384;  // elements that one thread rounds sooner than two

template <typename T, bool kInteger>
inline void round_row(const T* __restrict x, T* __restrict y, int64_t k, const Grid<kInteger> grid, float share,
                      float perturb) {
  const float scale = grid.scale(largest_bits(x, k), share, perturb);
#pragma omp simd
  for (int64_t i = 0; i < k; ++i) store(y + i, grid.saturated(to_float(x[i]) / scale) * scale);
}

// x (rows, k), a scale for each row; a block is a row here
template <typename T, bool kInteger>
void by_row(const T* x, T* y, int64_t rows, int64_t k, const Grid<kInteger> grid, float share, float perturb) {
#pragma omp parallel for if (rows * k > kFew) schedule(static)
  for (int64_t r = 0; r < rows; ++r) round_row(x + r * k, y + r * k, k, grid, share, perturb);
}

// x (n, rows, k), a scale for each column of each matrix
template <typename T, bool kInteger>
void by_column(const T* x, T* y, int64_t n, int64_t rows, int64_t k, const Grid<kInteger> grid, float perturb) {
#pragma omp parallel for if (n * rows * k > kFew) schedule(static)
  for (int64_t m = 0; m < n; ++m) {
    const T* from = x + m * rows * k;
    T* to = y + m * rows * k;
    std::vector<uint32_t> largest(k, 0);
    std::vector<float> scale(k);
    for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
      for (int64_t i = 0; i < k; ++i) {
        const uint32_t size = size_bits(to_float(from[r * k + i]));
        largest[i] = size > largest[i] ? size : largest[i];
      }
    }
    for (int64_t i = 0; i < k; ++i) scale[i] = grid.scale(largest[i], 1.0f, perturb);
    for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
      for (int64_t i = 0; i < k; ++i) store(to + r * k + i, grid.saturated(to_float(from[r * k + i]) / scale[i]) * scale[i]);
    }
  }
}

// formats of 16 bits take no scale, and overflow to infinity
template <typename T>
void unscaled(const T* x, T* y, int64_t count, const Grid<false> grid) {
#pragma omp parallel for simd if (parallel : count > kFew) schedule(static)
  for (int64_t i = 0; i < count; ++i) store(y + i, grid.overflowing(to_float(x[i])));
}

}  // namespace

#define MPQ_ENTRIES(name, T, kInteger)                                                                                     \
  void row_##name(const T* x, T* y, int64_t rows, int64_t k, const Format* f, float share, float perturb) {                \
    by_row(x, y, rows, k, Grid<kInteger>(*f), share, perturb);                                                             \
  }                                                                                                                        \
  void column_##name(const T* x, T* y, int64_t n, int64_t rows, int64_t k, const Format* f, float perturb) {               \
    by_column(x, y, n, rows, k, Grid<kInteger>(*f), perturb);                                                              \
  }
#define MPQ_UNSCALED(name, T) \
  void unscaled_##name(const T* x, T* y, int64_t count, const Format* f) { unscaled(x, y, count, Grid<false>(*f)); }

extern "C" {
MPQ_ENTRIES(float_f32, float, false)
MPQ_ENTRIES(float_bf16, uint16_t, false)
MPQ_ENTRIES(int_f32, float, true)
MPQ_ENTRIES(int_bf16, uint16_t, true)
MPQ_UNSCALED(float_f32, float)
MPQ_UNSCALED(float_bf16, uint16_t)
void bf16_f32(const float* x, float* y, int64_t count) {  // BF16 ends where FP32 does: no room above for the trick
#pragma omp parallel for simd if (parallel : count > kFew) schedule(static)
  for (int64_t i = 0; i < count; ++i) y[i] = to_float(static_cast<uint16_t>(to_bf16(x[i])));
}
}
