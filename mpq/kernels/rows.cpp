// The passes around INT8's product, each one sweep over a row that stays in cache. Called through ctypes: next to a
// product of half a millisecond, a compiled Python function that has gone cold costs 0.2 ms a call.
#include "codes.h"

namespace {

constexpr int32_t kZeroPoint = 128;  // codes are unsigned

// x (rows, k) -> codes (rows, k), scale (rows): x ~ (codes - 128) * scale, scale = max|x| / 127 * perturb
template <typename T>
void quantize(const T* x, int64_t rows, int64_t k, float perturb, uint8_t* codes, float* scale) {
#pragma omp parallel for if (rows * k > 16384) schedule(static)
  for (int64_t r = 0; r < rows; ++r) scale[r] = quantize_row(x + r * k, k, kZeroPoint, codes + r * k, perturb);
}

// y (rows, c) <- y * scale (rows) + bias (c) in place; bias may be null
template <typename T>
void rescale(T* y, int64_t rows, int64_t c, const float* scale, const float* bias) {
#pragma omp parallel for if (rows * c > 16384) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    T* row = y + r * c;
    const float step = scale[r];
    if (bias) {
#pragma omp simd
      for (int64_t i = 0; i < c; ++i) store(row + i, to_float(row[i]) * step + bias[i]);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < c; ++i) store(row + i, to_float(row[i]) * step);
    }
  }
}

}  // namespace

extern "C" {
void quantize_f32(const float* x, int64_t rows, int64_t k, float perturb, uint8_t* codes, float* scale) {
  quantize(x, rows, k, perturb, codes, scale);
}
void quantize_bf16(const uint16_t* x, int64_t rows, int64_t k, float perturb, uint8_t* codes, float* scale) {
  quantize(x, rows, k, perturb, codes, scale);
}
void rescale_f32(float* y, int64_t rows, int64_t c, const float* scale, const float* bias) { rescale(y, rows, c, scale, bias); }
void rescale_bf16(uint16_t* y, int64_t rows, int64_t c, const float* scale, const float* bias) { rescale(y, rows, c, scale, bias); }
}
