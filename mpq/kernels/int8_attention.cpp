// Attention's two products in INT8, and the whole attention with both, on VNNI instructions (u8 x s8 sums of four into s32).
// Called through ctypes. Scales: a row of Q, K and P each, a column of V, as kernels/emulated.py rounds them.
//
// The second operand of a product is packed into tiles of 16 columns by 4 steps of the sum, so that one instruction adds
// 4 steps of 16 columns: packed[tile][step / 4][column][step % 4]. The first operand's 4 codes are broadcast. Codes of Q are
// unsigned with zero point 128, hence the term 128 * sum of the column's codes; P is not negative and needs none.
#include <vector>

#include <immintrin.h>
#include <omp.h>

#include "codes.h"

namespace {

constexpr int kTile = 16;                 // columns of a tile: 16 sums of 32 bits fill a register
constexpr int kRows = 6, kTiles = 4;      // sums held in registers at once: 6 rows by 4 tiles of 32 registers
constexpr int kBlock = 48;                // query rows whose scores stay in the cache

// The second operand of a product: n columns, summed over k steps.
struct Packed {
  int64_t k4 = 0, tiles = 0;
  std::vector<int8_t> codes;
  std::vector<float> scale;   // of each column
  std::vector<int32_t> sums;  // 128 * the sum of each column's codes

  void size(int64_t n, int64_t k) {
    k4 = up(k, 4) / 4;
    tiles = up(n, kTile) / kTile;
    codes.assign(tiles * k4 * kTile * 4, 0);
    scale.assign(tiles * kTile, 1.0f);
    sums.assign(tiles * kTile, 0);
  }

  // columns that are contiguous: the rows of K
  template <typename T>
  void pack_columns(const T* b, int64_t n, int64_t k, int64_t column_stride) {
    size(n, k);
    std::vector<int8_t> column(k4 * 4, 0);
    for (int64_t c = 0; c < n; ++c) {
      scale[c] = quantize_row(b + c * column_stride, k, 0, column.data());
      int8_t* out = codes.data() + (c / kTile) * k4 * kTile * 4 + (c % kTile) * 4;
      int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < k; ++i) sum += column[i];
      sums[c] = 128 * sum;
      for (int64_t i = 0; i < k4; ++i) std::memcpy(out + i * kTile * 4, column.data() + i * 4, 4);
    }
  }

  // steps that are contiguous: the rows of V
  template <typename T>
  void pack_steps(const T* b, int64_t n, int64_t k, int64_t step_stride) {
    size(n, k);
    const int64_t width = tiles * kTile;
    std::vector<float> largest(width, 0.0f);
    for (int64_t i = 0; i < k; ++i) {
      const T* row = b + i * step_stride;
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) {
        const float size = std::fabs(to_float(row[c]));
        largest[c] = size > largest[c] ? size : largest[c];
      }
    }
    for (int64_t c = 0; c < n; ++c) scale[c] = step_of(largest[c]);
    std::vector<int8_t> four(4 * width);
    for (int64_t i = 0; i < k4; ++i) {
      std::memset(four.data(), 0, four.size());
      for (int64_t j = 0; j < 4 && i * 4 + j < k; ++j) {
        const T* row = b + (i * 4 + j) * step_stride;
        int8_t* to = four.data() + j * width;
#pragma omp simd
        for (int64_t c = 0; c < n; ++c) {
          const int32_t code = code_of(to_float(row[c]), scale[c]);
          to[c] = static_cast<int8_t>(code);
          sums[c] += 128 * code;
        }
      }
      for (int64_t t = 0; t < tiles; ++t) interleave(four.data() + t * kTile, width, codes.data() + (t * k4 + i) * kTile * 4);
    }
  }

  // 4 rows of 16 bytes -> 16 columns of 4
  static void interleave(const int8_t* rows, int64_t stride, int8_t* out) {
    const auto load = [&](int j) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + j * stride)); };
    const __m128i r0 = load(0), r1 = load(1), r2 = load(2), r3 = load(3);
    const __m128i a = _mm_unpacklo_epi8(r0, r1), b = _mm_unpackhi_epi8(r0, r1);
    const __m128i c = _mm_unpacklo_epi8(r2, r3), d = _mm_unpackhi_epi8(r2, r3);
    __m128i* to = reinterpret_cast<__m128i*>(out);
    _mm_storeu_si128(to, _mm_unpacklo_epi16(a, c));
    _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(a, c));
    _mm_storeu_si128(to + 2, _mm_unpacklo_epi16(b, d));
    _mm_storeu_si128(to + 3, _mm_unpackhi_epi16(b, d));
  }
};

