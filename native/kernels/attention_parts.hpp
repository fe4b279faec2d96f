// What attention by vectors and by tiles share: a call, the scale of its softmax, and asking for rows ahead.
#pragma once

#include "decode_row.hpp"
#include "row_parts.hpp"
#include "scratch.hpp"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr float nothing = -1e9F;  // reference point of a running softmax before the first row
constexpr float log2_e = 1.44269504088896341F;

// 2^x for x within +-1/2, highest power first; relative error 1e-8 (Cephes).
constexpr float exp2_terms[7] = {1.535336188319500e-4F, 1.339887440266574e-3F, 9.618437357674640e-3F,
                                 5.550332471162809e-2F, 2.402264791363012e-1F, 6.931472028550421e-1F, 1.0F};

// `sparse_attention`, and its split into tasks: tiles of queries times ranges of heads.
struct Attention {
    const float* q;
    const Rows* sources;
    int64_t num_sources;
    const float* sink;
    const float* frequencies;
    float* out;
    int64_t n, heads, width, value_dim;
    int64_t position, pairs;
    float scale;
    int64_t tile = 0, tiles = 0, head_parts = 0, part_heads = 0;
};

// Queries and heads of one task.
struct Part {
    int64_t first, count, first_head, heads;

    Part(const Attention& c, int64_t task)
        : first(task / c.head_parts * c.tile),
          count(c.n - first < c.tile ? c.n - first : c.tile),
          first_head(task % c.head_parts * c.part_heads),
          heads(c.heads - first_head < c.part_heads ? c.heads - first_head : c.part_heads) {}
};

// Few tiles of queries: heads are split too, in groups of `group`.
inline void split_tasks(Attention& c, int64_t tile, int64_t group, int32_t threads) {
    const int64_t share_each = divided(c.n, threads);
    c.tile = tile < share_each ? tile : share_each;
    c.tiles = divided(c.n, c.tile);
    const int64_t parts = c.tiles < 2 * threads ? threads : 1;
    c.part_heads = round_up(divided(c.heads, parts), group);
    c.head_parts = divided(c.heads, c.part_heads);
}

// ---------------------------------------------------------------- the running softmax

#ifdef __AVX2__

// 2^exponent for integers up to 127; 0 from -127 down, and for NaN.
inline __m256 power_of_two(__m256 exponent) {
    const __m256i biased = _mm256_cvtps_epi32(_mm256_add_ps(_mm256_max_ps(exponent, _mm256_set1_ps(-127.0F)),
                                                            _mm256_set1_ps(127.0F)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}

// 2^(x - top). The fraction is taken from x alone, so another top gives the same digits.
inline __m256 share(__m256 x, __m256 top) {
    const __m256 whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 part = _mm256_sub_ps(x, whole);
    __m256 sum = _mm256_set1_ps(exp2_terms[0]);
    for (int i = 1; i < 7; ++i) sum = _mm256_fmadd_ps(sum, part, _mm256_set1_ps(exp2_terms[i]));
    return _mm256_mul_ps(sum, power_of_two(_mm256_sub_ps(whole, top)));
}

inline float share_of(float x, float top) { return _mm256_cvtss_f32(share(_mm256_set1_ps(x), _mm256_set1_ps(top))); }

inline float power_of_two(float exponent) { return _mm256_cvtss_f32(power_of_two(_mm256_set1_ps(exponent))); }

inline float next_integer(float x) { return _mm_cvtss_f32(_mm_ceil_ps(_mm_set_ss(x))); }

// Up to the next eight; x is aligned to them.
inline void multiply(float* x, int64_t count, float factor) {
    const __m256 factors = _mm256_set1_ps(factor);
    for (int64_t i = 0; i < count; i += 8) _mm256_store_ps(x + i, _mm256_mul_ps(_mm256_load_ps(x + i), factors));
}

#else

inline float power_of_two(float exponent) {
    return from_bits(static_cast<uint32_t>((exponent > -127.0F ? exponent : -127.0F) + 127.0F) << 23);
}

inline float share_of(float x, float top) {
    const float whole = __builtin_rintf(x), part = x - whole;
    float sum = exp2_terms[0];
    for (int i = 1; i < 7; ++i) sum = sum * part + exp2_terms[i];
    return sum * power_of_two(whole - top);
}

inline float next_integer(float x) { return __builtin_ceilf(x); }

inline void multiply(float* x, int64_t count, float factor) {
    for (int64_t i = 0; i < count; ++i) x[i] *= factor;
}

#endif

// Moves a head's reference point up to `to`, if that is higher, and with it what was summed so far.
inline void raise_top(float to, float& top, float& total, float* values, int64_t count) {
    if (!(to > top)) return;
    const float factor = power_of_two(top - to);
    top = to;
    total *= factor;
    multiply(values, count, factor);
}

// A head's reference point, and what it has been given, before the first row: the sink's share, if there is one.
// Number -1 is a head that only fills a group.
inline void begin_softmax(const Attention& c, int64_t head, float& top, float& total) {
    top = nothing;
    total = 0.0F;
    if (c.sink == nullptr || head < 0) return;
    const float sink = c.sink[head] * log2_e;
    if (!(sink > nothing)) return;
    top = next_integer(sink);
    total = share_of(sink, top);
}

// Results of some heads of a query: write(head, where to), then their tails are turned back.
template <class Write>
void finish_heads(const Attention& c, int64_t query, int64_t first_head, int64_t heads, const Write& write) {
    float cos[most_pairs], sin[most_pairs];
    turn(c.position + query, c.frequencies, c.pairs, -1.0F, cos, sin);
    for (int64_t h = 0; h < heads; ++h) {
        float* const to = c.out + (query * c.heads + first_head + h) * c.value_dim;
        write(h, to);
        float* const tail = to + c.value_dim - 2 * c.pairs;
        rotate_row(tail, cos, sin, c.pairs, true, tail);
    }
}

// Gathered rows lie anywhere in memory: those of the next block are asked for while this one is computed, a few
// cache lines at a time, since more at once than the core can have under way would stop it.
template <class RowAt, int nearness = 3>
class Ahead {
public:
    Ahead(RowAt row_at, int64_t row_bytes, int64_t count) : row_at_(row_at), row_bytes_(row_bytes), count_(count) {
        if (count > 0) begin_row();
    }

    // At most, since a row may start within a line.
    int64_t lines() const { return count_ * ((row_bytes_ + 126) / 64); }

    void ask(int64_t some) {
        for (; some > 0 && row_ < count_; --some) {
            __builtin_prefetch(at_, 0, nearness);
            at_ += 64;
            if (at_ >= end_ && ++row_ < count_) begin_row();
        }
    }

private:
    void begin_row() {
        const uint8_t* const first = row_at_(row_);
        at_ = first - reinterpret_cast<uintptr_t>(first) % 64;
        end_ = first + row_bytes_;
    }

    RowAt row_at_;  // the packed row of a number
    int64_t row_bytes_, count_, row_ = 0;
    const uint8_t *at_ = nullptr, *end_ = nullptr;
};

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
