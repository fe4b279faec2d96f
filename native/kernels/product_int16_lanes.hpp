// AVX2 and AVX-512: what product_int16.cpp leaves to this file. A group of weight rows, one to a lane, is multiplied at
// a time: with few activation rows row by row as they lie in memory, with more from a tile of vectors that hold two
// columns of every row. A block's sum is exact, so that either way gives the same bits.
#pragma once

#include "product_int16.hpp"

namespace tenfold::TENFOLD_ISA {
namespace {


inline Wholes decoded(Ints codes, Ints& worst) {
    worst = larger_bytes(worst, twice_bytes(codes));
    return wholes_of(codes, exponents_of(codes));
}

// Where the codes of a group's rows begin, the last row again where fewer are left. Rows that share a vector stand
// together: with two sides 0, 8, 1, 9, and so on.
struct Group {
    const uint8_t* codes[kGroup];
    Group(const Matrix& m, int64_t row, int64_t last) {
        for (int64_t i = 0; i < kGroup; ++i) {
            codes[i] = static_cast<const uint8_t*>(m.codes) + smaller(row + row_at_place(i), last - 1) * m.in;
        }
    }

    static int64_t row_at_place(int64_t i) { return i / kSide + i % kSide * kLanes; }
};

// The same for the last step of rows that end within it: zeros behind `count` codes from column k on.
struct RestOfGroup {
    uint8_t bytes[kGroup][kStep] = {};
    const uint8_t* codes[kGroup];
    RestOfGroup(const Group& rows, int64_t k, int64_t count) {
        for (int64_t i = 0; i < kGroup; ++i) {
            std::memcpy(bytes[i], rows.codes[i] + k, static_cast<uint64_t>(count));
            codes[i] = bytes[i];
        }
    }
};

// NaN in the lanes of rows that have such a code.
TENFOLD_APART Floats poison(const Group& rows, int64_t first, int64_t last) {
    float lanes[kGroup] = {};
    for (int64_t i = 0; i < kGroup; ++i) {
        for (int64_t k = first; k < last; ++k) {
            if ((rows.codes[i][k] & 0x7F) == 0x7F) lanes[Group::row_at_place(i)] = __builtin_nanf("");
        }
    }
    return load(lanes);
}

inline Floats add_block(Ints exact, Floats x_scale, Floats scale, Floats sum) {
    return add_product(times(to_floats(exact), x_scale), scale, sum);
}

// ---------------------------------------------------------------- few activation rows: weights go by once, decoded

// The sums of the lanes of eight vectors, of either side its own eight.
inline Ints lane_sums(const Ints (&v)[kLanes]) {
    Ints two[kLanes / 2];
#pragma GCC unroll 4
    for (int i = 0; i < kLanes / 2; ++i) two[i] = sum32(low32(v[2 * i], v[2 * i + 1]), high32(v[2 * i], v[2 * i + 1]));
    return halves_sum(sum32(low64(two[0], two[1]), high64(two[0], two[1])),
                      sum32(low64(two[2], two[3]), high64(two[2], two[3])));
}

// `steps` steps of the weight rows that share a vector, from column k on, times activation rows `stride` bytes apart.
template <int Tokens>
inline void dot_rows(const uint8_t* const* codes, int64_t k, int64_t steps, const uint8_t* x, int64_t stride,
                     Ints (&sums)[Tokens], Ints& worst) {
    constexpr int kChains = Tokens == 1 ? 2 : 1;  // with one activation row each product would wait for the one before
    Ints chains[kChains][Tokens];
#pragma GCC unroll 2
    for (auto& chain : chains) {
#pragma GCC unroll 4
        for (auto& sum : chain) sum = no_ints();
    }
    for (int64_t step = 0; step < steps; ++step, k += kStep, x += 2 * kStep) {
        const Wholes w = decoded(beside(codes, k), worst);
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
            const void* const at = x + t * stride;
            const void* const behind = x + t * stride + kStep;
            chains[0][t] = add_pairs(chains[0][t], w.first, spread(at));
            chains[kChains - 1][t] = add_pairs(chains[kChains - 1][t], w.second, spread(behind));
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) sums[t] = kChains == 1 ? chains[0][t] : sum32(chains[0][t], chains[1][t]);
}

// One panel, from column `first` on, of a group from `row` on.
template <class Scale, int Tokens>
TENFOLD_APART void dot_group(const Product& p, const Group& rows, int64_t first, int64_t row, int64_t last) {
    const int64_t in = p.weight.in, width = panel_columns(in, first), stride = row_bytes(width);
    const int64_t ahead = columns_ahead(in, first, kGroup);
    const uint8_t* const x = packed_row(p, first, 0);
    const Fp8Row<Scale> scales(p.weight, row);
    Floats totals[Tokens];
#pragma GCC unroll 4
    for (auto& total : totals) total = no_floats();
    Ints worst = no_ints();
    for (int64_t k = 0; k < width; k += kBlock) {
        const int64_t columns = smaller(kBlock, width - k), whole = smaller(columns, (in - first - k) / kStep * kStep);
        Ints sums[Tokens][kLanes];
        const auto keep = [&sums](int lane, const Ints (&of_tokens)[Tokens], bool add) {
#pragma GCC unroll 4
            for (int t = 0; t < Tokens; ++t) sums[t][lane] = add ? sum32(sums[t][lane], of_tokens[t]) : of_tokens[t];
        };
        for (int lane = 0; lane < kLanes; ++lane) {
            const uint8_t* const* const codes = rows.codes + kSide * lane;
            for (int side = 0; side < kSide; ++side) {
                const char* const next = reinterpret_cast<const char*>(codes[side]) + first + k + ahead;
                _mm_prefetch(next, _MM_HINT_T1);
                _mm_prefetch(next + 64, _MM_HINT_T1);
            }
            Ints of_tokens[Tokens];
            dot_rows(codes, first + k, whole / kStep, x + 2 * k, stride, of_tokens, worst);
            keep(lane, of_tokens, false);
        }
        if (whole < columns) {
            const RestOfGroup rest(rows, first + k + whole, in - first - k - whole);
            for (int lane = 0; lane < kLanes; ++lane) {
                Ints of_tokens[Tokens];
                dot_rows(rest.codes + kSide * lane, 0, 1, x + 2 * (k + whole), stride, of_tokens, worst);
                keep(lane, of_tokens, true);
            }
        }
        const Floats scale = all_floats(scales.scale_at(first + k));
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
            const Floats x_scale = all_floats(scale_at(x + t * stride + 2 * width, k / kBlock));
            totals[t] = add_block(lane_sums(sums[t]), x_scale, scale, totals[t]);
        }
    }
    if (has_nan_code(worst)) {
        const Floats poisoned = poison(rows, first, smaller(first + width, in));
        for (auto& total : totals) total = total + poisoned;
    }
    for (int t = 0; t < Tokens; ++t) put_group(y_row(p, t, row), totals[t], last - row, p.add || first > 0);
}

template <class Scale>
void multiply_few(const Product& p, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row += kGroup) {
        const Group rows(p.weight, row, last);
        for (int64_t k = 0; k < p.weight.in; k += kPanel) {
            switch (p.count) {
                case 1: dot_group<Scale, 1>(p, rows, k, row, last); break;
                case 2: dot_group<Scale, 2>(p, rows, k, row, last); break;
                case 3: dot_group<Scale, 3>(p, rows, k, row, last); break;
                default: dot_group<Scale, kFew>(p, rows, k, row, last); break;
            }
        }
    }
}