// sums (rows, tiles * 16) of a (rows, 4 * k4) u8 and `tiles` tiles of b, of which the sum starts at `b`
template <int R, int N>
inline void multiply(const uint8_t* a, int64_t a_stride, const int8_t* b, int64_t tile_stride, int64_t k4, int32_t* out,
                     int64_t out_stride) {
  __m512i acc[R][N];
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < N; ++t) acc[r][t] = _mm512_setzero_si512();
  for (int64_t i = 0; i < k4; ++i) {
    __m512i column[N];
    for (int t = 0; t < N; ++t) column[t] = _mm512_loadu_si512(b + t * tile_stride + i * kTile * 4);
    for (int r = 0; r < R; ++r) {
      int32_t four;
      std::memcpy(&four, a + r * a_stride + i * 4, 4);
      const __m512i row = _mm512_set1_epi32(four);
      for (int t = 0; t < N; ++t) acc[r][t] = _mm512_dpbusd_epi32(acc[r][t], row, column[t]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < N; ++t) _mm512_storeu_si512(out + r * out_stride + t * kTile, acc[r][t]);
}

template <int N>
inline void multiply_rows(int rows, const uint8_t* a, int64_t a_stride, const int8_t* b, int64_t tile_stride, int64_t k4,
                          int32_t* out, int64_t out_stride) {
  for (; rows >= kRows; rows -= kRows, a += kRows * a_stride, out += kRows * out_stride)
    multiply<kRows, N>(a, a_stride, b, tile_stride, k4, out, out_stride);
  for (; rows > 0; --rows, a += a_stride, out += out_stride) multiply<1, N>(a, a_stride, b, tile_stride, k4, out, out_stride);
}

// a (rows, 4 * k4) x the first `tiles` tiles of b -> out (rows, 16 * tiles), over the first k4 steps of four
void product(int rows, const uint8_t* a, int64_t a_stride, const Packed& b, int64_t tiles, int64_t k4, int32_t* out,
             int64_t out_stride) {
  const int64_t tile_stride = b.k4 * kTile * 4;
  int64_t t = 0;
  for (; t + kTiles <= tiles; t += kTiles)
    multiply_rows<kTiles>(rows, a, a_stride, b.codes.data() + t * tile_stride, tile_stride, k4, out + t * kTile, out_stride);
  for (; t < tiles; ++t)
    multiply_rows<1>(rows, a, a_stride, b.codes.data() + t * tile_stride, tile_stride, k4, out + t * kTile, out_stride);
}

// exp(x) for x <= 0, to 2e-7 of its value: 2^n * exp(f), both from x * log2(e)
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float t = x * 1.44269504f, n = std::nearbyint(t);
  const float f = (t - n) * 0.693147181f;
  float p = 1.0f / 720.0f;
  p = p * f + 1.0f / 120.0f;
  p = p * f + 1.0f / 24.0f;
  p = p * f + 1.0f / 6.0f;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

}  // namespace

// a (count, t, k) x b (count, k, n) -> y (count, t, n), operands rounded to INT8: a row of a, a column of b one scale each.
// a and y are contiguous; b is contiguous along its steps or its columns, strides in elements; the codes of a are unsigned with zero point 128.
template <typename T>
void bgemm(const T* a, const T* b, int64_t count, int64_t t, int64_t k, int64_t n, int64_t b_batch, int64_t b_step,
           int64_t b_column, T* y) {
#pragma omp parallel
  {
    Packed packed;
    std::vector<uint8_t> codes(kBlock * up(k, 4));
    std::vector<int32_t> sums(kBlock * up(n, kTile));
    float scale[kBlock];
#pragma omp for schedule(dynamic)
    for (int64_t m = 0; m < count; ++m) {
      if (b_step == 1)
        packed.pack_columns(b + m * b_batch, n, k, b_column);
      else
        packed.pack_steps(b + m * b_batch, n, k, b_step);
      const int64_t width = packed.tiles * kTile, padded = packed.k4 * 4;
      for (int64_t start = 0; start < t; start += kBlock) {
        const int rows = static_cast<int>(t - start < kBlock ? t - start : kBlock);
        for (int r = 0; r < rows; ++r) scale[r] = quantize_row(a + (m * t + start + r) * k, k, 128, codes.data() + r * padded);
        product(rows, codes.data(), padded, packed, packed.tiles, packed.k4, sums.data(), width);
        for (int r = 0; r < rows; ++r) {
          T* out = y + (m * t + start + r) * n;
          const int32_t* sum = sums.data() + r * width;
#pragma omp simd
          for (int64_t c = 0; c < n; ++c)
            store(out + c, static_cast<float>(sum[c] - packed.sums[c]) * scale[r] * packed.scale[c]);
        }
      }
    }
  }
}

struct Strides {
  int64_t batch, head, row;
};

