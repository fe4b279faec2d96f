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

// The scales of a panel of the rows that share a vector: of each row two, for the halves of its lanes.
#ifdef __AVX512VNNI__

// Eight e8m0 bytes as numbers; 0 is subnormal and 255 is NaN, which shifting alone would both miss.
inline __m256 powers_of(const uint8_t* codes) {
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    const __m256i number = _mm256_max_epu32(_mm256_slli_epi32(wide, 23), _mm256_set1_epi32(0x00400000));
    return _mm256_castsi256_ps(_mm256_or_si256(number, _mm256_cmpeq_epi32(wide, _mm256_set1_epi32(255))));
}

class Scales {
public:
    void set(const uint8_t* const* rows, int64_t first, int64_t count) {
        for (int64_t block = 0; block < count; block += 8) {
            const __m256d a = eight(rows[0] + first, block, count), b = eight(rows[1] + first, block, count);
            const __m256d low = _mm256_unpacklo_pd(a, b), high = _mm256_unpackhi_pd(a, b);
            double* to = reinterpret_cast<double*>(numbers_ + 2 * block);
            _mm256_storeu_pd(to, _mm256_permute2f128_pd(low, high, 0x20));
            _mm256_storeu_pd(to + 4, _mm256_permute2f128_pd(low, high, 0x31));
        }
    }

    Floats of(int64_t pair) const {
        const __m512i which = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(numbers_ + 4 * pair)), which);
    }
    Floats of_half(int64_t pair) const { return of(pair); }

private:
    static __m256d eight(const uint8_t* row, int64_t block, int64_t count) {
        uint8_t rest[8] = {};
        if (count - block >= 8) return _mm256_castps_pd(powers_of(row + block));
        std::memcpy(rest, row + block, static_cast<size_t>(count - block));
        return _mm256_castps_pd(powers_of(rest));
    }

    float numbers_[4 * kPairs];  // two of the first row, two of the second, and so on
};

#else

class Scales {
public:
    void set(const uint8_t* const* rows, int64_t first, int64_t) { row_ = rows[0] + first; }

    Floats of(int64_t pair) const { return beside_each_other(row_[2 * pair], row_[2 * pair + 1]); }
    Floats of_half(int64_t pair) const { return beside_each_other(row_[2 * pair], 127); }

private:
    static Floats beside_each_other(uint8_t first, uint8_t second) {
        return _mm256_blend_ps(_mm256_set1_ps(scale_of(first)), _mm256_set1_ps(scale_of(second)), 0xF0);
    }

    const uint8_t* row_ = nullptr;
};

#endif

// The bytes 2 w + 12 of two blocks and their scales, as the activations lie; of one weight row or of two.
struct Weights {
    Ints even, odd;
    Floats scale;
};

