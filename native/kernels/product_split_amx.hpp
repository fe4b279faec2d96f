// Weights in fp8 and bf16 times activations in two parts of bf16, by the tiles of AMX.
//
// An activation is the nearest bf16 number and what that leaves, rounded to bf16 too: together it to within 2^-17. e4m3
// numbers are bf16 numbers. Sixteen weight rows times up to sixteen activation rows, 32 columns of one part, are one
// instruction, whose sums are float32, in an order that does not depend on which of the two comes first. The sums of 128
// columns leave the tiles, take their scale and are added one after the other. So no row depends on its company:
// few activation rows have weights on the left, which need not change places for that; more have them on the right.
#pragma once

#include "amx.hpp"
#include "product_parts.hpp"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int64_t kStepColumns = 32;  // of one instruction
constexpr int64_t kScaleSteps = 4;  // under one scale
constexpr int64_t kBlock = kScaleSteps * kStepColumns;
constexpr int64_t kFewPanel = 256;   // columns that are unpacked at a time for few: twice 8 KB, in the first cache

inline int64_t steps_of(int64_t in) { return (in + kStepColumns - 1) / kStepColumns; }

template <int N>
struct Constant {
    static constexpr int value = N;
};

// ---------------------------------------------------------------- weights by their format

// A panel of sixteen weight rows, tile after tile.
struct SplitPanel {
    alignas(64) uint8_t words[kFewPanel / kStepColumns][kTileBytes];
};

// 128 columns of sixteen weight rows, tile after tile, and their scales.
struct SplitBlock {
    alignas(64) uint8_t words[kScaleSteps][kTileBytes];
    alignas(64) float scales[kTileSide];
};

// The columns of a line of 64 bytes of a row in the order of its steps, and how that line becomes rows of tiles.
template <class Scale>
struct Fp8Split {
    static constexpr int64_t kCodeBytes = 1, kLine = 64;
    const Scale* scale;
    int64_t scales_of_row;
    explicit Fp8Split(const Matrix& m)
        : scale(static_cast<const Scale*>(m.scale)), scales_of_row((m.in + 127) / 128) {}

    // Of sixteen rows from `row` on, most often one for all; of the last row where there are none.
    void scales_at(int64_t row, int64_t last, int64_t block, float* to) const {
        row = smaller(row, last - 1);
        const Scale* const of_row = scale + row / 128 * scales_of_row + block;
        const int64_t same = 128 - row % 128;
        const bool two = same < kTileSide && row + same < last;
        const __m512 first = _mm512_set1_ps(scale_of(of_row[0]));
        const __m512 others = _mm512_set1_ps(two ? scale_of(of_row[scales_of_row]) : 0.0F);
        _mm512_store_ps(to, _mm512_mask_mov_ps(first, static_cast<__mmask16>(two ? 0xFFFF << same : 0), others));
    }

    // Even columns are one step, odd ones the next; half a line is one step.
    static void unpack(__m512i codes, bool whole, __m512i (&steps)[2]) {
        unpack_e4m3(codes, steps[0], steps[1]);
        if (!whole) steps[0] = _mm512_inserti64x4(steps[0], _mm512_castsi512_si256(steps[1]), 1);
    }

    // Fours of columns of sixteen rows become pairs of columns of them.
    static void unpack_fours(const __m512i (&fours)[16], bool whole, __m512i* steps) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            __m512i even, odd;
            unpack_e4m3(fours[i], even, odd);
            if (i >= 8 && !whole) return;
            _mm512_store_si512(steps + i, even);
            _mm512_store_si512(steps + i + (whole ? 16 : 8), odd);
        }
    }

    // Activations in the order of the steps.
    static void arrange(__m512 (&x)[4], bool whole) {
        const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
        const __m512 even[2] = {_mm512_permutex2var_ps(x[0], evens, x[1]), _mm512_permutex2var_ps(x[2], evens, x[3])};
        const __m512 odd[2] = {_mm512_permutex2var_ps(x[0], odds, x[1]), _mm512_permutex2var_ps(x[2], odds, x[3])};
        x[0] = even[0];
        x[1] = whole ? even[1] : odd[0];
        x[2] = odd[0];
        x[3] = odd[1];
    }
};

