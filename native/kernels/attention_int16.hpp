// Attention over e4m3 rows with scales that are powers of two, by products of whole numbers of 16 bits.
//
// A row becomes whole numbers under one scale, 16 times its codes where theirs is its largest; of those only what is
// below a half is rounded. Queries are rounded under one scale a head, and so are shares times the scales of their
// rows, half a block at a time, as finely as sums of 31 bits allow. Sums are exact, and what is rounded together is a
// query's own affair: nothing depends on the vectors' width, on company or on threads.
#pragma once

#if defined(__AVX2__) && !defined(__AMX_BF16__)

#include "attention_blocks.hpp"
#include "int16.hpp"
#include "product_parts.hpp"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int64_t kWords = 16 * kSide;                        // in a vector
constexpr int64_t kRowsScored = 4, kHeadsScored = 2 * kSide;  // at a time: as many as registers hold sums of
constexpr int64_t kHeadsSummed = 4 * kSide;
constexpr int64_t kLineWords = 32;                            // in a cache line
constexpr int64_t kStripRows = 16;  // 16 KB of 512 channels, that all heads meet in the first cache
constexpr int64_t kShareRows = 64;  // whose shares are under one scale
constexpr int64_t kShareParts = kBlockRows / kShareRows;

constexpr float kMostSizes = 0x1p31F / 8192.0F;  // together, of what meets a row's numbers, which are up to 8,192
constexpr float kNoScore = -1e30F;

// ---------------------------------------------------------------- rows

// The biased exponent of the largest of `count` bf16 numbers; 255 where one is infinite or none.
inline int32_t largest_exponent(const uint8_t* stored, int64_t count) {
    __m256i largest = _mm256_setzero_si256();
    for (int64_t i = 0; i < count; i += 16) {
        const __m256i numbers = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(stored + 2 * i));
        largest = _mm256_max_epu16(largest, _mm256_and_si256(numbers, _mm256_set1_epi16(0x7FFF)));
    }
    const __m128i eight = _mm_max_epu16(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1)));
    return (0xFFFF ^ _mm_extract_epi16(least, 0)) >> 7;
}

// The channels of one row as whole numbers, and what undoes that: NaN where one is no finite number.
inline float decode_whole(const uint8_t* row, const RowLayout& layout, int16_t* to) {
    constexpr int64_t kCodes = 32 * kSide;
    const uint8_t* const scales = row + layout.scale_offset;
    const uint8_t* const plain = row + layout.plain_offset;
    const int64_t blocks = layout.coded / kCodesTogether;
    const int32_t of_plain = largest_exponent(plain, layout.plain);
    int32_t top = of_plain > 16 ? of_plain - 8 : 8;  // room for its numbers, and factors that float32 can hold
    bool is_nan = of_plain == 255;
    for (int64_t i = 0; i < blocks; ++i) {
        is_nan |= scales[i] == 255;
        if (scales[i] > top) top = scales[i];
    }
    Ints worst = no_ints();
    for (int64_t i = 0; i < blocks; ++i) {
        const int32_t below = top - scales[i] + 1, by = below < 15 ? below : 15;  // 16 times a code, not 32
        const Ints down = all_lanes(worst, by * 0x01010101);
        for (int64_t first = i * kCodesTogether; first < (i + 1) * kCodesTogether; first += kCodes) {
            const Ints codes = dealt(load_ints(row + first));
            worst = larger_bytes(worst, twice_bytes(codes));
            const Wholes wholes = wholes_of(codes, lower_bytes(exponents_of(codes), down));
            store_ints(to + first, wholes.first);
            store_ints(to + first + kWords, wholes.second);
        }
    }
    is_nan |= has_nan_code(worst);
    const __m256 factor = _mm256_set1_ps(from_bits(static_cast<uint32_t>(258 - top) << 23));  // 16 times 2^(127 - top)
    for (int64_t i = 0; i < layout.plain; i += 16) {
        const auto eight = [=](int64_t first) { return _mm256_mul_ps(eight_bf16(plain + 2 * first), factor); };
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + layout.coded + i), in_16_bits(eight(i), eight(i + 8)));
    }
    return is_nan ? __builtin_nanf("") : from_bits(static_cast<uint32_t>(top - 4) << 23);
}

