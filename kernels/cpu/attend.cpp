// The attention of one query of each head to the slots of a cache, as described in README.md.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/enum_tag.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "vectors.h"

namespace {

constexpr int SLOTS = 64;           // that are scored at a time: a multiple of LANES
constexpr int WIDTH = 4;            // vectors of a value at a time
constexpr int64_t SHARE = 1 << 15;  // least number of multiplications that are worth a thread
constexpr float NONE = -std::numeric_limits<float>::infinity();

// e^x for x <= 0 with a relative error of 3e-7; 0 below -87. Rounds x / ln 2 to an integer n by adding 1.5 * 2^23, whose low bits hold n.
inline Vec exponential(Vec x) {
  const Vec shift = Vec{} + 12582912.f;
  const Vec shifted = x * 1.44269504f + shift, n = shifted - shift;
  const Vec r = (x - n * .693145752f) - n * 1.42860677e-6f;
  const Vec series = 1.f + r * (1.f + r * (.5f + r * (1.f / 6 + r * (1.f / 24 + r * (1.f / 120 + r * (1.f / 720))))));
  const Lanes power = (Lanes)shifted - (Lanes)shift + 127;
  return (Vec)((Lanes)(series * (Vec)(power << 23)) & (x >= -87.f));
}

// a b + c, rounded once: compilers round products of floats in some iterations of a loop, but not in others.
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline Vec fused(float a, Vec b, Vec c) { return a * b + c; }

// The dot products of q [D] with N rows of k, in the first N lanes. Each is summed in the same order for every N.
template <int N>
inline Vec dots(const float* q, const float* k, int64_t stride, int64_t D) {
  Vec each[LANES] = {};
  int64_t d = 0;
  for (; d + LANES <= D; d += LANES) {
    const Vec part = load<Vec>(q + d);
    for (int s = 0; s < N; s++) each[s] += part * load<Vec>(k + s * stride + d);
  }
  Vec total = sums(each);
  for (; d < D; d++)
    for (int s = 0; s < N; s++) total[s] = fused(q[d], k[s * stride + d], total[s]);
  return total;
}

// o = before o + sum over n slots of p[s] v[s], for the part of the value that W vectors of type T hold.
template <typename T, int W>
inline void add(const float* p, const float* v, int64_t stride, int64_t n, float before, float* o) {
  constexpr int64_t SIZE = sizeof(T) / sizeof(float);
  T sum[W];
  for (int i = 0; i < W; i++) sum[i] = before * load<T>(o + i * SIZE);
  for (int64_t s = 0; s < n; s++)
    for (int i = 0; i < W; i++) sum[i] = fused(p[s], load<T>(v + s * stride + i * SIZE), sum[i]);
  for (int i = 0; i < W; i++) store<T>(o + i * SIZE, sum[i]);
}

// The largest score so far, and the sum of exp(score - largest).
struct Softmax {
  float largest = NONE, sum = 0;
};

// Attends from q [D] to n slots: k [n, D], v [n, V], visible [n]; o [V] is the sum of values so far.
inline void slots(Softmax& softmax, const float* q, const float* k, const float* v, const bool* visible, int64_t n, int64_t k_stride,
                  int64_t v_stride, int64_t D, int64_t V, float scale, float* o) {
  float p[SLOTS];
  int64_t s = 0;
  for (; s + LANES <= n; s += LANES) store<Vec>(p + s, scale * dots<LANES>(q, k + s * k_stride, k_stride, D));
  for (; s < n; s++) p[s] = scale * dots<1>(q, k + s * k_stride, k_stride, D)[0];
  float largest = softmax.largest;
  for (s = 0; s < n; s++) {
    p[s] = visible[s] ? p[s] : NONE;
    largest = std::max(largest, p[s]);
  }
  if (largest == NONE) return;
  std::fill(p + n, p + SLOTS, NONE);
  const float before = std::exp(softmax.largest - largest);
  Vec total{};
  for (s = 0; s < SLOTS; s += LANES) {
    const Vec weights = exponential(load<Vec>(p + s) - largest);
    store<Vec>(p + s, weights);
    total += weights;
  }
  softmax.largest = largest;
  softmax.sum *= before;
  for (int i = 0; i < LANES; i++) softmax.sum += total[i];
  int64_t c = 0;
  for (; c + WIDTH * LANES <= V; c += WIDTH * LANES) add<Vec, WIDTH>(p, v + c, v_stride, n, before, o + c);
  for (; c + LANES <= V; c += LANES) add<Vec, 1>(p, v + c, v_stride, n, before, o + c);
  for (; c < V; c++) add<float, 1>(p, v + c, v_stride, n, before, o + c);
}

at::Tensor attend(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& visible, double scale) {
  const int64_t n = queries.size(0), H = queries.size(1), D = queries.size(2);
  const int64_t G = keys.size(1), S = keys.size(2), V = values.size(3);
  TORCH_CHECK(queries.scalar_type() == at::kFloat && keys.scalar_type() == at::kFloat && values.scalar_type() == at::kFloat,
              "q, k, v: want float");
  TORCH_CHECK(G > 0 && H % G == 0, "k ", keys.sizes(), ": want a number of heads that divides ", H);
  TORCH_CHECK(keys.size(0) == n && keys.size(3) == D && values.size(0) == n && values.size(1) == G && values.size(2) == S, "k ",
              keys.sizes(), ", v ", values.sizes(), ": do not fit q ", queries.sizes());
  TORCH_CHECK(visible.scalar_type() == at::kBool && visible.dim() == 2 && visible.size(0) == n && visible.size(1) == S, "visible ",
              visible.sizes(), " ", visible.dtype(), ": want [", n, ", ", S, "] bool");
  const at::Tensor q = rows(queries), k = rows(keys), v = rows(values), seen = rows(visible);
  at::Tensor result = at::zeros({n, H, V}, q.options());
  float* o = result.mutable_data_ptr<float>();
  const float *pq = q.const_data_ptr<float>(), *pk = k.const_data_ptr<float>(), *pv = v.const_data_ptr<float>();
  const bool* ps = seen.const_data_ptr<bool>();
  at::parallel_for(0, n * G, 1 + SHARE / (S * (D + V) * (H / G) + 1), [&](int64_t begin, int64_t end) {
    std::vector<Softmax> softmax(H / G);
    for (int64_t i = begin; i < end; i++) {
      const int64_t stream = i / G, group = i % G, first = group * (H / G);
      std::fill(softmax.begin(), softmax.end(), Softmax{});
      for (int64_t s = 0; s < S; s += SLOTS) {  // every query reads them while they are in the cache
        const float* ki = pk + stream * k.stride(0) + group * k.stride(1) + s * k.stride(2);
        const float* vi = pv + stream * v.stride(0) + group * v.stride(1) + s * v.stride(2);
        for (int64_t h = 0; h < H / G; h++) {
          const float* qi = pq + stream * q.stride(0) + (first + h) * q.stride(1);
          slots(softmax[h], qi, ki, vi, ps + stream * seen.stride(0) + s, std::min<int64_t>(SLOTS, S - s), k.stride(2), v.stride(2), D, V,
                scale, o + (stream * H + first + h) * V);
        }
      }
      for (int64_t h = 0; h < H / G; h++)
        for (int64_t c = 0; c < V; c++) o[(stream * H + first + h) * V + c] /= softmax[h].sum;
    }
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(zoo, library) {
  // otherwise torch.compile copies the caches, to make them contiguous
  library.def("attend(Tensor q, Tensor k, Tensor v, Tensor visible, float scale) -> Tensor", {at::Tag::flexible_layout});
}
TORCH_LIBRARY_IMPL(zoo, CPU, library) { library.impl("attend", &attend); }
