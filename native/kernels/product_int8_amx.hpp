// AMX: what product_int8.cpp leaves to this file.
//
// Sixteen weight rows times sixteen activation rows, a block of 32 columns at a time, by one instruction; a block's
// sums, exact integers, leave the tiles, take both scales and are added one block after the other. While one block is
// multiplied, the one before is added. For few activation rows vpdpbusd makes the same sums of a block.
#pragma once

#include "amx.hpp"
#include "product_int8.hpp"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int64_t kSideRows = 16;     // weight rows of a tile, and activation rows
constexpr int64_t kPanelBlocks = 16;  // blocks of 32 columns that are unpacked at a time
constexpr int64_t kBytesAhead = 512;  // of a row's codes that are asked for before they are read
constexpr int64_t kGroups = 4;        // groups of weight rows that activations, once near, are multiplied with

// Activations as bytes [panel rows][in], then [in / 32][panel rows] half their scales and -12 times their sums. Rows lie
// apart by an odd number of cache lines: sixteen that fall into one set of the cache would drive each other out.
inline int64_t record_bytes(int64_t in) { return ((in + 63) / 64 | 1) * 64; }

inline const uint8_t* bytes_of_row(const Product& p, int64_t i) {
    return reinterpret_cast<const uint8_t*>(p.panels) + (p.first_row + i) * record_bytes(p.weight.in);
}

inline const float* scales_of_row(const Product& p, int64_t i, int64_t block) {
    const uint8_t* const scales = reinterpret_cast<const uint8_t*>(p.panels) + p.panel_rows * record_bytes(p.weight.in);
    return reinterpret_cast<const float*>(scales) + block * p.panel_rows + p.first_row + i;
}

inline const int32_t* corrections_of_row(const Product& p, int64_t i, int64_t block) {
    return reinterpret_cast<const int32_t*>(scales_of_row(p, i, p.weight.in / 32 + block));
}

// Words of four even columns and of four odd ones in turns, as the nibbles of eight columns of a weight become bytes.
inline void keep_block(const Rounded& block, int64_t in, void* panels, int64_t panel_rows, int64_t row, int64_t at) {
    uint8_t* const bytes = static_cast<uint8_t*>(panels);
    const __m128i even = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block.even));
    const __m128i odd = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block.odd));
    __m128i* const to = reinterpret_cast<__m128i*>(bytes + row * record_bytes(in) + 32 * at);
    _mm_storeu_si128(to, _mm_unpacklo_epi32(even, odd));
    _mm_storeu_si128(to + 1, _mm_unpackhi_epi32(even, odd));
    float* const scales = reinterpret_cast<float*>(bytes + panel_rows * record_bytes(in));
    scales[at * panel_rows + row] = block.half;
    reinterpret_cast<int32_t*>(scales)[(in / 32 + at) * panel_rows + row] = -12 * block.sum;
}

// A panel of sixteen weight rows: twice the numbers [block][word of four columns][row][4], and the scales.
struct Unpacked {
    alignas(64) int8_t words[kPanelBlocks][8 * kSideRows * 4];
    alignas(64) float scales[kPanelBlocks][kSideRows];
};

// Of a block v[i] has eight columns of each row, two in a byte.
inline void unpack_block(const uint8_t* const* codes, int64_t offset, int8_t* words) {
    const __m512i doubled = doubled_e2m1();
    __m512i v[4];
    load_quads(codes, offset, v);
    for (int i = 0; i < 4; ++i) {
        _mm512_store_si512(words + 128 * i, _mm512_shuffle_epi8(doubled, even_codes(v[i])));
        _mm512_store_si512(words + 128 * i + 64, _mm512_shuffle_epi8(doubled, odd_codes(v[i])));
    }
}

// The scale bytes of four blocks of sixteen rows, or of as many as there are.
inline __m512i scale_bytes(const uint8_t* const* scale, int64_t first, int64_t count) {
    alignas(64) int32_t words[kSideRows];
    for (int r = 0; r < kSideRows; ++r) {
        if (count == 4) {
            words[r] = static_cast<int32_t>(scale[r] - scale[0]);
        } else {
            words[r] = 0;
            std::memcpy(words + r, scale[r] + first, static_cast<size_t>(count));
        }
    }
    const __m512i loaded = _mm512_load_si512(words);
    return count == 4 ? _mm512_i32gather_epi32(loaded, scale[0] + first, 1) : loaded;
}

