// Decoding a packed row (spec 2.10, 2.11) to float32. Everything belongs to one instruction set.
#pragma once

#include <cstdint>

#include "rows.hpp"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace tenfold {

namespace TENFOLD_ISA {
namespace {

inline float from_bits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}

// Byte b means 2^(b - 127), subnormal for 0; 255 is NaN.
inline float e8m0_value(uint32_t code) {
    return from_bits(code == 0 ? 0x00400000U : code == 255 ? 0x7fc00000U : code << 23);
}

inline float e4m3_value(uint32_t code) {
    const uint32_t sign = (code & 0x80) << 24, size = code & 0x7f;
    if (size == 0x7f) return from_bits(sign | 0x7fc00000U);
    if (size < 8) return from_bits(sign | to_bits(static_cast<float>(size) * 0x1p-9F));
    return from_bits(sign | ((size << 20) + (120U << 23)));
}

inline float e2m1_value(uint32_t code) {
    constexpr float sizes[8] = {0.0F, 0.5F, 1.0F, 1.5F, 2.0F, 3.0F, 4.0F, 6.0F};
    return (code & 8) != 0 ? -sizes[code & 7] : sizes[code & 7];
}

inline float bf16_value(const uint8_t* stored) {
    return from_bits(static_cast<uint32_t>(stored[0]) << 16 | static_cast<uint32_t>(stored[1]) << 24);
}

inline void decode_e4m3(const uint8_t* codes, int64_t count, float scale, float* out) {
    int64_t i = 0;
    // Through half precision, which has room for every e4m3 number, 2^8 too small; NaN has to be put in.
#ifdef __AVX512VNNI__
    const __m512 all_scales = _mm512_set1_ps(scale), all_up = _mm512_set1_ps(256.0F);
    for (; i + 32 <= count; i += 32) {
        const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i)));
        const __m512i half = _mm512_and_si512(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16(static_cast<int16_t>(0xbfff)));
        const __m512i size = _mm512_and_si512(half, _mm512_set1_epi16(0x3f80));
        const __mmask32 nan = _mm512_cmpeq_epi16_mask(size, _mm512_set1_epi16(0x3f80));
        const __m512i all = _mm512_or_si512(half, _mm512_maskz_set1_epi16(nan, 0x7e00));
        const __m512 low = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(all)), all_up);
        const __m512 high = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(all, 1)), all_up);
        _mm512_storeu_ps(out + i, _mm512_mul_ps(low, all_scales));
        _mm512_storeu_ps(out + i + 16, _mm512_mul_ps(high, all_scales));
    }
#endif
#ifdef __AVX2__
    const __m256i sign_and_size = _mm256_set1_epi16(static_cast<int16_t>(0xbfff));
    const __m256i nan_size = _mm256_set1_epi16(0x3f80), half_nan = _mm256_set1_epi16(0x7e00);
    const __m256 scales = _mm256_set1_ps(scale), up = _mm256_set1_ps(256.0F);
    for (; i + 16 <= count; i += 16) {
        const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
        const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), sign_and_size);
        const __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(half, nan_size), nan_size);
        const __m256i all = _mm256_or_si256(half, _mm256_and_si256(nan, half_nan));
        const __m256 low = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(all)), up);
        const __m256 high = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(all, 1)), up);
        _mm256_storeu_ps(out + i, _mm256_mul_ps(low, scales));
        _mm256_storeu_ps(out + i + 8, _mm256_mul_ps(high, scales));
    }
#endif
    for (; i < count; ++i) out[i] = e4m3_value(codes[i]) * scale;
}

inline void decode_e2m1(const uint8_t* codes, int64_t count, float scale, float* out) {
    int64_t i = 0;
#ifdef __AVX2__
    const __m256 sizes = _mm256_setr_ps(0.0F, 0.5F, 1.0F, 1.5F, 2.0F, 3.0F, 4.0F, 6.0F);
    const __m256 scales = _mm256_set1_ps(scale);
    const __m256i nibbles = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i sign_bit = _mm256_set1_epi32(static_cast<int32_t>(0x80000000U));
    for (; i + 8 <= count; i += 8) {
        int32_t word;
        __builtin_memcpy(&word, codes + i / 2, 4);
        const __m256i code = _mm256_srlv_epi32(_mm256_set1_epi32(word), nibbles);  // looks at three bits of each
        const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(code, 28), sign_bit);
        const __m256 value = _mm256_xor_ps(_mm256_permutevar8x32_ps(sizes, code), _mm256_castsi256_ps(sign));
        _mm256_storeu_ps(out + i, _mm256_mul_ps(value, scales));
    }
#endif
    for (; i < count; ++i) out[i] = e2m1_value(codes[i / 2] >> (i % 2 * 4) & 15) * scale;
}

#ifdef __AVX2__

inline __m256 eight_bf16(const uint8_t* stored) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(stored));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

#endif

inline void decode_bf16(const uint8_t* stored, int64_t count, float* out) {
    int64_t i = 0;
#ifdef __AVX2__
    for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, eight_bf16(stored + 2 * i));
#endif
    for (; i < count; ++i) out[i] = bf16_value(stored + 2 * i);
}

inline float stored_scale(const uint8_t* row, const RowLayout& layout, int64_t block) {
    if (layout.scale_bytes == 1) return e8m0_value(row[layout.scale_offset + block]);
    float scale;
    __builtin_memcpy(&scale, row + layout.scale_offset + 4 * block, 4);
    return scale;
}

// out[0 .. coded + plain) of one row; nothing behind it is written.
inline void decode_row(const uint8_t* row, const RowLayout& layout, float* out) {
    if (layout.code_bits == 32) {
        __builtin_memcpy(out, row, static_cast<uint64_t>(layout.coded) * 4);
        return;
    }
    for (int64_t block = 0, first = 0; first < layout.coded; ++block, first += layout.block) {
        const int64_t rest = layout.coded - first, count = rest < layout.block ? rest : layout.block;
        const float scale = stored_scale(row, layout, block);
        if (layout.code_bits == 8) decode_e4m3(row + first, count, scale, out + first);
        else decode_e2m1(row + first / 2, count, scale, out + first);
    }
    decode_bf16(row + layout.plain_offset, layout.plain, out + layout.coded);
}

}  // namespace
}  // namespace TENFOLD_ISA
}  // namespace tenfold
