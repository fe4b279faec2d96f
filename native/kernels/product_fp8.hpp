// Fp8 weights as they are stored, and few activation rows times them: what product.cpp leaves to this file.
//
// Scales that are powers of two, as all published ones are, are given to the activations once per 128 weight rows:
// both products are exact, so no bit of a sum changes, and nothing but codes is left to decode.
#pragma once

#include <cstring>

#include "product_parts.hpp"

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
template <class Codes, class Numbers>
inline void decode_fp8(Codes v, Numbers (&w)[4], Codes& worst) {
    const Codes mask = all_lanes(v, static_cast<int32_t>(0x87F00000));
    worst = larger_bytes(worst, twice_bytes(v));
    const Codes even = down16_signed(up16(v, 8), 4), odd = down16_signed(v, 4);
    w[0] = as_floats(both(up32(even, 16), mask));
    w[1] = as_floats(both(up32(odd, 16), mask));
    w[2] = as_floats(both(even, mask));
    w[3] = as_floats(both(odd, mask));
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
inline void add_codes(Ints codes, const float* x, int64_t width, Floats (&sums)[Tokens], Ints& worst) {
    Floats w[4];
    decode_fp8(codes, w, worst);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) sums[t] = add_product_of(w[i], x + t * width + 8 * i, sums[t]);
    }
}

// The sums of `Rows` weight rows and `Tokens` activation rows over one panel; whether no code is NaN. Each line of 64
// codes asks for the one `ahead`.
template <int Rows, int Tokens>
inline bool dot_codes(const uint8_t* const* codes, const float* x, int64_t width, int64_t ahead,
                      Floats (*out)[Tokens]) {
    Floats sums[Rows / kSide][Tokens];
    for (auto& of_rows : sums) {
        for (auto& sum : of_rows) sum = no_floats();
    }
    Ints worst = no_ints();
    for (int64_t k = 0; k < width; k += 32) {
        if (k % 64 == 0) {
#pragma GCC unroll 8
            for (int r = 0; r < Rows; ++r) {
                _mm_prefetch(reinterpret_cast<const char*>(codes[r]) + k + ahead, _MM_HINT_T1);
            }
        }
#pragma GCC unroll 8
        for (int v = 0; v < Rows / kSide; ++v) add_codes(beside(codes + v * kSide, k), x + k, width, sums[v], worst);
    }
    for (int v = 0; v < Rows / kSide; ++v) {
        for (int t = 0; t < Tokens; ++t) out[v][t] = sums[v][t];
    }
    return !has_nan_code(worst);
}

template <int Count>
bool all_finite(const Floats* sums) {
    const __m256 zeros = _mm256_setzero_ps();  // times a number 0, times anything else NaN
    __m256 finite = zeros;
    for (int i = 0; i < Count; ++i) {
        for (int side = 0; side < kSide; ++side) finite = _mm256_fmadd_ps(row_of(sums[i], side), zeros, finite);
    }
    return _mm256_movemask_ps(_mm256_cmp_ps(finite, zeros, _CMP_EQ_OQ)) == 0xFF;
}

// One panel of `Rows` weight rows; false, and nothing written, where a code is NaN or a sum not finite: scaled
// activations reach infinity sooner than others, so that the sum may yet be a number.
template <int Rows, int Tokens>
TENFOLD_APART bool dot_group(const Product& p, const float* x, int64_t k, int64_t row, int64_t last) {
    constexpr int kRows = Tokens <= 2 * kSide ? Rows : 2;  // as many sums at a time as the registers hold
    const int64_t in = p.weight.in, width = smaller(kPanel, in - k);
    const uint8_t* codes[Rows];
    for (int64_t r = 0; r < Rows; ++r) {
        codes[r] = static_cast<const uint8_t*>(p.weight.codes) + smaller(row + r, last - 1) * in + k;
    }
    Floats sums[Rows / kSide][Tokens];
    for (int r = 0; r < Rows; r += kRows) {
        if (!dot_codes<kRows, Tokens>(codes + r, x, width, columns_ahead(in, k, Rows), sums + r / kSide)) return false;
    }
    if (!all_finite<Rows / kSide * Tokens>(sums[0])) return false;
    for (int64_t quad = 0; quad < Rows && row + quad < last; quad += kQuad) {
        for (int t = 0; t < Tokens; ++t) {
            const __m128 sum = quad_sums(&sums[0][t], Tokens, quad);
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
