// Mxfp4 weights times activations rounded to int8, one scale per 32: the products within a block are exact integers.
//
// As a byte 2 w + 12 every weight is an unsigned number up to 24, so that byte products are summed in 16 bits without
// overflow (4 * 24 * 127 < 2^15); 12 times the sum of the activations is taken off afterwards, in 32 bits.
#include <cstring>

#include "product_parts.hpp"

namespace tenfold::TENFOLD_ISA {
namespace {

// 64 activations, two blocks side by side: bytes of even columns, then of odd ones, as the nibbles of a weight lie.
struct Pair {
    int8_t even[32], odd[32];
    float scale[8];         // half the scale of either block, in four lanes each
    int32_t correction[8];  // -12 times the sum of either block's bytes, in its first lane
};

constexpr int64_t kPairs = 16;  // of a panel, 2 KiB per row

int64_t num_pairs(int64_t in) { return (in + 63) / 64; }

int64_t panel_width(int64_t in, int64_t pair) { return smaller(kPairs, num_pairs(in) - pair); }

const Pair* pair_row(const Product& p, int64_t pair, int64_t i) {
    const Pair* panels = reinterpret_cast<const Pair*>(p.panels);
    return panels + p.panel_rows * pair + (p.first_row + i) * panel_width(p.weight.in, pair);
}

// What a block of 32 is divided by, from its largest size as bits, in which NaN is larger than any number. Too small
// for its inverse to be a number is as good as zero; what is not finite makes the products NaN.
struct Step {
    float inverse, half;
};

Step step_of(uint32_t largest_bits) {
    float largest;
    std::memcpy(&largest, &largest_bits, sizeof(largest));
    if (!(largest <= 3.4028234e38F)) return {0.0F, __builtin_nanf("")};
    if (largest < 0x1p-100F) return {0.0F, 0.0F};
    return {127.0F / largest, largest * (0.5F / 127.0F)};
}

void set_block(Pair& pair, int half, float scale, int32_t sum) {
    for (int lane = 0; lane < 4; ++lane) pair.scale[4 * half + lane] = scale;
    pair.correction[4 * half] = -12 * sum;
}

struct Row {
    const uint8_t *codes, *scale;
    Row(const Matrix& m, int64_t row)
        : codes(static_cast<const uint8_t*>(m.codes) + row * (m.in / 2)),
          scale(static_cast<const uint8_t*>(m.scale) + row * (m.in / 32)) {}
};

#ifdef __AVX2__

uint32_t largest_of(__m256i sizes) {
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(sizes), _mm256_extracti128_si256(sizes, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xB1))));
}

int32_t sum_of(__m256i numbers) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(numbers), _mm256_extracti128_si256(numbers, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
}

// One block of 32 into half `half` of a pair.
void quantise(const float* x, Pair& pair, int half) {
    __m256i sizes = _mm256_setzero_si256(), codes[4];
    for (int i = 0; i < 4; ++i) {
        const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(x + 8 * i));
        sizes = _mm256_max_epi32(sizes, _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF)));
    }
    const Step step = step_of(largest_of(sizes));
    const __m256 kept = _mm256_castsi256_ps(_mm256_set1_epi32(step.inverse > 0 ? -1 : 0));
    for (int i = 0; i < 4; ++i) {
        const __m256 values = _mm256_and_ps(_mm256_loadu_ps(x + 8 * i), kept);
        codes[i] = _mm256_cvtps_epi32(_mm256_mul_ps(values, _mm256_set1_ps(step.inverse)));
    }
    const __m256i sums = _mm256_add_epi32(_mm256_add_epi32(codes[0], codes[1]), _mm256_add_epi32(codes[2], codes[3]));
    const __m256i first = _mm256_permute4x64_epi64(_mm256_packs_epi32(codes[0], codes[1]), 0xD8);
    const __m256i second = _mm256_permute4x64_epi64(_mm256_packs_epi32(codes[2], codes[3]), 0xD8);
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(first, second), 0xD8);
    const __m256i even_first = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    const __m256i split = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(bytes, even_first), 0xD8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(pair.even + 16 * half), _mm256_castsi256_si128(split));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(pair.odd + 16 * half), _mm256_extracti128_si256(split, 1));
    set_block(pair, half, step.half, sum_of(sums));
}

// The bytes 2 w + 12 of two blocks of a weight row and their scales, as the activations lie.
struct Weights {
    __m256i even, odd;
    __m256 scale;
};

inline Weights decoded(__m256i codes, float first_scale, float second_scale) {
    const __m256i table = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_shuffle_epi8(table, _mm256_and_si256(codes, mask)),
            _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(codes, 4), mask)),
            _mm256_blend_ps(_mm256_set1_ps(first_scale), _mm256_set1_ps(second_scale), 0xF0)};
}

inline Weights whole_pair(const Row& row, int64_t pair) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row.codes + 32 * pair));
    return decoded(codes, scale_of(row.scale[2 * pair]), scale_of(row.scale[2 * pair + 1]));
}

