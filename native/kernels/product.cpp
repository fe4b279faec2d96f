#include <cstring>

#include "product_fp8.hpp"
#ifdef __AMX_BF16__
#include "product_mxfp4_amx.hpp"
#endif

namespace tenfold::TENFOLD_ISA {
namespace {

// One row of a weight by its format. `at` is where column k lies; kBlockBytes is what 32 columns take; kMayBeNan:
// some code of the format means NaN, and the decoding below does not turn it into one.

struct F32Row {
    using Code = float;
    static constexpr int64_t kBlockBytes = 128;
    static constexpr bool kMayBeNan = false;
    const float* codes;
    F32Row(const Matrix& m, int64_t row) : codes(static_cast<const float*>(m.codes) + row * m.in) {}
    const float* at(int64_t k) const { return codes + k; }
};

struct Bf16Row {
    using Code = uint16_t;
    static constexpr int64_t kBlockBytes = 64;
    static constexpr bool kMayBeNan = false;
    const uint16_t* codes;
    Bf16Row(const Matrix& m, int64_t row) : codes(static_cast<const uint16_t*>(m.codes) + row * m.in) {}
    const uint16_t* at(int64_t k) const { return codes + k; }
};

struct Mxfp4Row {
    using Code = uint8_t;
    static constexpr int64_t kBlockBytes = 16;
    static constexpr bool kMayBeNan = false;
    const uint8_t* codes;
    const uint8_t* scale;
    Mxfp4Row(const Matrix& m, int64_t row)
        : codes(static_cast<const uint8_t*>(m.codes) + row * (m.in / 2)),
          scale(static_cast<const uint8_t*>(m.scale) + row * (m.in / 32)) {}
    const uint8_t* at(int64_t k) const { return codes + k / 2; }
    float scale_at(int64_t k) const { return scale_of(scale[k / 32]); }
};

#ifdef __AVX2__

// decode(row, codes, k, w): 32 weights from column k on, in an order of the format's own; `arrange` brings 32
// activations into that order, so no weight is ever moved between lanes.

struct NaturalOrder {
    static void arrange(__m256 (&)[4]) {}
};

inline void split_pairs(__m256& a, __m256& b) {  // even ones to a, odd ones to b
    const __m256 even = _mm256_shuffle_ps(a, b, 0x88), odd = _mm256_shuffle_ps(a, b, 0xDD);
    a = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xD8));
    b = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(odd), 0xD8));
}

struct ByteOrder {  // 0 4 8 ... 28, then 1 5 9 ... 29, and so on: the first byte of each four, the second, ...
    static void arrange(__m256 (&x)[4]) {
        split_pairs(x[0], x[1]);  // even, odd
        split_pairs(x[2], x[3]);
        split_pairs(x[0], x[2]);  // of even ones every other
        split_pairs(x[1], x[3]);
    }
};

struct NibbleOrder {  // of each 16: 0 4 8 12 1 5 9 13, then 2 6 10 14 3 7 11 15
    static void arrange(__m256 (&x)[4]) {
        const __m256i order = _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7);
        for (int i = 0; i < 4; i += 2) {
            const __m256d first = _mm256_castps_pd(_mm256_permutevar8x32_ps(x[i], order));
            const __m256d second = _mm256_castps_pd(_mm256_permutevar8x32_ps(x[i + 1], order));
            x[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(first, second));
            x[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(first, second));
        }
    }
};

inline void decode(const F32Row&, const float* codes, int64_t, __m256 (&w)[4], __m256i&) {
    for (int i = 0; i < 4; ++i) w[i] = _mm256_loadu_ps(codes + 8 * i);
}

inline void decode(const Bf16Row&, const uint16_t* codes, int64_t, __m256 (&w)[4], __m256i&) {
    for (int i = 0; i < 4; ++i) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 8 * i));
        w[i] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
}

