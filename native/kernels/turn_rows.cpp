// What lies between a projection and the attention that uses it: norm, RoPE on the last channels, the Hadamard
// transform and the packed form, each where it is asked for, in one pass over the rows.
#include "decode_row.hpp"
#include "kernels.hpp"
#include "row_parts.hpp"
#include "scratch.hpp"

namespace tenfold::TENFOLD_ISA {
namespace {

struct Call {
    const float *x, *weight;
    const int64_t* positions;
    const float* frequencies;
    const RowLayout* layout;
    void* out;
    int64_t rows, width, pairs;
    float eps;
    int32_t steps;

    bool has(int32_t step) const { return (steps & step) != 0; }

    // `row` has room for a row of numbers, `packed` for a packed one; the first only if numbers are not the result.
    void run(int64_t token, float* row, uint8_t* packed) const {
        float cos[most_pairs], sin[most_pairs];
        turn(positions[token], frequencies, pairs, 1.0F, cos, sin);
        for (int64_t i = token * rows; i < (token + 1) * rows; ++i) {
            float* const to = has(turn_pack) ? row : static_cast<float*>(out) + i * width;
            if (has(turn_norm)) norm_row(x + i * width, weight, to, width, eps);
            else __builtin_memcpy(to, x + i * width, static_cast<uint64_t>(width) * 4);
            float* const tail = to + width - 2 * pairs;
            rotate_row(tail, cos, sin, pairs, true, tail);
            if (has(turn_spread)) spread_row(to, width);
            if (has(turn_pack)) encode_row(to, *layout, static_cast<uint8_t*>(out) + i * layout->row_bytes);
            if (!has(turn_round)) continue;
            encode_row(to, *layout, packed);
            decode_row(packed, *layout, to);
        }
    }
};

}  // namespace

void turn_rows(const float* x, const float* weight, const int64_t* positions, const float* frequencies,
               const RowLayout* layout, void* out, int64_t n, int64_t rows, int64_t width, int64_t pairs, float eps,
               int32_t steps, int32_t threads) {
    const Call call{x, weight, positions, frequencies, layout, out, rows, width, pairs, eps, steps};
    const int64_t packed_bytes = layout == nullptr ? 0 : layout->row_bytes;
    split_rows(n, n * rows * width, threads, [&call, packed_bytes](int64_t first, int64_t last) {
        Scratch scratch(Scratch::bytes_of<float>(call.width) + Scratch::bytes_of<uint8_t>(packed_bytes));
        float* const row = scratch.take<float>(call.width);
        uint8_t* const packed = scratch.take<uint8_t>(packed_bytes);
        for (int64_t token = first; token < last; ++token) call.run(token, row, packed);
    });
}

}  // namespace tenfold::TENFOLD_ISA
