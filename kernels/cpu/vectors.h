// Vectors of floats, as wide as those of the CPU.

#pragma once

#include <cstdint>
#include <cstring>

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