template <class Scale>
inline void decode(const Fp8Row<Scale>& row, const uint8_t* codes, int64_t k, __m256 (&w)[4], __m256i& worst) {
    decode_fp8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)), w, worst);
    float scale = row.scale_at(k);
    if (scale < 0x1p7F) {
        scale *= 0x1p120F;
    } else {  // that would be infinite
        for (auto& weights : w) weights = _mm256_mul_ps(weights, _mm256_set1_ps(0x1p120F));
    }
    // A multiply-add takes subnormal operands at full speed, which a multiplication does not; -0 changes nothing.
    const __m256 nothing = _mm256_set1_ps(-0.0F);
    for (auto& weights : w) weights = _mm256_fmadd_ps(weights, _mm256_set1_ps(scale), nothing);
}

// The upper half of a float32 holds every e2m1 number: two table look-ups give its two bytes.
inline void decode(const Mxfp4Row& row, const uint8_t* codes, int64_t k, __m256 (&w)[4], __m256i&) {
    const __m256i high = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0, 0x3F, 0x3F, 0x3F, 0x40, 0x40, 0x40, 0x40, -128, -65, -65, -65, -64, -64, -64, -64));
    const __m256i low = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 0, -128, -64, 0, 0x40, -128, -64, 0, 0, -128, -64, 0, 0x40, -128, -64));
    const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    const __m256i shifted = _mm256_srlv_epi32(both, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
    const __m256i nibbles = _mm256_and_si256(shifted, _mm256_set1_epi8(15));
    const __m256i upper = _mm256_shuffle_epi8(high, nibbles), lower = _mm256_shuffle_epi8(low, nibbles);
    const __m256i first = _mm256_unpacklo_epi8(lower, upper), second = _mm256_unpackhi_epi8(lower, upper);
    const __m256i mask = _mm256_set1_epi32(static_cast<int32_t>(0xFFFF0000));
    const __m256 scale = _mm256_set1_ps(row.scale_at(k));
    w[0] = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(first, 16)), scale);
    w[1] = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_and_si256(first, mask)), scale);
    w[2] = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(second, 16)), scale);
    w[3] = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_and_si256(second, mask)), scale);
}

template <class Order>
void pack(const float* x, int64_t in, float* panels, int64_t panel_rows, int64_t row) {
    for (int64_t k = 0; k < in; k += 32) {
        float rest[32] = {};
        if (in - k < 32) std::memcpy(rest, x + k, static_cast<size_t>(in - k) * sizeof(float));
        const float* from = in - k < 32 ? rest : x + k;
        __m256 values[4];
        for (int i = 0; i < 4; ++i) values[i] = _mm256_loadu_ps(from + 8 * i);
        Order::arrange(values);
        const int64_t panel = k / kPanel * kPanel, width = smaller(kPanel, padded(in) - panel);
        float* to = panels + panel_rows * panel + row * width + (k - panel);
        for (int i = 0; i < 4; ++i) _mm256_storeu_ps(to + 8 * i, values[i]);
    }
}

void pack_any(Format format, const float* x, int64_t in, float* panels, int64_t panel_rows, int64_t row) {
    switch (format) {
        case Format::mxfp4: return pack<NibbleOrder>(x, in, panels, panel_rows, row);
        case Format::fp8:
        case Format::fp8_rounded:
        case Format::fp8_f32scale_rounded:
        case Format::fp8_f32scale: return pack<ByteOrder>(x, in, panels, panel_rows, row);
        default: return pack<NaturalOrder>(x, in, panels, panel_rows, row);
    }
}

// The last, incomplete block of a row, from memory that ends with the row.
template <class Row>
TENFOLD_APART void decode_rest(const Row& row, int64_t k, int64_t count, __m256 (&w)[4], __m256i& worst) {
    typename Row::Code codes[32] = {};
    std::memcpy(codes, row.at(k), static_cast<size_t>(count) * sizeof(codes[0]));
    decode(row, codes, k, w, worst);
}

// ---------------------------------------------------------------- few activation rows: weights go by once, decoded

template <class Row>
inline void prefetch(const typename Row::Code* codes, int64_t k, int64_t ahead) {
    const char* next = reinterpret_cast<const char*>(codes) + ahead;
    if (Row::kBlockBytes < 64 && k / 32 * Row::kBlockBytes % 64 != 0) return;  // one line holds several blocks
    for (int64_t line = 0; line < Row::kBlockBytes; line += 64) _mm_prefetch(next + line, _MM_HINT_T1);
}

