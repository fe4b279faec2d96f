// Mxfp4 weights times activations rounded to bf16, by the tiles of AMX.
//
// A weight's scale is a power of two: as bf16, with its scale in its exponent, it is what it was. So sums may stay in the
// tiles, 32 columns after 32 columns, from the first to the last; they are float32, in an order that does not depend on the
// other rows. Sixteen weight rows stand on the left, where they need not change places, up to six tiles of activation rows on
// the right, and while 256 columns are multiplied the next 256 are unpacked. Numbers below 2^-126 count as zero.
#pragma once

#include "decode_row.hpp"
#include "product_int8.hpp"
#include "product_split_amx.hpp"

namespace tenfold::TENFOLD_ISA {
namespace {

// ---------------------------------------------------------------- e2m1 as bf16

// By code, and once more: 2^126 times the number, its exponent running over where that is too large, and zero. Taking off
// (253 - scale) << 7 gives the number times 2^(scale - 127); zero stays zero, as unsigned numbers go no lower.
constexpr int32_t kLargestScale = 252, kTopScale = 253;

struct Words {
    alignas(64) uint16_t of[32];
};

constexpr Words make_numbers() {
    Words words{};
    constexpr int sizes[8] = {0, 252 << 1, 253 << 1, 253 << 1 | 1, 254 << 1, 254 << 1 | 1, 255 << 1, 255 << 1 | 1};
    for (int code = 0; code < 32; ++code) {
        const int size = sizes[code % 8] << 6;
        words.of[code] = static_cast<uint16_t>(size | (code % 16 > 8 ? 0x8000 : 0));
    }
    return words;
}

constexpr Words kNumbers = make_numbers();

// Within a block of 32 every fourth column comes first, then the ones behind these, and so on: sixteen bytes of codes, four
// times side by side, are moved by 0, 4, 8 and 12 bits, and every word begins with a code of its own.
constexpr int64_t place_of(int64_t column) { return column % 4 * 8 + column / 4; }

constexpr Words make_shifts() {
    Words shifts{};
    for (int word = 0; word < 32; ++word) shifts.of[word] = static_cast<uint16_t>(word / 8 * 4);
    return shifts;
}

constexpr Words make_order() {
    Words order{};
    for (int column = 0; column < 32; ++column) order.of[place_of(column)] = static_cast<uint16_t>(column);
    return order;
}

constexpr Words kShifts = make_shifts(), kOrder = make_order();

inline __m512i kept(const void* table) { return _mm512_load_si512(table); }

// 32 numbers in that order whatever their scale is: zero, NaN, or so large that some of them are infinite.
TENFOLD_APART void numbers_slowly(const uint8_t* codes, uint8_t scale, uint16_t* to) {
    for (int i = 0; i < 32; ++i) {
        const float number = e2m1_value(codes[i / 2] >> (i % 2 * 4) & 15) * scale_of(scale);
        to[place_of(i)] = static_cast<uint16_t>(to_bits(number) >> 16);
    }
}

// ---------------------------------------------------------------- activations

// As [row][in] bf16; rows lie apart by an odd number of cache lines, so that they do not share a set of the cache.
inline uint16_t* rounded_row(void* panels, int64_t in, int64_t row) {
    return static_cast<uint16_t*>(panels) + row * (steps_of(in) | 1) * kStepColumns;
}

inline const uint16_t* rounded_row(const Product& p, int64_t i) {
    return rounded_row(const_cast<float*>(p.panels), p.weight.in, p.first_row + i);
}

// In the order of the weights' columns.
inline void pack_row_rounded(const float* x, int64_t in, void* panels, int64_t row) {
    uint16_t* const to = rounded_row(panels, in, row);
    for (int64_t k = 0; k < in; k += kStepColumns) {
        alignas(64) uint16_t nearest[kStepColumns], rest[kStepColumns];
        split_numbers(_mm512_loadu_ps(x + k), _mm512_loadu_ps(x + k + 16), nearest, rest);
        _mm512_storeu_si512(to + k, _mm512_permutexvar_epi16(kept(kOrder.of), _mm512_load_si512(nearest)));
    }
}

// ---------------------------------------------------------------- weights, on the left

constexpr int64_t kFewSteps = kFewPanel / kStepColumns;
constexpr int64_t kAheadBytes = 512;  // of a row's codes that are asked for before they are read

using Sixteen = Group<kTileSide>;

// A panel of sixteen weight rows, tile after tile. Two that lie one behind the other are 2 KB from the same place within a
// page: a load from where something is being stored would wait for it, though in another page.
struct LeftPanel {
    alignas(64) uint8_t words[kFewSteps + 2][kTileBytes];
};

// What is taken off the numbers of a panel for their scales, by row and step.
struct Taken {
    alignas(64) int32_t of[kTileSide][kFewSteps];
    bool odd;  // some scale is none of the usual ones
};

inline __attribute__((always_inline)) void prepare(const Sixteen& rows, int64_t step, int64_t steps, Taken& to) {
    const __m256i spread = _mm256_setr_epi8(0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3, -1,  //
                                            4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7, -1);
    __m256i least = _mm256_set1_epi16(kLargestScale), largest = least;
#pragma GCC unroll 4
    for (int64_t r = 0; r < kTileSide; ++r) {
        uint64_t bytes = 0x0101010101010101;  // of steps that are not there
        std::memcpy(&bytes, rows.scale[r] + step, static_cast<size_t>(steps));
        const __m256i scales = _mm256_shuffle_epi8(_mm256_set1_epi64x(static_cast<int64_t>(bytes)), spread);
        least = _mm256_min_epu16(least, scales);
        largest = _mm256_max_epu16(largest, scales);
        const __m256i taken = _mm256_slli_epi16(_mm256_sub_epi16(_mm256_set1_epi16(kTopScale), scales), 7);
        _mm256_store_si256(reinterpret_cast<__m256i*>(to.of[r]), taken);
    }
    const __m256i zero = _mm256_cmpeq_epi16(least, _mm256_setzero_si256());
    const __m256i above = _mm256_cmpgt_epi16(largest, _mm256_set1_epi16(kLargestScale));
    to.odd = _mm256_testz_si256(_mm256_or_si256(zero, above), _mm256_set1_epi8(-1)) == 0;
}

// Asks for what lies ahead of `step` in these rows or, behind their end, in the next sixteen: a line is four steps, in each of
// which a quarter of the rows is asked for. The next rows' scales lie one behind the other, a line for four steps.
inline __attribute__((always_inline)) void ask_ahead(const Sixteen& rows, int64_t step, int64_t row_bytes) {
    const int64_t quarter = step % 4, ahead = 16 * (step - quarter) + kAheadBytes;
    const int64_t from = ahead < row_bytes ? ahead : ahead + (kTileSide - 1) * row_bytes;
#pragma GCC unroll 4
    for (int64_t r = 0; r < 4; ++r) {
        _mm_prefetch(reinterpret_cast<const char*>(rows.codes[4 * quarter + r]) + from, _MM_HINT_T0);
    }
    const int64_t line = kTileSide * row_bytes / 16 + 16 * step;
    _mm_prefetch(reinterpret_cast<const char*>(rows.scale[0]) + line, _MM_HINT_T0);
}

// 32 columns of sixteen rows, from byte `from` of their codes on.
inline __attribute__((always_inline)) void unpack_left(const Sixteen& rows, int64_t from, const int32_t* taken,
                                                       uint8_t* words) {
    const __m512i shifts = kept(kShifts.of), table = kept(kNumbers.of);
#pragma GCC unroll 16
    for (int64_t r = 0; r < kTileSide; ++r) {
        const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows.codes[r] + from));
        const __m512i at = _mm512_srlv_epi16(_mm512_broadcast_i32x4(pairs), shifts);
        const __m512i numbers = _mm512_permutexvar_epi16(at, table);  // of a word the last five bits count
        _mm512_store_si512(words + 64 * r, _mm512_subs_epu16(numbers, _mm512_set1_epi32(taken[r * kFewSteps])));
    }
}

