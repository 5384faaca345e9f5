// A linear in INT8 for CPUs with AVX2 and without VNNI, where it still beats FP32: codes are held in 16 bits, and one instruction
// (vpmaddwd) adds two products of each of 8 columns into 32 bits, exactly. Called through ctypes.
//
// Weights are packed into panels of 16 columns by 2 steps of the sum: packed[panel][step / 2][column][step % 2]. A panel is
// multiplied by all rows of a block, whose codes stay in the cache meanwhile, 4 rows by 16 columns at once in 8 registers. Scales
// and bias are applied before the sums go to memory: no pass over y follows.
#include <algorithm>

#include <immintrin.h>

#include "codes.h"

namespace {

constexpr int kRows = 4, kColumns = 16;  // 8 registers of sums: with 12 GCC spills them
constexpr int64_t kCache = 256 << 10;  // bytes of a block's codes: half of the L2 cache of the CPUs that this is for
constexpr int64_t kPanels = 8;         // what a thread takes at once

struct Linear {
  const int16_t* codes;  // (rows, 2 * k2)
  const float* row_scale;
  const int16_t* packed;  // (panels, k2, 16, 2)
  const float* column_scale;
  const float* bias;  // or null
  int64_t rows, k2, columns;
};

// R rows from `row` on times one panel
template <int R, typename T>
inline void multiply(const Linear& of, int64_t row, int64_t panel, T* y) {
  const int64_t stride = 2 * of.k2, first = panel * kColumns;
  const int16_t *a = of.codes + row * stride, *b = of.packed + panel * of.k2 * 2 * kColumns;
  __m256i sum[R][2];
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 2
  for (int64_t i = 0; i < of.k2; ++i, b += 2 * kColumns) {
    const __m256i left = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
    const __m256i right = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + kColumns));
    for (int r = 0; r < R; ++r) {
      int32_t two;
      std::memcpy(&two, a + r * stride + 2 * i, sizeof two);
      const __m256i steps = _mm256_set1_epi32(two);
      sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(steps, left));
      sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(steps, right));
    }
  }
  const int64_t n = std::min<int64_t>(kColumns, of.columns - first);
  for (int r = 0; r < R; ++r) {
    alignas(32) int32_t sums[kColumns];
    _mm256_store_si256(reinterpret_cast<__m256i*>(sums), sum[r][0]);
    _mm256_store_si256(reinterpret_cast<__m256i*>(sums + 8), sum[r][1]);
    const float scale = of.row_scale[row + r];
    T* out = y + (row + r) * of.columns + first;
    for (int64_t c = 0; c < n; ++c) {
      const float value = static_cast<float>(sums[c]) * (scale * of.column_scale[first + c]);
      store(out + c, of.bias ? value + of.bias[first + c] : value);
    }
  }
}

template <typename T>
void product(const Linear& of, T* y) {
  const int64_t panels = up(of.columns, kColumns) / kColumns;
  const int64_t block = std::clamp<int64_t>(kCache / (4 * of.k2) / kRows, 4, 48) * kRows;
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t start = 0; start < of.rows; start += block) {
    for (int64_t first = 0; first < panels; first += kPanels) {
      const int64_t end = std::min(start + block, of.rows);
      for (int64_t panel = first; panel < std::min(first + kPanels, panels); ++panel) {
        int64_t row = start;
        for (; row + kRows <= end; row += kRows) multiply<kRows>(of, row, panel, y);
        for (; row < end; ++row) multiply<1>(of, row, panel, y);
      }
    }
  }
}

// x (rows, k) -> codes (rows, 2 * k2), filled up with zeros, and scale (rows): x ~ codes * scale
template <typename T>
void quantize(const T* x, int64_t rows, int64_t k, int64_t k2, float perturb, int16_t* codes, float* scale) {
#pragma omp parallel for if (rows * k > 16384) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    int16_t* row = codes + r * 2 * k2;
    row[2 * k2 - 1] = 0;
    scale[r] = quantize_row(x + r * k, k, 0, row, perturb);
  }
}

}  // namespace

extern "C" {
void quantize_f32(const float* x, int64_t rows, int64_t k, int64_t k2, float perturb, int16_t* codes, float* scale) {
  quantize(x, rows, k, k2, perturb, codes, scale);
}
void quantize_bf16(const uint16_t* x, int64_t rows, int64_t k, int64_t k2, float perturb, int16_t* codes, float* scale) {
  quantize(x, rows, k, k2, perturb, codes, scale);
}
void product_f32(const int16_t* codes, const float* row_scale, const int16_t* packed, const float* column_scale,
                 const float* bias, int64_t rows, int64_t k2, int64_t columns, float* y) {
  product({codes, row_scale, packed, column_scale, bias, rows, k2, columns}, y);
}
void product_bf16(const int16_t* codes, const float* row_scale, const int16_t* packed, const float* column_scale,
                  const float* bias, int64_t rows, int64_t k2, int64_t columns, uint16_t* y) {
  product({codes, row_scale, packed, column_scale, bias, rows, k2, columns}, y);
}
}
