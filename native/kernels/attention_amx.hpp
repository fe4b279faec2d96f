// Attention over e4m3 rows with scales that are powers of two, by the tiles of AMX.
//
// Such rows are bf16 numbers as they are. Queries and shares are taken as two bf16 numbers each, as activations are in
// the products, which leaves 2^-17 of them. A block's rows are taken in steps of 32, each one instruction's sums.
#pragma once

#ifdef __AMX_BF16__

#include "amx.hpp"
#include "attention_blocks.hpp"
#include "product_parts.hpp"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int64_t kStepRows = 32, kBlockSteps = kBlockRows / kStepRows;
constexpr int64_t kNearSteps = 8;       // of channels: 32 KB of two tiles of heads, within the first cache

// Queries of a task: what they have in common is decoded once, and together they stay in the second cache.
inline int64_t queries_of_tiles(int64_t heads) {
    const int64_t tiles = divided(heads, kTileSide);
    return tiles >= 8 ? 1 : 8 / tiles;
}

// ---------------------------------------------------------------- rows

// The exponents of all numbers but zero, raised; those of e4m3 numbers are 118 to 135.
inline __m512i raised(__m512i numbers, __m512i by) {
    const __mmask32 some = _mm512_test_epi16_mask(numbers, _mm512_set1_epi16(0x7FFF));
    return _mm512_mask_add_epi16(numbers, some, numbers, by);
}

// Where a number would be subnormal or infinite, or is none at all: by way of float32.
TENFOLD_APART void decode_slowly(const uint8_t* codes, uint8_t scale, __m512i& even, __m512i& odd) {
    alignas(64) uint16_t parts[2][kCodesTogether / 2];
    for (int64_t i = 0; i < kCodesTogether; ++i) {
        const float number = e4m3_value(codes[i]) * e8m0_value(scale);
        parts[i % 2][i / 2] = static_cast<uint16_t>(to_bits(number) >> 16);
    }
    even = _mm512_load_si512(parts[0]);
    odd = _mm512_load_si512(parts[1]);
}

// Says false where the numbers are not right.
inline __attribute__((always_inline)) bool decode_quickly(const uint8_t* at, uint8_t scale, __m512i& even,
                                                          __m512i& odd) {
    const __m512i codes = _mm512_loadu_si512(at), size = _mm512_set1_epi8(127);
    const __mmask64 nan = _mm512_cmpeq_epi8_mask(_mm512_and_si512(codes, size), size);
    unpack_e4m3(codes, even, odd);
    const __m512i by = _mm512_set1_epi16(static_cast<int16_t>((scale - 127) * 128));
    even = raised(even, by);
    odd = raised(odd, by);
    return nan == 0 && scale >= 127 - 117 && scale <= 127 + 119;
}

// ---------------------------------------------------------------- the running softmax

// 2^exponent for integers up to 127; 0 from -127 down, and for NaN.
inline __m512 power_of_two(__m512 exponent) {
    const __m512i biased = _mm512_cvtps_epi32(_mm512_add_ps(_mm512_max_ps(exponent, _mm512_set1_ps(-127.0F)),
                                                            _mm512_set1_ps(127.0F)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}

inline __m512 share(__m512 x, __m512 top) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 part = _mm512_sub_ps(x, whole);
    __m512 sum = _mm512_set1_ps(exp2_terms[0]);
    for (int i = 1; i < 7; ++i) sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(exp2_terms[i]));
    return _mm512_mul_ps(sum, power_of_two(_mm512_sub_ps(whole, top)));
}

// Each of the first half beside the one of the second.
inline __m512i paired(__m512i halves) {
    const __m512i first = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i second = _mm512_slli_epi32(_mm512_add_epi32(first, _mm512_set1_epi32(16)), 16);
    return _mm512_permutexvar_epi16(_mm512_or_si512(first, second), halves);
}

// ---------------------------------------------------------------- a task

// Sizes of a part, and where each of its pieces of memory begins.
struct TilePieces {
    int64_t head_tiles, steps, values;  // tiles of heads; steps of a row; tiles of channels that are summed

    uint8_t *k, *v;      // a block: [8][steps] tiles of rows; of one step, [4][2] tiles of pairs of rows
    float* scores;       // [head tile][kBlockRows][16 heads]
    uint8_t* shares;     // [head tile][4 steps][part] tiles of heads
    uint8_t* q;          // [query][head tile][steps][part] tiles of pairs of channels
    float* sums;         // [query][head tile][values] tiles of heads
    float *top, *total;  // [query][head tile][16]
    uint16_t* split;     // [steps][part][16 heads][32], of queries on their way to tiles
    float* row;          // [width], a head's values on their way out
    uint8_t* no_row;     // a packed row of zeros
    int64_t *source, *source_row;

