// The passes around INT8's product, each one sweep over a row that stays in cache. Called through ctypes: next to a
// product of half a millisecond, a compiled Python function that has gone cold costs 0.2 ms a call.
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr float kTiny = 1.17549435e-38f;  // the smallest normal FP32: a row of zeros has scale 1
constexpr float kZeroPoint = 128.0f;      // codes are unsigned

inline float to_float(float x) { return x; }
inline float to_float(uint16_t x) {  // BF16 is the upper half of FP32
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void store(float* at, float x) { *at = x; }
inline void store(uint16_t* at, float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  *at = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

// x (rows, k) -> codes (rows, k), scale (rows): x ~ (codes - 128) * scale, scale = max|x| / 127 * perturb
template <typename T>
void quantize(const T* x, int64_t rows, int64_t k, float perturb, uint8_t* codes, float* scale) {
#pragma omp parallel for if (rows * k > 16384) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = x + r * k;
    uint8_t* out = codes + r * k;
    float largest = 0.0f;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < k; ++i) {
      const float size = std::fabs(to_float(row[i]));
      largest = size > largest ? size : largest;  // not fmax: its rules for NaN keep compilers from vectorizing
    }
    float step = largest / 127.0f;
    step = (step > kTiny ? step : 1.0f) * perturb;
    scale[r] = step;
#pragma omp simd
    for (int64_t i = 0; i < k; ++i) {
      float code = std::nearbyint(to_float(row[i]) / step);
      code = code < -127.0f ? -127.0f : code;
      code = code > 127.0f ? 127.0f : code;
      out[i] = static_cast<uint8_t>(static_cast<int32_t>(code + kZeroPoint));
    }
  }
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