inline Weights decoded(Ints codes, Floats scale) {
    const Ints table = spread(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    const Ints mask = all_lanes(codes, 0x0F0F0F0F);
    return {look_up(table, both(codes, mask)), look_up(table, both(down16(codes, 4), mask)), scale};
}

// The last pair where a row has an odd number of blocks: the activations of the missing one are zero.
inline Weights half_pair(const uint8_t* const* codes, int64_t offset, Floats scale) {
    uint8_t rest[kSide][32] = {};
    const uint8_t* rows[kSide];
    for (int side = 0; side < kSide; ++side) {
        rows[side] = static_cast<uint8_t*>(std::memcpy(rest[side], codes[side] + offset, 16));
    }
    return decoded(beside(rows, 0), scale);
}

inline Floats add_pair(const Weights& w, const Pair& x, Floats sum) {
    const Ints exact = dot_bytes(spread(x.correction), w.even, spread(x.even), w.odd, spread(x.odd));
    return add_product(to_floats(exact), times(w.scale, spread(x.scale)), sum);
}

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

int64_t blocks_of(int64_t in, int64_t pair) { return smaller(2 * kPairs, in / 32 - 2 * pair); }

// Few activation rows: weights go by once, decoded. The sums of `Rows` weight rows and `Tokens` activation rows, which
// lie `width` apart, over one panel of `whole` pairs, and one more if half a pair is left.
template <int Rows, int Tokens>
inline void dot_rows(const uint8_t* const* codes, const Scales* scales, const Pair* x, int64_t width, int64_t pair,
                     int64_t whole, int64_t next_bytes, Floats (*out)[Tokens]) {
    Floats sums[Rows / kSide][Tokens];
    for (auto& of_rows : sums) {
        for (auto& sum : of_rows) sum = no_floats();
    }
    for (int64_t at = 0; at < whole; ++at) {
        if (at % 2 == 0) {  // a row is short: the hardware's own prefetch starts again with every row
            for (int r = 0; r < Rows; ++r) {
                const char* code = reinterpret_cast<const char*>(codes[r]);
                _mm_prefetch(code + 32 * (pair + at) + next_bytes, _MM_HINT_T0);
            }
        }
#pragma GCC unroll 4
        for (int v = 0; v < Rows / kSide; ++v) {
            const Weights w = decoded(beside(codes + v * kSide, 32 * (pair + at)), scales[v].of(at));
#pragma GCC unroll 4
            for (int t = 0; t < Tokens; ++t) sums[v][t] = add_pair(w, x[t * width + at], sums[v][t]);
        }
    }
    if (whole < width) {
#pragma GCC unroll 4
        for (int v = 0; v < Rows / kSide; ++v) {
            const Weights w = half_pair(codes + v * kSide, 32 * (pair + whole), scales[v].of_half(whole));
#pragma GCC unroll 4
            for (int t = 0; t < Tokens; ++t) sums[v][t] = add_pair(w, x[t * width + whole], sums[v][t]);
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < Rows / kSide; ++v) {
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) out[v][t] = sums[v][t];
    }
}

template <int Tokens>
TENFOLD_APART void dot_quad(const Product& p, const Group<kQuad>& rows, int64_t pair, int64_t row, int64_t last) {
    constexpr int kRows = Tokens <= 2 * kSide ? 4 : 2;  // as many sums at a time as the registers hold
    const int64_t in = p.weight.in, width = panel_width(in, pair), whole = smaller(width, in / 64 - pair);
    Floats sums[kQuad / kSide][Tokens];
    for (int r = 0; r < kQuad; r += kRows) {
        Scales scales[kRows / kSide];
        for (int v = 0; v < kRows / kSide; ++v) {
            scales[v].set(rows.scale + r + v * kSide, 2 * pair, blocks_of(in, pair));
        }
        dot_rows<kRows, Tokens>(rows.codes + r, scales, pair_row(p, pair, 0), width, pair, whole,
                                kQuad * in / 2, sums + r / kSide);
    }
    for (int t = 0; t < Tokens; ++t) {
        put(y_row(p, t, row), quad_sums(&sums[0][t], Tokens, 0), smaller(kQuad, last - row), p.add || pair > 0);
    }
}

void multiply_few(const Product& p, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row += kQuad) {
        const Group<kQuad> rows(p.weight, row, last);
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

// `next`, as many bytes of each row, comes next.
TENFOLD_APART void unpack(const Group<kSide>& rows, int64_t in, int64_t pair, const Group<kSide>& next,
                          int64_t next_pair, Weights* to) {
    const int64_t width = panel_width(in, pair), whole = smaller(width, in / 64 - pair);
    for (const uint8_t* codes : next.codes) prefetch_lines(codes + 32 * next_pair, 32 * whole);
    Scales scales;
    scales.set(rows.scale, 2 * pair, blocks_of(in, pair));
    for (int64_t at = 0; at < whole; ++at) {
        *to++ = decoded(beside(rows.codes, 32 * (pair + at)), scales.of(at));
    }
    if (whole < width) *to = half_pair(rows.codes, 32 * (pair + whole), scales.of_half(whole));
}

template <int Tokens>
TENFOLD_APART void multiply_wide(const Product& p, const Weights* tile, int64_t pair, int64_t i, int64_t row,
                                 int64_t last) {
    const int64_t width = panel_width(p.weight.in, pair);
    Floats sums[4][Tokens];
    for (auto& of_rows : sums) {
        for (auto& sum : of_rows) sum = no_floats();
    }
    const Pair* x = pair_row(p, pair, i);
    for (int64_t at = 0; at < width; ++at) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const Weights& w = tile[v * kPairs + at];
#pragma GCC unroll 4
            for (int t = 0; t < Tokens; ++t) sums[v][t] = add_pair(w, x[t * width + at], sums[v][t]);
        }
    }
    for (int64_t quad = 0; quad < kWide && row + quad < last; quad += kQuad) {
        for (int t = 0; t < Tokens; ++t) {
            const __m128 sum = quad_sums(&sums[0][t], Tokens, quad);
            put(y_row(p, i + t, row + quad), sum, smaller(kQuad, last - row - quad), p.add || pair > 0);
        }
    }
}

void multiply_tokens(const Product& p, const Weights* tile, int64_t pair, int64_t row, int64_t last, int64_t i,
                     int64_t stop) {
    while (i < stop) {
        const int64_t tokens = tokens_of(stop - i);
        switch (tokens) {
            case 1: multiply_wide<1>(p, tile, pair, i, row, last); break;
            case 2: multiply_wide<2>(p, tile, pair, i, row, last); break;
            case 3: multiply_wide<3>(p, tile, pair, i, row, last); break;
            default: multiply_wide<kMostTokens>(p, tile, pair, i, row, last); break;
        }
        i += tokens;
    }
}

void multiply_tile(const Product& p, Weights* tile, int64_t pair, int64_t first, int64_t last) {
    const int64_t in = p.weight.in, stop = pair + panel_width(in, pair);
    const bool more = stop < num_pairs(in);
    for (int64_t r = 0; r < round_up(last - first, kWide); r += kSide) {
        const Group<kSide> rows(p.weight, first + r, last);
        const Group<kSide> after(p.weight, first + r + tile_rows(p.count), p.weight.out);
        unpack(rows, in, pair, more ? rows : after, more ? stop : 0, tile + r / kSide * kPairs);
    }
    for (int64_t i = 0; i < p.count; i += kTokens) {
        for (int64_t r = 0; r < last - first; r += kWide) {
            multiply_tokens(p, tile + r / kSide * kPairs, pair, first + r, last, i, smaller(i + kTokens, p.count));
        }
    }
}

void multiply_rows(const Product& p, int64_t first, int64_t last) {
    if (p.count <= kFew) return multiply_few(p, first, last);
    Weights tile[kTileRows / kSide * kPairs];
    const int64_t rows = tile_rows(p.count);
    for (int64_t row = first; row < last; row += rows) {
        for (int64_t pair = 0; pair < num_pairs(p.weight.in); pair += kPairs) {
            multiply_tile(p, tile, pair, row, smaller(row + rows, last));
        }
    }
}

#else

struct Row {
    const uint8_t *codes, *scale;
    Row(const Matrix& m, int64_t row)
        : codes(static_cast<const uint8_t*>(m.codes) + row * (m.in / 2)),
          scale(static_cast<const uint8_t*>(m.scale) + row * (m.in / 32)) {}
};

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
