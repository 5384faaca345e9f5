// What the rounding of a tensor does to a loss whose gradient is known: sums of gradients times magnitudes, and of their squares,
// of all formats in one sweep over rows that stay in cache. Called through ctypes (errors.py).
#include "grid.h"

namespace {

constexpr int64_t kFew = 16384;  // elements that one thread sums sooner than two
constexpr int32_t kMagnitudes = 3;
inline float kept_as(const float*, float x) { return x; }  // what a tensor of this type holds of x
inline float kept_as(const uint16_t*, float x) { return to_float(static_cast<uint16_t>(to_bf16(x))); }

struct Sums {
  float squares, signed_;
};

template <typename T, typename Of>
inline Sums weighted(const T* g, const T* u, int64_t k, Of of) {
  float squares = 0.0f, signed_ = 0.0f;
#pragma omp simd reduction(+ : squares, signed_)
  for (int64_t i = 0; i < k; ++i) {
    const float moved = to_float(g[i]) * of(to_float(u[i]));
    squares += moved * moved;
    signed_ += moved;
  }
  return {squares, signed_};
}

template <bool kInt, typename T>
inline Sums scaled_error(const T* g, const T* u, int64_t k, const Format& f, uint32_t largest, float share) {
  const Grid<kInt> grid(f);
  const int64_t block = f.block > 0 ? f.block : k;
  Sums sum = {0.0f, 0.0f};
  for (int64_t at = 0; at < k; at += block) {
    const int64_t count = k - at < block ? k - at : block;
    const float scale = grid.scale(f.block > 0 ? largest_bits(u + at, count) : largest, share, 1.0f);
    // the compiler may leave out the rounding of this product: 2^-24 of v at most, where errors are 2^-10 of it
    const Sums of_block =
        weighted(g + at, u + at, count, [=](float v) { return kept_as(u, grid.saturated(v / scale) * scale) - v; });
    sum.squares += of_block.squares;
    sum.signed_ += of_block.signed_;
  }
  return sum;
}

template <typename T>
inline Sums error(const T* g, const T* u, int64_t k, const Format& f, uint32_t largest, float share) {
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

// g, u (rows, k) -> sums (rows, 2, 3 + count), `shares` of the formats' tensors: first of the squares of g times u, the binade, the
// row's largest |u|, each format's error; then of g times u, nothing, nothing, each format's error
template <typename T>
void sums(const T* g, const T* u, int64_t rows, int64_t k, const Format* formats, const float* shares, int32_t count,
          float* out) {
#pragma omp parallel for if (rows * k > kFew) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const T *of_g = g + r * k, *of_u = u + r * k;
    float *to = out + r * 2 * (kMagnitudes + count), *with_sign = to + kMagnitudes + count;
    const uint32_t largest = largest_bits(of_u, k);
    const float size = from_bits(largest);
    const auto put = [=](int32_t at, Sums sum) { to[at] = sum.squares, with_sign[at] = sum.signed_; };
    put(0, weighted(of_g, of_u, k, [](float v) { return v; }));
    put(1, {weighted(of_g, of_u, k, [](float v) { return from_bits(bits_of(v) & kExponent); }).squares, 0.0f});
    put(2, {weighted(of_g, of_u, k, [](float) { return 1.0f; }).squares * size * size, 0.0f});
    for (int32_t f = 0; f < count; ++f) put(kMagnitudes + f, error(of_g, of_u, k, formats[f], largest, shares[f]));
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