// A NaN among the codes makes a whole sum NaN; it is rare, so the row is searched for again.
template <int Tokens>
TENFOLD_APART void poison(const uint8_t* codes, int64_t first, int64_t last, __m256 (&sums)[Tokens]) {
    for (int64_t k = first; k < last; ++k) {
        if ((codes[k] & 0x7F) != 0x7F) continue;
        for (auto& sum : sums) sum = _mm256_set1_ps(__builtin_nanf(""));
    }
}

template <int Tokens>
inline void add_block(const __m256 (&w)[4], const float* x, int64_t width, __m256 (&sums)[Tokens]) {
    __asm__("" : "+r"(x));  // x comes from memory each time: kept in registers it would drive the sums out of them
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
            sums[t] = _mm256_fmadd_ps(w[i], _mm256_loadu_ps(x + t * width + 8 * i), sums[t]);
        }
    }
}

// The lanes' sums of `Rows` weight rows and `Tokens` activation rows, which lie `width` apart, over one panel.
template <int Rows, int Tokens, class Row>
inline void dot_rows(const Row* rows, const float* x, int64_t width, int64_t first, int64_t last, int64_t ahead,
                     __m256 (*out)[Tokens]) {
    __m256 sums[Rows][Tokens], w[4];
    for (auto& of_row : sums) {
        for (auto& sum : of_row) sum = _mm256_setzero_ps();
    }
    __m256i worst = _mm256_setzero_si256();
    int64_t k = first;
    for (; k + 32 <= last; k += 32, x += 32) {
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
            prefetch<Row>(rows[r].at(k), k - first, ahead);
            decode(rows[r], rows[r].at(k), k, w, worst);
            add_block(w, x, width, sums[r]);
        }
    }
    for (int r = 0; k < last && r < Rows; ++r) {
        decode_rest(rows[r], k, last - k, w, worst);
        add_block(w, x, width, sums[r]);
    }
    for (int r = 0; r < Rows; ++r) {
        if constexpr (Row::kMayBeNan) {
            if (has_nan_code(worst)) poison(rows[r].codes, first, last, sums[r]);
        }
        for (int t = 0; t < Tokens; ++t) out[r][t] = sums[r][t];
    }
}

// One panel of four weight rows and all activation rows: as many sums at a time as the registers hold, and no fewer
// than hide the latency of a multiply-add.
template <int Tokens, class Row>
TENFOLD_APART void dot_quad(const Product& p, const Row (&rows)[kQuad], int64_t k, int64_t row, int64_t last) {
    constexpr int kRows = Tokens == 1 ? 4 : 2;
    const int64_t in = p.weight.in, width = smaller(kPanel, padded(in) - k), stop = smaller(k + kPanel, in);
    const int64_t ahead = columns_ahead(in, k, kQuad) / 32 * Row::kBlockBytes;
    __m256 sums[kQuad][Tokens];
    const float* x = panel_row(p, k, width, 0);
    for (int r = 0; r < kQuad; r += kRows) {
        dot_rows<kRows, Tokens>(rows + r, x, width, k, stop, ahead, sums + r);
    }
    for (int t = 0; t < Tokens; ++t) {
        const __m128 sum = lane_sums(sums[0][t], sums[1][t], sums[2][t], sums[3][t]);
        put(y_row(p, t, row), sum, smaller(kQuad, last - row), p.add || k > 0);
    }
}

template <class Row>
void dot_any(const Product& p, const Row (&rows)[kQuad], int64_t k, int64_t row, int64_t last) {
    switch (p.count) {
        case 1: return dot_quad<1>(p, rows, k, row, last);
        case 2: return dot_quad<2>(p, rows, k, row, last);
        case 3: return dot_quad<3>(p, rows, k, row, last);
        default: return dot_quad<kFew>(p, rows, k, row, last);
    }
}

