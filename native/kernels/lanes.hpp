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
inline __m256i lower_bytes(__m256i v, __m256i by) { return _mm256_subs_epu8(v, by); }  // not below zero
inline __m256i twice_bytes(__m256i v) { return _mm256_add_epi8(v, v); }
inline __m256i down16_signed(__m256i v, int bits) { return _mm256_srai_epi16(v, bits); }
inline __m256i up16(__m256i v, int bits) { return _mm256_slli_epi16(v, bits); }
inline __m256i up32(__m256i v, int bits) { return _mm256_slli_epi32(v, bits); }
inline __m256i all_lanes(__m256i, int32_t value) { return _mm256_set1_epi32(value); }
inline __m256i spread_as(__m256i, __m128i bytes) { return _mm256_broadcastsi128_si256(bytes); }
inline __m256 times(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
inline __m256 to_floats(__m256i v) { return _mm256_cvtepi32_ps(v); }
inline __m256i look_up(__m256i table, __m256i at) { return _mm256_shuffle_epi8(table, at); }
inline __m256i down16(__m256i v, int bits) { return _mm256_srli_epi16(v, bits); }
inline __m256i sum32(__m256i a, __m256i b) { return _mm256_add_epi32(a, b); }
inline __m256i low8(__m256i a, __m256i b) { return _mm256_unpacklo_epi8(a, b); }
inline __m256i high8(__m256i a, __m256i b) { return _mm256_unpackhi_epi8(a, b); }
inline __m256i low16(__m256i a, __m256i b) { return _mm256_unpacklo_epi16(a, b); }
inline __m256i high16(__m256i a, __m256i b) { return _mm256_unpackhi_epi16(a, b); }
inline __m256i low32(__m256i a, __m256i b) { return _mm256_unpacklo_epi32(a, b); }
inline __m256i high32(__m256i a, __m256i b) { return _mm256_unpackhi_epi32(a, b); }
inline __m256i low64(__m256i a, __m256i b) { return _mm256_unpacklo_epi64(a, b); }
inline __m256i high64(__m256i a, __m256i b) { return _mm256_unpackhi_epi64(a, b); }
inline __m256i rounded_product16(__m256i a, __m256i b) { return _mm256_mulhrs_epi16(a, b); }  // a b 2^-15
inline bool has_byte(__m256i v, int8_t byte) {
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_set1_epi8(byte))) != 0;
}

// Halves taken together until one number is left.
inline __m128 halves_of(__m256 v, __m128 (*of)(__m128, __m128)) {
    const __m128 four = of(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = of(four, _mm_movehl_ps(four, four));
    return of(two, _mm_movehdup_ps(two));
}

inline float largest_of(__m256 v) {
    return _mm_cvtss_f32(halves_of(v, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); }));
}

inline float sum_of(__m256 v) {
    return _mm_cvtss_f32(halves_of(v, [](__m128 a, __m128 b) { return _mm_add_ps(a, b); }));
}

inline __m256 sizes_of(__m256 v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0F), v); }

#ifdef __AVX512VNNI__

