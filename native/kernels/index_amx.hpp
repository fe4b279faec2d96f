// Index scores by AMX: sixteen heads times sixteen keys in one instruction, for heads and keys of 128 channels.
//
// A row of e2m1 has four scales, which would have to be applied one after the other to sums that leave the tiles
// each time. But whole numbers up to 12 leave room for three doublings in a byte: where a row's scales are at most
// three powers of two apart, as good as always since rows are spread by Hadamard before they are rounded, the larger
// ones move into the numbers, exactly, and one scale is left. Then a query's sum over heads needs a key's scale only
// at its end. Sums of whole numbers below 2^24 times powers of two are exact, so scores have the bits of the others'.
#pragma once

#ifdef __AMX_INT8__

#include "amx.hpp"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int64_t tile_side = 16;  // heads, or keys, of a tile
constexpr int64_t pair_keys = 2 * tile_side;  // keys that stay in the tiles while heads go by
constexpr int64_t folded_dim = 128;
constexpr TileShape whole_tile = {tile_side, 64};
constexpr uint32_t lowest_exponent = 87, highest_exponent = 167;  // of scales: no sum nears the ends of float32

// Sixteen keys as bytes in words of four channels, in the order of `to_bytes`, and the scale of each.
struct FoldedKeys {
    int8_t* words;  // [dim / 4][16 keys][4]
    float* scales;  // [16 keys]
};

// Of a query's heads: bytes [heads][dim], and the weights times the heads' scales [heads].
struct FoldedQuery {
    int8_t* bytes;
    float* weights;
};

inline bool may_fold(uint32_t lowest, uint32_t highest) {
    return highest - lowest <= 3 && lowest >= lowest_exponent && highest <= highest_exponent;
}

// One head from what `to_bytes` made of its four blocks; false if their scales are too far apart.
inline bool fold_head(const uint8_t* bytes, const float* scales, float weight, int8_t* folded, float* scaled_weight) {
    uint32_t lowest = 255, highest = 0;
    for (int b = 0; b < folded_dim / 32; ++b) {
        const uint32_t exponent = to_bits(scales[b]) >> 23;
        if (scales[b] == 0.0F) continue;  // a block of zeros
        if (exponent < lowest) lowest = exponent;
        if (exponent > highest) highest = exponent;
    }
    if (highest == 0) lowest = highest = 127;
    if (!may_fold(lowest, highest)) return false;
    for (int c = 0; c < folded_dim; ++c) {
        const uint32_t exponent = to_bits(scales[c / 32]) >> 23;
        const int32_t doublings = exponent > lowest ? static_cast<int32_t>(exponent - lowest) : 0;
        folded[c] = static_cast<int8_t>((bytes[c] - 12) * (1 << doublings));
    }
    *scaled_weight = weight * from_bits(lowest << 23);
    const uint32_t exponent = to_bits(*scaled_weight) << 1 >> 24;
    return weight == 0.0F || (exponent >= lowest_exponent && exponent <= highest_exponent);
}

// Eight lanes of 32 bits of sixteen rows: v[i] holds 32 bytes of row i and of row i + 8 -> v[i] lane i of all sixteen.
inline __attribute__((always_inline)) void transpose(__m512i* v) {
    transpose_quads(v);
    transpose_quads(v + 4);
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
    const __m512i high = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
    for (int i = 0; i < 4; ++i) {
        const __m512i first = v[i], second = v[i + 4];
        v[i] = _mm512_permutex2var_epi64(first, low, second);
        v[i + 4] = _mm512_permutex2var_epi64(first, high, second);
    }
}