template <class Row>
void multiply_few(const Product& p, int64_t first, int64_t last) {
    const int64_t end = last - 1;
    for (int64_t row = first; row < last; row += kQuad) {
        const Row rows[kQuad] = {{p.weight, row},
                                 {p.weight, smaller(row + 1, end)},
                                 {p.weight, smaller(row + 2, end)},
                                 {p.weight, smaller(row + 3, end)}};
        for (int64_t k = 0; k < p.weight.in; k += kPanel) dot_any(p, rows, k, row, last);
    }
}

// fp8 as well as it goes: whole blocks by product_fp8.hpp, and what that leaves.
template <class Scale>
void multiply_few_fp8(const Product& p, int64_t first, int64_t last) {
    if (p.weight.in % 32 != 0) return multiply_few<Fp8Row<Scale>>(p, first, last);
    Scratch memory(Scratch::bytes_of<float>(p.weight.in * p.count));
    float* scaled = memory.take<float>(p.weight.in * p.count);
    for (int64_t row = first, stop = 0; row < last; row = stop) {
        stop = smaller(last, (row / kScaleRows + 1) * kScaleRows);
        if (!scale_panels<Scale>(p, row, scaled)) {
            multiply_few<Fp8Row<Scale>>(p, row, stop);
            continue;
        }
        multiply_scaled(p, scaled, row, stop, [&p](int64_t k, int64_t quad, int64_t end) {
            const Fp8Row<Scale> rows[kQuad] = {{p.weight, quad},
                                               {p.weight, smaller(quad + 1, end - 1)},
                                               {p.weight, smaller(quad + 2, end - 1)},
                                               {p.weight, smaller(quad + 3, end - 1)}};
            dot_any(p, rows, k, quad, end);
        });
    }
}

// ---------------------------------------------------------------- more rows: weights are decoded into a tile first

// A tile holds vector after vector of rows, of each all columns of a panel, eight of one row beside eight of the other.
inline float* tile_row(float* tile, int64_t r) { return tile + r / kSide * (kSide * kPanel) + r % kSide * 8; }

// Row by row and panel by panel is no order the hardware foresees: `next`, `last - first` columns, comes next.
template <class Row>
TENFOLD_APART void unpack(const Row& row, int64_t first, int64_t last, const typename Row::Code* next, float* to) {
    prefetch_lines(next, (last - first) / 32 * Row::kBlockBytes);
    __m256i worst = _mm256_setzero_si256();
    float* const start = to;
    int64_t k = first;
    for (; k + 32 <= last; k += 32, to += 32 * kSide) {
        __m256 w[4];
        decode(row, row.at(k), k, w, worst);
        for (int i = 0; i < 4; ++i) _mm256_store_ps(to + 8 * kSide * i, w[i]);
    }
    if (k < last) {
        __m256 w[4];
        decode_rest(row, k, last - k, w, worst);
        for (int i = 0; i < 4; ++i) _mm256_store_ps(to + 8 * kSide * i, w[i]);
    }
    if (Row::kMayBeNan && has_nan_code(worst)) *start = __builtin_nanf("");  // NaN times anything: one is enough
}

template <int Tokens>
TENFOLD_APART void multiply_wide(const Product& p, const float* tile, int64_t k, int64_t width, int64_t i, int64_t row,
                                 int64_t last) {
    Floats sums[4][Tokens];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) sums[v][t] = no_floats();
    }
    for (int t = 0; t < Tokens; ++t) __builtin_prefetch(y_row(p, i + t, row), 1);  // rows of y share sets of the caches
    const float* x = panel_row(p, k, width, i);
    for (int64_t column = 0; column < width; column += 8) {
        Floats xs[Tokens];
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) xs[t] = spread(x + t * width + column);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const Floats w = load(tile + kSide * (v * kPanel + column));
#pragma GCC unroll 4
            for (int t = 0; t < Tokens; ++t) sums[v][t] = add_product(w, xs[t], sums[v][t]);
        }
    }
    const bool add = p.add || k > 0;
#pragma GCC unroll 2
    for (int64_t quad = 0; quad < kWide; quad += kQuad) {
        if (row + quad >= last) break;
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
            const __m128 sum = quad_sums(&sums[0][t], Tokens, quad);
            put(y_row(p, i + t, row + quad), sum, smaller(kQuad, last - row - quad), add);
        }
    }
}

