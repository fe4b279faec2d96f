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
        __asm__ volatile("" : : "r"(words) : "memory");  // gcc's header says that eight bytes are read
        _tile_loadconfig(words);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// Tiles are loaded from memory and stored there, which a compiler may not know.
inline void settle_memory() { __asm__ volatile("" ::: "memory"); }

constexpr int64_t kTileSide = 16;  // rows of a tile
constexpr int64_t kTileBytes = 1024, kTileFloats = 256;

// Tiles 0 to `count` - 1, up to six.
template <int count>
inline void zero_tiles() {
    _tile_zero(0);
    if (count > 1) _tile_zero(1);
    if (count > 2) _tile_zero(2);
    if (count > 3) _tile_zero(3);
    if (count > 4) _tile_zero(4);
    if (count > 5) _tile_zero(5);
}

// Tiles 0 to 3 are the sums of a pair of tiles by another, or 0 and 1 alone. They begin with zeros or with what lies at
// `first` and, for 2 and 3, at `others`.
template <int pairs>
inline void begin_sums(bool zeros, const float* first, const float* others) {
    if (zeros) return zero_tiles<2 * pairs>();
    _tile_loadd(0, first, 64);
    _tile_loadd(1, first + kTileFloats, 64);
    if (pairs == 2) _tile_loadd(2, others, 64);
    if (pairs == 2) _tile_loadd(3, others + kTileFloats, 64);
}

template <int pairs>
inline void store_sums(float* first, float* others) {
    _tile_stored(0, first, 64);
    _tile_stored(1, first + kTileFloats, 64);
    if (pairs == 2) _tile_stored(2, others, 64);
    if (pairs == 2) _tile_stored(3, others + kTileFloats, 64);
}

