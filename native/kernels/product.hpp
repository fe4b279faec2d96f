// Activations times stored weights: what linear.cpp and experts.cpp are made of.
//
// One order of summation serves every number of rows, so a row's result never depends on the rows computed with it,
// nor on the threads: columns go in panels of `kPanel`; within a panel eight lanes run side by side (scalar: one sum
// in double), are added in a fixed tree, and the panels' sums are added one after another.
#pragma once

#include <cstdint>

namespace tenfold::TENFOLD_ISA {

// As in src/tenfold/ops/cpu_linear.py. mxfp4_rounded is mxfp4, multiplied with activations rounded to int8, or with
// AMX to bf16; the ones behind it are bf16, fp8 and fp8_f32scale, with AMX multiplied with activations in two parts of
// bf16, and without it, but for bf16, with ones rounded to int16.
enum class Format : int32_t { f32, bf16, fp8, fp8_f32scale, mxfp4, mxfp4_rounded, bf16_split, fp8_rounded, fp8_f32scale_rounded };

// A weight as it is stored (spec 3.1), [out, in]; in is a multiple of 32 for mxfp4.
struct Matrix {
    Format format;
    const void* codes;
    const void* scale;
    int64_t out, in;
};

constexpr int64_t kPanel = 512;
constexpr int64_t kQuad = 4;  // weight rows that are multiplied together; threads share work in this unit

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t padded(int64_t in) { return (in + 31) / 32 * 32; }
inline int64_t quads(int64_t rows) { return (rows + kQuad - 1) / kQuad; }

// Writes x [in] as row `row` of panels that hold `panel_rows` rows, in the order in which `format` decodes:
// panel after panel, in each row after row, filled with zeros up to padded(in).
void pack_row(Format format, const float* x, int64_t in, float* panels, int64_t panel_rows, int64_t row);

// Packed rows [first_row, first_row + count) times weight rows; see multiply.
struct Product {
    Matrix weight;
    const float* panels;
    int64_t panel_rows, first_row, count;
    float* y;
    int64_t y_stride;
    const int32_t* y_rows;  // where the i-th result goes; null: to row i
    int64_t first_column;   // the weight row whose products are column 0 of y
    bool add;               // to what y holds
};

// y[y_rows[i], r - first_column] (+)= packed row (first_row + i) . weight row r, for r in [first, last).
void multiply(const Product& product, int64_t first, int64_t last);

// The same for mxfp4_rounded without AMX (product_int8.cpp); the panels take less memory than those of numbers.
void pack_row_int8(const float* x, int64_t in, void* panels, int64_t panel_rows, int64_t row);
void multiply_int8(const Product& product, int64_t first, int64_t last);

// The same for fp8 with rounded activations without AMX (product_int16.cpp).
void pack_row_int16(const float* x, int64_t in, void* panels, int64_t panel_rows, int64_t row);
void multiply_int16(const Product& product, int64_t first, int64_t last);

}  // namespace tenfold::TENFOLD_ISA