void multiply_tokens(const Product& p, const float* tile, int64_t k, int64_t width, int64_t row, int64_t last,
                     int64_t i, int64_t stop) {
    while (i < stop) {
        const int64_t tokens = tokens_of(stop - i);
        switch (tokens) {
            case 1: multiply_wide<1>(p, tile, k, width, i, row, last); break;
            case 2: multiply_wide<2>(p, tile, k, width, i, row, last); break;
            case 3: multiply_wide<3>(p, tile, k, width, i, row, last); break;
            default: multiply_wide<kMostTokens>(p, tile, k, width, i, row, last); break;
        }
        i += tokens;
    }
}

// Columns [k, k + kPanel) of weight rows [first, last); what comes next begins with column `next_k` of row `next`.
struct Panel {
    int64_t k, first, last, next, next_k;
};

// Times the activation rows [i, stop).
template <class Row>
void multiply_tile(const Product& p, float* tile, const Panel& at, int64_t i, int64_t stop) {
    const int64_t in = p.weight.in, rows = at.last - at.first, width = smaller(kPanel, padded(in) - at.k);
    for (int64_t r = 0; r < round_up(rows, kWide); ++r) {
        const Row row(p.weight, smaller(at.first + r, at.last - 1));
        const Row next(p.weight, smaller(at.next + r, p.weight.out - 1));
        unpack(row, at.k, smaller(at.k + kPanel, in), next.at(at.next_k), tile_row(tile, r));
    }
    for (; i < stop; i += kTokens) {
        for (int64_t r = 0; r < rows; r += kWide) {
            multiply_tokens(p, tile_row(tile, r), at.k, width, at.first + r, at.last, i, smaller(i + kTokens, stop));
        }
    }
}

// Weight rows [first, last) panel by panel, tile by tile, times the activation rows [i, stop): as many as stay near.
template <class Row>
void multiply_block(const Product& p, float* tile, int64_t first, int64_t last, int64_t i, int64_t stop) {
    const int64_t rows = tile_rows(p.count), in = p.weight.in;
    for (int64_t k = 0; k < in; k += kPanel) {
        for (int64_t row = first; row < last; row += rows) {
            Panel at{k, row, smaller(row + rows, last), row + rows, k};
            if (at.last == last) {
                at.next_k = k + kPanel < in ? k + kPanel : 0;
                at.next = at.next_k > 0 ? first : last;
            }
            multiply_tile<Row>(p, tile, at, i, stop);
        }
    }
}

template <class Row>
void multiply_as(const Product& p, int64_t first, int64_t last) {
    if (p.count <= kFew) return multiply_few<Row>(p, first, last);
    alignas(64) float tile[kTileRows * kPanel];
    const int64_t together = near_tokens(p.count, kTokens);
    const int64_t near_rows = p.count <= kTokens ? tile_rows(p.count) : kNearRows;
    for (int64_t i = 0; i < p.count; i += together) {
        for (int64_t row = first; row < last; row += near_rows) {
            multiply_block<Row>(p, tile, row, smaller(row + near_rows, last), i, smaller(i + together, p.count));
        }
    }
}

template <class Scale>
void multiply_fp8(const Product& p, int64_t first, int64_t last) {
    p.count <= kFew ? multiply_few_fp8<Scale>(p, first, last) : multiply_as<Fp8Row<Scale>>(p, first, last);
}

#else

float decode(const F32Row& row, int64_t k) { return row.codes[k]; }