struct Bf16Split {
    static constexpr int64_t kCodeBytes = 2, kLine = 32;
    explicit Bf16Split(const Matrix&) {}
    static void scales_at(int64_t, int64_t, int64_t, float* to) { _mm512_store_ps(to, _mm512_set1_ps(1.0F)); }
    static void unpack(__m512i numbers, bool, __m512i (&steps)[2]) { steps[0] = numbers; }
    static void unpack_fours(const __m512i (&pairs)[16], bool, __m512i* steps) {
        for (int i = 0; i < 16; ++i) _mm512_store_si512(steps + i, pairs[i]);
    }
    static void arrange(__m512 (&)[4], bool) {}
};

// ---------------------------------------------------------------- activations

constexpr int64_t kPair = 2 * kTileSide;
constexpr int64_t kPairBytes = kPair * 64;  // one part of a step of 32 rows

// One row among the packed ones, of each step and part a line of 64 bytes.
struct SplitRow {
    uint8_t* at;
    int64_t step_bytes, part_bytes;
    uint16_t* line(int64_t step, int64_t part) const {
        return reinterpret_cast<uint16_t*>(at + step * step_bytes + part * part_bytes);
    }
};

// Whole pairs of tiles lie as they are multiplied, [pair][step][part][32 rows][32] bf16, and the rows behind them one by one,
// [row][step][part][32].
inline SplitRow split_row(void* panels, int64_t panel_rows, int64_t in, int64_t row) {
    uint8_t* const start = static_cast<uint8_t*>(panels);
    const int64_t row_bytes = steps_of(in) * 128;
    if (row >= panel_rows / kPair * kPair) return {start + row * row_bytes, 128, 64};
    return {start + row / kPair * kPair * row_bytes + row % kPair * 64, 2 * kPairBytes, kPairBytes};
}

inline SplitRow split_row(const Product& p, int64_t i) {
    return split_row(const_cast<float*>(p.panels), p.panel_rows, p.weight.in, p.first_row + i);
}

template <class Weights>
void pack_row_split(const float* x, int64_t in, void* panels, int64_t panel_rows, int64_t row) {
    const SplitRow to = split_row(panels, panel_rows, in, row);
    for (int64_t k = 0; k < in; k += Weights::kLine) {
        const int64_t steps = smaller(Weights::kLine / kStepColumns, steps_of(in - k));
        __m512 values[4];
        for (int64_t i = 0; i < 4; ++i) {
            const int64_t left = in - k - 16 * i;
            const auto there = static_cast<__mmask16>(left >= 16 ? 0xFFFF : left > 0 ? (1 << left) - 1 : 0);
            values[i] = _mm512_maskz_loadu_ps(there, x + k + 16 * i);
        }
        Weights::arrange(values, steps == 2);
        for (int64_t i = 0; i < steps; ++i) {
            const int64_t step = k / kStepColumns + i;
            split_numbers(values[2 * i], values[2 * i + 1], to.line(step, 0), to.line(step, 1));
        }
    }
}

// ---------------------------------------------------------------- panels of weights

// Columns [k, k + width) of sixteen weight rows, the last one again where there are fewer.
struct SplitRows {
    const uint8_t* at[kTileSide] = {};

    SplitRows() = default;
    SplitRows(const Matrix& m, int64_t code_bytes, int64_t row, int64_t last, int64_t k) {
        for (int64_t r = 0; r < kTileSide; ++r) {
            at[r] = static_cast<const uint8_t*>(m.codes) + (smaller(row + r, last - 1) * m.in + k) * code_bytes;
        }
    }

    // Of row r, zeros behind `bytes`: memory ends with the row.
    __m512i line(int64_t r, int64_t offset, int64_t bytes) const {
        if (bytes >= 64) return _mm512_loadu_si512(at[r] + offset);
        return _mm512_maskz_loadu_epi8((uint64_t{1} << bytes) - 1, at[r] + offset);
    }
};