// ---------------------------------------------------------------- the two products

// to[head][row] = what rows and heads that lie `stride` numbers apart come to, times their scales.
template <int heads>
TENFOLD_APART void score_rows(const int16_t* q, const int16_t* k, int64_t width, int64_t stride, const float* q_scales,
                              const float* row_scales, float* to) {
    Ints sums[heads][kRowsScored];
#pragma GCC unroll 4
    for (int h = 0; h < heads; ++h) {
#pragma GCC unroll 4
        for (int r = 0; r < kRowsScored; ++r) sums[h][r] = no_ints();
    }
    for (int64_t i = 0; i < width; i += kWords) {
        Ints of_heads[heads];
#pragma GCC unroll 4
        for (int h = 0; h < heads; ++h) of_heads[h] = load_ints(q + h * stride + i);
#pragma GCC unroll 4
        for (int r = 0; r < kRowsScored; ++r) {
            const int16_t* const row = k + r * stride + i;
#pragma GCC unroll 2
            for (int h = 0; h < heads; h += 2) {
                add_products_of_vector(of_heads[h], of_heads[h + 1], row, sums[h][r], sums[h + 1][r]);
            }
        }
    }
    const __m128 of_rows = _mm_loadu_ps(row_scales);
#pragma GCC unroll 4
    for (int h = 0; h < heads; ++h) {
        __m256 of_row[kRowsScored];
#pragma GCC unroll 4
        for (int r = 0; r < kRowsScored; ++r) of_row[r] = _mm256_cvtepi32_ps(sides_sum(sums[h][r]));
        const __m128 exact = lane_sums(of_row[0], of_row[1], of_row[2], of_row[3]);
        _mm_storeu_ps(to + h * kBlockRows, _mm_mul_ps(_mm_mul_ps(exact, _mm_set1_ps(q_scales[h])), of_rows));
    }
}

// sums[head][0 .. kWords) += shares[head] times pairs of rows, times the shares' scales.
template <int heads>
TENFOLD_APART void add_pairs_of_rows(const Ints* pairs, int64_t count, const int16_t* shares, const float* scales,
                                     float* sums, int64_t stride) {
    Ints exact[heads][2];
#pragma GCC unroll 8
    for (auto& of_head : exact) of_head[0] = of_head[1] = no_ints();
    for (int64_t pair = 0; pair < count; ++pair) {
        const Ints first = pairs[2 * pair], second = pairs[2 * pair + 1];
#pragma GCC unroll 8
        for (int h = 0; h < heads; ++h) {
            add_products_of_pair(first, second, shares + h * kBlockRows + 2 * pair, exact[h][0], exact[h][1]);
        }
    }
#pragma GCC unroll 8
    for (int h = 0; h < heads; ++h) {
        const Floats scale = all_floats(scales[h]);
        float* const to = sums + h * stride;
        store(to, add_product(to_floats(exact[h][0]), scale, load(to)));
        store(to + kWords / 2, add_product(to_floats(exact[h][1]), scale, load(to + kWords / 2)));
    }
}

// ---------------------------------------------------------------- a task

struct Int16Pieces {
    int64_t stride;        // numbers from one row, or head of a query, to the next: an odd number of cache lines
    int64_t value_stride;  // floats from one head's sums to the next

    int16_t* k;           // [kBlockRows][stride]
    float* row_scales;    // [kBlockRows]
    float* scores;        // [head][kBlockRows]
    int16_t* shares;      // [head][kBlockRows]
    float* share_scales;  // [kShareParts][head]
    Ints* pairs;          // [vector of a line][kBlockRows / 2][2], the channels of two rows
    int16_t* q;           // [query][head][stride]
    float* q_scales;      // [query][head]
    float* sums;          // [query][head][value_stride], of each vector's channels fours in turns
    float *top, *total;   // [query][head]
    float* row;           // [value_stride], a head's values on their way out
    int64_t *source, *source_row;

