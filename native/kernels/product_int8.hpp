// Activations as int8, and what is common to the instruction sets that multiply them with mxfp4 weights.
#pragma once

#include <cstring>

#include "product_parts.hpp"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int64_t kPairs = 16;  // pairs of blocks of 32 columns in a panel

inline int64_t num_pairs(int64_t in) { return (in + 63) / 64; }

inline int64_t panel_width(int64_t in, int64_t pair) { return smaller(kPairs, num_pairs(in) - pair); }

// The blocks of the panel that begins with `pair`.
inline int64_t blocks_of(int64_t in, int64_t pair) { return smaller(2 * kPairs, in / 32 - 2 * pair); }

// 32 activations: bytes of even columns, then of odd ones, as the nibbles of a weight lie.
struct Rounded {
    int8_t even[16], odd[16];
    float half;   // half the scale: weights are doubled
    int32_t sum;  // of the bytes
};

// The codes and scales of `Rows` weight rows from `row` on, the last one again where fewer are left.
template <int64_t Rows>
struct Group {
    const uint8_t *codes[Rows], *scale[Rows];
    Group(const Matrix& m, int64_t row, int64_t last) {
        for (int64_t r = 0; r < Rows; ++r) {
            const int64_t at = smaller(row + r, last - 1);
            codes[r] = static_cast<const uint8_t*>(m.codes) + at * (m.in / 2);
            scale[r] = static_cast<const uint8_t*>(m.scale) + at * (m.in / 32);
        }
    }
};

#ifdef __AVX2__

// Eight e8m0 bytes as numbers; 0 is subnormal and 255 is NaN, which shifting alone would both miss.
inline __m256 powers_of(__m128i codes) {
    const __m256i wide = _mm256_cvtepu8_epi32(codes);
    const __m256i number = _mm256_max_epu32(_mm256_slli_epi32(wide, 23), _mm256_set1_epi32(0x00400000));
    return _mm256_castsi256_ps(_mm256_or_si256(number, _mm256_cmpeq_epi32(wide, _mm256_set1_epi32(255))));
}

inline __m128i load_eight(const uint8_t* bytes) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)); }

// Eight bytes of a row from `at` on, zeros behind its `count`.
inline __m128i eight_of(const uint8_t* row, int64_t at, int64_t count) {
    if (count - at >= 8) return load_eight(row + at);
    uint8_t rest[8] = {};
    std::memcpy(rest, row + at, static_cast<size_t>(count - at));
    return load_eight(rest);
}

#endif

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