// A block of columns from k on as tiles of pairs of columns of all rows, pair after pair. What lies `ahead` in these rows is
// asked for or, behind their end, what lies `rows_ahead` rows further.
template <class Weights>
TENFOLD_APART void unpack_split(const Matrix& m, const Weights& weights, int64_t row, int64_t last, int64_t k,
                                int64_t ahead, int64_t rows_ahead, SplitBlock& to) {
    constexpr int64_t kBytes = Weights::kCodeBytes;
    const SplitRows rows(m, kBytes, row, last, k);
    const int64_t width = smaller(kBlock, m.in - k), from_here = k + ahead < m.in ? ahead : rows_ahead * m.in - k;
    for (const uint8_t* codes : rows.at) prefetch_lines(codes + from_here * kBytes, width * kBytes);
    for (int64_t from = 0; from < width; from += Weights::kLine) {
        __m512i v[16];
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) v[r] = rows.line(r, from * kBytes, (width - from) * kBytes);
        transpose_lines(v);
        const bool whole = Weights::kLine == kStepColumns || width - from > kStepColumns;
        Weights::unpack_fours(v, whole, reinterpret_cast<__m512i*>(to.words[from / kStepColumns]));
    }
    weights.scales_at(row, last, k / kBlock, to.scales);
}

// Sums of 128 columns from four tiles.
struct SplitSums {
    alignas(64) float of[4][kTileFloats];
};

// ---------------------------------------------------------------- few activation rows: weights on the left

// Activations of a step as they stand on the right: [part][pair of columns][row][2].
struct SplitRight {
    const uint8_t* at;
    int64_t stride, part_bytes, step_bytes;
};

SplitRight right_of(const Product& p, uint32_t* memory) {
    const int64_t steps = steps_of(p.weight.in), count = p.count;
    if (count == 1) {
        const SplitRow row = split_row(p, 0);
        return {row.at, 4, row.part_bytes, row.step_bytes};
    }
    for (int64_t i = 0; i < 2 * steps; ++i) {
        for (int64_t row = 0; row < count; ++row) {
            uint32_t pairs[16];
            std::memcpy(pairs, split_row(p, row).line(i / 2, i % 2), 64);
            for (int64_t j = 0; j < 16; ++j) memory[(i * 16 + j) * count + row] = pairs[j];
        }
    }
    return {reinterpret_cast<const uint8_t*>(memory), 4 * count, 64 * count, 128 * count};
}

// One step of 32 columns: tiles 4 and 5 hold the activations' two parts, tile `Block` the sums of its 128 columns.
template <int Block>
inline void multiply_left(const uint8_t* words) {
    if constexpr (Block == 0) {
        _tile_loadd(6, words, 64);
        _tile_dpbf16ps(0, 6, 4);
        _tile_dpbf16ps(0, 6, 5);
    } else {
        _tile_loadd(7, words, 64);
        _tile_dpbf16ps(1, 7, 4);
        _tile_dpbf16ps(1, 7, 5);
    }
}

// A panel of sixteen weight rows: `width` columns from k on. Panels follow one another in a row, then in the next rows.
struct SplitPlace {
    int64_t row, k, width;

    SplitPlace(int64_t of_row, int64_t of_k, int64_t in) : row(of_row), k(of_k), width(smaller(kFewPanel, in - of_k)) {}
    SplitPlace next(int64_t in) const {
        return k + kFewPanel < in ? SplitPlace(row, k + kFewPanel, in) : SplitPlace(row + kTileSide, 0, in);
    }
};

// One row of a panel, row after row in each tile; as many codes are asked for that lie `ahead`.
template <class Weights, bool Whole>
inline __attribute__((always_inline)) void unpack_row(const SplitRows& rows, int64_t r, int64_t width, int64_t ahead,
                                                      SplitPanel& to) {
    constexpr int64_t kBytes = Weights::kCodeBytes, kLine = Weights::kLine;
    const uint8_t* const codes = rows.at[r];
    uint8_t* words = to.words[0] + 64 * r;
#pragma GCC unroll 4
    for (int64_t from = 0; from < (Whole ? kFewPanel : width); from += kLine, words += kLine / kStepColumns * kTileBytes) {
        __m512i steps[2];
        _mm_prefetch(reinterpret_cast<const char*>(codes) + from * kBytes + ahead, _MM_HINT_T1);
        const bool two = kLine > kStepColumns && (Whole || width - from > kStepColumns);
        const __m512i line = Whole ? _mm512_loadu_si512(codes + from * kBytes)
                                   : rows.line(r, from * kBytes, (width - from) * kBytes);
        Weights::unpack(line, two || kLine == kStepColumns, steps);
        _mm512_store_si512(words, steps[0]);
        if (two) _mm512_store_si512(words + kTileBytes, steps[1]);
    }
}

