// Activations as whole numbers of up to 15 bits, and what is common to the builds that multiply them with fp8 weights.
#pragma once

#include "int16.hpp"
#include "product_fp8.hpp"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int64_t kBlock = 128;  // columns under one scale of the activations, as under one of the weights
constexpr int64_t kStep = 32;    // columns that are taken at a time

// Weights become whole numbers up to 32 * 448: a block's products stay within 31 bits while the sizes of its
// activations add up to no more than 149,700, what rounding adds included.
constexpr float kWeightUnits = 32.0F, kMostMean = 149700.0F / kBlock;

// A row of a panel: `width` numbers of 16 bits, then the scales of its blocks.
inline int64_t row_bytes(int64_t width) { return 2 * width + (width + kBlock - 1) / kBlock * 4; }

inline int64_t panel_columns(int64_t in, int64_t k) { return smaller(kPanel, padded(in) - k); }

// Where row `row` of the panel that begins with column k lies.
inline int64_t packed_offset(int64_t in, int64_t panel_rows, int64_t k, int64_t row) {
    return panel_rows * k * static_cast<int64_t>(sizeof(float)) + row * row_bytes(panel_columns(in, k));
}

inline const uint8_t* packed_row(const Product& p, int64_t k, int64_t i) {
    return reinterpret_cast<const uint8_t*>(p.panels) + packed_offset(p.weight.in, p.panel_rows, k, p.first_row + i);
}

inline float scale_at(const uint8_t* scales, int64_t block) {
    float scale;
    std::memcpy(&scale, scales + 4 * block, sizeof(scale));
    return scale;
}

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