    explicit TilePieces(const Attention& c)
        : head_tiles(divided(c.part_heads, kTileSide)), steps(c.width / kStepRows) {
        // whole groups of channels: they lie together
        const int64_t coded = c.sources[0].layout.coded, group = c.value_dim <= coded ? kCodesTogether : kStepRows;
        values = round_up(c.value_dim, group) / kTileSide;
    }

    template <class Take>
    void lay_out(const Attention& c, Take& take) {
        const int64_t each = c.tile * head_tiles;
        take(k, kBlockRows / kTileSide * steps * kTileBytes);
        take(v, kBlockSteps * 2 * kTileBytes);
        take(scores, head_tiles * kBlockRows * kTileSide);
        take(shares, head_tiles * kBlockSteps * 2 * kTileBytes);
        take(q, each * steps * 2 * kTileBytes);
        take(sums, each * values * kTileFloats);
        take(top, each * kTileSide);
        take(total, each * kTileSide);
        take(split, steps * 2 * kTileSide * kStepRows);
        take(row, c.width);
        take(no_row, c.sources[0].layout.row_bytes);
        take(source, c.tile);
        take(source_row, c.tile);
    }
};

class TileWorker : TilePieces {
public:
    static constexpr bool zeroed = false;

    static int64_t bytes(const Attention& c) {
        CountBytes count;
        TilePieces(c).lay_out(c, count);
        return count.bytes;
    }

    TileWorker(Scratch& scratch, const Attention& c) : TilePieces(c), call_(c), layout_(c.sources[0].layout) {
        TakePieces take{scratch};
        lay_out(c, take);
        __builtin_memset(no_row, 0, static_cast<uint64_t>(layout_.row_bytes));
        for (int64_t i = 0; i < layout_.coded / layout_.block; ++i) no_row[layout_.scale_offset + i] = 127;
    }

    void run(int64_t task) const {
        constexpr TileShape whole = {kTileSide, 64};
        const Part part(call_, task);
        for (int64_t i = 0; i < part.count; ++i) begin(part, i);
        const Tiles tiles({whole, whole, whole, whole, whole, whole, whole, whole});
        const uint64_t begun = each_block(
            call_, part, source, source_row, [this](const Block& block) { decode(block); },
            [this](const Block& block, bool first, const Block& next) { attend(block, first, next); });
        for (int64_t i = 0; i < part.count; ++i) {
            if ((begun >> i & 1) == 0) clear_sums(i);
            finish(part, i);
        }
    }

private:
    // -------------------------------------------------------- a query

    TENFOLD_APART void begin(const Part& part, int64_t i) const {
        const float scale = call_.scale * log2_e;
        const float* const of_query = call_.q + ((part.first + i) * call_.heads + part.first_head) * call_.width;
        for (int64_t tile = 0; tile < head_tiles; ++tile) {
            for (int64_t h = 0; h < kTileSide; ++h) {
                const int64_t head = tile * kTileSide + h;
                split_head(head < part.heads ? of_query + head * call_.width : nullptr, scale, h);
                const int64_t at = i * head_tiles * kTileSide + head;
                begin_softmax(call_, head < part.heads ? part.first_head + head : -1, top[at], total[at]);
            }
            uint8_t* const to = q + (i * head_tiles + tile) * steps * 2 * kTileBytes;
            for (int64_t at = 0; at < 2 * steps; ++at) {
                __m512i lines[16];
                const uint16_t* const from = split + at * kTileSide * kStepRows;
                for (int r = 0; r < 16; ++r) lines[r] = _mm512_load_si512(from + r * kStepRows);
                transpose_lines(lines);
                for (int r = 0; r < 16; ++r) _mm512_store_si512(to + at * kTileBytes + r * 64, lines[r]);
            }
        }
    }

    // A head's channels, or none, in the order of decoded rows.
    void split_head(const float* from, float scale, int64_t head) const {
        const auto put = [=](int64_t step, __m512 first, __m512 second) {
            __m512i upper, rest;
            two_parts(first, second, upper, rest);
            uint16_t* const to = split + (step * 2 * kTileSide + head) * kStepRows;
            _mm512_store_si512(to, upper);
            _mm512_store_si512(to + kTileSide * kStepRows, rest);
        };
        if (from == nullptr) {
            for (int64_t step = 0; step < steps; ++step) put(step, _mm512_setzero_ps(), _mm512_setzero_ps());
            return;
        }
        const __m512 factor = _mm512_set1_ps(scale);
        const auto load = [=](int64_t at) { return _mm512_mul_ps(_mm512_loadu_ps(from + at), factor); };
        const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
        int64_t step = 0, at = 0;
        for (; at < layout_.coded; at += kCodesTogether, step += 2) {
            const __m512 a = load(at), b = load(at + 16), c = load(at + 32), d = load(at + 48);
            put(step, _mm512_permutex2var_ps(a, evens, b), _mm512_permutex2var_ps(c, evens, d));
            put(step + 1, _mm512_permutex2var_ps(a, odds, b), _mm512_permutex2var_ps(c, odds, d));
        }
        for (; at < call_.width; at += kStepRows, ++step) put(step, load(at), load(at + 16));
    }

