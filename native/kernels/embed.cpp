// Rows of tables, by number.
#include "../threads.hpp"
#include "kernels.hpp"

namespace tenfold::TENFOLD_ISA {
namespace {

void copy_row(const float* from, float* to, int64_t width) {
    __builtin_memcpy(to, from, static_cast<uint64_t>(width) * sizeof(float));
}

void copy_row(const uint16_t* from, float* to, int64_t width) {  // bf16: the upper half of a float32
    for (int64_t c = 0; c < width; ++c) {
        const uint32_t bits = static_cast<uint32_t>(from[c]) << 16;
        __builtin_memcpy(to + c, &bits, sizeof(bits));
    }
}

template <class Number>
void embed_rows(const Number* table, const int64_t* ids, float* out, int64_t n, int64_t copies, int64_t width,
                int32_t threads) {
    split_rows(n, n * copies * width, threads, [=](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            float* const to = out + i * copies * width;
            copy_row(table + ids[i] * width, to, width);
            for (int64_t copy = 1; copy < copies; ++copy) copy_row(to, to + copy * width, width);
        }
    });
}

}  // namespace

void embed(const void* table, const int64_t* ids, float* out, int64_t n, int64_t copies, int64_t width, int32_t bf16,
           int32_t threads) {
    if (bf16 != 0) return embed_rows(static_cast<const uint16_t*>(table), ids, out, n, copies, width, threads);
    embed_rows(static_cast<const float*>(table), ids, out, n, copies, width, threads);
}

void look_up(const int64_t* table, const int64_t* ids, int64_t* out, int64_t n, int64_t width) {
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t c = 0; c < width; ++c) out[i * width + c] = table[ids[i] * width + c];
    }
}

}  // namespace tenfold::TENFOLD_ISA