// ---------------------------------------------------------------- more rows: weights are decoded into a tile first

constexpr int kGroups = 2;                      // that are multiplied at a time
constexpr int kAtOnce = 6;                      // activation rows: as many as 16 registers hold sums of
constexpr int64_t kAtHome = 2 * kAtOnce;        // activation rows of one panel at home in the first cache
constexpr int64_t kPanelPairs = kPanel / 2;

struct Tile {
    Ints pairs[kTileRows / kGroup][kPanelPairs];  // two columns of a group's rows, in the order of the activations
    Floats start[kTileRows / kGroup];             // NaN for rows with such a code, else 0
};

// Sixteen codes of the rows that share a vector by their lane within 128 bits, from column k on.
inline Ints sixteen(const uint8_t* const* rows, int64_t k) {
    const auto of_row = [=](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + k)); };
    const auto two = [&](int side) {
        return _mm256_inserti128_si256(_mm256_castsi128_si256(of_row(side)), of_row(side + 4 * kSide), 1);
    };
#ifdef __AVX512VNNI__
    return _mm512_inserti64x4(_mm512_castsi256_si512(two(0)), two(1), 1);
#else
    return two(0);
#endif
}

// Sixteen columns of a group, four in each vector: of every lane of 128 bits two of four rows, then the other two.
inline void turned(const uint8_t* const* rows, int64_t k, Ints (&out)[4]) {
    const Ints a = sixteen(rows, k), b = sixteen(rows + kSide, k);
    const Ints c = sixteen(rows + 2 * kSide, k), d = sixteen(rows + 3 * kSide, k);
    const Ints first = low16(a, b), second = low16(c, d), third = high16(a, b), fourth = high16(c, d);
    out[0] = low32(first, second);
    out[1] = high32(first, second);
    out[2] = low32(third, fourth);
    out[3] = high32(third, fourth);
}

