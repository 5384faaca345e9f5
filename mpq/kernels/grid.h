// The numbers that a format has, and the nearest of them.
//
// A float with m mantissa bits has the step 2^(e - m) where 2^e <= |v| < 2^(e + 1). The last bit of 1.5 * 2^(e + 23 - m) in
// FP32 is worth that step: adding it lets FP32's own addition round v to nearest, ties to even, and taking it away again is
// exact. Subnormals have the step of the smallest normals. Integers have one step everywhere, no NaN and one zero.
// What a scale is stored as, and what it maps the largest magnitude onto: formats/format.py, formats/quantize.py.
#pragma once

#include "codes.h"

namespace {

constexpr uint32_t kSign = 0x80000000u, kExponent = 0x7f800000u, kHalf = 0x00400000u;

inline uint32_t size_bits(float x) { return bits_of(x) & ~kSign; }  // order as magnitudes do, NaN above all

inline float clamped(float v, float limit) {  // NaN stays NaN
  v = v < -limit ? -limit : v;
  return v > limit ? limit : v;
}

enum Kind : int32_t { kScaled, kInteger, kUnscaled, kBf16 };
enum Scale : int32_t { kFp32Scale, kBf16Scale, kPowerOfTwo, kE4m3Scale };

struct Format {  // as grid.py writes it
  int32_t kind, mantissa_bits, min_exponent, scale;
  float maximum, minimum, top;
  int64_t rows, columns;  // of the block that shares a scale; 0: all of them
};

template <bool kInteger>
struct Grid {
  float maximum, minimum, top;
  uint32_t lift, lowest;  // 23 - m and the smallest normal's exponent, both in the exponent's place
  int32_t stored;         // Scale

  Grid(int32_t mantissa_bits, int32_t min_exponent, float largest)
      : maximum(largest),
        minimum(-largest),
        top(largest),
        lift(static_cast<uint32_t>(23 - mantissa_bits) << 23),
        lowest(static_cast<uint32_t>(127 + min_exponent) << 23),
        stored(kFp32Scale) {}
  explicit Grid(const Format& f) : Grid(f.mantissa_bits, f.min_exponent, f.maximum) {
    minimum = f.minimum;
    top = f.top;
    stored = f.scale;
  }

  inline float nearest(float v) const {
    const uint32_t exponent = bits_of(v) & kExponent;
    const float magic = from_bits(((exponent > lowest ? exponent : lowest) + lift) | kHalf);
    const float rounded = (v + magic) - magic;
    if (kInteger) return v != v ? 0.0f : rounded;
    return from_bits(bits_of(rounded) | (bits_of(v) & kSign));
  }
  inline float saturated(float v) const {
    v = v < minimum ? minimum : v;
    return nearest(v > maximum ? maximum : v);
  }
  inline float overflowing(float v) const {
    const float rounded = nearest(clamped(v, 2 * maximum));
    return size_bits(rounded) > bits_of(maximum) && v == v ? from_bits(kExponent | (bits_of(v) & kSign)) : rounded;
  }
  // of blocks whose largest magnitudes have these bits; `share` is quantize.share_of their tensor
  inline void scales(const uint32_t* largest, float* scale, int64_t count, float share, float perturb) const {
    switch (stored) {
      case kPowerOfTwo:
        return each_scale<kPowerOfTwo>(largest, scale, count, share, perturb);
      case kE4m3Scale:
        return each_scale<kE4m3Scale>(largest, scale, count, share, perturb);
      case kBf16Scale:
        return each_scale<kBf16Scale>(largest, scale, count, share, perturb);
      default:
        return each_scale<kFp32Scale>(largest, scale, count, share, perturb);
    }
  }

 private:
  template <Scale kStored>
  inline void each_scale(const uint32_t* __restrict largest, float* __restrict scale, int64_t count, float share,
                         float perturb) const {
    const Grid grid = *this;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) scale[i] = grid.template as_stored<kStored>(largest[i], share) * perturb;
  }
  template <Scale kStored>
  inline float as_stored(uint32_t largest, float share) const {
    const float size = from_bits(largest);
    float scale = size / top;
    if constexpr (kStored == kPowerOfTwo) {
      const int32_t of_maximum = static_cast<int32_t>(bits_of(maximum) >> 23) - 127;
      const int32_t power = static_cast<int32_t>((largest + 0x00200000u) >> 23) - of_maximum;
      const int32_t kept = power < 1 ? 1 : power > 254 ? 254 : power;
      return size > kTiny ? from_bits(static_cast<uint32_t>(kept) << 23) : 1.0f;
    }
    if constexpr (kStored == kE4m3Scale) {
      const float of_block = Grid<false>(3, -6, 448.0f).saturated(scale * share);
      return (of_block > 0.0f ? of_block : 0.125f) / share;
    }
    if constexpr (kStored == kBf16Scale) scale = to_float(static_cast<uint16_t>(to_bf16(scale)));
    return scale > kTiny ? scale : 1.0f;
  }
};

}  // namespace
