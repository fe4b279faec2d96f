// Activations as int8, and what is common to the instruction sets that multiply them with mxfp4 weights.
#pragma once

#include <cstring>

#include "product_parts.hpp"

namespace tenfold::TENFOLD_ISA {
namespace {

// 64 activations, two blocks side by side: bytes of even columns, then of odd ones, as the nibbles of a weight lie.
struct Pair {
    int8_t even[32], odd[32];
    float scale[8];         // half the scale of either block, in four lanes each
    int32_t correction[8];  // -12 times the sum of either block's bytes, in its first kCorrectedLanes lanes
};

#ifdef __AVX512VNNI__
constexpr int kCorrectedLanes = 1;  // of the four that are summed
#else
constexpr int kCorrectedLanes = 4;
#endif

constexpr int64_t kPairs = 16;  // of a panel, 2 KiB per row

int64_t num_pairs(int64_t in) { return (in + 63) / 64; }

int64_t panel_width(int64_t in, int64_t pair) { return smaller(kPairs, num_pairs(in) - pair); }

const Pair* pair_row(const Product& p, int64_t pair, int64_t i) {
    const Pair* panels = reinterpret_cast<const Pair*>(p.panels);
    return panels + p.panel_rows * pair + (p.first_row + i) * panel_width(p.weight.in, pair);
}

// The blocks of 32 of one panel.
inline int64_t blocks_of(int64_t in, int64_t pair) { return smaller(2 * kPairs, in / 32 - 2 * pair); }

#ifdef __AVX2__

// Eight e8m0 bytes as numbers; 0 is subnormal and 255 is NaN, which shifting alone would both miss.
inline __m256 powers_of(const uint8_t* codes) {
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    const __m256i number = _mm256_max_epu32(_mm256_slli_epi32(wide, 23), _mm256_set1_epi32(0x00400000));
    return _mm256_castsi256_ps(_mm256_or_si256(number, _mm256_cmpeq_epi32(wide, _mm256_set1_epi32(255))));
}

#endif

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