inline void unpack_step(const uint8_t* const* rows, int64_t k, Ints* to, Ints& worst) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        Ints codes[4];
        turned(rows, k + 16 * half, codes);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const Wholes w = decoded(codes[i], worst);
            Ints* const place = to + 8 * (i / 2) + 4 * half + 2 * (i % 2);
            place[0] = w.first;
            place[1] = w.second;
        }
    }
}

// Columns [first, last) of a group; what its sums start with.
TENFOLD_APART Floats unpack(const Group& rows, int64_t first, int64_t last, Ints* to) {
    Ints worst = no_ints();
    int64_t k = first;
    for (; k + kStep <= last; k += kStep, to += kStep / 2) unpack_step(rows.codes, k, to, worst);
    if (k < last) unpack_step(RestOfGroup(rows, k, last - k).codes, 0, to, worst);
    return has_nan_code(worst) ? poison(rows, first, last) : no_floats();
}

// Two groups of a tile from `group` on, the weight rows from `row` on, times `Tokens` activation rows from i on.
template <class Scale, int Tokens>
TENFOLD_APART void multiply_wide(const Product& p, const Tile& tile, int64_t group, int64_t first, int64_t i,
                                 int64_t row, int64_t last) {
    const int64_t width = panel_columns(p.weight.in, first), stride = row_bytes(width);
    const uint8_t* x = packed_row(p, first, i);
    const uint8_t* const x_scales = x + 2 * width;
    const Ints* w = tile.pairs[group];
    const Fp8Row<Scale> scales(p.weight, row);
    Floats totals[kGroups][Tokens];
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
        __builtin_prefetch(y_row(p, i + t, row), 1);
        totals[0][t] = tile.start[group];
        totals[1][t] = tile.start[group + 1];
    }
    for (int64_t k = 0; k < width; k += kBlock) {
        Ints sums[kGroups][Tokens];
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t) sums[0][t] = sums[1][t] = no_ints();
        for (const Ints* const stop = w + smaller(kBlock, width - k) / 2; w < stop;) {
#pragma GCC unroll 4
            for (int pair = 0; pair < 4; ++pair, ++w, x += 4) {
                const Ints of_first = w[0], of_second = w[kPanelPairs];
#pragma GCC unroll 8
                for (int t = 0; t < Tokens; ++t) {
                    add_products_of_pair(of_first, of_second, x + t * stride, sums[0][t], sums[1][t]);
                }
            }
        }
        const Floats scale = all_floats(scales.scale_at(first + k));
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t) {
            const Floats x_scale = all_floats(scale_at(x_scales + t * stride, k / kBlock));
            totals[0][t] = add_block(sums[0][t], x_scale, scale, totals[0][t]);
            totals[1][t] = add_block(sums[1][t], x_scale, scale, totals[1][t]);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
        float* const y = y_row(p, i + t, row);
        put_group(y, totals[0][t], last - row, p.add || first > 0);
        if (row + kGroup < last) put_group(y + kGroup, totals[1][t], last - row - kGroup, p.add || first > 0);
    }
}

// `tokens` activation rows, at most `Most`.
template <class Scale, int Most = kAtOnce>
void multiply_tokens(const Product& p, const Tile& tile, int64_t group, int64_t k, int64_t i, int64_t tokens,
                     int64_t row, int64_t last) {
    if constexpr (Most > 1) {
        if (tokens < Most) return multiply_tokens<Scale, Most - 1>(p, tile, group, k, i, tokens, row, last);
    }
    multiply_wide<Scale, Most>(p, tile, group, k, i, row, last);
}

