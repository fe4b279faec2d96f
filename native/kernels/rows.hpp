// Packed rows of a session's memory as the kernels are given them; src/tenfold/ops/cpu_attention.py fills in the
// same fields in the same order.
#pragma once

#include <cstdint>

namespace tenfold {

// tenfold.formats.RowLayout.
struct RowLayout {
    int64_t coded;        // quantised channels
    int64_t plain;        // bf16 channels behind them
    int64_t code_bits;    // 8 = e4m3, 4 = e2m1, 32 = float32 without scales
    int64_t block;        // channels that share a scale
    int64_t scale_bytes;  // 1 = e8m0, 4 = float32
    int64_t plain_offset;
    int64_t scale_offset;
    int64_t row_bytes;
};

// tenfold.ops.Rows: query i sees rows start[i] to stop[i] - 1, or those that index[i] lists until the first -1.
struct Rows {
    const uint8_t* packed;
    int64_t num_rows;
    const int64_t* start;
    const int64_t* stop;
    const int32_t* index;  // [n, columns]
    int64_t columns;       // -1: a range, there is no index
    RowLayout layout;
};

}  // namespace tenfold
