// Fp8 weights as they are stored, and few activation rows times them: what product.cpp leaves to this file.
//
// Scales that are powers of two, as all published ones are, are given to the activations once per 128 weight rows:
// both products are exact, so no bit of a sum changes, and nothing but codes is left to decode.
#pragma once

#include <cstring>

#include "product_parts.hpp"
#include "scratch.hpp"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int64_t kScaleRows = 128;  // weight rows, and columns, under one scale

template <class Scale>
struct Fp8Row {
    using Code = uint8_t;
    static constexpr int64_t kBlockBytes = 32;
    static constexpr bool kMayBeNan = true;
    const uint8_t* codes;
    const Scale* scale;
    Fp8Row(const Matrix& m, int64_t row)
        : codes(static_cast<const uint8_t*>(m.codes) + row * m.in),
          scale(static_cast<const Scale*>(m.scale) + row / kScaleRows * ((m.in + 127) / 128)) {}
    const uint8_t* at(int64_t k) const { return codes + k; }
    float scale_at(int64_t k) const { return scale_of(scale[k / 128]); }
};

#ifdef __AVX2__

// An e4m3 code put four bits below its place in a float32 is that number times 2^-120, subnormal or not. The largest
// code of either sign would be NaN: `worst` keeps the largest byte seen, its sign shifted out.
inline void decode_fp8(const uint8_t* codes, __m256 (&w)[4], __m256i& worst) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const __m256i mask = _mm256_set1_epi32(static_cast<int32_t>(0x87F00000));
    worst = _mm256_max_epu8(worst, _mm256_add_epi8(v, v));
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 4), odd = _mm256_srai_epi16(v, 4);
    w[0] = _mm256_castsi256_ps(_mm256_and_si256(_mm256_slli_epi32(even, 16), mask));
    w[1] = _mm256_castsi256_ps(_mm256_and_si256(_mm256_slli_epi32(odd, 16), mask));
    w[2] = _mm256_castsi256_ps(_mm256_and_si256(even, mask));
    w[3] = _mm256_castsi256_ps(_mm256_and_si256(odd, mask));
}

inline bool has_nan_code(__m256i worst) {
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(worst, _mm256_set1_epi8(-2))) != 0;
}

// A NaN among the codes makes a whole sum NaN; it is rare, so the row is searched for again.
template <int Tokens>
TENFOLD_APART void poison(const uint8_t* codes, int64_t first, int64_t last, __m256 (&sums)[Tokens]) {
    for (int64_t k = first; k < last; ++k) {
        if ((codes[k] & 0x7F) != 0x7F) continue;
        for (auto& sum : sums) sum = _mm256_set1_ps(__builtin_nanf(""));
    }
}

// 2^120 times a scale, if that is a power of two and not too large; else no finite number.
inline float lifted(uint8_t scale) { return scale < 135 ? kE8m0.of[scale + 120] : __builtin_nanf(""); }

inline float lifted(float scale) {
    uint32_t bits;
    std::memcpy(&bits, &scale, sizeof(bits));
    return (bits & 0x007FFFFF) == 0 ? scale * 0x1p120F : __builtin_nanf("");
}

// The panels of p, times the lifted scales of the weight rows that share one with `row`; false if one is not finite.
template <class Scale>
bool scale_panels(const Product& p, int64_t row, float* to) {
    const Fp8Row<Scale> weight(p.weight, row);
    for (int64_t k = 0; k < p.weight.in; k += kPanel) {
        const int64_t width = smaller(kPanel, p.weight.in - k);
        for (int64_t i = 0; i < p.count; ++i) {
            const float* x = panel_row(p, k, width, i);
            for (int64_t column = 0; column < width; column += 8, x += 8, to += 8) {
                const float scale = lifted(weight.scale[(k + column) / 128]);
                if (!(scale * 0.0F == 0.0F)) return false;
                _mm256_storeu_ps(to, _mm256_mul_ps(_mm256_loadu_ps(x), _mm256_set1_ps(scale)));
            }
        }
    }
    return true;
}

template <int Tokens>
inline void add_codes(const uint8_t* codes, const float* x, int64_t width, __m256 (&sums)[Tokens], __m256i& worst) {
    __m256 w[4];
    decode_fp8(codes, w, worst);
    __asm__("" : "+r"(x));  // x comes from memory each time: kept in registers it would drive the sums out of them
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
            sums[t] = _mm256_fmadd_ps(w[i], _mm256_loadu_ps(x + t * width + 8 * i), sums[t]);
        }
    }
}