// The two blocks of a panel are multiplied in turns, and between them the next panel is unpacked, row by row.
template <class Weights, bool Whole>
TENFOLD_APART void multiply_and_unpack(const SplitRight& x, const SplitPlace& at, const SplitPanel& now,
                                       const SplitRows& rows, int64_t width, int64_t ahead, SplitPanel& next) {
    const int64_t steps = steps_of(at.width);
    const uint8_t* const first = x.at + at.k / kStepColumns * x.step_bytes;
    const auto turn = [&](auto block, int64_t place) __attribute__((always_inline)) {
        constexpr int kHalf = decltype(block)::value;
        const int64_t step = kHalf * kScaleSteps + place;
        const bool there = Whole || step < steps;
        if (there) _tile_loadd(4, first + step * x.step_bytes, x.stride);
        if (there) _tile_loadd(5, first + step * x.step_bytes + x.part_bytes, x.stride);
        unpack_row<Weights, Whole>(rows, place * 4 + kHalf * 2, width, ahead, next);
        unpack_row<Weights, Whole>(rows, place * 4 + kHalf * 2 + 1, width, ahead, next);
        if (there) multiply_left<kHalf>(now.words[step]);
    };
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t place = 0; place < kScaleSteps; ++place) {
        turn(Constant<0>{}, place);
        turn(Constant<1>{}, place);
    }
}

// Sums of 128 columns take their scales, [weight row][activation row].
inline void add_scaled(const float* sums, const float* scales, int64_t count, float* results) {
    if (count == 1) {
        const __m512 sum = _mm512_fmadd_ps(_mm512_load_ps(sums), _mm512_load_ps(scales), _mm512_load_ps(results));
        return _mm512_store_ps(results, sum);
    }
    const auto all = static_cast<__mmask16>((1U << count) - 1);
    for (int64_t r = 0; r < kTileSide; ++r) {
        float* const to = results + r * 16;
        const __m512 sum = _mm512_maskz_load_ps(all, sums + r * 16);
        _mm512_store_ps(to, _mm512_fmadd_ps(sum, _mm512_set1_ps(scales[r]), _mm512_load_ps(to)));
    }
}

