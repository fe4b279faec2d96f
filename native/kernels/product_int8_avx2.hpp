// AVX2: what product_int8.cpp leaves to this file.
//
// Vectors hold eight weight rows side by side, four columns of each: a block of 32 takes eight of them, whose byte
// products are summed in 16 bits by halves, in 32 bits, and only then become one float32 a row. Sums of even and of
// odd blocks go on apart and are added when the panel ends. One activation row alone is multiplied in the order of
// the memory instead, which saves turning the weights; the sums, exact until they are floats, are the same.
#pragma once

#include "product_int8.hpp"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int kEight = 8;  // weight rows side by side

// Of eight weight rows from `row` on, the last one again where fewer are left.
struct Group {
    const uint8_t *codes[kEight], *scale[kEight];
    Group(const Matrix& m, int64_t row, int64_t last) {
        for (int64_t r = 0; r < kEight; ++r) {
            const int64_t at = smaller(row + r, last - 1);
            codes[r] = static_cast<const uint8_t*>(m.codes) + at * (m.in / 2);
            scale[r] = static_cast<const uint8_t*>(m.scale) + at * (m.in / 32);
        }
    }
};

// The scales of a panel of a group, block by block; of a block the group's eight, or of a pair of blocks four rows'
// for the first and then for the second.
class Scales {
public:
    void set_eight(const Group& rows, int64_t pair, int64_t count) {
        for (int64_t block = 0; block < count; block += 8) {
            __m128i row[kEight];
            for (int r = 0; r < kEight; ++r) row[r] = eight_of(rows.scale[r] + 2 * pair, block, count);
            const __m128i a = _mm_unpacklo_epi8(row[0], row[1]), b = _mm_unpacklo_epi8(row[2], row[3]);
            const __m128i c = _mm_unpacklo_epi8(row[4], row[5]), d = _mm_unpacklo_epi8(row[6], row[7]);
            const __m128i first = _mm_unpacklo_epi16(a, b), second = _mm_unpackhi_epi16(a, b);
            const __m128i third = _mm_unpacklo_epi16(c, d), fourth = _mm_unpackhi_epi16(c, d);
            keep(block, _mm_unpacklo_epi32(first, third), _mm_unpackhi_epi32(first, third));
            keep(block + 4, _mm_unpacklo_epi32(second, fourth), _mm_unpackhi_epi32(second, fourth));
        }
    }

    void set_four(const uint8_t* const* scale, int64_t pair, int64_t count) {
        for (int64_t block = 0; block < count; block += 8) {
            __m128i row[4];
            for (int r = 0; r < 4; ++r) row[r] = eight_of(scale[r] + 2 * pair, block, count);
            const __m128i a = _mm_unpacklo_epi8(row[0], row[1]), b = _mm_unpacklo_epi8(row[2], row[3]);
            keep(block / 2, _mm_unpacklo_epi16(a, b), _mm_unpackhi_epi16(a, b));
        }
    }

    __m256 of(int64_t at) const { return powers_of(bytes_[at]); }

private:
    void keep(int64_t at, __m128i two, __m128i next_two) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes_[at]), two);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes_[at + 2]), next_two);
    }

    static __m128i eight_of(const uint8_t* row, int64_t block, int64_t count) {
        if (count - block >= 8) return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + block));
        uint8_t rest[8] = {};
        std::memcpy(rest, row + block, static_cast<size_t>(count - block));
        return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rest));
    }

    uint8_t bytes_[2 * kPairs][kEight];
};

// The bytes 2 w + 12 of the even columns; those of the odd ones lie four bits higher.
inline __m256i even_of(__m256i codes) {
    const __m256i table = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    return _mm256_shuffle_epi8(table, _mm256_and_si256(codes, _mm256_set1_epi8(15)));
}

inline __m256i odd_of(__m256i codes) { return even_of(_mm256_srli_epi16(codes, 4)); }

inline __m256i in_32_bits(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

inline __m256 add_exact(__m256i exact, __m256 scale, __m256 x_scale, __m256 sum) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact), _mm256_mul_ps(scale, x_scale), sum);
}

inline void prefetch_panel(const Group& rows, int64_t offset, int64_t in) {
    for (const uint8_t* codes : rows.codes) {  // a row is short: the hardware's own prefetch starts again with each
        _mm_prefetch(reinterpret_cast<const char*>(codes) + offset + kEight * in / 2, _MM_HINT_T0);
    }
}

// ------------------------------------------------------------------------------- one activation row

inline __m256i row_sums(const uint8_t* codes, const Pair& x) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const __m256i even = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.even));
    const __m256i odd = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.odd));
    return in_32_bits(_mm256_add_epi16(_mm256_maddubs_epi16(even_of(both), even),
                                       _mm256_maddubs_epi16(odd_of(both), odd)));
}

