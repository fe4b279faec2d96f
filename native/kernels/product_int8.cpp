// Mxfp4 weights times activations rounded to int8, one scale per 32: the products within a block are exact integers. The
// build for AMX rounds them to bf16 instead (product_mxfp4_amx.hpp).
//
// As a byte 2 w + 12 every weight is an unsigned number up to 24; 12 times the sum of the activations is taken off
// before or afterwards. Each instruction set keeps the activations in an order of its own.
#include "product_int8.hpp"

#ifndef __AMX_BF16__

#ifdef __AVX2__
#include "product_int8_lanes.hpp"
#endif

namespace tenfold::TENFOLD_ISA {
namespace {

// What a block of 32 is divided by, from its largest size as bits, in which NaN is larger than any number. Too small
// for its inverse to be a number is as good as zero; what is not finite makes the products NaN.
struct Step {
    float inverse, half;
};

Step step_of(uint32_t largest_bits) {
    float largest;
    std::memcpy(&largest, &largest_bits, sizeof(largest));
    if (!(largest <= 3.4028234e38F)) return {0.0F, __builtin_nanf("")};
    if (largest < 0x1p-100F) return {0.0F, 0.0F};
    return {127.0F / largest, largest * (0.5F / 127.0F)};
}

#ifdef __AVX2__

uint32_t largest_of(__m256i sizes) {
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(sizes), _mm256_extracti128_si256(sizes, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xB1))));
}

int32_t sum_of(__m256i numbers) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(numbers), _mm256_extracti128_si256(numbers, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
}

Rounded rounded(const float* x) {
    __m256i sizes = _mm256_setzero_si256(), codes[4];
    for (int i = 0; i < 4; ++i) {
        const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(x + 8 * i));
        sizes = _mm256_max_epi32(sizes, _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF)));
    }
    const Step step = step_of(largest_of(sizes));
    const __m256 kept = _mm256_castsi256_ps(_mm256_set1_epi32(step.inverse > 0 ? -1 : 0));
    for (int i = 0; i < 4; ++i) {
        const __m256 values = _mm256_and_ps(_mm256_loadu_ps(x + 8 * i), kept);
        codes[i] = _mm256_cvtps_epi32(_mm256_mul_ps(values, _mm256_set1_ps(step.inverse)));
    }
    const __m256i sums = _mm256_add_epi32(_mm256_add_epi32(codes[0], codes[1]), _mm256_add_epi32(codes[2], codes[3]));
    const __m256i first = _mm256_permute4x64_epi64(_mm256_packs_epi32(codes[0], codes[1]), 0xD8);
    const __m256i second = _mm256_permute4x64_epi64(_mm256_packs_epi32(codes[2], codes[3]), 0xD8);
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(first, second), 0xD8);
    const __m256i even_first = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    const __m256i split = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(bytes, even_first), 0xD8);
    Rounded block;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(block.even), _mm256_castsi256_si128(split));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(block.odd), _mm256_extracti128_si256(split, 1));
    block.half = step.half;
    block.sum = sum_of(sums);
    return block;
}

#else

Rounded rounded(const float* x) {
    uint32_t largest = 0;
    for (int i = 0; i < 32; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof(bits));
        bits &= 0x7FFFFFFF;
        largest = bits > largest ? bits : largest;
    }
    const Step step = step_of(largest);
    Rounded block{};
    block.half = step.half;
    for (int i = 0; i < 32 && step.inverse > 0; ++i) {
        const int32_t code = static_cast<int32_t>(__builtin_nearbyintf(x[i] * step.inverse));
        int8_t* const to = i % 2 == 0 ? block.even : block.odd;
        to[i / 2] = static_cast<int8_t>(code);
        block.sum += code;
    }
    return block;
}

void keep_block(const Rounded& block, int64_t in, void* panels, int64_t, int64_t row, int64_t at) {
    static_cast<Rounded*>(panels)[row * (in / 32) + at] = block;
}

// The sum of one block's products, an exact integer.
int32_t block_sum(const uint8_t* codes, const Rounded& x) {
    static const int8_t doubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += doubled[codes[i] & 15] * x.even[i] + doubled[codes[i] >> 4] * x.odd[i];
    return sum;
}

void multiply_rows(const Product& p, int64_t first, int64_t last) {
    const int64_t blocks = p.weight.in / 32;
    for (int64_t r = first; r < last; ++r) {
        const uint8_t* const codes = static_cast<const uint8_t*>(p.weight.codes) + r * blocks * 16;
        const uint8_t* const scale = static_cast<const uint8_t*>(p.weight.scale) + r * blocks;
        for (int64_t i = 0; i < p.count; ++i) {
            const Rounded* const x = reinterpret_cast<const Rounded*>(p.panels) + (p.first_row + i) * blocks;
            double sum = 0;
            for (int64_t b = 0; b < blocks; ++b) {
                sum += static_cast<double>(block_sum(codes + 16 * b, x[b])) * x[b].half * scale_of(scale[b]);
            }
            float* y = y_row(p, i, r);
            *y = static_cast<float>(p.add ? *y + sum : sum);
        }
    }
}

#endif

}  // namespace

void pack_row_int8(const float* x, int64_t in, void* panels, int64_t panel_rows, int64_t row) {
    for (int64_t at = 0; at < in / 32; ++at) keep_block(rounded(x + 32 * at), in, panels, panel_rows, row, at);
}

void multiply_int8(const Product& product, int64_t first, int64_t last) { multiply_rows(product, first, last); }

}  // namespace tenfold::TENFOLD_ISA

#endif
