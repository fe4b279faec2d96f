// What kernels do to one row of numbers, for those that do several things to a row while it is in the cache.
#pragma once

#include <cstdint>

#include "rows.hpp"

namespace tenfold::TENFOLD_ISA {

constexpr int64_t most_pairs = 256;

// out = x / sqrt(mean(x^2) + eps) * weight, without a weight if it is null; out may be x.
void norm_row(const float* x, const float* weight, float* out, int64_t width, float eps);

// cos and sin of a token's angles, each angle rounded to float32 before anything else, as the reference does.
void turn(int64_t position, const float* frequencies, int64_t pairs, float sign, float* cos, float* sin);

// Pairs are (2i, 2i + 1) if interleaved, else (i, i + pairs); out may be x.
void rotate_row(const float* x, const float* cos, const float* sin, int64_t pairs, bool interleaved, float* out);

// One row in place times the orthonormal Sylvester-Hadamard matrix; width is a power of two.
void spread_row(float* x, int64_t width);

// A row's packed form, bit for bit as the reference's.
void encode_row(const float* x, const RowLayout& layout, uint8_t* out);

}  // namespace tenfold::TENFOLD_ISA