inline __m256i two_rows(__m256i a, __m256i b) {
    return _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
}

// Four weight rows: their sums over the first block of a pair, beside those over the second.
inline __m256 add_pair(const uint8_t* const* codes, int64_t offset, __m256 scale, const Pair& x, __m256 sum) {
    const __m256i a = two_rows(row_sums(codes[0] + offset, x), row_sums(codes[1] + offset, x));
    const __m256i b = two_rows(row_sums(codes[2] + offset, x), row_sums(codes[3] + offset, x));
    const __m256i four = _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
    const __m256i correction = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.correction));
    return add_exact(_mm256_add_epi32(four, correction), scale, _mm256_loadu_ps(x.scale), sum);
}

// The last pair where a row has an odd number of blocks: the activations of the missing one are zero.
inline __m256 add_half_pair(const uint8_t* const* codes, int64_t offset, __m256 scale, const Pair& x, __m256 sum) {
    uint8_t rest[4][32] = {};
    const uint8_t* rows[4];
    for (int r = 0; r < 4; ++r) rows[r] = static_cast<uint8_t*>(std::memcpy(rest[r], codes[r] + offset, 16));
    return add_pair(rows, 0, scale, x, sum);
}

TENFOLD_APART void multiply_one(const Product& p, const Group& rows, int64_t pair, int64_t row, int64_t last) {
    const int64_t in = p.weight.in, width = panel_width(in, pair), whole = smaller(width, in / 64 - pair);
    Scales first, second;
    first.set_four(rows.scale, pair, blocks_of(in, pair));
    second.set_four(rows.scale + 4, pair, blocks_of(in, pair));
    const Pair* x = pair_row(p, pair, 0);
    __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int64_t at = 0; at < whole; ++at) {
        const int64_t offset = 32 * (pair + at);
        if (at % 2 == 0) prefetch_panel(rows, offset, in);
        sums[0] = add_pair(rows.codes, offset, first.of(at), x[at], sums[0]);
        sums[1] = add_pair(rows.codes + 4, offset, second.of(at), x[at], sums[1]);
    }
    if (whole < width) {
        const int64_t offset = 32 * (pair + whole);
        sums[0] = add_half_pair(rows.codes, offset, first.of(whole), x[whole], sums[0]);
        sums[1] = add_half_pair(rows.codes + 4, offset, second.of(whole), x[whole], sums[1]);
    }
    for (int64_t quad = 0; quad < kEight && row + quad < last; quad += kQuad) {
        const __m256 sum = sums[quad / kQuad];
        put(y_row(p, 0, row + quad), _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1)),
            smaller(kQuad, last - row - quad), p.add || pair > 0);
    }
}

// ------------------------------------------------------------------------------- more activation rows

// Four times four bytes of eight rows each: those of the first four columns' codes, and so on.
inline void turned(const uint8_t* const* rows, int64_t offset, __m256i (&out)[4]) {
    __m256i v[4];
    for (int r = 0; r < 4; ++r) {
        const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r] + offset));
        const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r + 4] + offset));
        v[r] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }
    const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
    const __m256i c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
    out[0] = _mm256_unpacklo_epi64(a, c);
    out[1] = _mm256_unpackhi_epi64(a, c);
    out[2] = _mm256_unpacklo_epi64(b, d);
    out[3] = _mm256_unpackhi_epi64(b, d);
}

inline __m256i four_of(const int8_t* x, int at) {
    int32_t bytes;
    std::memcpy(&bytes, x + 4 * at, sizeof(bytes));
    return _mm256_set1_epi32(bytes);
}

inline __m256 add_block(__m256i exact, __m256 scale, const Pair& x, int half, __m256 sum) {
    exact = _mm256_add_epi32(exact, _mm256_set1_epi32(x.correction[4 * half]));
    return add_exact(exact, scale, _mm256_broadcast_ss(&x.scale[4 * half]), sum);
}

// y (+)= the sums of the even blocks and those of the odd ones.
inline void put_eight(float* y, __m256 even, __m256 odd, int64_t rows, bool add) {
    const __m256 sums = _mm256_add_ps(even, odd);
    put(y, _mm256_castps256_ps128(sums), smaller(kQuad, rows), add);
    if (rows > kQuad) put(y + kQuad, _mm256_extractf128_ps(sums, 1), smaller(kQuad, rows - kQuad), add);
}

template <int Tokens>
struct Activations {
    const Pair* row[Tokens];
    Activations(const Product& p, int64_t pair, int64_t i) {
        for (int t = 0; t < Tokens; ++t) row[t] = pair_row(p, pair, i + t);
    }
    void next() {
        for (auto& at : row) ++at;
    }
};

// Few: weights go by once, decoded.

