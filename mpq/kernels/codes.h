// Numbers of the C++ kernels: BF16 to FP32 and back, and the INT8 codes of a row with a scale of its own.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr float kTiny = 1.17549435e-38f;  // the smallest normal FP32: what is below it has scale 1

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t to_bf16(float x) {  // to nearest, ties to even; NaN stays NaN
  const uint32_t bits = bits_of(x);
  return x != x ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
inline float to_float(float x) { return x; }
inline float to_float(uint16_t x) { return from_bits(static_cast<uint32_t>(x) << 16); }  // BF16 is the upper half of FP32
inline void store(float* at, float x) { *at = x; }
inline void store(uint16_t* at, float x) { *at = static_cast<uint16_t>(to_bf16(x)); }

inline int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

inline float step_of(float largest) {
  const float step = largest / 127.0f;
  return step > kTiny ? step : 1.0f;
}

inline int32_t code_of(float x, float step) {
  float code = std::nearbyint(x / step);
  code = code < -127.0f ? -127.0f : code;
  return static_cast<int32_t>(code > 127.0f ? 127.0f : code);
}

// codes + zero of one row, and the scale that it has to itself, times perturb
template <typename T, typename Code>
inline float quantize_row(const T* row, int64_t k, int32_t zero, Code* codes, float perturb = 1.0f) {
  float largest = 0.0f;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < k; ++i) {
    const float size = std::fabs(to_float(row[i]));
    largest = size > largest ? size : largest;  // not fmax: its rules for NaN keep compilers from vectorizing
  }
  const float step = step_of(largest) * perturb;
#pragma omp simd
  for (int64_t i = 0; i < k; ++i) codes[i] = static_cast<Code>(code_of(to_float(row[i]), step) + zero);
  return step;
}

}  // namespace
