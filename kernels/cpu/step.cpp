// One token of a recurrence over a state, as described in README.md.

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "vectors.h"

namespace {

constexpr int WIDTH = 4;            // vectors of a row of S at a time
constexpr int64_t SHARE = 1 << 15;  // least number of elements of S that are worth a thread

// The columns of one head that W vectors of type T hold: S [K, stride]; decay [K], or [1] if `by_channel` is 0; beta may be null.
template <typename T, int W>
inline void columns(float* S, const float* q, const float* k, const float* v, const float* decay, int64_t by_channel, const float* beta,
                    float scale, float* o, int64_t K, int64_t stride) {
  constexpr int64_t SIZE = sizeof(T) / sizeof(float);
  T u[W], sum[W] = {};
  for (int i = 0; i < W; i++) u[i] = load<T>(v + i * SIZE);
  if (beta) {
    for (int64_t row = 0; row < K; row++) {
      const float* s = S + row * stride;
      const float weight = decay[row * by_channel] * k[row];
      for (int i = 0; i < W; i++) sum[i] += weight * load<T>(s + i * SIZE);
    }
    for (int i = 0; i < W; i++) u[i] = *beta * (u[i] - sum[i]), sum[i] = T{};
  }
  for (int64_t row = 0; row < K; row++) {
    float* s = S + row * stride;
    for (int i = 0; i < W; i++) {
      const T written = decay[row * by_channel] * load<T>(s + i * SIZE) + k[row] * u[i];
      store<T>(s + i * SIZE, written);
      sum[i] += q[row] * written;
    }
  }
  for (int i = 0; i < W; i++) store<T>(o + i * SIZE, scale * sum[i]);
}

using Shape = std::vector<int64_t>;

void check(const char* name, const at::Tensor& x, const Shape& shape) {
  TORCH_CHECK(x.sizes() == shape && x.scalar_type() == at::kFloat, name, " ", x.sizes(), " ", x.dtype(), ": want ", shape, " float");
}

at::Tensor step_(at::Tensor& state, const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& decays,
                 const std::optional<at::Tensor>& betas, double scale) {
  const int64_t n = state.size(0), H = state.size(1), K = state.size(2), V = state.size(3), G = keys.size(1);
  const bool by_channel = decays.dim() == 3;
  const at::Tensor q = rows(queries), k = rows(keys), v = rows(values), decay = decays.contiguous();
  const at::Tensor beta = betas ? betas->contiguous() : at::Tensor();
  const Shape shared{n, G, K}, rates = by_channel ? Shape{n, H, K} : Shape{n, H};
  TORCH_CHECK(state.is_contiguous(), "state: want contiguous memory");
  TORCH_CHECK(G > 0 && H % G == 0, "k ", k.sizes(), ": want a number of heads that divides ", H);
  check("q", q, shared);
  check("k", k, shared);
  check("v", v, {n, H, V});
  check("decay", decay, rates);
  if (betas) check("beta", beta, {n, H});
  at::Tensor result = at::empty({n, H, V}, v.options());
  float* S = state.mutable_data_ptr<float>();
  float* o = result.mutable_data_ptr<float>();
  const float *pq = q.const_data_ptr<float>(), *pk = k.const_data_ptr<float>(), *pv = v.const_data_ptr<float>();
  const float *pd = decay.const_data_ptr<float>(), *pb = betas ? beta.const_data_ptr<float>() : nullptr;
  at::parallel_for(0, n * H, 1 + SHARE / (K * V + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t stream = i / H, head = i % H, group = head / (H / G);
      float* Si = S + i * K * V;
      const float *qi = pq + stream * q.stride(0) + group * q.stride(1), *ki = pk + stream * k.stride(0) + group * k.stride(1);
      const float *vi = pv + stream * v.stride(0) + head * v.stride(1), *di = pd + i * (by_channel ? K : 1);
      const float* bi = pb ? pb + i : nullptr;
      float* oi = o + i * V;
      const auto run = [&](auto part, int64_t c) { part(Si + c, qi, ki, vi + c, di, by_channel, bi, scale, oi + c, K, V); };
      int64_t c = 0;
      for (; c + WIDTH * LANES <= V; c += WIDTH * LANES) run(columns<Vec, WIDTH>, c);
      for (; c + LANES <= V; c += LANES) run(columns<Vec, 1>, c);
      for (; c < V; c++) run(columns<float, 1>, c);
    }
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(zoo, library) {
  library.def("step_(Tensor(a!) state, Tensor q, Tensor k, Tensor v, Tensor decay, Tensor? beta, float scale) -> Tensor");
}
TORCH_LIBRARY_IMPL(zoo, CPU, library) { library.impl("step_", &step_); }