    explicit Int16Pieces(const Attention& c)
        : stride((divided(c.width, 32) | 1) * 32), value_stride(padded_stride(round_up(c.value_dim, kLineWords))) {}

    template <class Take>
    void lay_out(const Attention& c, Take& take) {
        const int64_t each = c.tile * c.part_heads;
        take(k, kBlockRows * stride);
        take(row_scales, kBlockRows);
        take(scores, c.part_heads * kBlockRows);
        take(shares, c.part_heads * kBlockRows);
        take(share_scales, kShareParts * c.part_heads);
        take(pairs, kLineWords / kWords * kBlockRows);
        take(q, each * stride);
        take(q_scales, each);
        take(sums, each * value_stride);
        take(top, each);
        take(total, each);
        take(row, value_stride);
        take(source, c.tile);
        take(source_row, c.tile);
    }
};

class Int16Worker : Int16Pieces {
public:
    static constexpr bool zeroed = false;

    static int64_t bytes(const Attention& c) {
        CountBytes count;
        Int16Pieces(c).lay_out(c, count);
        return count.bytes;
    }

    Int16Worker(Scratch& scratch, const Attention& c) : Int16Pieces(c), call_(c), layout_(c.sources[0].layout) {
        TakePieces take{scratch};
        lay_out(c, take);
    }

    void run(int64_t task) const {
        const Part part(call_, task);
        const int64_t heads = round_up(part.heads, kHeadsSummed);
        for (int64_t i = 0; i < part.count; ++i) begin(part, i, heads);
        each_block(
            call_, part, source, source_row, [this](const Block& block) { decode(block); },
            [this, heads](const Block& block, bool first, const Block& next) { attend(block, heads, first, next); });
        for (int64_t i = 0; i < part.count; ++i) finish(part, i);
    }

private:
    // -------------------------------------------------------- a query

    // Heads behind the last one are zeros: they fill the last group.
    void begin(const Part& part, int64_t i, int64_t heads) const {
        const float* const of_query = call_.q + ((part.first + i) * call_.heads + part.first_head) * call_.width;
        for (int64_t head = 0; head < heads; ++head) {
            const int64_t at = i * call_.part_heads + head;
            const bool is_head = head < part.heads;
            begin_softmax(call_, is_head ? part.first_head + head : -1, top[at], total[at]);
            __builtin_memset(sums + at * value_stride, 0, static_cast<uint64_t>(value_stride) * 4);
            if (is_head) q_scales[at] = round_head(of_query + head * call_.width, q + at * stride);
            else fill_head(at);
        }
    }

    void fill_head(int64_t at) const {
        __builtin_memset(q + at * stride, 0, static_cast<uint64_t>(call_.width) * 2);
        q_scales[at] = 0.0F;
    }