TENFOLD_APART void unpack_left_slowly(const Sixteen& rows, int64_t step, uint8_t* words) {
    for (int64_t r = 0; r < kTileSide; ++r) {
        numbers_slowly(rows.codes[r] + 16 * step, rows.scale[r][step], reinterpret_cast<uint16_t*>(words + 64 * r));
    }
}

// ---------------------------------------------------------------- activations, on the right

// Of each step tile after tile, pair of columns after pair of all rows.
struct RightRows {
    const uint8_t* at;
    int64_t stride;      // from one pair of columns to the next
    int64_t step_bytes;
};

// Sixteen rows make a tile, the last one filled with zeros; one row alone lies as it should.
RightRows rows_on_the_right(const Product& p, int64_t i, int64_t count, uint8_t* memory) {
    if (count == 1) return {reinterpret_cast<const uint8_t*>(rounded_row(p, i)), 4, 64};
    const int64_t step_bytes = (count + kTileSide - 1) / kTileSide * kTileBytes;
    for (int64_t first = 0; first < count; first += kTileSide) {
        for (int64_t step = 0; step < steps_of(p.weight.in); ++step) {
            __m512i v[16];
#pragma GCC unroll 16
            for (int r = 0; r < 16; ++r) {
                v[r] = first + r < count ? _mm512_loadu_si512(rounded_row(p, i + first + r) + step * kStepColumns)
                                         : _mm512_setzero_si512();
            }
            transpose_lines(v);
            uint8_t* const to = memory + step * step_bytes + first / kTileSide * kTileBytes;
#pragma GCC unroll 16
            for (int pair = 0; pair < 16; ++pair) _mm512_store_si512(to + 64 * pair, v[pair]);
        }
    }
    return {memory, 64, step_bytes};
}