// query (b, h, t, d), key and value (b, kv, s, d | dv) -> y (b, t, h, dv). The last dimension is contiguous everywhere.
// mask: additive FP32 by its strides (batch, head, row, 1), or null; causal: row i attends to columns 0..i.
template <typename T>
void attention(const T* query, const T* key, const T* value, const float* mask, T* y, int64_t batch, int64_t heads, int64_t kv,
               int64_t t, int64_t s, int64_t d, int64_t dv, Strides q, Strides k, Strides v, Strides m, int64_t causal,
               float scaling) {
  std::vector<Packed> keys(batch * kv), values(batch * kv);
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < batch * kv; ++i) {
      keys[i].pack_columns(key + (i / kv) * k.batch + (i % kv) * k.head, s, d, k.row);
      values[i].pack_steps(value + (i / kv) * v.batch + (i % kv) * v.head, dv, s, v.row);
    }
    const int64_t width = up(s, kTile), padded = up(d, 4), out_width = up(dv, kTile), blocks = (t + kBlock - 1) / kBlock;
    std::vector<uint8_t> codes(kBlock * padded), p(kBlock * width);
    std::vector<int32_t> sums(kBlock * width), out(kBlock * out_width);
    std::vector<float> score(width);
    float scale[kBlock], weight[kBlock];
#pragma omp for schedule(dynamic) collapse(2)
    for (int64_t bh = 0; bh < batch * heads; ++bh) {
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t b = bh / heads, h = bh % heads, i = b * kv + h / (heads / kv), start = block * kBlock;
        const int rows = static_cast<int>(t - start < kBlock ? t - start : kBlock);
        const Packed &ks = keys[i], &vs = values[i];
        for (int r = 0; r < rows; ++r)
          scale[r] = quantize_row(query + b * q.batch + h * q.head + (start + r) * q.row, d, 128, codes.data() + r * padded);
        const int64_t seen = causal && start + rows < s ? start + rows : s;  // columns that some row of the block sees
        const int64_t tiles = up(seen, kTile) / kTile;
        product(rows, codes.data(), padded, ks, tiles, ks.k4, sums.data(), width);
        for (int r = 0; r < rows; ++r) {
          const int64_t until = causal && start + r + 1 < s ? start + r + 1 : s;
          const int32_t* sum = sums.data() + r * width;
          const float* added = mask ? mask + b * m.batch + h * m.head + (start + r) * m.row : nullptr;
          const float factor = scale[r] * scaling;
          float largest = -INFINITY, total = 0.0f;
#pragma omp simd
          for (int64_t c = 0; c < until; ++c) score[c] = static_cast<float>(sum[c] - ks.sums[c]) * factor * ks.scale[c];
          if (added)
#pragma omp simd
            for (int64_t c = 0; c < until; ++c) score[c] += added[c];
#pragma omp simd reduction(max : largest)
          for (int64_t c = 0; c < until; ++c) largest = score[c] > largest ? score[c] : largest;
          largest = largest > -INFINITY ? largest : 0.0f;
          uint8_t* row = p.data() + r * width;
#pragma omp simd reduction(+ : total)
          for (int64_t c = 0; c < until; ++c) {
            const float e = exponential(score[c] - largest);
            total += e;
            row[c] = static_cast<uint8_t>(e * 127.0f + 0.5f);  // the largest of a row is e = 1, its scale 1 / (127 * total)
          }
          std::memset(row + until, 0, tiles * kTile - until);
          weight[r] = 1.0f / (127.0f * total);
        }
        product(rows, p.data(), width, vs, vs.tiles, up(seen, 4) / 4, out.data(), out_width);
        for (int r = 0; r < rows; ++r) {
          T* to = y + ((b * t + start + r) * heads + h) * dv;
          const int32_t* sum = out.data() + r * out_width;
#pragma omp simd
          for (int64_t c = 0; c < dv; ++c) store(to + c, static_cast<float>(sum[c]) * weight[r] * vs.scale[c]);
        }
      }
    }
  }
}

extern "C" {
void bgemm_f32(const float* a, const float* b, int64_t count, int64_t t, int64_t k, int64_t n, int64_t b_batch, int64_t b_step,
               int64_t b_column, float* y) {
  bgemm(a, b, count, t, k, n, b_batch, b_step, b_column, y);
}
void bgemm_bf16(const uint16_t* a, const uint16_t* b, int64_t count, int64_t t, int64_t k, int64_t n, int64_t b_batch,
                int64_t b_step, int64_t b_column, uint16_t* y) {
  bgemm(a, b, count, t, k, n, b_batch, b_step, b_column, y);
}
void attention_f32(const float* query, const float* key, const float* value, const float* mask, float* y, const int64_t* sizes,
                   const int64_t* strides, int64_t causal, float scaling) {
  const Strides* by = reinterpret_cast<const Strides*>(strides);
  attention(query, key, value, mask, y, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], by[0], by[1], by[2],
            by[3], causal, scaling);
}
void attention_bf16(const uint16_t* query, const uint16_t* key, const uint16_t* value, const float* mask, uint16_t* y,
                    const int64_t* sizes, const int64_t* strides, int64_t causal, float scaling) {
  const Strides* by = reinterpret_cast<const Strides*>(strides);
  attention(query, key, value, mask, y, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], by[0], by[1], by[2],
            by[3], causal, scaling);
}
}
