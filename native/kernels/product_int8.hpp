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

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