// Tiles 0 to 5 are sums, 6 is weights, 7 activations, of which there are `Count` tiles.
template <int Count>
inline __attribute__((always_inline)) void multiply_step(const RightRows& x, int64_t step, const uint8_t* words) {
    const uint8_t* const at = x.at + step * x.step_bytes;
    _tile_loadd(6, words, 64);
    _tile_loadd(7, at, x.stride);
    _tile_dpbf16ps(0, 6, 7);
    if (Count > 1) _tile_loadd(7, at + kTileBytes, 64);
    if (Count > 1) _tile_dpbf16ps(1, 6, 7);
    if (Count > 2) _tile_loadd(7, at + 2 * kTileBytes, 64);
    if (Count > 2) _tile_dpbf16ps(2, 6, 7);
    if (Count > 3) _tile_loadd(7, at + 3 * kTileBytes, 64);
    if (Count > 3) _tile_dpbf16ps(3, 6, 7);
    if (Count > 4) _tile_loadd(7, at + 4 * kTileBytes, 64);
    if (Count > 4) _tile_dpbf16ps(4, 6, 7);
    if (Count > 5) _tile_loadd(7, at + 5 * kTileBytes, 64);
    if (Count > 5) _tile_dpbf16ps(5, 6, 7);
}

template <int Count>
inline void store_sums_of(float (&sums)[6][kTileFloats]) {
    _tile_stored(0, sums[0], 64);
    if (Count > 1) _tile_stored(1, sums[1], 64);
    if (Count > 2) _tile_stored(2, sums[2], 64);
    if (Count > 3) _tile_stored(3, sums[3], 64);
    if (Count > 4) _tile_stored(4, sums[4], 64);
    if (Count > 5) _tile_stored(5, sums[5], 64);
    settle_memory();
}

// While a panel is multiplied the next one, from `step` of `rows` on, is unpacked.
template <int Count>
TENFOLD_APART void multiply_and_unpack(const RightRows& x, const SplitPlace& at, const LeftPanel& now,
                                       const Sixteen& rows, int64_t step, int64_t steps, int64_t row_bytes, LeftPanel& to) {
    Taken taken;
    steps == kFewSteps ? prepare(rows, step, kFewSteps, taken) : prepare(rows, step, steps, taken);
    const int64_t first = at.k / kStepColumns, count = steps_of(at.width);
    for (int64_t i = 0; i < kFewSteps; ++i) {
        if (i < count) multiply_step<Count>(x, first + i, now.words[i]);
        ask_ahead(rows, step + i, row_bytes);
        if (i < steps && taken.odd) unpack_left_slowly(rows, step + i, to.words[i]);
        else if (i < steps) unpack_left(rows, 16 * (step + i), taken.of[0] + i, to.words[i]);
        settle_memory();
    }
}

