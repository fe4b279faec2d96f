// Rows to and from the packed form of a session's memory, bit for bit as the reference does it.
#include "decode_row.hpp"
#include "kernels.hpp"
#include "lanes.hpp"
#include "row_parts.hpp"
#include "scratch.hpp"

namespace tenfold::TENFOLD_ISA {
namespace {

// What a code format can hold, and the smallest largest number that a block's scale is made for.
struct Range {
    float limit, floor;
};

Range range_of(int64_t code_bits) { return code_bits == 8 ? Range{448.0F, 1e-4F} : Range{6.0F, 6.0F * 0x1p-126F}; }

// e8m0 code of the smallest power of two that brings `largest` within the limit.
uint32_t scale_exponent(float largest, const Range& range) {
    const uint32_t bits = to_bits((largest > range.floor ? largest : range.floor) * (1.0F / range.limit));
    return (bits >> 23) + ((bits & 0x7fffffU) != 0 ? 1 : 0);
}

uint32_t e4m3_code(float x) {
    const uint32_t bits = to_bits(x), sign = bits >> 24 & 0x80, size = bits & 0x7fffffffU;
    if (size > 0x7f800000U) return sign | 0x7f;
    if (size < 121U << 23) {  // below 2^-6: a whole number of 2^-9
        return sign | static_cast<uint32_t>(__builtin_rintf(from_bits(size) * 512.0F));
    }
    return sign | (((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120U << 3));
}

// To the nearest, of two equally near to the even code; as many as are less than |x|, or reached, is the code.
uint32_t e2m1_code(float x) {
    const float size = __builtin_fabsf(x);
    const uint32_t code = (size > 0.25F) + (size >= 0.75F) + (size > 1.25F) + (size >= 1.75F) + (size > 2.5F) +
                          (size >= 3.5F) + (size > 5.0F);
    return code | (to_bits(x) >> 28 & 8);
}

uint32_t bf16_code(float x) {
    const uint32_t bits = to_bits(x);
    if ((bits & 0x7fffffffU) > 0x7f800000U) return 0x7fc0;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

float clamped(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x; }

float largest_of(const float* x, int64_t count) {
    float largest = 0.0F;
    for (int64_t i = 0; i < count; ++i) {
        const float size = __builtin_fabsf(x[i]);
        largest = size > largest ? size : largest;
    }
    return largest;
}

#ifdef __AVX2__

float largest_of_eights(const float* x, int64_t eights) {
    __m256 largest = _mm256_setzero_ps();
    for (int64_t i = 0; i < eights; ++i) largest = _mm256_max_ps(sizes_of(_mm256_loadu_ps(x + 8 * i)), largest);
    float lanes[8];
    _mm256_storeu_ps(lanes, largest);
    return largest_of(lanes, 8);
}

__m256 scaled(const float* x, float factor, float limit) {
    const __m256 v = _mm256_mul_ps(_mm256_loadu_ps(x), _mm256_set1_ps(factor));
    // The limits come first: the second operand is the one that a NaN leaves.
    return _mm256_max_ps(_mm256_set1_ps(-limit), _mm256_min_ps(_mm256_set1_ps(limit), v));
}

// The lowest byte of each lane.
__m128i low_bytes(__m256i lanes) {
    const __m256i first = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                           0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i bytes = _mm256_shuffle_epi8(lanes, first);
    return _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
}

__m256i e4m3_codes(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, 24), _mm256_set1_epi32(0x80));
    const __m256i size = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(size, 20), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(size, _mm256_set1_epi32(0x7ffff)), odd);
    const __m256i normal = _mm256_sub_epi32(_mm256_srli_epi32(rounded, 20), _mm256_set1_epi32(120 << 3));
    const __m256i small = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(size), _mm256_set1_ps(512.0F)));
    const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(121 << 23), size);
    const __m256i nan = _mm256_cmpgt_epi32(size, _mm256_set1_epi32(0x7f800000));
    const __m256i finite = _mm256_blendv_epi8(normal, small, below);
    return _mm256_or_si256(sign, _mm256_blendv_epi8(finite, _mm256_set1_epi32(0x7f), nan));
}

__m256i e2m1_codes(__m256 v) {
    const __m256 size = sizes_of(v);
    __m256i code = _mm256_and_si256(_mm256_srli_epi32(_mm256_castps_si256(v), 28), _mm256_set1_epi32(8));
    constexpr float passed[4] = {0.25F, 1.25F, 2.5F, 5.0F}, reached[3] = {0.75F, 1.75F, 3.5F};
    for (int i = 0; i < 4; ++i) {  // a true comparison is -1
        const __m256 up = _mm256_cmp_ps(size, _mm256_set1_ps(passed[i]), _CMP_GT_OQ);
        code = _mm256_sub_epi32(code, _mm256_castps_si256(up));
    }
    for (int i = 0; i < 3; ++i) {
        const __m256 up = _mm256_cmp_ps(size, _mm256_set1_ps(reached[i]), _CMP_GE_OQ);
        code = _mm256_sub_epi32(code, _mm256_castps_si256(up));
    }
    return code;
}