// The last pair where a row has an odd number of blocks: the activations of the missing one are zero.
inline Weights half_pair(const Row& row, int64_t pair) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row.codes + 32 * pair));
    return decoded(_mm256_broadcastsi128_si256(codes), scale_of(row.scale[2 * pair]), 1.0F);
}

inline __m256 add_pair(const Weights& w, const Pair& x, __m256 sum) {
    const __m256i even = _mm256_maddubs_epi16(w.even, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.even)));
    const __m256i odd = _mm256_maddubs_epi16(w.odd, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.odd)));
    const __m256i products = _mm256_madd_epi16(_mm256_add_epi16(even, odd), _mm256_set1_epi16(1));
    const __m256i correction = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.correction));
    const __m256 exact = _mm256_cvtepi32_ps(_mm256_add_epi32(products, correction));
    return _mm256_fmadd_ps(exact, _mm256_mul_ps(w.scale, _mm256_loadu_ps(x.scale)), sum);
}

// Few activation rows: weights go by once, decoded. The lanes' sums of `Rows` weight rows and `Tokens` activation
// rows, which lie `width` apart, over one panel.
template <int Rows, int Tokens>
inline void dot_rows(const Row* rows, const Pair* x, int64_t width, int64_t first, int64_t whole, int64_t last,
                     int64_t next_bytes, __m256 (*out)[Tokens]) {
    __m256 sums[Rows][Tokens];
    for (auto& of_row : sums) {
        for (auto& sum : of_row) sum = _mm256_setzero_ps();
    }
    for (int64_t pair = first; pair < whole; ++pair, ++x) {
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
            if ((pair - first) % 2 == 0) {  // a row is short: the hardware's own prefetch starts again with every row
                _mm_prefetch(reinterpret_cast<const char*>(rows[r].codes) + 32 * pair + next_bytes, _MM_HINT_T0);
            }
            const Weights w = whole_pair(rows[r], pair);
#pragma GCC unroll 4
            for (int t = 0; t < Tokens; ++t) sums[r][t] = add_pair(w, x[t * width], sums[r][t]);
        }
    }
    for (int r = 0; whole < last && r < Rows; ++r) {
        const Weights w = half_pair(rows[r], whole);
        for (int t = 0; t < Tokens; ++t) sums[r][t] = add_pair(w, x[t * width], sums[r][t]);
    }
    for (int r = 0; r < Rows; ++r) {
        for (int t = 0; t < Tokens; ++t) out[r][t] = sums[r][t];
    }
}

template <int Tokens>
TENFOLD_APART void dot_quad(const Product& p, const Row (&rows)[kQuad], int64_t pair, int64_t row, int64_t last) {
    constexpr int kRows = Tokens <= 2 ? 4 : 2;  // as many sums at a time as the registers hold
    const int64_t in = p.weight.in, width = panel_width(in, pair), stop = pair + width;
    __m256 sums[kQuad][Tokens];
    for (int r = 0; r < kQuad; r += kRows) {
        dot_rows<kRows, Tokens>(rows + r, pair_row(p, pair, 0), width, pair, smaller(stop, in / 64), stop,
                                kQuad * in / 2, sums + r);
    }
    for (int t = 0; t < Tokens; ++t) {
        const __m128 sum = lane_sums(sums[0][t], sums[1][t], sums[2][t], sums[3][t]);
        put(y_row(p, t, row), sum, smaller(kQuad, last - row), p.add || pair > 0);
    }
}

void multiply_few(const Product& p, int64_t first, int64_t last) {
    const int64_t end = last - 1;
    for (int64_t row = first; row < last; row += kQuad) {
        const Row rows[kQuad] = {{p.weight, row},
                                 {p.weight, smaller(row + 1, end)},
                                 {p.weight, smaller(row + 2, end)},
                                 {p.weight, smaller(row + 3, end)}};
        for (int64_t pair = 0; pair < num_pairs(p.weight.in); pair += kPairs) {
            switch (p.count) {
                case 1: dot_quad<1>(p, rows, pair, row, last); break;
                case 2: dot_quad<2>(p, rows, pair, row, last); break;
                case 3: dot_quad<3>(p, rows, pair, row, last); break;
                default: dot_quad<kFew>(p, rows, pair, row, last); break;
            }
        }
    }
}

// More rows: weights are decoded into a tile first.
TENFOLD_APART void unpack(const Row& row, int64_t first, int64_t whole, int64_t last, const uint8_t* next,
                          Weights* to) {
    prefetch_lines(next, 32 * (whole - first));
    for (int64_t pair = first; pair < whole; ++pair) *to++ = whole_pair(row, pair);
    if (whole < last) *to = half_pair(row, whole);
}

template <int Tokens>
TENFOLD_APART void multiply_quad(const Product& p, const Weights* tile, int64_t pair, int64_t width, int64_t i,
                                 int64_t row, int64_t rows) {
    __m256 sums[kQuad][Tokens];
    for (auto& of_row : sums) {
        for (auto& sum : of_row) sum = _mm256_setzero_ps();
    }
    const Pair* x = pair_row(p, pair, i);
    for (int64_t at = 0; at < width; ++at) {
#pragma GCC unroll 4
        for (int r = 0; r < kQuad; ++r) {
            const Weights& w = tile[r * kPairs + at];
#pragma GCC unroll 3
            for (int t = 0; t < Tokens; ++t) sums[r][t] = add_pair(w, x[t * width + at], sums[r][t]);
        }
    }
    for (int t = 0; t < Tokens; ++t) {
        const __m128 sum = lane_sums(sums[0][t], sums[1][t], sums[2][t], sums[3][t]);
        put(y_row(p, i + t, row), sum, rows, p.add || pair > 0);
    }
}