template <class Weights>
void multiply_few_split(const Product& p, int64_t first, int64_t last) {
    const Weights weights(p.weight);
    const int64_t count = p.count, in = p.weight.in, row_bytes = in * Weights::kCodeBytes;
    const int64_t words = count > 1 ? count * 32 * steps_of(in) : 0;
    Scratch memory(Scratch::bytes_of<uint32_t>(words));
    const SplitRight x = right_of(p, memory.take<uint32_t>(words));
    const int64_t apart = count == 1 ? 1 : 16;  // floats from one weight row's results to the next
    constexpr TileShape whole = {kTileSide, 64};
    const TileShape narrow = {kTileSide, 4 * count};
    const Tiles tiles({narrow, narrow, narrow, narrow, narrow, narrow, whole, whole});
    SplitPanel panels[2];
    SplitSums sums;
    alignas(64) float results[kTileFloats];
    SplitPlace at(first, 0, in);
    SplitRows rows(p.weight, Weights::kCodeBytes, first, last, 0);
    for (int64_t r = 0; r < kTileSide; ++r) unpack_row<Weights, false>(rows, r, at.width, 0, panels[0]);
    for (int64_t n = 0; at.row < last; ++n) {
        const SplitPlace next = at.next(in);
        const SplitPanel& now = panels[n % 2];
        rows = SplitRows(p.weight, Weights::kCodeBytes, smaller(next.row, last - 1), last, next.k);
        const int64_t later = next.k + kFewPanel < in ? 0 : (kTileSide - 1) * row_bytes;
        const int64_t ahead = kFewPanel * Weights::kCodeBytes + later;
        settle_memory();
        if (at.width == kFewPanel && next.width == kFewPanel) {
            multiply_and_unpack<Weights, true>(x, at, now, rows, kFewPanel, ahead, panels[(n + 1) % 2]);
        } else {
            multiply_and_unpack<Weights, false>(x, at, now, rows, next.width, ahead, panels[(n + 1) % 2]);
        }
        _tile_stored(0, sums.of[0], 4 * apart);
        _tile_stored(1, sums.of[1], 4 * apart);
        settle_memory();
        const int64_t num_rows = smaller(last - at.row, kTileSide);
        if (at.k == 0) {
            std::memset(results, 0, sizeof(results));
            for (int64_t i = 0; p.add && i < count; ++i) {
                const float* const y = y_row(p, i, at.row);
                for (int64_t r = 0; r < num_rows; ++r) results[r * apart + i] = y[r];
            }
        }
        for (int64_t block = 0; block * kBlock < at.width; ++block) {
            alignas(64) float scales[kTileSide];
            weights.scales_at(at.row, last, at.k / kBlock + block, scales);
            add_scaled(sums.of[block], scales, count, results);
        }
        if (next.row != at.row) {
            for (int64_t i = 0; i < count; ++i) {
                float* const y = y_row(p, i, at.row);
                for (int64_t r = 0; r < num_rows; ++r) y[r] = results[r * apart + i];
            }
        }
        at = next;
    }
}

// ---------------------------------------------------------------- more: weights on the right

// Up to 512 activation rows and 512 weight rows at a time, whose sums, 1 MB, are at home in the second cache. Of 128 columns
// all these weights are unpacked and stay there too (where activations are few, of 512 columns 128 weights: longer pieces of
// memory); of the activations a block of 32 rows at a time, 16 KB at home in the first cache, meets them in pairs of tiles.
constexpr int64_t kManyPairs = 16, kRowPairs = 16;  // pairs of tiles of activation rows, and of weight rows
constexpr int64_t kFewPairs = 4, kDeepBlocks = 4;   // so many pairs of activation rows, for so many blocks of columns
constexpr int64_t kPairFloats = kPair * kPair;
constexpr int64_t kAsked = kScaleSteps * 2 * kPairBytes / kRowPairs;  // bytes of the next activations, with each of those

inline int64_t pairs_of(int64_t rows) { return (rows + kPair - 1) / kPair; }

// Steps from `first` on of 32 activation rows as they lie, or, where they lie in two pairs, laid `near`.
inline const uint8_t* pair_at(const Product& p, int64_t i, int64_t first, int64_t steps, uint8_t* near) {
    if ((p.first_row + i) % kPair == 0) return split_row(p, i).at + first * 2 * kPairBytes;
    for (int64_t r = 0; r < kPair; ++r) {
        const SplitRow row = split_row(p, i + r);
        for (int64_t line = 0; line < 2 * steps; ++line) {
            std::memcpy(near + line * kPairBytes + 64 * r, row.line(first + line / 2, line % 2), 64);
        }
    }
    settle_memory();
    return near;
}

// Sums of 32 activation rows, a block of 128 columns, with two tiles of weight rows, and where they are to be added.
struct SplitUnit {
    const SplitBlock* weights;
    float* results;
};

// Sums of one of the unit's four tiles take their scales and are added.
inline __attribute__((always_inline)) void add_tile(const SplitUnit& unit, const SplitSums& sums, int64_t tile) {
    const __m512 scales = _mm512_load_ps(unit.weights[tile % 2].scales);
    float* const to = unit.results + tile * kTileFloats;
#pragma GCC unroll 16
    for (int64_t at = 0; at < kTileFloats; at += kTileSide) {
        _mm512_store_ps(to + at, _mm512_fmadd_ps(_mm512_load_ps(sums.of[tile] + at), scales, _mm512_load_ps(to + at)));
    }
}

