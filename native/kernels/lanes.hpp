// Vectors that hold the same eight lanes of `kSide` weight rows side by side: one row with AVX2, two with AVX-512.
//
// Every row is summed in eight lanes of its own, in the same order, so both widths give the same bits.
#pragma once

#ifdef __AVX2__

#include <immintrin.h>

#include <cstdint>

namespace tenfold::TENFOLD_ISA {
namespace {

// The same names for both widths.

inline __m256 add_product(__m256 a, __m256 b, __m256 sum) { return _mm256_fmadd_ps(a, b, sum); }
inline __m256 as_floats(__m256i v) { return _mm256_castsi256_ps(v); }
inline __m256i both(__m256i a, __m256i b) { return _mm256_and_si256(a, b); }
inline __m256i larger_bytes(__m256i a, __m256i b) { return _mm256_max_epu8(a, b); }
inline __m256i twice_bytes(__m256i v) { return _mm256_add_epi8(v, v); }
inline __m256i down16_signed(__m256i v, int bits) { return _mm256_srai_epi16(v, bits); }
inline __m256i up16(__m256i v, int bits) { return _mm256_slli_epi16(v, bits); }
inline __m256i up32(__m256i v, int bits) { return _mm256_slli_epi32(v, bits); }
inline __m256i all_lanes(__m256i, int32_t value) { return _mm256_set1_epi32(value); }
inline bool has_byte(__m256i v, int8_t byte) {
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_set1_epi8(byte))) != 0;
}

#ifdef __AVX512VNNI__

inline __m512 add_product(__m512 a, __m512 b, __m512 sum) { return _mm512_fmadd_ps(a, b, sum); }
inline __m512 times(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
inline __m512 as_floats(__m512i v) { return _mm512_castsi512_ps(v); }
inline __m512 to_floats(__m512i v) { return _mm512_cvtepi32_ps(v); }
inline __m512i both(__m512i a, __m512i b) { return _mm512_and_si512(a, b); }
inline __m512i look_up(__m512i table, __m512i at) { return _mm512_shuffle_epi8(table, at); }
inline __m512i larger_bytes(__m512i a, __m512i b) { return _mm512_max_epu8(a, b); }
inline __m512i twice_bytes(__m512i v) { return _mm512_add_epi8(v, v); }
inline __m512i down16(__m512i v, int bits) { return _mm512_srli_epi16(v, static_cast<unsigned>(bits)); }
inline __m512i down16_signed(__m512i v, int bits) { return _mm512_srai_epi16(v, static_cast<unsigned>(bits)); }
inline __m512i up16(__m512i v, int bits) { return _mm512_slli_epi16(v, static_cast<unsigned>(bits)); }
inline __m512i up32(__m512i v, int bits) { return _mm512_slli_epi32(v, static_cast<unsigned>(bits)); }
inline __m512i all_lanes(__m512i, int32_t value) { return _mm512_set1_epi32(value); }
inline bool has_byte(__m512i v, int8_t byte) { return _mm512_cmpeq_epi8_mask(v, _mm512_set1_epi8(byte)) != 0; }

constexpr int kSide = 2;
using Floats = __m512;
using Ints = __m512i;

inline Floats no_floats() { return _mm512_setzero_ps(); }
inline Ints no_ints() { return _mm512_setzero_si512(); }
inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline Floats all_floats(float value) { return _mm512_set1_ps(value); }
inline void store(float* to, Floats v) { _mm512_storeu_ps(to, v); }

// Eight numbers, or 32 bytes, beside each row; 16 bytes beside each half of a row.
inline Floats spread(const float* from) {
    return _mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_loadu_pd(reinterpret_cast<const double*>(from))));
}
inline Ints spread(const void* from) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
inline Ints spread(__m128i bytes) { return _mm512_broadcast_i32x4(bytes); }

// sum + a times the eight numbers at x, beside each row.
inline Floats add_product_of(Floats a, const float* x, Floats sum) { return add_product(a, spread(x), sum); }

// 32 bytes of each row.
inline Ints beside(const uint8_t* const* rows, int64_t offset) {
    const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[0] + offset));
    const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[1] + offset));
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

// start + products of unsigned bytes a, b and signed bytes x, y, by fours.
inline Ints dot_bytes(Ints start, Ints a, Ints x, Ints b, Ints y) {
    return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(start, a, x), b, y);
}

inline __m256 row_of(Floats v, int side) {
    return side == 0 ? _mm512_castps512_ps256(v) : _mm512_extractf32x8_ps(v, 1);
}

#else

constexpr int kSide = 1;
using Floats = __m256;
using Ints = __m256i;

inline Floats no_floats() { return _mm256_setzero_ps(); }
inline Ints no_ints() { return _mm256_setzero_si256(); }
inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
inline Floats all_floats(float value) { return _mm256_set1_ps(value); }
inline void store(float* to, Floats v) { _mm256_storeu_ps(to, v); }
inline Floats spread(const float* from) { return _mm256_loadu_ps(from); }

// From memory: sixteen registers hold sums and weights, and loaded beforehand x would drive the sums out of them.
inline Floats add_product_of(Floats a, const float* x, Floats sum) {
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "m"(*reinterpret_cast<const float(*)[8]>(x)));
    return sum;
}

inline Ints beside(const uint8_t* const* rows, int64_t offset) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[0] + offset));
}

inline __m256 row_of(Floats v, int) { return v; }

#endif

constexpr int64_t kWide = 4 * kSide;  // rows of the four vectors that are summed at a time

// Of vectors of sums, `stride` apart, the lanes of one row.
inline __m256 row_at(const Floats* sums, int64_t stride, int64_t row) {
    return row_of(sums[row / kSide * stride], static_cast<int>(row % kSide));
}

}  // namespace
}  // namespace tenfold::TENFOLD_ISA

#endif
