// Small parts of the products: what product.cpp and product_int8.cpp share. Every function is the file's own.
#pragma once

#include "product.hpp"
#include "scratch.hpp"

#ifdef __SSE2__
#include <xmmintrin.h>
#endif
#ifdef __AVX2__
#include "lanes.hpp"
#endif

// Loops stand in functions of their own: inlined into one, their constants no longer fit the registers.
#define TENFOLD_APART __attribute__((noinline))

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int64_t kFew = 4;        // activation rows for which weights are better decoded in registers
constexpr int64_t kTokens = 12;    // activation rows of one panel: 24 KiB, at home in the first cache
constexpr int64_t kTileRows = 32;  // weight rows that are unpacked at a time: 64 KiB, at home in the second cache
constexpr int64_t kNearTokens = 192, kNearRows = 512;  // activation rows, 384 KiB a panel there, for so many weight rows

// Of few activation rows an unpacked weight has so few uses that its way to the second cache would cost more.
inline int64_t tile_rows(int64_t count) { return count <= kTokens ? 8 : kTileRows; }

// 2^(b - 127) of each e8m0 byte; 0 is a subnormal number and 255 is NaN, which shifting bits would both miss.
struct Powers {
    float of[256];
};

constexpr Powers make_powers() {
    Powers powers{};
    float power = 0x1p-127F;
    for (int b = 0; b < 255; ++b, power *= b < 255 ? 2.0F : 1.0F) powers.of[b] = power;
    powers.of[255] = __builtin_nanf("");
    return powers;
}

constexpr Powers kE8m0 = make_powers();

inline float scale_of(uint8_t scale) { return kE8m0.of[scale]; }
inline float scale_of(float scale) { return scale; }

inline float* y_row(const Product& p, int64_t i, int64_t weight_row) {
    return p.y + (p.y_rows == nullptr ? i : p.y_rows[i]) * p.y_stride + (weight_row - p.first_column);
}

inline const float* panel_row(const Product& p, int64_t k, int64_t width, int64_t i) {
    return p.panels + p.panel_rows * k + (p.first_row + i) * width;
}

#ifdef __SSE2__

// While it lives, subnormal numbers are numbers on this thread, also after torch.set_flush_denormal(True): some codes
// and scales are such, and threads must agree.
class KeepSubnormals {
public:
    KeepSubnormals() : before_(_mm_getcsr()) {
        if ((before_ & kFlush) != 0) _mm_setcsr(before_ & ~kFlush);
    }
    ~KeepSubnormals() {
        if ((before_ & kFlush) != 0) _mm_setcsr(before_);
    }
    KeepSubnormals(const KeepSubnormals&) = delete;
    KeepSubnormals& operator=(const KeepSubnormals&) = delete;

private:
    static constexpr uint32_t kFlush = 0x8040;  // results to zero, operands to zero
    uint32_t before_;
};

#else

class KeepSubnormals {};

#endif

#ifdef __AVX2__

constexpr int kLanes = 8;                   // on each side of a vector
constexpr int64_t kGroup = kLanes * kSide;  // weight rows, one to a lane

// The sums of the eight lanes of four vectors: each ((0 + 2) + (1 + 3)) + ((4 + 6) + (5 + 7)).
inline __m128 lane_sums(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const __m256 sums = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
    return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

TENFOLD_APART void put_few(float* y, __m128 sums, int64_t rows, bool add) {
    float values[kQuad];
    _mm_storeu_ps(values, sums);
    for (int64_t r = 0; r < rows; ++r) y[r] = add ? y[r] + values[r] : values[r];
}

inline void put(float* y, __m128 sums, int64_t rows, bool add) {
    if (rows < kQuad) return put_few(y, sums, rows, add);
    _mm_storeu_ps(y, add ? _mm_add_ps(_mm_loadu_ps(y), sums) : sums);
}

// Sums of up to as many weight rows as a vector has lanes.
inline void put_group(float* y, Floats sums, int64_t rows, bool add) {
    if (rows >= kGroup) return store(y, add ? load(y) + sums : sums);
    for (int64_t quad = 0; quad < rows; quad += kQuad) {
        const __m256 side = row_of(sums, static_cast<int>(quad / kLanes));
        const __m128 four = quad % kLanes == 0 ? _mm256_castps256_ps128(side) : _mm256_extractf128_ps(side, 1);
        put(y + quad, four, smaller(kQuad, rows - quad), add);
    }
}

// Sums of four weight rows from `first` on with one activation row, from vectors of lanes that lie `stride` apart.
inline __m128 quad_sums(const Floats* sums, int64_t stride, int64_t first) {
    return lane_sums(row_at(sums, stride, first), row_at(sums, stride, first + 1), row_at(sums, stride, first + 2),
                     row_at(sums, stride, first + 3));
}

// How far ahead of column `k` of `rows` rows lies what is read two panels later, in the same rows or in the next ones:
// the hardware's own prefetch starts again with every row.
inline int64_t columns_ahead(int64_t in, int64_t k, int64_t rows) {
    return k + 2 * kPanel < in ? 2 * kPanel : rows * in + 2 * kPanel - in;
}

// As many activation rows at a time as the registers hold sums of, of `left`; one alone is slow, so none is left over.
constexpr int64_t kMostTokens = 2 + kSide;
inline int64_t tokens_of(int64_t left, int64_t most = kMostTokens) {
    return left == most + 1 ? most - 1 : smaller(left, most);
}

// Activation rows that are taken together: no more than stay near, about as many each time, a multiple of `home`.
inline int64_t near_tokens(int64_t count, int64_t home) {
    return round_up(divided(count, divided(count, kNearTokens)), home);
}

// A tile of weights, by its first row and its panel.
struct Place {
    int64_t row, panel;
};

// The tile behind `at` of rows [first, last): panels of `width` up to `end`, in each all rows. None is the last row and
// panel 0.
inline Place tile_behind(Place at, int64_t tile_rows, int64_t first, int64_t last, int64_t width, int64_t end) {
    if (at.row + tile_rows < last) return {at.row + tile_rows, at.panel};
    if (at.panel + width < end) return {first, at.panel + width};
    return {last, 0};
}

// Codes of the next tile, asked for line by line while this one is multiplied: all at once they would not come in time.
class CodesAhead {
public:
    // `width` bytes of each of `rows` rows.
    CodesAhead(const uint8_t* codes, int64_t row_bytes, int64_t width, int64_t rows)
        : codes_(codes), row_bytes_(row_bytes), width_(width), left_(rows) {}

    int64_t lines() const { return left_ * divided(width_, 64); }

    void ask(int64_t lines) {
        for (; lines > 0 && left_ > 0; --lines) {
            _mm_prefetch(reinterpret_cast<const char*>(codes_ + at_), _MM_HINT_T1);
            at_ += 64;
            if (at_ < width_) continue;
            at_ = 0;
            codes_ += row_bytes_;
            --left_;
        }
    }

private:
    const uint8_t* codes_;
    int64_t row_bytes_, width_, left_, at_ = 0;
};

inline void prefetch_lines(const void* from, int64_t num_bytes) {
    for (int64_t line = 0; line < num_bytes; line += 64) {
        _mm_prefetch(static_cast<const char*>(from) + line, _MM_HINT_T1);
    }
}

#endif

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