    // -------------------------------------------------------- a block

    // Rows are decoded up to the end of a step; those behind the last one are zeros.
    TENFOLD_APART void decode(const Block& block) const {
        const int64_t rows = round_up(block.count, kStepRows);
        for (int64_t r = 0; r < rows; r += 2) {
            const uint8_t* const first = r < block.count ? block.rows[r] : no_row;
            const uint8_t* const second = r + 1 < block.count ? block.rows[r + 1] : no_row;
            if (!decode_pair<true>(first, second, r)) decode_pair<false>(first, second, r);
        }
    }

    // Says false where the quick way was the wrong one.
    template <bool quick>
    bool decode_pair(const uint8_t* first, const uint8_t* second, int64_t r) const {
        uint8_t* const to = k + r / kTileSide * steps * kTileBytes + r % kTileSide * 64;
        const auto put = [=](int64_t step, __m512i a, __m512i b) {
            _mm512_store_si512(to + step * kTileBytes, a);
            _mm512_store_si512(to + step * kTileBytes + 64, b);
        };
        int64_t step = 0;
        bool right = true;
        for (int64_t block = 0; block * kCodesTogether < layout_.coded; ++block, step += 2) {
            __m512i even[2], odd[2];
            const uint8_t* const rows[2] = {first, second};
            for (int i = 0; i < 2; ++i) {
                const uint8_t* const codes = rows[i] + block * kCodesTogether;
                const uint8_t scale = rows[i][layout_.scale_offset + block];
                if (quick) right &= decode_quickly(codes, scale, even[i], odd[i]);
                else decode_slowly(codes, scale, even[i], odd[i]);
            }
            put(step, even[0], even[1]);
            put(step + 1, odd[0], odd[1]);
        }
        for (int64_t at = 0; at < layout_.plain; at += kStepRows, ++step) {
            const int64_t from = layout_.plain_offset + 2 * at;
            put(step, _mm512_loadu_si512(first + from), _mm512_loadu_si512(second + from));
        }
        return right;
    }

    // A step of channels of all rows: of two rows each, the numbers of a channel beside each other.
    void pair_rows(int64_t step, int64_t row_steps) const {
        const uint8_t* from = k + step * kTileBytes;
        uint8_t* to = v;
        for (int64_t tile = 0; tile < 2 * row_steps; ++tile, from += steps * kTileBytes) {
            for (int64_t r = 0; r < kTileSide; r += 2, to += 64) {
                const __m512i a = _mm512_load_si512(from + r * 64), b = _mm512_load_si512(from + (r + 1) * 64);
                _mm512_store_si512(to, _mm512_unpacklo_epi16(a, b));
                _mm512_store_si512(to + kTileBytes, _mm512_unpackhi_epi16(a, b));
            }
            if (tile % 2 == 1) to += kTileBytes;
        }
    }

    void attend(const Block& block, bool first, const Block& next) const {
        const int64_t row_steps = divided(block.count, kStepRows), head = block.query * head_tiles;
        const auto row_at = [&next](int64_t i) { return next.rows[i]; };
        Ahead<decltype(row_at), 2> ahead(row_at, layout_.row_bytes, next.count);
        const int64_t times = row_steps * divided(head_tiles, 2) * (steps + values / 2);
        const int64_t each = divided(ahead.lines(), times);
        settle_memory();
        for (int64_t tile = 0; tile < head_tiles; tile += 2) {
            for (int64_t from = 0; from < steps; from += kNearSteps) {
                for (int64_t step = 0; step < row_steps; ++step) {
                    if (tile + 1 < head_tiles) score<2>(head, tile, step, from, ahead, each);
                    else score<1>(head, tile, step, from, ahead, each);
                }
            }
        }
        settle_memory();
        for (int64_t tile = 0; tile < head_tiles; ++tile) {
            raise_tops(head + tile, tile, block.count, first);
            to_shares(head + tile, tile, block.count);
        }
        settle_memory();
        for (int64_t channel = 0; channel < values; channel += 2) {
            pair_rows(channel / 2, row_steps);
            settle_memory();
            for (int64_t tile = 0; tile < head_tiles; tile += 2) {
                if (tile + 1 < head_tiles) add_values<2>(head, tile, channel, row_steps, first, ahead, each);
                else add_values<1>(head, tile, channel, row_steps, first, ahead, each);
            }
        }
        settle_memory();
    }

