// The tiles of AMX: their shapes, what compilers do not know of them, and how e2m1 codes become rows of them.
#pragma once

#ifdef __AMX_INT8__

#include <immintrin.h>

#include <cstdint>

namespace tenfold::TENFOLD_ISA {
namespace {

// Rows, and bytes of each, of a tile; none of one that is not used.
struct TileShape {
    int64_t rows, bytes;
};

// The shapes of all eight tiles, for one thread and until the object is gone.
class Tiles {
public:
    explicit Tiles(const TileShape (&shapes)[8]) {
        alignas(64) uint8_t words[64] = {1};
        for (int tile = 0; tile < 8; ++tile) {
            words[16 + 2 * tile] = static_cast<uint8_t>(shapes[tile].bytes);
            words[48 + tile] = static_cast<uint8_t>(shapes[tile].rows);
        }
        _tile_loadconfig(words);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// Tiles are loaded from memory and stored there, which a compiler may not know.
inline void settle_memory() { __asm__ volatile("" ::: "memory"); }

// Two e2m1 codes lie in a byte; the table has twice the number of each code.
inline __m512i even_codes(__m512i pairs) { return _mm512_and_si512(pairs, _mm512_set1_epi8(15)); }
inline __m512i odd_codes(__m512i pairs) { return even_codes(_mm512_srli_epi16(pairs, 4)); }

inline __m512i doubled_e2m1() {
    return _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
}

// Of each 128 bits the lanes of four vectors become rows.
inline __attribute__((always_inline)) void transpose_quads(__m512i* v) {
    const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
    const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm512_unpacklo_epi64(a, c);
    v[1] = _mm512_unpackhi_epi64(a, c);
    v[2] = _mm512_unpacklo_epi64(b, d);
    v[3] = _mm512_unpackhi_epi64(b, d);
}

// Sixteen bytes of sixteen rows from `offset` on: v[i] has the i-th four of every row, row after row.
inline __attribute__((always_inline)) void load_quads(const uint8_t* const* rows, int64_t offset, __m512i (&v)[4]) {
    const auto load = [=](int row) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + offset));
    };
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm512_castsi128_si512(load(i));
        v[i] = _mm512_inserti32x4(v[i], load(i + 4), 1);
        v[i] = _mm512_inserti32x4(v[i], load(i + 8), 2);
        v[i] = _mm512_inserti32x4(v[i], load(i + 12), 3);
    }
    transpose_quads(v);
}

}  // namespace
}  // namespace tenfold::TENFOLD_ISA

#endif