    // A head's channels, scaled to units of log2, as whole numbers. Each eighth pair of channels is summed apart.
    TENFOLD_APART float round_head(const float* from, int16_t* to) const {
        const __m256 scale = _mm256_set1_ps(call_.scale * log2_e);
        __m256 largest = _mm256_setzero_ps(), even = largest, odd = largest;
        for (int64_t i = 0; i < call_.width; i += 16) {
            const __m256 a = sizes_of(_mm256_mul_ps(_mm256_loadu_ps(from + i), scale));
            const __m256 b = sizes_of(_mm256_mul_ps(_mm256_loadu_ps(from + i + 8), scale));
            largest = _mm256_max_ps(largest, _mm256_max_ps(a, b));
            even = _mm256_add_ps(even, a);
            odd = _mm256_add_ps(odd, b);
        }
        const float most = kMostSizes - static_cast<float>(call_.width / 16 + 1);  // less what rounding adds
        const Step step = step_of(largest_of(largest), largest_of(_mm256_hadd_ps(even, odd)), most);
        const __m256 factor = _mm256_mul_ps(scale, _mm256_set1_ps(step.inverse));
        for (int64_t i = 0; i < call_.width; i += 16) {
            const __m256 a = _mm256_loadu_ps(from + i), b = _mm256_loadu_ps(from + i + 8);
            const __m256i wholes = in_16_bits(_mm256_mul_ps(a, factor), _mm256_mul_ps(b, factor));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), wholes);
        }
        return step.scale;
    }

    // -------------------------------------------------------- a block

    TENFOLD_APART void decode(const Block& block) const {
        for (int64_t r = 0; r < block.count; ++r) {
            if (r + 2 < block.count) {
                const uint8_t* const later = block.rows[r + 2];
                ask_for<3>(later, layout_.row_bytes, later + layout_.row_bytes);
            }
            row_scales[r] = decode_whole(block.rows[r], layout_, k + r * stride);
        }
        for (int64_t r = block.count; r < round_up(block.count, 16); ++r) row_scales[r] = 0.0F;
        for (int64_t r = block.count; r < round_up(block.count, kRowsScored); ++r) {
            __builtin_memset(k + r * stride, 0, static_cast<uint64_t>(call_.width) * 2);
        }
    }

    void attend(const Block& block, int64_t heads, bool first, const Block& next) const {
        const int64_t rows = round_up(block.count, kRowsScored), query = block.query * call_.part_heads;
        const auto row_at = [&next](int64_t i) { return next.rows[i]; };
        Ahead<decltype(row_at), 2> ahead(row_at, layout_.row_bytes, next.count);
        const int64_t times = divided(rows, kStripRows) * heads / kHeadsScored +
                              divided(call_.value_dim, kLineWords) * kLineWords / kWords * heads / kHeadsSummed;
        const int64_t each = divided(ahead.lines(), times);
        for (int64_t strip = 0; strip < rows; strip += kStripRows) {
            for (int64_t head = 0; head < heads; head += kHeadsScored) {
                ahead.ask(each);
                for (int64_t r = strip; r < smaller(strip + kStripRows, rows); r += kRowsScored) {
                    score_rows<kHeadsScored>(q + (query + head) * stride, k + r * stride, call_.width, stride,
                                             q_scales + query + head, row_scales + r, scores + head * kBlockRows + r);
                }
            }
        }
        for (int64_t head = 0; head < heads; ++head) to_shares(query + head, head, block.count, first);
        for (int64_t line = 0; line < call_.value_dim; line += kLineWords) {
            pair_rows(line, rows);
            for (int64_t vector = 0; vector < kLineWords / kWords; ++vector) {
                for (int64_t head = 0; head < heads; head += kHeadsSummed) {
                    ahead.ask(each);
                    add_rows(vector, head, rows, sums + (query + head) * value_stride + line + vector * kWords);
                }
            }
        }
    }

    // One vector of a line of channels for some heads.
    void add_rows(int64_t vector, int64_t head, int64_t rows, float* to) const {
        for (int64_t r = 0; r < rows; r += kShareRows) {
            add_pairs_of_rows<kHeadsSummed>(pairs + vector * kBlockRows + r, smaller(kShareRows, rows - r) / 2,
                                            shares + head * kBlockRows + r,
                                            share_scales + r / kShareRows * call_.part_heads + head, to, value_stride);
        }
    }

    // One head's scores become whole shares; its reference point goes up to the largest score, and with it what was
    // summed so far.
    TENFOLD_APART void to_shares(int64_t at, int64_t head, int64_t count, bool first) const {
        float* const of_head = scores + head * kBlockRows;
        const int64_t stop = round_up(count, 16);
        for (int64_t r = count; r < stop; ++r) of_head[r] = kNoScore;
        __m256 largest = _mm256_set1_ps(top[at]);
        for (int64_t r = 0; r < stop; r += 8) largest = _mm256_max_ps(_mm256_loadu_ps(of_head + r), largest);
        const int64_t summed = first ? 0 : value_stride;
        raise_top(next_integer(largest_of(largest)), top[at], total[at], sums + at * value_stride, summed);
        const __m256 tops = _mm256_set1_ps(top[at]);
        for (int64_t r = 0; r < stop; r += kShareRows) {
            float* const scale = share_scales + r / kShareRows * call_.part_heads + head;
            int16_t* const to = shares + head * kBlockRows + r;
            *scale = round_shares(of_head + r, row_scales + r, smaller(kShareRows, stop - r), tops, total[at], to);
        }
    }

    // Shares of some scores are added to `total_of` and come out as whole numbers; returns what undoes that.
    static float round_shares(const float* of_rows, const float* scales, int64_t count, __m256 tops, float& total_of,
                              int16_t* to) {
        alignas(32) float weights[kShareRows];
        __m256 all = _mm256_setzero_ps(), weighed = all, largest = all;
        for (int64_t r = 0; r < count; r += 8) {
            const __m256 part = share(_mm256_loadu_ps(of_rows + r), tops);
            const __m256 weight = _mm256_mul_ps(part, _mm256_loadu_ps(scales + r));
            all = _mm256_add_ps(all, part);
            weighed = _mm256_add_ps(weighed, weight);
            largest = _mm256_max_ps(largest, weight);
            _mm256_store_ps(weights + r, weight);
        }
        total_of += sum_of(all);
        const Step step = step_of(largest_of(largest), sum_of(weighed), kMostSizes - kShareRows / 2 - 1);
        const __m256 factor = _mm256_set1_ps(step.inverse);
        for (int64_t r = 0; r < count; r += 16) {
            const __m256 a = _mm256_mul_ps(_mm256_load_ps(weights + r), factor);
            const __m256 b = _mm256_mul_ps(_mm256_load_ps(weights + r + 8), factor);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + r), in_16_bits(a, b));
        }
        return step.scale;
    }

    // A line of channels, from `first` on, of all rows: of two rows each, the numbers of a channel beside each other.
    void pair_rows(int64_t first, int64_t rows) const {
        const int16_t* from = k + first;
        for (int64_t r = 0; r < rows; r += 2, from += 2 * stride) {
            for (int64_t i = 0; i < kLineWords / kWords; ++i) {
                const Ints a = load_ints(from + i * kWords), b = load_ints(from + stride + i * kWords);
                pairs[i * kBlockRows + r] = low16(a, b);
                pairs[i * kBlockRows + r + 1] = high16(a, b);
            }
        }
    }

    // -------------------------------------------------------- the result

    TENFOLD_APART void finish(const Part& part, int64_t i) const {
        finish_heads(call_, part.first + i, part.first_head, part.heads, [&](int64_t h, float* to) {
            const int64_t at = i * call_.part_heads + h;
            arrange(sums + at * value_stride, total[at]);
            __builtin_memcpy(to, row, static_cast<uint64_t>(call_.value_dim) * 4);
        });
    }

    // One head's sums, divided, in the order of channels: pairing rows took fours of each eight to either vector.
    void arrange(const float* from, float total_of) const {
        const __m128 factor = _mm_set1_ps(1.0F / total_of);
        for (int64_t first = 0; first < call_.value_dim; first += kWords) {
            for (int64_t i = 0; i < kWords / 2; i += 4) {
                const auto four = [&](int64_t at) { return _mm_mul_ps(_mm_loadu_ps(from + first + at), factor); };
                _mm_storeu_ps(row + first + 2 * i, four(i));
                _mm_storeu_ps(row + first + 2 * i + 4, four(kWords / 2 + i));
            }
        }
    }

    const Attention& call_;
    const RowLayout& layout_;
};

}  // namespace
}  // namespace tenfold::TENFOLD_ISA

#endif