// The scales of one of those blocks.
inline __m512 scales_of(__m512i bytes, int64_t block) {
    const __m512i code = _mm512_and_si512(_mm512_srli_epi32(bytes, static_cast<unsigned>(8 * block)),
                                          _mm512_set1_epi32(255));
    const __m512i number = _mm512_max_epu32(_mm512_slli_epi32(code, 23), _mm512_set1_epi32(0x00400000));
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(code, _mm512_set1_epi32(255));
    return _mm512_castsi512_ps(_mm512_mask_set1_epi32(number, nan, 0x7FC00000));
}

// ---------------------------------------------------------------- few activation rows: weights go by in registers

// As bytes 2 w + 12, unsigned, which vpdpbusd multiplies; the sums of a block are the ones of the tiles.
template <int Tokens>
TENFOLD_APART void dot_rows(const Product& p, int64_t row, int64_t last) {
    const __m512i lifted =
        _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    const Group<kSideRows> rows(p.weight, row, last);
    const __mmask16 exist = static_cast<__mmask16>((1U << smaller(last - row, kSideRows)) - 1);
    const int64_t blocks = p.weight.in / 32, row_bytes = 16 * blocks;
    __m512 sums[Tokens];
    for (int t = 0; t < Tokens; ++t) {
        sums[t] = p.add ? _mm512_maskz_loadu_ps(exist, y_row(p, t, row)) : _mm512_setzero_ps();
    }
    for (int64_t first = 0; first < blocks; first += 4) {
        const int64_t count = smaller(blocks - first, 4);
        const int64_t ahead = 16 * first + kBytesAhead;  // in these rows or in the next sixteen
        for (const uint8_t* codes : rows.codes) {
            const int64_t next = ahead < row_bytes ? ahead : ahead + (kSideRows - 1) * row_bytes;
            _mm_prefetch(reinterpret_cast<const char*>(codes) + next, _MM_HINT_T0);
        }
        const __m512i bytes = scale_bytes(rows.scale, first, count);
        for (int64_t b = 0; b < count; ++b) {
            __m512i v[4];
            load_quads(rows.codes, 16 * (first + b), v);
            const float* const x_scales = scales_of_row(p, 0, first + b);
            const int32_t* const corrections = corrections_of_row(p, 0, first + b);
            const __m512 scales = scales_of(bytes, b);
            __m512i dots[Tokens];
            for (int t = 0; t < Tokens; ++t) dots[t] = _mm512_set1_epi32(corrections[t]);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const __m512i even = _mm512_shuffle_epi8(lifted, even_codes(v[i]));
                const __m512i odd = _mm512_shuffle_epi8(lifted, odd_codes(v[i]));
                for (int t = 0; t < Tokens; ++t) {
                    int32_t words[2];
                    std::memcpy(words, bytes_of_row(p, t) + 32 * (first + b) + 8 * i, 8);
                    dots[t] = _mm512_dpbusd_epi32(dots[t], even, _mm512_set1_epi32(words[0]));
                    dots[t] = _mm512_dpbusd_epi32(dots[t], odd, _mm512_set1_epi32(words[1]));
                }
            }
            for (int t = 0; t < Tokens; ++t) {
                const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(x_scales[t]));
                sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t]), scale, sums[t]);
            }
        }
    }
    for (int t = 0; t < Tokens; ++t) _mm512_mask_storeu_ps(y_row(p, t, row), exist, sums[t]);
}

void multiply_few(const Product& p, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row += kSideRows) {
        switch (p.count) {
            case 1: dot_rows<1>(p, row, last); break;
            case 2: dot_rows<2>(p, row, last); break;
            case 3: dot_rows<3>(p, row, last); break;
            default: dot_rows<kFew>(p, row, last); break;
        }
    }
}

// ---------------------------------------------------------------- more rows: weights are unpacked first

// Blocks [block, block + count) of weight rows from `row` on; the panel behind them is asked for.
TENFOLD_APART void unpack(const Matrix& weight, int64_t row, int64_t last, int64_t block, int64_t count,
                          Unpacked& to) {
    const Group<kSideRows> rows(weight, row, last);
    const int64_t blocks = weight.in / 32, next = smaller(blocks - block - count, kPanelBlocks);
    for (const uint8_t* codes : rows.codes) {
        if (next > 0) prefetch_lines(codes + 16 * (block + count), 16 * next);
        else prefetch_lines(codes + kSideRows * 16 * blocks, 16 * smaller(blocks, kPanelBlocks));
    }
    for (int64_t b = 0; b < count; ++b) unpack_block(rows.codes, 16 * (block + b), to.words[b]);
    for (int64_t b = 0; b < count; b += 4) {
        const int64_t some = smaller(count - b, 4);
        const __m512i bytes = scale_bytes(rows.scale, block + b, some);
        for (int64_t i = 0; i < some; ++i) _mm512_store_ps(to.scales[b + i], scales_of(bytes, i));
    }
}

