// What the rounding of a tensor does to a loss whose gradient is known: sums of squared gradients, each times a squared
// magnitude, of all formats in one sweep over rows that stay in cache. Called through ctypes (errors.py).
#include "grid.h"

namespace {

constexpr int64_t kFew = 16384;  // elements that one thread sums sooner than two
constexpr int32_t kMagnitudes = 3;
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
inline float scaled_error(const T* g, const T* u, int64_t k, const Format& f, uint32_t largest, float share) {
  const Grid<kInt> grid(f);
  const int64_t block = f.block > 0 ? f.block : k;
  float sum = 0.0f;
  for (int64_t at = 0; at < k; at += block) {
    const int64_t count = k - at < block ? k - at : block;
    const float scale = grid.scale(f.block > 0 ? largest_bits(u + at, count) : largest, share, 1.0f);
    // the compiler may leave out the rounding of this product: 2^-24 of v at most, where errors are 2^-10 of it
    sum += weighted(g + at, u + at, count, [=](float v) { return kept_as(u, grid.saturated(v / scale) * scale) - v; });
  }
  return sum;
}

template <typename T>
inline float error(const T* g, const T* u, int64_t k, const Format& f, uint32_t largest, float share) {
  switch (f.kind) {
    case kInteger:
      return scaled_error<true>(g, u, k, f, largest, share);
    case kScaled:
      return scaled_error<false>(g, u, k, f, largest, share);
    case kUnscaled: {
      const Grid<false> grid(f);
      return weighted(g, u, k, [=](float v) { return kept_as(u, grid.overflowing(v)) - v; });
    }
    default:
      return weighted(g, u, k, [](float v) { return to_float(static_cast<uint16_t>(to_bf16(v))) - v; });
  }
}

// g, u (rows, k) -> sums (rows, 3 + count), `shares` of the formats' tensors: of g² times u², the squared binade, the row's largest u², each format's error²
template <typename T>
void sums(const T* g, const T* u, int64_t rows, int64_t k, const Format* formats, const float* shares, int32_t count,
          float* out) {
#pragma omp parallel for if (rows * k > kFew) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const T *of_g = g + r * k, *of_u = u + r * k;
    float* to = out + r * (kMagnitudes + count);
    const uint32_t largest = largest_bits(of_u, k);
    const float size = from_bits(largest);
    to[0] = weighted(of_g, of_u, k, [](float v) { return v; });
    to[1] = weighted(of_g, of_u, k, [](float v) { return from_bits(bits_of(v) & kExponent); });
    to[2] = weighted(of_g, of_u, k, [](float) { return 1.0f; }) * size * size;
    for (int32_t f = 0; f < count; ++f) to[kMagnitudes + f] = error(of_g, of_u, k, formats[f], largest, shares[f]);
  }
}

}  // namespace

extern "C" {
void sums_f32(const float* g, const float* u, int64_t rows, int64_t k, const Format* formats, const float* shares, int32_t count,
              float* out) {
  sums(g, u, rows, k, formats, shares, count, out);
}
void sums_bf16(const uint16_t* g, const uint16_t* u, int64_t rows, int64_t k, const Format* formats, const float* shares, int32_t count,
              float* out) {
  sums(g, u, rows, k, formats, shares, count, out);
}
}
