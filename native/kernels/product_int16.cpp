// Fp8 weights times activations rounded to whole numbers, one scale per 128: within 2e-4, a hundredth of what the
// official inference's own rounding takes. The build for AMX takes two bf16 numbers for each (product_split_amx.hpp).
//
// 32 times a weight is a whole number of 15 bits, but for codes below a quarter, which are rounded to one. The products
// of a block of 128 columns are summed in 32 bits without overflow, so exactly and in any order; its sum takes both
// scales and is added to those before it in float32, panel by panel.
#include "product_int16.hpp"

#ifndef __AMX_BF16__

#ifdef __AVX2__
#include "product_int16_lanes.hpp"
#endif

namespace tenfold::TENFOLD_ISA {
namespace {

#ifndef __AVX2__

float round_block(const float* x, int64_t count, int16_t* to) {
    float largest = 0, mean = 0;
    for (int64_t i = 0; i < count; ++i) {
        const float size = __builtin_fabsf(x[i]);
        largest = size > largest ? size : largest;
        mean += size * (1.0F / kBlock);
    }
    const Step step = step_of(largest, mean, kMostMean);
    for (int64_t i = 0; i < count; ++i) {
        to[i] = step.inverse > 0 ? static_cast<int16_t>(__builtin_nearbyintf(x[i] * step.inverse)) : int16_t{0};
    }
    return step.scale / kWeightUnits;
}

// 32 times an e4m3 number, halves rounded up; subnormal codes are less.
int32_t whole(uint8_t code) {
    const int32_t exponent = code >> 3 & 15, size = (8 + (code & 7)) << 11;
    if (exponent == 0) return 0;
    return ((code & 0x80 ? -size : size) * (1 << (exponent - 1)) + (1 << 14)) >> 15;
}

bool has_nan(const uint8_t* codes, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        if ((codes[i] & 0x7F) == 0x7F) return true;
    }
    return false;
}

// Columns [first, last), at most a panel, of one weight row and one activation row.
template <class Scale>
float dot_panel(const Fp8Row<Scale>& row, const uint8_t* x, int64_t width, int64_t first, int64_t last) {
    float sum = 0;
    for (int64_t k = first; k < last; k += kBlock) {
        int32_t exact = 0;
        for (int64_t j = k; j < smaller(k + kBlock, last); ++j) {
            int16_t number;
            std::memcpy(&number, x + 2 * (j - first), sizeof(number));
            exact += whole(row.codes[j]) * number;
        }
        sum += static_cast<float>(exact) * scale_at(x + 2 * width, (k - first) / kBlock) * row.scale_at(k);
    }
    return sum;
}

template <class Scale>
void multiply_rows(const Product& p, int64_t first, int64_t last) {
    const int64_t in = p.weight.in;
    for (int64_t r = first; r < last; ++r) {
        const Fp8Row<Scale> row(p.weight, r);
        for (int64_t k = 0; k < in; k += kPanel) {
            const int64_t stop = smaller(k + kPanel, in);
            const bool is_nan = has_nan(row.codes + k, stop - k);
            for (int64_t i = 0; i < p.count; ++i) {
                const float sum = dot_panel(row, packed_row(p, k, i), panel_columns(in, k), k, stop);
                float* const y = y_row(p, i, r);
                *y = is_nan ? __builtin_nanf("") : p.add || k > 0 ? *y + sum : sum;
            }
        }
    }
}

#endif

}  // namespace

void pack_row_int16(const float* x, int64_t in, void* panels, int64_t panel_rows, int64_t row) {
    for (int64_t k = 0; k < in; k += kPanel) {
        uint8_t* const to = static_cast<uint8_t*>(panels) + packed_offset(in, panel_rows, k, row);
        const int64_t width = panel_columns(in, k);
        for (int64_t at = 0; at < width; at += kBlock) {
            const int64_t columns = smaller(kBlock, width - at), given = smaller(columns, in - k - at);
            float block[kBlock] = {};
            std::memcpy(block, x + k + at, static_cast<uint64_t>(given) * sizeof(float));
            int16_t numbers[kBlock];
            const float scale = round_block(block, columns, numbers);
            std::memcpy(to + 2 * at, numbers, static_cast<uint64_t>(columns) * sizeof(int16_t));
            std::memcpy(to + 2 * width + at / kBlock * 4, &scale, sizeof(scale));
        }
    }
}

void multiply_int16(const Product& p, int64_t first, int64_t last) {
    if (p.weight.format == Format::fp8_rounded) return multiply_rows<uint8_t>(p, first, last);
    multiply_rows<float>(p, first, last);
}

}  // namespace tenfold::TENFOLD_ISA

#endif
