// What the rounding of a tensor does to a loss whose gradient is known: sums of gradients times magnitudes, and of their squares,
// of all formats in one sweep over rows that stay in cache. Called through ctypes (errors.py).
#include <numeric>
#include <vector>

#include "blocks.h"

namespace {

constexpr int64_t kFew = 16384;  // elements that one thread sums sooner than two
constexpr int32_t kMagnitudes = 3;
inline float kept_as(const float*, float x) { return x; }  // what a tensor of this type holds of x
inline float kept_as(const uint16_t*, float x) { return to_float(static_cast<uint16_t>(to_bf16(x))); }

struct Sums {
  float squares, signed_;
};

// of(v, i) is what element i, which is v, is moved by
template <typename T, typename Of>
inline Sums weighted(const T* g, const T* u, int64_t k, Of of) {
  float squares = 0.0f, signed_ = 0.0f;
#pragma omp simd reduction(+ : squares, signed_)
  for (int64_t i = 0; i < k; ++i) {
    const float moved = to_float(g[i]) * of(to_float(u[i]), i);
    squares += moved * moved;
    signed_ += moved;
  }
  return {squares, signed_};
}

template <bool kInt, typename T>
inline Sums scaled_error(const T* g, const T* u, int64_t k, const Format& f, const float* scale) {
  const Grid<kInt> grid(f);
  Sums sum = {0.0f, 0.0f};
  by_piece(scale, k, f.columns > 0 ? f.columns : k, [&](int64_t first, int64_t count, auto scale_of) {
    // the compiler may leave out the rounding of this product: 2^-24 of v at most, where errors are 2^-10 of it
    const auto error_of = [=](float v, int64_t i) {
      return kept_as(u, grid.saturated(v / scale_of(i)) * scale_of(i)) - v;
    };
    const Sums of_piece = weighted(g + first, u + first, count, error_of);
    sum.squares += of_piece.squares;
    sum.signed_ += of_piece.signed_;
  });
  return sum;
}

template <typename T>
inline Sums error(const T* g, const T* u, int64_t k, const Format& f, const float* scale) {
  switch (f.kind) {
    case kInteger:
      return scaled_error<true>(g, u, k, f, scale);
    case kScaled:
      return scaled_error<false>(g, u, k, f, scale);
    case kUnscaled: {
      const Grid<false> grid(f);
      return weighted(g, u, k, [=](float v, int64_t) { return kept_as(u, grid.overflowing(v)) - v; });
    }
    default:
      return weighted(g, u, k, [](float v, int64_t) { return to_float(static_cast<uint16_t>(to_bf16(v))) - v; });
  }
}

// the scales of the blocks that lie side by side in these rows; `of_row` is the first row's largest
template <typename T>
inline void measure(const T* u, int64_t rows, int64_t k, const Format& f, uint32_t of_row, float share,
                    std::vector<uint32_t>& largest, std::vector<float>& scale) {
  const int64_t wide = f.columns > 0 ? f.columns : k;
  largest.assign(up(k, wide) / wide, 0u);
  scale.resize(largest.size());
  if (rows == 1 && wide >= k) {  // known, whatever the format
    largest[0] = of_row;
  } else {
    for (int64_t r = 0; r < rows; ++r) raise_largest(u + r * k, k, wide, largest.data());
  }
  Grid<false>(f).scales(largest.data(), scale.data(), static_cast<int64_t>(scale.size()), share, 1.0f);
}

// g, u (n, rows, k) -> sums (n * rows, 2, 3 + count), `shares` of the formats' tensors: first of the squares of g times u, the
// binade, the row's largest |u|, each format's error; then of g times u, nothing, nothing, each format's error
template <typename T>
void sums(const T* g, const T* u, int64_t n, int64_t rows, int64_t k, const Format* formats, const float* shares, int32_t count,
          float* out) {
  int64_t high = 1;
  for (int32_t f = 0; f < count; ++f) high = std::lcm(high, formats[f].rows);
  const int64_t strips = up(rows, high) / high;  // of rows that have their blocks to themselves, in every format
#pragma omp parallel if (n * rows * k > kFew)
  {
    std::vector<uint32_t> largest;
    std::vector<std::vector<float>> scales(count);  // of the blocks that a row lies in
#pragma omp for schedule(static)
    for (int64_t s = 0; s < n * strips; ++s) {
      const int64_t above = s % strips * high, below = rows - above < high ? rows : above + high;
      for (int64_t r = above; r < below; ++r) {
        const int64_t row = s / strips * rows + r;
        const T *of_g = g + row * k, *of_u = u + row * k;
        float *to = out + row * 2 * (kMagnitudes + count), *with_sign = to + kMagnitudes + count;
        const uint32_t of_row = largest_bits(of_u, k);
        const float size = from_bits(of_row);
        const auto put = [=](int32_t at, Sums sum) { to[at] = sum.squares, with_sign[at] = sum.signed_; };
        put(0, weighted(of_g, of_u, k, [](float v, int64_t) { return v; }));
        put(1, {weighted(of_g, of_u, k, [](float v, int64_t) { return from_bits(bits_of(v) & kExponent); }).squares, 0.0f});
        put(2, {weighted(of_g, of_u, k, [](float, int64_t) { return 1.0f; }).squares * size * size, 0.0f});
        for (int32_t i = 0; i < count; ++i) {
          const Format& f = formats[i];
          if ((f.kind == kScaled || f.kind == kInteger) && r % f.rows == 0)
            measure(of_u, below - r < f.rows ? below - r : f.rows, k, f, of_row, shares[i], largest, scales[i]);
          put(kMagnitudes + i, error(of_g, of_u, k, f, scales[i].data()));
        }
      }
    }
  }
}

}  // namespace

extern "C" {
void sums_f32(const float* g, const float* u, int64_t n, int64_t rows, int64_t k, const Format* formats, const float* shares,
              int32_t count, float* out) {
  sums(g, u, n, rows, k, formats, shares, count, out);
}
void sums_bf16(const uint16_t* g, const uint16_t* u, int64_t n, int64_t rows, int64_t k, const Format* formats,
               const float* shares, int32_t count, float* out) {
  sums(g, u, n, rows, k, formats, shares, count, out);
}
}