// Tiles 0 and 3: sixteen activation rows and their sums; 1 and 4: those that are left over; 2: a block of weights.
template <bool Whole>
inline void multiply_block(const uint8_t* x, int64_t stride, const int8_t* words, int32_t* dots) {
    _tile_loadd(2, words, 64);
    if constexpr (Whole) {
        _tile_loadd(0, x, stride);
        _tile_zero(3);
        _tile_dpbssd(3, 0, 2);
        _tile_stored(3, dots, 64);
    } else {
        _tile_loadd(1, x, stride);
        _tile_zero(4);
        _tile_dpbssd(4, 1, 2);
        _tile_stored(4, dots, 64);
    }
    settle_memory();
}

// `tokens` activation rows from i on, `Tokens` at most, times an unpacked panel; y is added to behind the first one.
template <int Tokens, bool Whole>
TENFOLD_APART void multiply_panel(const Product& p, const Unpacked& weights, int64_t block, int64_t count, int64_t i,
                                  int64_t tokens, int64_t row, int64_t rows) {
    const __mmask16 exist = static_cast<__mmask16>((1U << rows) - 1);
    __m512 sums[Tokens];
#pragma GCC unroll 16
    for (int t = 0; t < Tokens; ++t) {
        const bool begun = (p.add || block > 0) && t < tokens;
        sums[t] = begun ? _mm512_maskz_loadu_ps(exist, y_row(p, i + t, row)) : _mm512_setzero_ps();
    }
    alignas(64) int32_t dots[2][kSideRows * kSideRows];
    const uint8_t* const x = bytes_of_row(p, i) + 32 * block;
    const int64_t stride = record_bytes(p.weight.in);
    settle_memory();
    multiply_block<Whole>(x, stride, weights.words[0], dots[0]);
    for (int64_t b = 0; b < count; ++b) {
        if (b + 1 < count) multiply_block<Whole>(x + 32 * (b + 1), stride, weights.words[b + 1], dots[(b + 1) % 2]);
        const float* const x_scales = scales_of_row(p, i, block + b);
        const __m512 scales = _mm512_load_ps(weights.scales[b]);
#pragma GCC unroll 16
        for (int t = 0; t < Tokens; ++t) {
            const __m512 dot = _mm512_cvtepi32_ps(_mm512_load_si512(dots[b % 2] + t * kSideRows));
            sums[t] = _mm512_fmadd_ps(dot, _mm512_mul_ps(scales, _mm512_set1_ps(x_scales[t])), sums[t]);
        }
    }
#pragma GCC unroll 16
    for (int t = 0; t < Tokens; ++t) {
        if (t < tokens) _mm512_mask_storeu_ps(y_row(p, i + t, row), exist, sums[t]);
    }
}

inline void multiply_any(const Product& p, const Unpacked& weights, int64_t block, int64_t count, int64_t i,
                         int64_t row, int64_t rows) {
    const int64_t tokens = p.count - i;
    if (tokens >= kSideRows) multiply_panel<kSideRows, true>(p, weights, block, count, i, kSideRows, row, rows);
    else if (tokens > 8) multiply_panel<kSideRows, false>(p, weights, block, count, i, tokens, row, rows);
    else multiply_panel<8, false>(p, weights, block, count, i, tokens, row, rows);
}

void multiply_rows(const Product& p, int64_t first, int64_t last) {
    if (p.count <= kFew) return multiply_few(p, first, last);
    const int64_t left = p.count % kSideRows == 0 ? kSideRows : p.count % kSideRows;
    const Tiles tiles({{kSideRows, 32}, {left, 32}, {8, 64}, {kSideRows, 64}, {left, 64}, {}, {}, {}});
    Unpacked weights[kGroups];
    const int64_t blocks = p.weight.in / 32, together = kSideRows * (p.count <= kSideRows ? 1 : kGroups);
    for (int64_t row = first; row < last; row += together) {
        const int64_t stop = smaller(row + together, last);
        for (int64_t block = 0; block < blocks; block += kPanelBlocks) {
            const int64_t count = smaller(blocks - block, kPanelBlocks);
            for (int64_t r = row; r < stop; r += kSideRows) {
                unpack(p.weight, r, last, block, count, weights[(r - row) / kSideRows]);
            }
            for (int64_t i = 0; i < p.count; i += kSideRows) {
                for (int64_t r = row; r < stop; r += kSideRows) {
                    const Unpacked& group = weights[(r - row) / kSideRows];
                    multiply_any(p, group, block, count, i, r, smaller(stop - r, kSideRows));
                }
            }
        }
    }
}

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