float decode(const Bf16Row& row, int64_t k) {
    const uint32_t bits = static_cast<uint32_t>(row.codes[k]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

float e4m3(uint8_t code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    if ((code & 0x7F) == 0x7F) return __builtin_nanf("");
    const float size = exponent == 0 ? static_cast<float>(mantissa) * 0x1p-9F
                                     : static_cast<float>(8 + mantissa) * kE8m0.of[127 + exponent - 10];
    return code & 0x80 ? -size : size;
}

template <class Scale>
float decode(const Fp8Row<Scale>& row, int64_t k) {
    return e4m3(row.codes[k]) * row.scale_at(k);
}

float decode(const Mxfp4Row& row, int64_t k) {
    static const float numbers[16] = {0, 0.5F, 1, 1.5F, 2, 3, 4, 6, -0.0F, -0.5F, -1, -1.5F, -2, -3, -4, -6};
    return numbers[row.codes[k / 2] >> (k % 2 * 4) & 15] * row.scale_at(k);
}

void pack_any(Format, const float* x, int64_t in, float* panels, int64_t panel_rows, int64_t row) {
    for (int64_t k = 0; k < in; k += kPanel) {
        const int64_t width = smaller(kPanel, padded(in) - k), used = smaller(width, in - k);
        float* to = panels + panel_rows * k + row * width;
        std::memcpy(to, x + k, static_cast<size_t>(used) * sizeof(float));
        std::memset(to + used, 0, static_cast<size_t>(width - used) * sizeof(float));
    }
}

// In double: the build the others are compared with must not add an error of its own.
template <class Row>
void multiply_as(const Product& p, int64_t first, int64_t last) {
    const int64_t in = p.weight.in;
    float w[kPanel];
    for (int64_t r = first; r < last; ++r) {
        const Row row(p.weight, r);
        for (int64_t k = 0; k < in; k += kPanel) {
            const int64_t width = smaller(kPanel, padded(in) - k), used = smaller(width, in - k);
            for (int64_t j = 0; j < used; ++j) w[j] = decode(row, k + j);
            for (int64_t i = 0; i < p.count; ++i) {
                const float* x = panel_row(p, k, width, i);
                double sum = 0;
                for (int64_t j = 0; j < used; ++j) sum += static_cast<double>(w[j]) * x[j];
                float* y = y_row(p, i, r);
                *y = static_cast<float>(p.add || k > 0 ? *y + sum : sum);
            }
        }
    }
}

template <class Scale>
void multiply_fp8(const Product& p, int64_t first, int64_t last) {
    multiply_as<Fp8Row<Scale>>(p, first, last);
}

#endif

}  // namespace

void pack_row(Format format, const float* x, int64_t in, float* panels, int64_t panel_rows, int64_t row) {
#ifdef __AMX_BF16__
    if (format == Format::mxfp4_rounded) return pack_row_rounded(x, in, panels, row);
    if (format == Format::bf16_split) return pack_row_split<Bf16Split>(x, in, panels, panel_rows, row);
    if (format > Format::bf16_split) return pack_row_split<Fp8Split<uint8_t>>(x, in, panels, panel_rows, row);
#else
    if (format == Format::mxfp4_rounded) return pack_row_int8(x, in, panels, panel_rows, row);
    if (format > Format::bf16_split) return pack_row_int16(x, in, panels, panel_rows, row);
#endif
    pack_any(format, x, in, panels, panel_rows, row);
}

void multiply(const Product& product, int64_t first, int64_t last) {
    if (first >= last) return;  // a thread may have no rows of a small weight
    [[maybe_unused]] const KeepSubnormals keep{};
    switch (product.weight.format) {
        case Format::f32: return multiply_as<F32Row>(product, first, last);
        case Format::bf16: return multiply_as<Bf16Row>(product, first, last);
        case Format::fp8: return multiply_fp8<uint8_t>(product, first, last);
        case Format::fp8_f32scale: return multiply_fp8<float>(product, first, last);
        case Format::mxfp4: return multiply_as<Mxfp4Row>(product, first, last);
#ifdef __AMX_BF16__
        case Format::mxfp4_rounded: return multiply_rounded(product, first, last);
        case Format::bf16_split: return multiply_split<Bf16Split>(product, first, last);
        case Format::fp8_rounded: return multiply_split<Fp8Split<uint8_t>>(product, first, last);
        case Format::fp8_f32scale_rounded: return multiply_split<Fp8Split<float>>(product, first, last);
#else
        case Format::mxfp4_rounded: return multiply_int8(product, first, last);
        case Format::bf16_split: return multiply_as<Bf16Row>(product, first, last);
        case Format::fp8_rounded:
        case Format::fp8_f32scale_rounded: return multiply_int16(product, first, last);
#endif
    }
}

}  // namespace tenfold::TENFOLD_ISA
