// Vectors of floats, as wide as those of the CPU.

#pragma once

#include <cstdint>

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int LANES = BYTES / sizeof(float);

typedef float Vec __attribute__((vector_size(BYTES), aligned(sizeof(float)), may_alias));
typedef int32_t Lanes __attribute__((vector_size(BYTES)));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec value) { *reinterpret_cast<Vec*>(p) = value; }