// One unit is multiplied and, step by step, the one before is added: the tiles and the vectors work side by side.
inline __attribute__((always_inline)) void multiply_unit(const uint8_t* near, const SplitUnit& unit, int64_t steps,
                                                         SplitSums& sums, const SplitUnit& before,
                                                         const SplitSums& sums_before) {
    zero_tiles<4>();
#pragma GCC unroll 4
    for (int64_t step = 0; step < kScaleSteps; ++step) {
        const uint8_t* const x = near + step * 2 * kPairBytes;
        if (step < steps) {
            add_split_left<2>(x, x + kTileBytes, kPairBytes, unit.weights[0].words[step], unit.weights[1].words[step]);
        }
        add_tile(before, sums_before, step);
    }
    store_sums<2>(sums.of[0], sums.of[2]);
    settle_memory();
}

// `pairs` pairs of activation rows from row i on times `row_pairs` pairs of weight rows, `steps` steps from `first` on.
// `next_step` is what follows for the first of them. From one pair's results to the next it is `apart` units.
TENFOLD_APART void multiply_block(const Product& p, int64_t i, int64_t pairs, int64_t first, int64_t steps,
                                  int64_t next_step, const SplitBlock* weights, int64_t row_pairs, int64_t apart,
                                  uint8_t* near, float* results) {
    constexpr TileShape whole = {kTileSide, 64};
    const Tiles tiles({whole, whole, whole, whole, whole, whole, whole, whole});
    SplitSums sums[2] = {};
    alignas(64) float nowhere[kPairFloats] = {};
    SplitUnit before{weights, nowhere};
    int64_t turn = 0;
    for (int64_t pair = 0; pair < pairs; ++pair) {
        const bool more = pair + 1 < pairs;
        const uint8_t* const x = pair_at(p, i + pair * kPair, first, steps, near);
        const uint16_t* const next = split_row(p, more ? i + (pair + 1) * kPair : i).line(more ? first : next_step, 0);
        for (int64_t wide = 0; wide < row_pairs; ++wide, turn = 1 - turn) {
            const SplitUnit unit{weights + 2 * wide, results + (pair * apart + wide) * kPairFloats};
            prefetch_lines(next + wide * kAsked / 2, kAsked);
            multiply_unit(x, unit, steps, sums[turn], before, sums[1 - turn]);
            before = unit;
        }
    }
    for (int64_t tile = 0; tile < 4; ++tile) add_tile(before, sums[1 - turn], tile);
}

// The results of `pairs` pairs of activation rows from row i on with the weight rows [row, stop), and what they are made in.
struct SplitPatch {
    int64_t i, pairs, row, stop;
    uint8_t* near;
    float* results;
    SplitBlock* blocks;
    int64_t row_pairs() const { return pairs_of(stop - row); }
};

// Adds columns from k on: `deep` blocks of them, as many weight rows at a time as that leaves room for.
template <class Weights>
void multiply_columns(const Product& p, const Weights& weights, const SplitPatch& patch, int64_t k, int64_t deep) {
    const int64_t in = p.weight.in, depth = smaller(deep, (in - k + kBlock - 1) / kBlock);
    const int64_t together = kRowPairs / deep * kPair;
    for (int64_t row = patch.row; row < patch.stop; row += together) {
        const int64_t row_pairs = pairs_of(smaller(together, patch.stop - row)), groups = 2 * row_pairs;
        for (int64_t group = 0; group < groups; ++group) {
            for (int64_t block = 0; block < depth; ++block) {
                unpack_split(p.weight, weights, row + group * kTileSide, patch.stop, k + block * kBlock, deep * kBlock,
                             together, patch.blocks[block * groups + group]);
            }
        }
        settle_memory();
        float* const results = patch.results + (row - patch.row) / kPair * kPairFloats;
        for (int64_t block = 0; block < depth; ++block) {
            const int64_t from = k + block * kBlock, then = from + kBlock < in ? from + kBlock : 0;
            multiply_block(p, patch.i, patch.pairs, from / kStepColumns, steps_of(smaller(kBlock, in - from)),
                           then / kStepColumns, patch.blocks + block * groups, row_pairs, patch.row_pairs(), patch.near,
                           results);
        }
    }
}

