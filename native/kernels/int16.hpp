// Whole numbers of 16 bits, whose products are summed in 32 bits without overflow, so exactly and in any order: what
// the products and attention do with e4m3 codes, and with numbers that were rounded to meet them.
#pragma once

#ifdef __AVX2__
#include "lanes.hpp"
#endif

namespace tenfold::TENFOLD_ISA {
namespace {

// What numbers are multiplied by to become whole ones, and what undoes that.
struct Step {
    float inverse, scale;
};

// As fine as the largest of some sizes allows, and what they come to, their sum or mean, which may be `most` once they
// are whole. Numbers too small for an inverse are as good as zero; what is not finite makes the products NaN.
inline Step step_of(float largest, float together, float most) {
    if (!(together <= 3.4028234e38F)) return {0.0F, __builtin_nanf("")};
    if (largest < 0x1p-100F) return {0.0F, 0.0F};
    const float by_all = most / together, by_one = 32767.0F / largest;
    const float inverse = by_all < by_one ? by_all : by_one;
    return {inverse, 1.0F / inverse};
}

#ifdef __AVX2__

// Sixteen numbers, rounded to whole ones.
inline __m256i in_16_bits(__m256 first, __m256 second) {
    const __m256i packed = _mm256_packs_epi32(_mm256_cvtps_epi32(first), _mm256_cvtps_epi32(second));
    return _mm256_permute4x64_epi64(packed, 0xD8);
}

// 32 times the numbers of codes: of each 16 bytes the first eight, and the others.
struct Wholes {
    Ints first, second;
};

inline Ints exponents_of(Ints codes) { return both(down16(codes, 3), all_lanes(codes, 0x0F0F0F0F)); }

// The significand, 64 to 120 with its sign, in the upper half of 16 bits times 2^(exponent - 1): what would be below
// eight is rounded, to zero where the exponent is none.
inline Wholes wholes_of(Ints codes, Ints exponents) {
    const Ints low_powers = spread(_mm_setr_epi8(0, 1, 2, 4, 8, 16, 32, 64, -128, 0, 0, 0, 0, 0, 0, 0));
    const Ints high_powers = spread(_mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 64));
    const Ints sizes = spread(_mm_setr_epi8(64, 72, 80, 88, 96, 104, 112, 120, 64, 72, 80, 88, 96, 104, 112, 120));
    const Ints low = look_up(low_powers, exponents), high = look_up(high_powers, exponents);
    const Ints size = signed_as(look_up(sizes, both(codes, all_lanes(codes, 0x0F0F0F0F))), codes);
    return {rounded_product16(low8(no_ints(), size), low8(low, high)),
            rounded_product16(high8(no_ints(), size), high8(low, high))};
}

// Adds the products of two vectors of pairs with the pair of numbers at x.
inline void add_products_of_pair(Ints first, Ints second, const void* x, Ints& first_sum, Ints& second_sum) {
#ifdef __AVX512VNNI__
    int32_t pair;
    __builtin_memcpy(&pair, x, sizeof(pair));
    const Ints pairs = all_lanes(first, pair);
    first_sum = add_pairs(first_sum, first, pairs);
    second_sum = add_pairs(second_sum, second, pairs);
#else
    // In this order: the compiler would make all products before it adds, and run out of registers.
    Ints pairs, product;
    __asm__("vpbroadcastd %6, %2\n\t"
            "vpmaddwd %2, %4, %3\n\t"
            "vpaddd %3, %0, %0\n\t"
            "vpmaddwd %2, %5, %2\n\t"
            "vpaddd %2, %1, %1"
            : "+x"(first_sum), "+x"(second_sum), "=&x"(pairs), "=&x"(product)
            : "x"(first), "x"(second), "m"(*static_cast<const uint8_t(*)[4]>(x)));
#endif
}

// The same with the vector of pairs at x.
inline void add_products_of_vector(Ints first, Ints second, const void* x, Ints& first_sum, Ints& second_sum) {
#ifdef __AVX512VNNI__
    const Ints pairs = _mm512_loadu_si512(x);
    first_sum = add_pairs(first_sum, first, pairs);
    second_sum = add_pairs(second_sum, second, pairs);
#else
    Ints pairs, product;
    __asm__("vmovdqu %6, %2\n\t"
            "vpmaddwd %2, %4, %3\n\t"
            "vpaddd %3, %0, %0\n\t"
            "vpmaddwd %2, %5, %2\n\t"
            "vpaddd %2, %1, %1"
            : "+x"(first_sum), "+x"(second_sum), "=&x"(pairs), "=&x"(product)
            : "x"(first), "x"(second), "m"(*static_cast<const uint8_t(*)[32]>(x)));
#endif
}

#endif

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