// To y, from a tile of sums of sixteen weight rows with `count` activation rows from i on.
inline void put_turned(const Product& p, int64_t i, int64_t count, const float* sums, int64_t row, int64_t last) {
    const auto exist = static_cast<__mmask16>((1U << smaller(last - row, kTileSide)) - 1);
    __m512i v[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) v[r] = _mm512_load_si512(sums + 16 * r);
    transpose_lines(v);
    alignas(64) float turned[kTileSide][16];
#pragma GCC unroll 16
    for (int t = 0; t < 16; ++t) _mm512_store_si512(turned[t], v[t]);
    for (int64_t t = 0; t < count; ++t) {
        float* const y = y_row(p, i + t, row);
        const __m512 before = p.add ? _mm512_maskz_loadu_ps(exist, y) : _mm512_setzero_ps();
        _mm512_mask_storeu_ps(y, exist, _mm512_add_ps(before, _mm512_load_ps(turned[t])));
    }
}

// `num_rows` activation rows from i on, `Count` tiles of them, times the weight rows [first, last).
template <int Count>
void multiply_tiles(const Product& p, int64_t i, int64_t num_rows, uint8_t* memory, int64_t first, int64_t last) {
    const int64_t in = p.weight.in;
    const RightRows x = rows_on_the_right(p, i, num_rows, memory);
    constexpr TileShape whole = {kTileSide, 64};
    const TileShape right = {kTileSide, x.stride};
    const Tiles tiles({right, whole, whole, whole, whole, whole, whole, right});
    LeftPanel panels[2];
    alignas(64) float sums[6][kTileFloats];
    SplitPlace at(first, 0, in), none = at;
    Sixteen rows(p.weight, first, last);
    none.width = 0;
    multiply_and_unpack<Count>(x, none, panels[1], rows, 0, steps_of(at.width), in / 2, panels[0]);
    for (int64_t n = 0; at.row < last; ++n) {
        const SplitPlace next = at.next(in);
        if (next.row != at.row) rows = Sixteen(p.weight, smaller(next.row, last - 1), last);
        if (at.k == 0) zero_tiles<Count>();
        multiply_and_unpack<Count>(x, at, panels[n % 2], rows, next.k / kStepColumns, steps_of(next.width), in / 2,
                                   panels[(n + 1) % 2]);
        if (next.row != at.row) {
            store_sums_of<Count>(sums);
            for (int64_t tile = 0; tile < Count; ++tile) {
                const int64_t done = tile * kTileSide;
                put_turned(p, i + done, smaller(num_rows - done, kTileSide), sums[tile], at.row, last);
            }
        }
        at = next;
    }
}

void multiply_rounded(const Product& p, int64_t first, int64_t last) {
    constexpr int64_t kMost = 6 * kTileSide;
    const int64_t passes = (p.count + kMost - 1) / kMost;
    const int64_t each = round_up((p.count + passes - 1) / passes, kTileSide);
    Scratch memory(p.count > 1 ? each * 64 * steps_of(p.weight.in) : 0, false);
    uint8_t* const x = memory.take<uint8_t>(0);
    for (int64_t i = 0; i < p.count; i += each) {
        const int64_t rows = smaller(each, p.count - i);
        switch ((rows + kTileSide - 1) / kTileSide) {
            case 1: multiply_tiles<1>(p, i, rows, x, first, last); break;
            case 2: multiply_tiles<2>(p, i, rows, x, first, last); break;
            case 3: multiply_tiles<3>(p, i, rows, x, first, last); break;
            case 4: multiply_tiles<4>(p, i, rows, x, first, last); break;
            case 5: multiply_tiles<5>(p, i, rows, x, first, last); break;
            default: multiply_tiles<6>(p, i, rows, x, first, last); break;
        }
    }
}

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