    // Scores of 32 rows with one tile of heads or two, by some steps of channels: a part of a query that the first cache
    // holds while the rows of a block go by. Tiles 0 and 1 are rows 0 and 16 with the first heads.
    template <int sides, class Asking>
    TENFOLD_APART void score(int64_t head, int64_t tile, int64_t row_step, int64_t from, Asking& ahead,
                             int64_t each) const {
        const uint8_t* rows = k + (row_step * 2 * steps + from) * kTileBytes;
        const uint8_t* heads = q + ((head + tile) * steps + from) * 2 * kTileBytes;
        const int64_t other_rows = steps * kTileBytes, other_heads = steps * 2 * kTileBytes;
        float* const to = scores + (tile * kBlockRows + row_step * kStepRows) * kTileSide;
        float* const others = to + kBlockRows * kTileSide;
        begin_sums<sides>(from == 0, to, others);
        const int64_t stop = smaller(from + kNearSteps, steps);
        for (int64_t step = from; step < stop; ++step, rows += kTileBytes, heads += 2 * kTileBytes) {
            ahead.ask(each);
            _tile_loadd(4, rows, 64);
            _tile_loadd(6, heads, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, rows + other_rows, 64);
            _tile_dpbf16ps(1, 5, 6);
            if (sides == 2) {
                _tile_loadd(7, heads + other_heads, 64);
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_loadd(6, heads + kTileBytes, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            if (sides == 2) {
                _tile_loadd(7, heads + other_heads + kTileBytes, 64);
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        store_sums<sides>(to, others);
    }

    // Moves the reference points of a tile of heads up to the largest score, and with them what was summed so far.
    TENFOLD_APART void raise_tops(int64_t head, int64_t tile, int64_t count, bool first) const {
        const float* const from = scores + tile * kBlockRows * kTileSide;
        __m512 largest = _mm512_load_ps(from);
        for (int64_t r = 1; r < count; ++r) largest = _mm512_max_ps(_mm512_load_ps(from + r * kTileSide), largest);
        largest = _mm512_roundscale_ps(largest, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
        const __m512 known = _mm512_load_ps(top + head * kTileSide);
        const __mmask16 raise = _mm512_cmp_ps_mask(largest, known, _CMP_GT_OQ);
        if (raise == 0) return;
        const __m512 factors = _mm512_mask_mov_ps(_mm512_set1_ps(1.0F), raise, power_of_two(_mm512_sub_ps(known, largest)));
        _mm512_store_ps(top + head * kTileSide, _mm512_mask_mov_ps(known, raise, largest));
        float* const total_of = total + head * kTileSide;
        _mm512_store_ps(total_of, _mm512_mul_ps(_mm512_load_ps(total_of), factors));
        if (first) return;
        alignas(64) float factor[kTileSide];
        _mm512_store_ps(factor, factors);
        for (int64_t h = 0; h < kTileSide; ++h) {
            if ((raise >> h & 1) == 0) continue;
            float* const to = sums + head * values * kTileFloats + h * kTileSide;
            for (int64_t i = 0; i < values; ++i) {
                const __m512 sum = _mm512_load_ps(to + i * kTileFloats);
                _mm512_store_ps(to + i * kTileFloats, _mm512_mul_ps(sum, _mm512_set1_ps(factor[h])));
            }
        }
    }

    // Scores of a tile of heads become shares, which are added to the heads' totals row by row.
    TENFOLD_APART void to_shares(int64_t head, int64_t tile, int64_t count) const {
        const float* from = scores + tile * kBlockRows * kTileSide;
        uint8_t* to = shares + tile * kBlockSteps * 2 * kTileBytes;
        const __m512 tops = _mm512_load_ps(top + head * kTileSide);
        __m512 sum = _mm512_load_ps(total + head * kTileSide);
        const auto next = [&](int64_t r) {
            if (r >= count) return _mm512_setzero_ps();
            const __m512 part = share(_mm512_load_ps(from + r * kTileSide), tops);
            sum = _mm512_add_ps(sum, part);
            return part;
        };
        for (int64_t r = 0; r < count; r += kStepRows, to += 2 * kTileBytes) {
            __m512i upper[16], rest[16];
            for (int i = 0; i < 16; ++i) {
                const __m512 even = next(r + 2 * i), odd = next(r + 2 * i + 1);
                two_parts(even, odd, upper[i], rest[i]);
                upper[i] = paired(upper[i]);
                rest[i] = paired(rest[i]);
            }
            transpose_lines(upper);
            transpose_lines(rest);
            for (int i = 0; i < 16; ++i) {
                _mm512_store_si512(to + i * 64, upper[i]);
                _mm512_store_si512(to + kTileBytes + i * 64, rest[i]);
            }
        }
        _mm512_store_ps(total + head * kTileSide, sum);
    }

    // Two tiles of channels for one tile of heads or two; sums of the first heads are tiles 0 and 1.
    template <int sides, class Asking>
    TENFOLD_APART void add_values(int64_t head, int64_t tile, int64_t channel, int64_t row_steps, bool first,
                                  Asking& ahead, int64_t each) const {
        const uint8_t* rows = v;
        const uint8_t* parts = shares + tile * kBlockSteps * 2 * kTileBytes;
        float* const to = sums + ((head + tile) * values + channel) * kTileFloats;
        float* const others = to + values * kTileFloats;
        constexpr int64_t other_parts = kBlockSteps * 2 * kTileBytes;
        begin_sums<sides>(first, to, others);
        for (int64_t step = 0; step < row_steps; ++step, rows += 2 * kTileBytes, parts += 2 * kTileBytes) {
            ahead.ask(each);
            add_split_left<sides>(parts, parts + other_parts, kTileBytes, rows, rows + kTileBytes);
        }
        store_sums<sides>(to, others);
    }

    // -------------------------------------------------------- the result

    void clear_sums(int64_t i) const {
        const int64_t each = head_tiles * values * kTileFloats;
        __builtin_memset(sums + i * each, 0, static_cast<uint64_t>(each) * 4);
    }

    TENFOLD_APART void finish(const Part& part, int64_t i) const {
        finish_heads(call_, part.first + i, part.first_head, part.heads, [&](int64_t h, float* to) {
            const int64_t tile = i * head_tiles + h / kTileSide;
            arrange(sums + tile * values * kTileFloats + h % kTileSide * kTileSide,
                    total[tile * kTileSide + h % kTileSide]);
            __builtin_memcpy(to, row, static_cast<uint64_t>(call_.value_dim) * 4);
        });
    }

    // One head's sums, divided, in the order of channels. Pairs of rows came from quarters of their vectors: of each
    // quarter the lower half of the channels stands in one tile and the upper half in the next.
    void arrange(const float* from, float total_of) const {
        const __m512 factor = _mm512_set1_ps(1.0F / total_of);
        const auto load = [&](int64_t tile) { return _mm512_mul_ps(_mm512_load_ps(from + tile * kTileFloats), factor); };
        int64_t tile = 0;
        for (; tile < values && tile * kTileSide < layout_.coded; tile += 4) {
            const __m512 a = load(tile), b = load(tile + 1), c = load(tile + 2), d = load(tile + 3);
            const __m512 u[4] = {_mm512_unpacklo_ps(a, c), _mm512_unpackhi_ps(a, c), _mm512_unpacklo_ps(b, d),
                                 _mm512_unpackhi_ps(b, d)};
            const __m512 e = _mm512_shuffle_f32x4(u[0], u[1], 0x44), f = _mm512_shuffle_f32x4(u[0], u[1], 0xEE);
            const __m512 g = _mm512_shuffle_f32x4(u[2], u[3], 0x44), h = _mm512_shuffle_f32x4(u[2], u[3], 0xEE);
            float* const to = row + tile * kTileSide;
            _mm512_store_ps(to, _mm512_shuffle_f32x4(e, g, 0x88));
            _mm512_store_ps(to + 16, _mm512_shuffle_f32x4(e, g, 0xDD));
            _mm512_store_ps(to + 32, _mm512_shuffle_f32x4(f, h, 0x88));
            _mm512_store_ps(to + 48, _mm512_shuffle_f32x4(f, h, 0xDD));
        }
        for (; tile < values; tile += 2) {
            const __m512 a = load(tile), b = load(tile + 1);
            const __m512i lower = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
            float* const to = row + tile * kTileSide;
            _mm512_store_ps(to, _mm512_permutex2var_ps(a, lower, b));
            _mm512_store_ps(to + 16, _mm512_permutex2var_ps(a, _mm512_add_epi32(lower, _mm512_set1_epi32(8)), b));
        }
    }

    const Attention& call_;
    const RowLayout& layout_;
};

}  // namespace
}  // namespace tenfold::TENFOLD_ISA

#endif
