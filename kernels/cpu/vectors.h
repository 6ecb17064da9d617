// Vectors of floats, as wide as those of the CPU, and the tensors from which they are loaded.

#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include <ATen/core/Tensor.h>

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int LANES = BYTES / sizeof(float);

typedef float Vec __attribute__((vector_size(BYTES)));
typedef int32_t Lanes __attribute__((vector_size(BYTES)));

// T is Vec or float. memcpy, because floats need not be aligned to vectors.
template <typename T>
inline T load(const float* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

template <typename T>
inline void store(float* p, T value) {
  std::memcpy(p, &value, sizeof(T));
}

// Adds neighbours at distance S: those of a in lanes without bit S, those of b in the others.
template <int S, int... I>
inline Vec fold(Vec a, Vec b, std::integer_sequence<int, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, (I & S ? I + LANES - S : I)...) + __builtin_shufflevector(a, b, (I & S ? I + LANES : I + S)...);
#else
  return __builtin_shuffle(a, b, Lanes{(I & S ? I + LANES - S : I)...}) + __builtin_shuffle(a, b, Lanes{(I & S ? I + LANES : I + S)...});
#endif
}

// Returns the sum of v[i] in lane i. Overwrites v.
template <int S = LANES / 2>
inline Vec sums(Vec* v) {
  if constexpr (S == 0) {
    return v[0];
  } else {
    for (int i = 0; i < S; i++) v[i] = fold<S>(v[i], v[i + S], std::make_integer_sequence<int, LANES>());
    return sums<S / 2>(v);
  }
}

// x, whose last dimension is contiguous.
inline at::Tensor rows(const at::Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }
