// AVX-512: what product_int8.cpp leaves to this file. Two weight rows lie side by side, the lanes of each hold four
// columns apiece, and vpdpbusd sums bytes into 32 bits.
#pragma once

#include "product_int8.hpp"

namespace tenfold::TENFOLD_ISA {
namespace {

// 64 activations, two blocks side by side.
struct Pair {
    int8_t even[32], odd[32];
    float scale[8];         // half the scale of either block, in four lanes each
    int32_t correction[8];  // -12 times the sum of either block's bytes, in its first lane
};

inline void keep_block(const Rounded& block, int64_t in, void* panels, int64_t panel_rows, int64_t row, int64_t at) {
    const int64_t pair = at / 2, panel = pair / kPairs * kPairs, half = at % 2;
    Pair& to = static_cast<Pair*>(panels)[panel_rows * panel + row * panel_width(in, panel) + (pair - panel)];
    if (half == 0) std::memset(&to, 0, sizeof(to));
    std::memcpy(to.even + 16 * half, block.even, sizeof(block.even));
    std::memcpy(to.odd + 16 * half, block.odd, sizeof(block.odd));
    for (int64_t lane = 4 * half; lane < 4 * half + 4; ++lane) to.scale[lane] = block.half;
    to.correction[4 * half] = -12 * block.sum;
}

inline const Pair* pair_row(const Product& p, int64_t pair, int64_t i) {
    const Pair* panels = reinterpret_cast<const Pair*>(p.panels);
    return panels + p.panel_rows * pair + (p.first_row + i) * panel_width(p.weight.in, pair);
}

// The scales of a panel of the rows that share a vector: of each row two, for the halves of its lanes.
class Scales {
public:
    void set(const uint8_t* const* rows, int64_t first, int64_t count) {
        for (int64_t block = 0; block < count; block += 8) {
            const __m256d a = _mm256_castps_pd(powers_of(eight_of(rows[0] + first, block, count)));
            const __m256d b = _mm256_castps_pd(powers_of(eight_of(rows[1] + first, block, count)));
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

private:
    float numbers_[4 * kPairs];  // two of the first row, two of the second, and so on
};

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
            const Weights w = half_pair(codes + v * kSide, 32 * (pair + whole), scales[v].of(whole));
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
    if (whole < width) *to = half_pair(rows.codes, 32 * (pair + whole), scales.of(whole));
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

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