template <int Half, int Tokens>
inline void add_codes(const uint8_t* const* rows, int64_t offset, __m256 scale, const Activations<Tokens>& x,
                      __m256 (&sums)[Tokens]) {
    __m256i codes[4], exact[Tokens];
    turned(rows, offset, codes);
#pragma GCC unroll 2
    for (int at = 0; at < 4; at += 2) {
        const __m256i even = even_of(codes[at]), odd = odd_of(codes[at]);
        const __m256i next_even = even_of(codes[at + 1]), next_odd = odd_of(codes[at + 1]);
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
            const int column = 4 * Half + at;
            const Pair& pair = *x.row[t];
            const __m256i first = _mm256_add_epi16(_mm256_maddubs_epi16(even, four_of(pair.even, column)),
                                                   _mm256_maddubs_epi16(odd, four_of(pair.odd, column)));
            const __m256i second = _mm256_add_epi16(_mm256_maddubs_epi16(next_even, four_of(pair.even, column + 1)),
                                                    _mm256_maddubs_epi16(next_odd, four_of(pair.odd, column + 1)));
            const __m256i half_sum = in_32_bits(_mm256_add_epi16(first, second));
            exact[t] = at == 0 ? half_sum : _mm256_add_epi32(exact[t], half_sum);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) sums[t] = add_block(exact[t], scale, *x.row[t], Half, sums[t]);
}

template <int Tokens>
TENFOLD_APART void multiply_group(const Product& p, const Group& rows, int64_t pair, int64_t row, int64_t last) {
    const int64_t in = p.weight.in, blocks = blocks_of(in, pair);
    Scales scales;
    scales.set_eight(rows, pair, blocks);
    __m256 even[Tokens], odd[Tokens];
    for (int t = 0; t < Tokens; ++t) even[t] = odd[t] = _mm256_setzero_ps();
    Activations<Tokens> x(p, pair, 0);
    int64_t offset = 32 * pair;
    for (int64_t block = 0; block + 2 <= blocks; block += 2, offset += 32, x.next()) {
        if (block % 4 == 0) prefetch_panel(rows, offset, in);
        add_codes<0>(rows.codes, offset, scales.of(block), x, even);
        add_codes<1>(rows.codes, offset + 16, scales.of(block + 1), x, odd);
    }
    if (blocks % 2 != 0) add_codes<0>(rows.codes, offset, scales.of(blocks - 1), x, even);
    for (int t = 0; t < Tokens; ++t) put_eight(y_row(p, t, row), even[t], odd[t], last - row, p.add || pair > 0);
}

void multiply_few(const Product& p, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row += kEight) {
        const Group rows(p.weight, row, last);
        for (int64_t pair = 0; pair < num_pairs(p.weight.in); pair += kPairs) {
            switch (p.count) {
                case 1: multiply_one(p, rows, pair, row, last); break;
                case 2: multiply_group<2>(p, rows, pair, row, last); break;
                case 3: multiply_group<3>(p, rows, pair, row, last); break;
                default: multiply_group<kFew>(p, rows, pair, row, last); break;
            }
        }
    }
}

// More: weights are decoded into a tile first.

struct Block {
    __m256i codes[8];  // 2 w + 12: even columns, odd ones, even ones, ...
    __m256 scale;
};

constexpr int64_t kGroupBlocks = 2 * kPairs;  // of one group in a tile
constexpr int kGroups = 2;                    // that are multiplied at a time, by kRegisterTokens activation rows
constexpr int64_t kRegisterTokens = 3;

// `next`, as many bytes of each row, comes next.
TENFOLD_APART void unpack(const Group& rows, int64_t in, int64_t pair, const Group& next, int64_t next_pair,
                          Block* to) {
    const int64_t blocks = blocks_of(in, pair);
    for (const uint8_t* codes : next.codes) prefetch_lines(codes + 32 * next_pair, 16 * blocks);
    Scales scales;
    scales.set_eight(rows, pair, blocks);
    for (int64_t block = 0; block < blocks; ++block, ++to) {
        __m256i codes[4];
        turned(rows.codes, 32 * pair + 16 * block, codes);
        for (int i = 0; i < 4; ++i) {
            to->codes[2 * i] = even_of(codes[i]);
            to->codes[2 * i + 1] = odd_of(codes[i]);
        }
        to->scale = scales.of(block);
    }
}