void encode_e4m3(const float* x, int64_t eights, float factor, uint8_t* codes) {
    for (int64_t i = 0; i < eights; ++i) {
        const __m128i bytes = low_bytes(e4m3_codes(scaled(x + 8 * i, factor, 448.0F)));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + 8 * i), bytes);
    }
}

void encode_e2m1(const float* x, int64_t eights, float factor, uint8_t* codes) {
    for (int64_t i = 0; i < eights; ++i) {
        const __m256i lanes = e2m1_codes(scaled(x + 8 * i, factor, 6.0F));
        const __m256i pairs = _mm256_or_si256(lanes, _mm256_srli_epi64(lanes, 28));  // the odd lane above the even
        const __m256i even = _mm256_permutevar8x32_epi32(pairs, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
        const int32_t word = _mm_cvtsi128_si32(low_bytes(even));
        __builtin_memcpy(codes + 4 * i, &word, 4);
    }
}

void encode_bf16(const float* x, int64_t eights, uint8_t* out) {
    for (int64_t i = 0; i < eights; ++i) {
        const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(x + 8 * i));
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        const __m256i size = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
        const __m256i nan = _mm256_cmpgt_epi32(size, _mm256_set1_epi32(0x7f800000));
        const __m256i halves = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * i), _mm256_castsi256_si128(packed));
    }
}

int64_t in_eights(int64_t count) { return count / 8; }

#else

float largest_of_eights(const float*, int64_t) { return 0.0F; }
void encode_e4m3(const float*, int64_t, float, uint8_t*) {}
void encode_e2m1(const float*, int64_t, float, uint8_t*) {}
void encode_bf16(const float*, int64_t, uint8_t*) {}
int64_t in_eights(int64_t) { return 0; }

#endif

float largest_of_block(const float* x, int64_t count) {
    const int64_t eights = in_eights(count);
    const float first = largest_of_eights(x, eights), rest = largest_of(x + 8 * eights, count - 8 * eights);
    return first > rest ? first : rest;
}

void encode_block(const float* x, int64_t count, float factor, int64_t code_bits, uint8_t* codes) {
    int64_t i = 8 * in_eights(count);
    if (code_bits == 8) {
        encode_e4m3(x, i / 8, factor, codes);
        for (; i < count; ++i) codes[i] = static_cast<uint8_t>(e4m3_code(clamped(x[i] * factor, 448.0F)));
        return;
    }
    encode_e2m1(x, i / 8, factor, codes);
    for (; i < count; i += 2) {
        const uint32_t low = e2m1_code(clamped(x[i] * factor, 6.0F));
        const uint32_t high = e2m1_code(clamped(x[i + 1] * factor, 6.0F));
        codes[i / 2] = static_cast<uint8_t>(low | high << 4);
    }
}

}  // namespace

void encode_row(const float* x, const RowLayout& layout, uint8_t* out) {
    if (layout.code_bits == 32) {
        __builtin_memcpy(out, x, static_cast<uint64_t>(layout.coded) * 4);
        return;
    }
    const Range range = range_of(layout.code_bits);
    int64_t end = layout.scale_offset;
    for (int64_t first = 0; first < layout.coded; first += layout.block) {
        const int64_t rest = layout.coded - first, count = rest < layout.block ? rest : layout.block;
        const uint32_t exponent = scale_exponent(largest_of_block(x + first, count), range);
        // Dividing by a power of two is multiplying by another.
        const float factor = e8m0_value(exponent == 255 ? 255 : 254 - exponent), scale = e8m0_value(exponent);
        encode_block(x + first, count, factor, layout.code_bits, out + first * layout.code_bits / 8);
        if (layout.scale_bytes == 1) out[end] = static_cast<uint8_t>(exponent);
        else __builtin_memcpy(out + end, &scale, 4);
        end += layout.scale_bytes;
    }
    uint8_t* const plain = out + layout.plain_offset;
    int64_t i = 8 * in_eights(layout.plain);
    encode_bf16(x + layout.coded, i / 8, plain);
    for (; i < layout.plain; ++i) {
        const uint16_t code = static_cast<uint16_t>(bf16_code(x[layout.coded + i]));
        __builtin_memcpy(plain + 2 * i, &code, 2);
    }
    const int64_t plain_end = layout.plain_offset + 2 * layout.plain, used = plain_end > end ? plain_end : end;
    __builtin_memset(out + used, 0, static_cast<uint64_t>(layout.row_bytes - used));
}

void pack_rows(const float* x, const RowLayout* layout, uint8_t* out, int64_t rows, int32_t threads) {
    const RowLayout& form = *layout;
    const int64_t width = form.coded + form.plain;
    split_rows(rows, rows * width, threads, [=, &form](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) encode_row(x + row * width, form, out + row * form.row_bytes);
    });
}

void unpack_rows(const uint8_t* packed, const RowLayout* layout, float* out, int64_t rows, int32_t threads) {
    const RowLayout& form = *layout;
    const int64_t width = form.coded + form.plain;
    split_rows(rows, rows * width, threads, [=, &form](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) decode_row(packed + row * form.row_bytes, form, out + row * width);
    });
}

}  // namespace tenfold::TENFOLD_ISA
