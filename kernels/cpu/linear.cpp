// The product of a few rows with a weight, as described in README.md.

#include <algorithm>
#include <cstdint>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "vectors.h"

namespace {

constexpr int ROWS = 4, COLS = 4;   // of a tile, whose sums are in 16 registers
constexpr int MOST_ROWS = 32;       // with more, BLAS is faster
constexpr int64_t SHARE = 1 << 17;  // least number of multiplications that are worth a thread

// y[r, c] = sum over k of x[r, k] w[c, k] for R rows and C columns. Meanwhile, loads FETCH rows of `next` into the cache.
template <int R, int C, int FETCH>
inline void tile(const float* x, const float* w, const float* next, float* y, int64_t K, int64_t N) {
  Vec total[ROWS * COLS] = {};
  int64_t k = 0;
  for (; k + LANES <= K; k += LANES) {
    for (int f = 0; f < FETCH; f++) __builtin_prefetch(next + f * K + k);
    Vec column[C];
    for (int c = 0; c < C; c++) column[c] = load<Vec>(w + c * K + k);
    for (int r = 0; r < R; r++) {
      Vec row = load<Vec>(x + r * K + k);
      for (int c = 0; c < C; c++) total[r * COLS + c] += row * column[c];
    }
  }
  Vec result[ROWS * COLS / LANES];
  for (int i = 0; i < ROWS * COLS / LANES; i++) result[i] = sums(total + i * LANES);
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) {
      int place = r * COLS + c;
      float sum = result[place / LANES][place % LANES];
      for (int64_t tail = k; tail < K; tail++) sum += x[r * K + tail] * w[c * K + tail];
      y[r * N + c] = sum;
    }
}

template <int C, int FETCH>
inline void rows(int64_t n, const float* x, const float* w, const float* next, float* y, int64_t K, int64_t N) {
  switch (n) {
    case 1: return tile<1, C, FETCH>(x, w, next, y, K, N);
    case 2: return tile<2, C, FETCH>(x, w, next, y, K, N);
    case 3: return tile<3, C, FETCH>(x, w, next, y, K, N);
    default: return tile<4, C, FETCH>(x, w, next, y, K, N);
  }
}

// C columns of y for n rows of x: tiles share the load of the next columns' weights.
template <int C>
inline void columns(int64_t n, const float* x, const float* w, const float* next, float* y, int64_t K, int64_t N) {
  for (int64_t r = 0; r < n; r += ROWS) {
    int64_t left = std::min<int64_t>(n - r, ROWS);
    if (n <= ROWS) {
      rows<C, C>(left, x, w, next, y, K, N);
    } else if (n <= 2 * ROWS) {
      rows<C, C / 2>(left, x + r * K, w, next + r / ROWS * (C / 2) * K, y + r * N, K, N);
    } else if (r / ROWS < C) {
      rows<C, 1>(left, x + r * K, w, next + r / ROWS * K, y + r * N, K, N);
    } else {
      rows<C, 0>(left, x + r * K, w, next, y + r * N, K, N);
    }
  }
}

at::Tensor linear(const at::Tensor& input, const at::Tensor& weight) {
  const int64_t n = input.size(0), K = weight.size(1), N = weight.size(0);
  const bool floats = input.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat;
  if (!floats || n > MOST_ROWS || n == 0 || input.size(1) != K || !weight.is_contiguous()) return at::linear(input, weight);
  const at::Tensor contiguous = input.contiguous();
  at::Tensor result = at::empty({n, N}, input.options());
  const float *x = contiguous.const_data_ptr<float>(), *w = weight.const_data_ptr<float>();
  float* y = result.mutable_data_ptr<float>();
  const int64_t whole = N / COLS;
  at::parallel_for(0, whole, 1 + SHARE / (COLS * K * n + 1), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * COLS; c < end * COLS; c += COLS) {
      const bool last = c + 2 * COLS > N;
      columns<COLS>(n, x, w + c * K, last ? w : w + (c + COLS) * K, y + c, K, N);
    }
  });
  for (int64_t c = whole * COLS; c < N; c++) columns<1>(n, x, w + c * K, w, y + c, K, N);
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(zoo, library) { library.def("linear(Tensor x, Tensor weight) -> Tensor"); }
TORCH_LIBRARY_IMPL(zoo, CPU, library) { library.impl("linear", &linear); }