void multiply_tokens(const Product& p, const Weights* tile, int64_t pair, int64_t row, int64_t rows, int64_t first,
                     int64_t last) {
    const int64_t width = panel_width(p.weight.in, pair);
    int64_t i = first;
    for (; last - i >= 3 && last - i != 4; i += 3) multiply_quad<3>(p, tile, pair, width, i, row, rows);
    for (; last - i >= 2; i += 2) multiply_quad<2>(p, tile, pair, width, i, row, rows);
    if (i < last) multiply_quad<1>(p, tile, pair, width, i, row, rows);
}

void multiply_tile(const Product& p, Weights* tile, int64_t pair, int64_t first, int64_t last) {
    const int64_t in = p.weight.in, stop = pair + panel_width(in, pair), rows = last - first;
    for (int64_t r = 0; r < quads(rows) * kQuad; ++r) {
        const Row row(p.weight, smaller(first + r, last - 1));
        const bool more = stop < num_pairs(in);
        const Row after = more ? row : Row(p.weight, smaller(first + r + tile_rows(p.count), p.weight.out - 1));
        const uint8_t* next = after.codes + (more ? 32 * stop : 0);
        unpack(row, pair, smaller(stop, in / 64), stop, next, tile + r * kPairs);
    }
    for (int64_t i = 0; i < p.count; i += kTokens) {
        for (int64_t r = 0; r < rows; r += kQuad) {
            multiply_tokens(p, tile + r * kPairs, pair, first + r, smaller(kQuad, rows - r), i,
                            smaller(i + kTokens, p.count));
        }
    }
}

void multiply_rows(const Product& p, int64_t first, int64_t last) {
    if (p.count <= kFew) return multiply_few(p, first, last);
    Weights tile[kTileRows * kPairs];
    const int64_t rows = tile_rows(p.count);
    for (int64_t row = first; row < last; row += rows) {
        for (int64_t pair = 0; pair < num_pairs(p.weight.in); pair += kPairs) {
            multiply_tile(p, tile, pair, row, smaller(row + rows, last));
        }
    }
}

#else

// One block of 32 into half `half` of a pair.
void quantise(const float* x, Pair& pair, int half) {
    uint32_t largest = 0;
    for (int i = 0; i < 32; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof(bits));
        bits &= 0x7FFFFFFF;
        largest = bits > largest ? bits : largest;
    }
    const Step step = step_of(largest);
    int32_t sum = 0;
    for (int i = 0; i < 32 && step.inverse > 0; ++i) {
        const int32_t code = static_cast<int32_t>(__builtin_nearbyintf(x[i] * step.inverse));
        int8_t* to = i % 2 == 0 ? pair.even : pair.odd;
        to[16 * half + i / 2] = static_cast<int8_t>(code);
        sum += code;
    }
    set_block(pair, half, step.half, sum);
}

// The sum of one block's products, an exact integer: half `half` of the pair.
int32_t block_sum(const uint8_t* codes, const Pair& x, int half) {
    static const int8_t doubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) {
        sum += doubled[codes[i] & 15] * x.even[16 * half + i] + doubled[codes[i] >> 4] * x.odd[16 * half + i];
    }
    return sum;
}

void multiply_rows(const Product& p, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
        const Row row(p.weight, r);
        for (int64_t i = 0; i < p.count; ++i) {
            double sum = 0;
            for (int64_t block = 0; block < p.weight.in / 32; ++block) {
                const int64_t pair = block / 2, panel = pair / kPairs * kPairs;
                const Pair& x = pair_row(p, panel, i)[pair - panel];
                const int half = static_cast<int>(block % 2);
                sum += static_cast<double>(block_sum(row.codes + 16 * block, x, half)) * x.scale[4 * half] *
                       scale_of(row.scale[block]);
            }
            float* y = y_row(p, i, r);
            *y = static_cast<float>(p.add ? *y + sum : sum);
        }
    }
}

#endif

}  // namespace

void pack_row_int8(const float* x, int64_t in, void* panels, int64_t panel_rows, int64_t row) {
    for (int64_t pair = 0; pair < num_pairs(in); ++pair) {
        const int64_t panel = pair / kPairs * kPairs;
        Pair& to = static_cast<Pair*>(panels)[panel_rows * panel + row * panel_width(in, panel) + (pair - panel)];
        std::memset(&to, 0, sizeof(to));
        quantise(x + 64 * pair, to, 0);
        if (64 * pair + 32 < in) quantise(x + 64 * pair + 32, to, 1);
    }
}

void multiply_int8(const Product& product, int64_t first, int64_t last) { multiply_rows(product, first, last); }

}  // namespace tenfold::TENFOLD_ISA