// The lanes' sums of `Rows` weight rows and `Tokens` activation rows over one panel. Each line of 64 codes asks for
// the one of the next rows: a row is short, and the hardware's own prefetch would start again with every row.
template <int Rows, int Tokens>
inline void dot_codes(const uint8_t* const* codes, const float* x, int64_t width, int64_t next_bytes,
                      __m256 (*out)[Tokens]) {
    __m256 sums[Rows][Tokens];
    for (auto& of_row : sums) {
        for (auto& sum : of_row) sum = _mm256_setzero_ps();
    }
    __m256i worst = _mm256_setzero_si256();
    for (int64_t k = 0; k < width; k += 32) {
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            if (k % 64 == 0) _mm_prefetch(reinterpret_cast<const char*>(codes[r]) + k + next_bytes, _MM_HINT_T0);
            add_codes(codes[r] + k, x + k, width, sums[r], worst);
        }
    }
    for (int r = 0; r < Rows; ++r) {
        if (has_nan_code(worst)) poison(codes[r], 0, width, sums[r]);
        for (int t = 0; t < Tokens; ++t) out[r][t] = sums[r][t];
    }
}

template <int Count>
bool all_finite(const __m256* sums) {
    const __m256 zeros = _mm256_setzero_ps();  // times a number 0, times anything else NaN
    __m256 finite = zeros;
    for (int i = 0; i < Count; ++i) finite = _mm256_fmadd_ps(sums[i], zeros, finite);
    return _mm256_movemask_ps(_mm256_cmp_ps(finite, zeros, _CMP_EQ_OQ)) == 0xFF;
}

// One panel of a group of weight rows; false, and nothing written, if a sum is not finite: scaled activations reach
// infinity sooner than others, so that this says nothing yet.
template <int Group, int Tokens>
TENFOLD_APART bool dot_group(const Product& p, const float* x, int64_t k, int64_t row, int64_t last) {
    constexpr int kRows = Tokens <= 2 ? Group : 2;  // as many sums at a time as the registers hold
    const int64_t in = p.weight.in, width = smaller(kPanel, in - k);
    const uint8_t* codes[Group];
    for (int64_t r = 0; r < Group; ++r) {
        codes[r] = static_cast<const uint8_t*>(p.weight.codes) + smaller(row + r, last - 1) * in + k;
    }
    __m256 sums[Group][Tokens];
    for (int r = 0; r < Group; r += kRows) {
        dot_codes<kRows, Tokens>(codes + r, x, width, Group * in, sums + r);
    }
    if (!all_finite<Group * Tokens>(sums[0])) return false;
    for (int quad = 0; quad < Group && row + quad < last; quad += kQuad) {
        for (int t = 0; t < Tokens; ++t) {
            const __m128 sum = lane_sums(sums[quad][t], sums[quad + 1][t], sums[quad + 2][t], sums[quad + 3][t]);
            put(y_row(p, t, row + quad), sum, smaller(kQuad, last - row - quad), p.add || k > 0);
        }
    }
    return true;
}

// Eight weight rows at a time of one activation row, four of more: enough sums to hide the latency of a multiply-add.
inline int64_t group_rows(int64_t count) { return count == 1 ? 2 * kQuad : kQuad; }

inline bool dot_any_group(const Product& p, const float* x, int64_t k, int64_t row, int64_t last) {
    switch (p.count) {
        case 1: return dot_group<2 * kQuad, 1>(p, x, k, row, last);
        case 2: return dot_group<kQuad, 2>(p, x, k, row, last);
        case 3: return dot_group<kQuad, 3>(p, x, k, row, last);
        default: return dot_group<kQuad, kFew>(p, x, k, row, last);
    }
}

// Weight rows [first, last), all under one row of scales, times `scaled` activations. fallback(k, row, last): the same
// for one panel of the four rows from `row` on, from the activations as they are.
template <class Fallback>
void multiply_scaled(const Product& p, const float* scaled, int64_t first, int64_t last, const Fallback& fallback) {
    for (int64_t row = first; row < last; row += group_rows(p.count)) {
        for (int64_t k = 0; k < p.weight.in; k += kPanel) {
            if (dot_any_group(p, scaled + p.count * k, k, row, last)) continue;
            for (int64_t quad = row; quad < smaller(last, row + group_rows(p.count)); quad += kQuad) {
                fallback(k, quad, last);
            }
        }
    }
}

#endif

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