inline __m512 add_product(__m512 a, __m512 b, __m512 sum) { return _mm512_fmadd_ps(a, b, sum); }
inline __m512 times(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
inline __m512 as_floats(__m512i v) { return _mm512_castsi512_ps(v); }
inline __m512 to_floats(__m512i v) { return _mm512_cvtepi32_ps(v); }
inline __m512i both(__m512i a, __m512i b) { return _mm512_and_si512(a, b); }
inline __m512i look_up(__m512i table, __m512i at) { return _mm512_shuffle_epi8(table, at); }
inline __m512i larger_bytes(__m512i a, __m512i b) { return _mm512_max_epu8(a, b); }
inline __m512i twice_bytes(__m512i v) { return _mm512_add_epi8(v, v); }
inline __m512i lower_bytes(__m512i v, __m512i by) { return _mm512_subs_epu8(v, by); }
inline __m512i down16(__m512i v, int bits) { return _mm512_srli_epi16(v, static_cast<unsigned>(bits)); }
inline __m512i down16_signed(__m512i v, int bits) { return _mm512_srai_epi16(v, static_cast<unsigned>(bits)); }
inline __m512i up16(__m512i v, int bits) { return _mm512_slli_epi16(v, static_cast<unsigned>(bits)); }
inline __m512i up32(__m512i v, int bits) { return _mm512_slli_epi32(v, static_cast<unsigned>(bits)); }
inline __m512i all_lanes(__m512i, int32_t value) { return _mm512_set1_epi32(value); }
inline __m512i spread_as(__m512i, __m128i bytes) { return _mm512_broadcast_i32x4(bytes); }
inline __m512i sum32(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
inline __m512i low8(__m512i a, __m512i b) { return _mm512_unpacklo_epi8(a, b); }
inline __m512i high8(__m512i a, __m512i b) { return _mm512_unpackhi_epi8(a, b); }
inline __m512i low16(__m512i a, __m512i b) { return _mm512_unpacklo_epi16(a, b); }
inline __m512i high16(__m512i a, __m512i b) { return _mm512_unpackhi_epi16(a, b); }
inline __m512i low32(__m512i a, __m512i b) { return _mm512_unpacklo_epi32(a, b); }
inline __m512i high32(__m512i a, __m512i b) { return _mm512_unpackhi_epi32(a, b); }
inline __m512i low64(__m512i a, __m512i b) { return _mm512_unpacklo_epi64(a, b); }
inline __m512i high64(__m512i a, __m512i b) { return _mm512_unpackhi_epi64(a, b); }
inline __m512i rounded_product16(__m512i a, __m512i b) { return _mm512_mulhrs_epi16(a, b); }
inline bool has_byte(__m512i v, int8_t byte) { return _mm512_cmpeq_epi8_mask(v, _mm512_set1_epi8(byte)) != 0; }

constexpr int kSide = 2;
using Floats = __m512;
using Ints = __m512i;

inline Floats no_floats() { return _mm512_setzero_ps(); }
inline Ints no_ints() { return _mm512_setzero_si512(); }
inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline Floats all_floats(float value) { return _mm512_set1_ps(value); }
inline void store(float* to, Floats v) { _mm512_storeu_ps(to, v); }
inline Ints load_ints(const void* from) { return _mm512_loadu_si512(from); }
inline void store_ints(void* to, Ints v) { _mm512_storeu_si512(to, v); }

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

// Bytes with the sign of others.
inline Ints signed_as(Ints bytes, Ints sign) {
    return _mm512_mask_sub_epi8(bytes, _mm512_movepi8_mask(sign), no_ints(), bytes);
}

// sum + products of numbers of 16 bits, by twos.
inline Ints add_pairs(Ints sum, Ints a, Ints b) { return _mm512_dpwssd_epi32(sum, a, b); }

// The halves of a's side added, beside those of b's.
inline Ints halves_sum(Ints a, Ints b) {
    const Ints first = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13), b);
    return sum32(first, _mm512_permutex2var_epi64(a, _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15), b));
}

// Pieces of eight bytes in the order in which low and high halves, each byte grown to two, come out in theirs.
inline Ints dealt(Ints bytes) { return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), bytes); }

inline __m256i sides_sum(Ints v) {
    return _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
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
inline Ints load_ints(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline void store_ints(void* to, Ints v) { _mm256_storeu_si256(static_cast<__m256i*>(to), v); }
inline Floats spread(const float* from) { return _mm256_loadu_ps(from); }
inline Ints spread(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline Ints spread(__m128i bytes) { return _mm256_broadcastsi128_si256(bytes); }

// From memory: sixteen registers hold sums and weights, and loaded beforehand x would drive the sums out of them.
inline Floats add_product_of(Floats a, const float* x, Floats sum) {
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "m"(*reinterpret_cast<const float(*)[8]>(x)));
    return sum;
}

inline Ints beside(const uint8_t* const* rows, int64_t offset) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[0] + offset));
}

inline Ints signed_as(Ints bytes, Ints sign) { return _mm256_sign_epi8(bytes, sign); }

inline Ints add_pairs(Ints sum, Ints a, Ints b) { return sum32(sum, _mm256_madd_epi16(a, b)); }

inline Ints halves_sum(Ints a, Ints b) {
    return sum32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}

inline Ints dealt(Ints bytes) { return _mm256_permute4x64_epi64(bytes, 0xD8); }

inline __m256i sides_sum(Ints v) { return v; }

inline __m256 row_of(Floats v, int) { return v; }

#endif

// Of codes seen, whose signs were shifted out (twice_bytes) and of which the largest was kept.
template <class Codes>
bool has_nan_code(Codes worst) {
    return has_byte(worst, -2);
}

constexpr int64_t kWide = 4 * kSide;  // rows of the four vectors that are summed at a time

// Of vectors of sums, `stride` apart, the lanes of one row.
inline __m256 row_at(const Floats* sums, int64_t stride, int64_t row) {
    return row_of(sums[row / kSide * stride], static_cast<int>(row % kSide));
}

}  // namespace
}  // namespace tenfold::TENFOLD_ISA

#endif