// Sixteen rows, of which `count` exist; false if one of those has scales too far apart.
inline bool fold_keys(const uint8_t* const* rows, const RowLayout& layout, int64_t count, const FoldedKeys& to) {
    constexpr int kBlocks = folded_dim / 32;
    __m512i exponents[kBlocks];
    uint32_t packed[tile_side];
    for (int i = 0; i < tile_side; ++i) __builtin_memcpy(packed + i, rows[i] + layout.scale_offset, 4);
    const __m512i codes = _mm512_loadu_si512(packed);
    __m512i lowest = _mm512_set1_epi32(255), highest = _mm512_setzero_si512();
    for (int b = 0; b < kBlocks; ++b) {
        exponents[b] = _mm512_and_si512(_mm512_srli_epi32(codes, static_cast<unsigned>(8 * b)), _mm512_set1_epi32(255));
        lowest = _mm512_min_epi32(lowest, exponents[b]);
        highest = _mm512_max_epi32(highest, exponents[b]);
    }
    const __mmask16 exist = static_cast<__mmask16>((1U << count) - 1);
    const __mmask16 wrong =
        _mm512_cmpgt_epi32_mask(_mm512_sub_epi32(highest, lowest), _mm512_set1_epi32(3)) |
        _mm512_cmplt_epi32_mask(lowest, _mm512_set1_epi32(lowest_exponent)) |
        _mm512_cmpgt_epi32_mask(highest, _mm512_set1_epi32(highest_exponent));
    if ((wrong & exist) != 0) return false;
    _mm512_store_si512(to.scales, _mm512_slli_epi32(lowest, 23));

    const __m512i doubled = doubled_e2m1(), low_bytes = _mm512_set1_epi32(0x01010101);
    for (int half = 0; half < 2; ++half) {
        __m512i v[8];
        for (int i = 0; i < 8; ++i) {
            const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[i] + 32 * half));
            const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[i + 8] + 32 * half));
            v[i] = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
        }
        transpose(v);
        for (int block = 0; block < 2; ++block) {
            const __m512i doublings = _mm512_sub_epi32(exponents[2 * half + block], lowest);
            // What a shift of 32 bits carries from one byte into the next is taken off.
            const __m512i carried = _mm512_sub_epi32(_mm512_sllv_epi32(low_bytes, doublings), low_bytes);
            for (int i = 0; i < 4; ++i) {
                const __m512i pairs = v[4 * block + i];
                const __m512i even = _mm512_shuffle_epi8(doubled, even_codes(pairs));
                const __m512i odd = _mm512_shuffle_epi8(doubled, odd_codes(pairs));
                int8_t* const words = to.words + (16 * half + 8 * block + 2 * i) * 64;
                _mm512_store_si512(words, _mm512_andnot_si512(carried, _mm512_sllv_epi32(even, doublings)));
                _mm512_store_si512(words + 64, _mm512_andnot_si512(carried, _mm512_sllv_epi32(odd, doublings)));
            }
        }
    }
    return true;
}

// A pair of tiles of keys, which lie in the tiles 2 to 5, times sixteen heads.
inline void multiply_heads(const int8_t* heads, int32_t (*dots)[tile_side * tile_side]) {
    _tile_loadd(0, heads, folded_dim);
    _tile_loadd(1, heads + 64, folded_dim);
    _tile_zero(6);
    _tile_zero(7);
    _tile_dpbssd(6, 0, 2);
    _tile_dpbssd(7, 0, 4);
    _tile_dpbssd(6, 1, 3);
    _tile_dpbssd(7, 1, 5);
    _tile_stored(6, dots[0], 64);
    _tile_stored(7, dots[1], 64);
    settle_memory();
}

// The sum over a query's heads of weight * relu(head . key), query after query.
class HeadSums {
public:
    HeadSums(float* to, int64_t stride, int64_t each) : to_(to), stride_(stride), each_(each), left_(each) {}

    void add(const int32_t (*dots)[tile_side * tile_side], const float* weights, int64_t heads) {
        for (int64_t head = 0; head < heads;) {
            const int64_t stop = head + left_ < heads ? head + left_ : heads;
            left_ -= stop - head;
            for (; head < stop; ++head) {
                const __m512 weight = _mm512_set1_ps(weights[head]);
                for (int t = 0; t < 2; ++t) {
                    const __m512 dot = _mm512_cvtepi32_ps(_mm512_load_si512(dots[t] + head * tile_side));
                    sums_[t] = _mm512_fmadd_ps(_mm512_max_ps(dot, _mm512_setzero_ps()), weight, sums_[t]);
                }
            }
            if (left_ > 0) return;
            for (int t = 0; t < 2; ++t) {
                _mm512_store_ps(to_ + t * tile_side, sums_[t]);
                sums_[t] = _mm512_setzero_ps();
            }
            to_ += stride_;
            left_ = each_;
        }
    }

private:
    __m512 sums_[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    float* to_;
    int64_t stride_, each_;
    int64_t left_;  // heads of the query at hand
};

// scores[query][key] without the keys' scales. The heads of all queries lie one behind the other, `each` to a query;
// there is room for heads up to a multiple of tile_side and for keys up to one of pair_keys. While heads are
// multiplied, those before them are summed.
inline void score_folded(const FoldedQuery& queries, int64_t heads, int64_t each, const FoldedKeys& keys,
                         int64_t num_keys, float* scores, int64_t stride) {
    alignas(64) int32_t dots[2][2][tile_side * tile_side];
    settle_memory();
    for (int64_t key = 0; key < num_keys; key += pair_keys) {
        const int8_t* const words = keys.words + key * folded_dim;
        _tile_loadd(2, words, 64);
        _tile_loadd(3, words + 64 * tile_side, 64);
        _tile_loadd(4, words + 128 * tile_side, 64);
        _tile_loadd(5, words + 192 * tile_side, 64);
        HeadSums sums(scores + key, stride, each);
        multiply_heads(queries.bytes, dots[0]);
        for (int64_t first = 0; first < heads; first += tile_side) {
            const int64_t next = first + tile_side, place = first / tile_side % 2;
            if (next < heads) multiply_heads(queries.bytes + next * folded_dim, dots[1 - place]);
            sums.add(dots[place], queries.weights + first, next < heads ? tile_side : heads - first);
        }
    }
}

}  // namespace
}  // namespace tenfold::TENFOLD_ISA

#endif
