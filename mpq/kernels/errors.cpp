// What the rounding of a tensor does to a loss whose gradient is known: sums of squared gradients, each times a squared
// magnitude, of all formats in one sweep over rows that stay in cache. Called through ctypes (errors.py).
#include "grid.h"

namespace {

constexpr int64_t kFew = 16384;  // elements that one thread sums sooner than two
constexpr int32_t kMagnitudes = 3;
enum Kind : int32_t { kScaled, kInteger, kUnscaled, kBf16 };

struct Format {
  int32_t kind, mantissa_bits, min_exponent;
  float maximum;
};

inline float kept_as(const float*, float x) { return x; }  // what a tensor of this type holds of x
inline float kept_as(const uint16_t*, float x) { return to_float(static_cast<uint16_t>(to_bf16(x))); }

template <typename T, typename Of>
inline float weighted(const T* g, const T* u, int64_t k, Of of) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < k; ++i) {
    const float moved = to_float(g[i]) * of(to_float(u[i]));
    sum += moved * moved;
  }
  return sum;
}

template <bool kInt, typename T>
inline float scaled_error(const T* g, const T* u, int64_t k, const Format& f, uint32_t largest) {
  const Grid<kInt> grid(f.mantissa_bits, f.min_exponent, f.maximum);
  const float scale = grid.scale(largest, 1.0f);
  // the compiler may leave out the rounding of this product: 2^-24 of v at most, where errors are 2^-10 of it
  return weighted(g, u, k, [=](float v) { return kept_as(u, grid.saturated(v / scale) * scale) - v; });
}

template <typename T>
inline float error(const T* g, const T* u, int64_t k, const Format& f, uint32_t largest) {
  switch (f.kind) {
    case kInteger:
      return scaled_error<true>(g, u, k, f, largest);
    case kScaled:
      return scaled_error<false>(g, u, k, f, largest);
    case kUnscaled: {
      const Grid<false> grid(f.mantissa_bits, f.min_exponent, f.maximum);
      return weighted(g, u, k, [=](float v) { return kept_as(u, grid.overflowing(v)) - v; });
    }
    default:
      return weighted(g, u, k, [](float v) { return to_float(static_cast<uint16_t>(to_bf16(v))) - v; });
  }
}

// g, u (rows, k) -> sums (rows, 3 + count): of g² times u², the squared binade, the row's largest u², each format's error²
template <typename T>
void sums(const T* g, const T* u, int64_t rows, int64_t k, const Format* formats, int32_t count, float* out) {
#pragma omp parallel for if (rows * k > kFew) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const T *of_g = g + r * k, *of_u = u + r * k;
    float* to = out + r * (kMagnitudes + count);
    const uint32_t largest = largest_bits(of_u, k);
    const float size = from_bits(largest);
    to[0] = weighted(of_g, of_u, k, [](float v) { return v; });
    to[1] = weighted(of_g, of_u, k, [](float v) { return from_bits(bits_of(v) & kExponent); });
    to[2] = weighted(of_g, of_u, k, [](float) { return 1.0f; }) * size * size;
    for (int32_t f = 0; f < count; ++f) to[kMagnitudes + f] = error(of_g, of_u, k, formats[f], largest);
  }
}

}  // namespace

extern "C" {
void sums_f32(const float* g, const float* u, int64_t rows, int64_t k, const void* formats, int32_t count, float* out) {
  sums(g, u, rows, k, static_cast<const Format*>(formats), count, out);
}
void sums_bf16(const uint16_t* g, const uint16_t* u, int64_t rows, int64_t k, const void* formats, int32_t count, float* out) {
  sums(g, u, rows, k, static_cast<const Format*>(formats), count, out);
}
}