// Results, tile by tile, and the rows of y they belong to.
template <class Run>
inline void each_result(const Product& p, const SplitPatch& patch, const Run& run) {
    for (int64_t token = 0; token < patch.pairs * kPair; ++token) {
        float* const y = y_row(p, patch.i + token, patch.row);
        for (int64_t r = patch.row; r < patch.stop; r += kTileSide) {
            const int64_t column = r - patch.row, half = token % kPair / kTileSide, side = column % kPair / kTileSide;
            const int64_t place = (token / kPair * patch.row_pairs() + column / kPair) * kPairFloats +
                                  ((2 * half + side) * kTileSide + token % kTileSide) * kTileSide;
            const auto exist = static_cast<__mmask16>((1U << smaller(patch.stop - r, kTileSide)) - 1);
            run(y + column, exist, patch.results + place);
        }
    }
}

template <class Weights>
void multiply_patch(const Product& p, const Weights& weights, const SplitPatch& patch) {
    const int64_t numbers = patch.pairs * patch.row_pairs() * kPairFloats;
    std::memset(patch.results, 0, static_cast<size_t>(numbers) * sizeof(float));
    if (p.add) {
        each_result(p, patch, [](const float* y, __mmask16 exist, float* result) {
            _mm512_store_ps(result, _mm512_maskz_loadu_ps(exist, y));
        });
    }
    const int64_t deep = patch.pairs <= kFewPairs ? kDeepBlocks : 1;
    for (int64_t k = 0; k < p.weight.in; k += deep * kBlock) multiply_columns(p, weights, patch, k, deep);
    each_result(p, patch, [](float* y, __mmask16 exist, const float* result) {
        _mm512_mask_storeu_ps(y, exist, _mm512_load_ps(result));
    });
}

template <class Weights>
void multiply_more_split(const Product& p, int64_t first, int64_t last) {
    constexpr int64_t kTokens = kManyPairs * kPair, kRows = kRowPairs * kPair;
    const Weights weights(p.weight);
    const int64_t most_pairs = smaller(p.count / kPair, kManyPairs);
    const int64_t most_row_pairs = smaller(pairs_of(last - first), kRowPairs);
    const int64_t near_bytes = kScaleSteps * 2 * kPairBytes, result_numbers = most_pairs * most_row_pairs * kPairFloats;
    const int64_t most_blocks = 2 * smaller(kRowPairs, kDeepBlocks * most_row_pairs);
    Scratch memory(near_bytes + Scratch::bytes_of<float>(result_numbers) + Scratch::bytes_of<SplitBlock>(most_blocks),
                   false);
    uint8_t* const near = memory.take<uint8_t>(near_bytes);
    float* const results = memory.take<float>(result_numbers);
    SplitBlock* const blocks = memory.take<SplitBlock>(most_blocks);
    for (int64_t i = 0; i < p.count; i += kTokens) {
        for (int64_t row = first; row < last; row += kRows) {
            const int64_t pairs = smaller(p.count - i, kTokens) / kPair, stop = smaller(row + kRows, last);
            multiply_patch(p, weights, SplitPatch{i, pairs, row, stop, near, results, blocks});
        }
    }
}

// Rows that fill no pair of tiles go by with weights on the left, sixteen at most at a time.
template <class Weights>
void multiply_split(const Product& p, int64_t first, int64_t last) {
    Product part = p;
    const auto run = [&](int64_t from, int64_t count, auto&& multiply_part) {
        part.first_row = p.first_row + from;
        part.count = count;
        part.y = p.y_rows == nullptr ? p.y + from * p.y_stride : p.y;
        part.y_rows = p.y_rows == nullptr ? nullptr : p.y_rows + from;
        multiply_part(part, first, last);
    };
    const int64_t most = p.count / kPair * kPair;
    if (most > 0) run(0, most, multiply_more_split<Weights>);
    for (int64_t i = most; i < p.count; i += kTileSide) {
        run(i, smaller(kTileSide, p.count - i), [](const Product& few, int64_t from, int64_t to) {
            multiply_few_split<Weights>(few, from, to);
        });
    }
}

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