template <int Half, int Groups, int Tokens>
inline void add_blocks(const Block* tile, const Activations<Tokens>& x, __m256 (&sums)[Groups][Tokens]) {
    __m256i exact[Groups][Tokens];
#pragma GCC unroll 2
    for (int first = 0; first < 8; first += 4) {  // four products stay within 16 bits
        __m256i pairs[Groups][Tokens];
#pragma GCC unroll 4
        for (int i = first; i < first + 4; ++i) {
#pragma GCC unroll 4
            for (int t = 0; t < Tokens; ++t) {
                const __m256i four = four_of(i % 2 == 0 ? x.row[t]->even : x.row[t]->odd, 4 * Half + i / 2);
#pragma GCC unroll 4
                for (int g = 0; g < Groups; ++g) {
                    const __m256i product = _mm256_maddubs_epi16(tile[g * kGroupBlocks].codes[i], four);
                    pairs[g][t] = i == first ? product : _mm256_add_epi16(pairs[g][t], product);
                }
            }
        }
#pragma GCC unroll 4
        for (int g = 0; g < Groups; ++g) {
#pragma GCC unroll 4
            for (int t = 0; t < Tokens; ++t) {
                const __m256i half_sum = in_32_bits(pairs[g][t]);
                exact[g][t] = first == 0 ? half_sum : _mm256_add_epi32(exact[g][t], half_sum);
            }
        }
    }
#pragma GCC unroll 4
    for (int g = 0; g < Groups; ++g) {
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
            sums[g][t] = add_block(exact[g][t], tile[g * kGroupBlocks].scale, *x.row[t], Half, sums[g][t]);
        }
    }
}

template <int Groups, int Tokens>
TENFOLD_APART void multiply_wide(const Product& p, const Block* tile, int64_t pair, int64_t i, int64_t row,
                                 int64_t last) {
    const int64_t blocks = blocks_of(p.weight.in, pair);
    __m256 even[Groups][Tokens], odd[Groups][Tokens];
    for (int g = 0; g < Groups; ++g) {
        for (int t = 0; t < Tokens; ++t) even[g][t] = odd[g][t] = _mm256_setzero_ps();
    }
    Activations<Tokens> x(p, pair, i);
    for (int64_t block = 0; block + 2 <= blocks; block += 2, tile += 2, x.next()) {
        add_blocks<0>(tile, x, even);
        add_blocks<1>(tile + 1, x, odd);
    }
    if (blocks % 2 != 0) add_blocks<0>(tile, x, even);
    for (int g = 0; g < Groups && row + kEight * g < last; ++g) {
        for (int t = 0; t < Tokens; ++t) {
            float* const y = y_row(p, i + t, row + kEight * g);
            put_eight(y, even[g][t], odd[g][t], last - row - kEight * g, p.add || pair > 0);
        }
    }
}

template <int Groups>
void multiply_tokens(const Product& p, const Block* tile, int64_t pair, int64_t row, int64_t last, int64_t i,
                     int64_t stop) {
    while (i < stop) {
        // One alone is slow, so none is left over.
        const int64_t left = stop - i, tokens = left == kRegisterTokens + 1 ? 2 : smaller(left, kRegisterTokens);
        switch (tokens) {
            case 1: multiply_wide<Groups, 1>(p, tile, pair, i, row, last); break;
            case 2: multiply_wide<Groups, 2>(p, tile, pair, i, row, last); break;
            default: multiply_wide<Groups, kRegisterTokens>(p, tile, pair, i, row, last); break;
        }
        i += tokens;
    }
}

void multiply_tile(const Product& p, Block* tile, int64_t pair, int64_t first, int64_t last, int64_t tile_rows) {
    const int64_t in = p.weight.in, stop = pair + panel_width(in, pair);
    const bool more = stop < num_pairs(in);
    for (int64_t r = 0; r < last - first; r += kEight) {
        const Group rows(p.weight, first + r, last);
        const Group after(p.weight, first + r + tile_rows, p.weight.out);
        unpack(rows, in, pair, more ? rows : after, more ? stop : 0, tile + r / kEight * kGroupBlocks);
    }
    for (int64_t i = 0; i < p.count; i += kTokens) {
        const int64_t tokens_stop = smaller(i + kTokens, p.count);
        for (int64_t r = 0; r < last - first; r += kGroups * kEight) {
            const Block* const at = tile + r / kEight * kGroupBlocks;
            if (last - first - r > kEight) {
                multiply_tokens<kGroups>(p, at, pair, first + r, last, i, tokens_stop);
            } else {
                multiply_tokens<1>(p, at, pair, first + r, last, i, tokens_stop);
            }
        }
    }
}

void multiply_rows(const Product& p, int64_t first, int64_t last) {
    if (p.count <= kFew) return multiply_few(p, first, last);
    Block tile[kTileRows / kEight * kGroupBlocks];
    const int64_t rows = p.count <= kTokens ? kGroups * kEight : kTileRows;
    for (int64_t row = first; row < last; row += rows) {
        for (int64_t pair = 0; pair < num_pairs(p.weight.in); pair += kPairs) {
            multiply_tile(p, tile, pair, row, smaller(row + rows, last), rows);
        }
    }
}

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