// Columns [k, k + kPanel) of weight rows [first, last), in a tile, times activation rows [i, stop).
template <class Scale>
void multiply_tile(const Product& p, Tile& tile, int64_t k, int64_t first, int64_t last, int64_t i, int64_t stop,
                   CodesAhead ahead) {
    constexpr int64_t kRows = kGroups * kGroup;
    for (int64_t row = first; row < round_up(last - first, kRows) + first; row += kGroup) {
        const int64_t group = (row - first) / kGroup;
        tile.start[group] = unpack(Group(p.weight, row, last), k, smaller(k + kPanel, p.weight.in), tile.pairs[group]);
    }
    const int64_t calls = divided(stop - i, kAtOnce) * divided(last - first, kRows);
    const int64_t lines = divided(ahead.lines(), calls);
    for (int64_t home = i; home < stop; home += kAtHome) {
        const int64_t home_stop = smaller(home + kAtHome, stop);
        for (int64_t row = first; row < last; row += kRows) {
            for (int64_t at = home, count = 0; at < home_stop; at += count) {
                count = tokens_of(home_stop - at, kAtOnce);
                ahead.ask(lines);
                multiply_tokens<Scale>(p, tile, (row - first) / kGroup, k, at, count, row, last);
            }
        }
    }
}

// Weight rows [first, last) under one row of scales, panel by panel, times activation rows [i, stop): as many as stay
// near. Of few an unpacked weight has so few uses that its way to the second cache would cost more.
template <class Scale>
void multiply_near(const Product& p, Tile& tile, int64_t first, int64_t last, int64_t i, int64_t stop) {
    const int64_t in = p.weight.in, tile_rows = stop - i <= kAtHome ? kGroups * kGroup : kTileRows;
    for (int64_t k = 0; k < in; k += kPanel) {
        for (int64_t row = first; row < last; row += tile_rows) {
            const Place next = tile_behind({row, k}, tile_rows, first, last, kPanel, in);
            const uint8_t* const codes = static_cast<const uint8_t*>(p.weight.codes) + next.row * in + next.panel;
            const int64_t rows = smaller(tile_rows, p.weight.out - next.row);
            const CodesAhead ahead(codes, in, smaller(kPanel, in - next.panel), rows);
            multiply_tile<Scale>(p, tile, k, row, smaller(row + tile_rows, last), i, stop, ahead);
        }
    }
}

template <class Scale>
void multiply_many(const Product& p, int64_t first, int64_t last) {
    Tile tile;
    const int64_t together = near_tokens(p.count, kAtHome);
    for (int64_t i = 0; i < p.count; i += together) {
        multiply_near<Scale>(p, tile, first, last, i, smaller(i + together, p.count));
    }
}

template <class Scale>
void multiply_rows(const Product& p, int64_t first, int64_t last) {
    for (int64_t row = first, stop = 0; row < last; row = stop) {
        stop = smaller(last, (row / kScaleRows + 1) * kScaleRows);
        p.count <= kFew ? multiply_few<Scale>(p, row, stop) : multiply_many<Scale>(p, row, stop);
    }
}

// ---------------------------------------------------------------- activations

// `count` numbers, a multiple of 32, to whole ones: of each 32 the first eight, the third, the second, the fourth, as
// decoded weights lie. What undoes it.
float round_block(const float* x, int64_t count, int16_t* to) {
    __m256 largest = _mm256_setzero_ps(), means = _mm256_setzero_ps();
    for (int64_t i = 0; i < count; i += 8) {
        const __m256 size = sizes_of(_mm256_loadu_ps(x + i));
        largest = _mm256_max_ps(largest, size);
        means = _mm256_fmadd_ps(size, _mm256_set1_ps(1.0F / kBlock), means);
    }
    const Step step = step_of(largest_of(largest), sum_of(means), kMostMean);
    const __m256 kept = _mm256_castsi256_ps(_mm256_set1_epi32(step.inverse > 0 ? -1 : 0));
    for (int64_t i = 0; i < count; i += kStep) {
        const auto part = [&](int number) {
            const __m256 values = _mm256_and_ps(_mm256_loadu_ps(x + i + 8 * number), kept);
            return _mm256_mul_ps(values, _mm256_set1_ps(step.inverse));
        };
        for (int half = 0; half < 2; ++half) {
            const __m256i numbers = in_16_bits(part(half), part(half + 2));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i + 16 * half), numbers);
        }
    }
    return step.scale / kWeightUnits;
}

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