// Adds two tiles on the right times one on the left, to sums 0 and 1, and times another, to 2 and 3. What is on the left
// is in two parts, of which the second lies `rest` bytes behind the first.
template <int pairs>
inline void add_split_left(const uint8_t* left, const uint8_t* other, int64_t rest, const uint8_t* right,
                           const uint8_t* next) {
    _tile_loadd(4, left, 64);
    _tile_loadd(6, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, next, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (pairs == 2) {
        _tile_loadd(5, other, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_loadd(4, left + rest, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (pairs == 2) {
        _tile_loadd(5, other + rest, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

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

// The i-th four bytes of each row from the i-th lines: v[i] has them row after row.
inline __attribute__((always_inline)) void transpose_lines(__m512i (&v)[16]) {
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) transpose_quads(v + i);  // v[i + j]: fours j, j + 4, ... of rows i to i + 3
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {  // now whole quarters change places
        const __m512i a = _mm512_shuffle_i32x4(v[j], v[j + 4], 0x88), b = _mm512_shuffle_i32x4(v[j], v[j + 4], 0xDD);
        const __m512i c = _mm512_shuffle_i32x4(v[j + 8], v[j + 12], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(v[j + 8], v[j + 12], 0xDD);
        v[j] = _mm512_shuffle_i32x4(a, c, 0x88);
        v[j + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        v[j + 8] = _mm512_shuffle_i32x4(a, c, 0xDD);
        v[j + 12] = _mm512_shuffle_i32x4(b, d, 0xDD);
    }
}

// The two bytes of each e4m3 number in bf16, by its code without the sign.
struct E4m3Bytes {
    alignas(64) uint8_t lower[128], upper[128];
};

constexpr E4m3Bytes make_e4m3_bytes() {
    E4m3Bytes bytes{};
    for (int code = 1; code < 128; ++code) {
        int exponent = code >> 3, mantissa = code & 7;
        if (exponent == 0) {  // subnormal there, not here
            for (exponent = 1; (mantissa & 8) == 0; --exponent) mantissa *= 2;
        }
        const int bits = code == 127 ? 0x7FC0 : (exponent + 120) << 7 | (mantissa & 7) << 4;
        bytes.lower[code] = static_cast<uint8_t>(bits & 255);
        bytes.upper[code] = static_cast<uint8_t>(bits >> 8);
    }
    return bytes;
}

constexpr E4m3Bytes kE4m3 = make_e4m3_bytes();

// The numbers of codes at even places, and of those at odd ones.
inline __attribute__((always_inline)) void unpack_e4m3(__m512i codes, __m512i& even, __m512i& odd) {
    const __m512i* const lower = reinterpret_cast<const __m512i*>(kE4m3.lower);
    const __m512i* const upper = reinterpret_cast<const __m512i*>(kE4m3.upper);
    const __m512i low = _mm512_permutex2var_epi8(lower[0], codes, lower[1]);
    const __m512i size = _mm512_permutex2var_epi8(upper[0], codes, upper[1]);
    const __m512i high = _mm512_or_si512(size, _mm512_and_si512(codes, _mm512_set1_epi8(-128)));
    const __m512i mask = _mm512_set1_epi16(255);
    even = _mm512_or_si512(_mm512_and_si512(low, mask), _mm512_slli_epi16(high, 8));
    odd = _mm512_or_si512(_mm512_srli_epi16(low, 8), _mm512_andnot_si512(mask, high));
}

// The nearest bf16 numbers, even ones of two, in the upper halves.
inline __m512i nearest_bf16(__m512i bits) {
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, even), _mm512_set1_epi32(0x7FFF));
}

// bf16 numbers as float32.
inline __m512 bf16_numbers(__m256i half) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// 32 finite numbers: the nearest bf16 numbers, and those nearest to what these leave.
inline void two_parts(__m512 first, __m512 second, __m512i& upper, __m512i& rest) {
    upper = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
    const __m512 a = _mm512_sub_ps(first, bf16_numbers(_mm512_castsi512_si256(upper)));
    const __m512 b = _mm512_sub_ps(second, bf16_numbers(_mm512_extracti64x4_epi64(upper, 1)));
    rest = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
}

// The parts of sixteen numbers; what is not finite is all in the first, and the largest are not rounded to infinity.
__attribute__((noinline)) void split_slowly(__m512 x, uint16_t* upper, uint16_t* rest) {
    const __m512i bits = _mm512_castps_si512(x), sign = _mm512_set1_epi32(static_cast<int32_t>(0x80000000));
    const __m512i infinity = _mm512_set1_epi32(0x7F800000), size = _mm512_andnot_si512(sign, bits);
    const __mmask16 finite = _mm512_cmplt_epi32_mask(size, infinity), nan = _mm512_cmpgt_epi32_mask(size, infinity);
    const __m512i nearest = nearest_bf16(bits);
    const __mmask16 fits = _mm512_cmplt_epi32_mask(_mm512_andnot_si512(sign, nearest), infinity);
    __m512i first = _mm512_srli_epi32(_mm512_mask_mov_epi32(bits, fits & finite, nearest), 16);
    first = _mm512_mask_set1_epi32(first, nan, 0x7FC0);
    const __m512 left = _mm512_maskz_sub_ps(finite, x, _mm512_castsi512_ps(_mm512_slli_epi32(first, 16)));
    const __m512i second = _mm512_srli_epi32(nearest_bf16(_mm512_castps_si512(left)), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(upper), _mm512_cvtepi32_epi16(first));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rest), _mm512_cvtepi32_epi16(second));
}

// The parts of 32 numbers of any kind.
inline void split_numbers(__m512 first, __m512 second, uint16_t* upper, uint16_t* rest) {
    const __m512 limit = _mm512_set1_ps(0x1.fp127F);
    const auto usual = [limit](__m512 x) { return _mm512_cmp_ps_mask(_mm512_abs_ps(x), limit, _CMP_LT_OQ); };
    if ((usual(first) & usual(second)) == 0xFFFF) {
        __m512i parts[2];
        two_parts(first, second, parts[0], parts[1]);
        _mm512_storeu_si512(upper, parts[0]);
        _mm512_storeu_si512(rest, parts[1]);
        return;
    }
    split_slowly(first, upper, rest);
    split_slowly(second, upper + 16, rest + 16);
}

}  // namespace
}  // namespace tenfold::TENFOLD_ISA

#endif
