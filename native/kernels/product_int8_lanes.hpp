// AVX2 and AVX-512: what product_int8.cpp leaves to this file.
//
// A row's sum within a panel has eight parts, each of every eighth block of 32. For few activation rows weights go by
// row after row, as they lie in memory, four pairs of blocks at a time: eight blocks become a vector of their sums.
// More activation rows take a vector's lanes of weight rows side by side, four columns of each, and one block becomes a
// vector of their sums. AVX-512 sums byte products in 32 bits; AVX2 in 16 first, a few of them or over a whole block.
// They are exact until they become float32, and the parts are the same every way.
#pragma once

#include <cstddef>
#include <utility>

#include "product_int8.hpp"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int64_t kParts = 8;
constexpr int64_t kQuadPairs = 4;

constexpr int64_t part_of(int64_t block) { return block % 8 / 2 + block % 2 * 4; }

// Up to 256 activations, in panels behind one another; of the last quad of a row only the pairs that exist.
struct Quad {
    float scale[kParts];    // of each block, by parts: half its scale
    int32_t start[kParts];  // what its sums begin with: -12 times the sum of its bytes
    struct {
        int8_t even[32], odd[32];  // of either block 16
    } pair[kQuadPairs];
};

constexpr int64_t kPairBytes = 64, kQuadBytes = sizeof(Quad);

inline int64_t panel_bytes(int64_t width) {
    return (width + kQuadPairs - 1) / kQuadPairs * (kQuadBytes - kQuadPairs * kPairBytes) + width * kPairBytes;
}

// Row `row` of the panel that begins with `pair`.
inline int64_t panel_offset(int64_t in, int64_t panel_rows, int64_t pair, int64_t row) {
    return panel_rows * (pair / kPairs * panel_bytes(kPairs)) + row * panel_bytes(panel_width(in, pair));
}

inline __m256i loaded(const void* bytes) { return _mm256_loadu_si256(static_cast<const __m256i*>(bytes)); }

// What is different where an instruction sums products of bytes in 32 bits.
#ifdef __AVX512VNNI__

inline int32_t start_of(const Rounded& block) { return -12 * block.sum; }

inline Ints in_32_bits(Ints sums) { return sums; }
inline __m256i starts_of(const Quad& x) { return loaded(x.start); }

inline __m256i pair_sums(__m256i even, __m256i odd, const int8_t* x_even, const int8_t* x_odd) {
    return _mm256_dpbusd_epi32(_mm256_dpbusd_epi32(_mm256_setzero_si256(), even, loaded(x_even)), odd, loaded(x_odd));
}

#else

// In either half of 32 bits its own: of the first two of every four columns, and of the others.
inline int32_t start_of(const Rounded& block) {
    const __m128i twelve = _mm_set1_epi8(12);
    const __m128i even = _mm_maddubs_epi16(twelve, _mm_loadu_si128(reinterpret_cast<const __m128i*>(block.even)));
    const __m128i odd = _mm_maddubs_epi16(twelve, _mm_loadu_si128(reinterpret_cast<const __m128i*>(block.odd)));
    __m128i sums = _mm_add_epi16(even, odd);
    sums = _mm_add_epi16(sums, _mm_shuffle_epi32(sums, 0x4E));
    sums = _mm_add_epi16(sums, _mm_shuffle_epi32(sums, 0xB1));
    return _mm_cvtsi128_si32(_mm_sub_epi16(_mm_setzero_si128(), sums));
}

inline Ints in_32_bits(Ints pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
inline __m256i starts_of(const Quad& x) { return in_32_bits(loaded(x.start)); }

inline __m256i pair_sums(__m256i even, __m256i odd, const int8_t* x_even, const int8_t* x_odd) {
    return in_32_bits(_mm256_add_epi16(_mm256_maddubs_epi16(even, loaded(x_even)),
                                       _mm256_maddubs_epi16(odd, loaded(x_odd))));
}

#endif

inline void keep_block(const Rounded& block, int64_t in, void* panels, int64_t panel_rows, int64_t row, int64_t at) {
    const int64_t pair = at / 2, panel = pair / kPairs * kPairs, half = at % 2, part = part_of(at);
    const int64_t quad = (pair - panel) / kQuadPairs, place = (pair - panel) % kQuadPairs;
    uint8_t* const bytes = static_cast<uint8_t*>(panels) + panel_offset(in, panel_rows, panel, row);
    Quad& to = *reinterpret_cast<Quad*>(bytes + quad * kQuadBytes);
    if (place == 0 && half == 0) std::memset(&to, 0, sizeof(to) - sizeof(to.pair));
    if (half == 0) std::memset(&to.pair[place], 0, kPairBytes);
    std::memcpy(to.pair[place].even + 16 * half, block.even, sizeof(block.even));
    std::memcpy(to.pair[place].odd + 16 * half, block.odd, sizeof(block.odd));
    to.scale[part] = block.half;
    to.start[part] = start_of(block);
}

inline const Quad* quads_of(const Product& p, int64_t pair, int64_t i) {
    const uint8_t* const panels = reinterpret_cast<const uint8_t*>(p.panels);
    return reinterpret_cast<const Quad*>(panels + panel_offset(p.weight.in, p.panel_rows, pair, p.first_row + i));
}

// Eight e8m0 bytes as numbers; 0 is subnormal and 255 is NaN, which shifting alone would both miss.
inline __m256 eight_powers(__m128i codes) {
    const __m256i wide = _mm256_cvtepu8_epi32(codes);
    const __m256i number = _mm256_max_epu32(_mm256_slli_epi32(wide, 23), _mm256_set1_epi32(0x00400000));
    return _mm256_castsi256_ps(_mm256_or_si256(number, _mm256_cmpeq_epi32(wide, _mm256_set1_epi32(255))));
}

inline __m128i load_eight(const uint8_t* bytes) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)); }

// Eight bytes of a row from `at` on, zeros behind its `count`.
inline __m128i eight_of(const uint8_t* row, int64_t at, int64_t count) {
    if (count - at >= 8) return load_eight(row + at);
    uint8_t rest[8] = {};
    std::memcpy(rest, row + at, static_cast<size_t>(count - at));
    return load_eight(rest);
}

// The bytes 2 w + 12 of the even columns; those of the odd ones lie four bits higher.
template <class Codes>
inline Codes even_of(Codes codes) {
    const __m128i table = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
    return look_up(spread_as(codes, table), both(codes, all_lanes(codes, 0x0F0F0F0F)));
}

template <class Codes>
inline Codes odd_of(Codes codes) {
    return even_of(down16(codes, 4));
}

template <class Exact, class Numbers>
inline Numbers add_exact(Exact exact, Numbers scale, Numbers x_scale, Numbers sum) {
    return add_product(to_floats(exact), times(scale, x_scale), sum);
}

// ------------------------------------------------------------------------------- few activation rows

// One row at a time: two side by side are two streams from memory, at two thirds of the speed (Zen 4).

constexpr int64_t kAheadBytes = 2048;  // of memory's delay, at some 10 GB/s

// The sums of two neighbours each: those of a's lanes of 128 bits beside those of b's.
inline __m256i neighbours(__m256i a, __m256i b) { return sum32(low32(a, b), high32(a, b)); }

template <int Tokens>
inline void add_quad(const uint8_t* codes, __m128i scales, const Quad* const (&x)[Tokens], __m256 (&sums)[Tokens]) {
    __m256i exact[Tokens];
#pragma GCC unroll 2
    for (int i = 0; i < kQuadPairs; i += 2) {
        const __m256i first = loaded(codes + 32 * i), second = loaded(codes + 32 * i + 32);
        const __m256i even = even_of(first), odd = odd_of(first), next_even = even_of(second), next_odd = odd_of(second);
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
            const auto &pair = x[t]->pair[i], &next = x[t]->pair[i + 1];
            const __m256i two = neighbours(pair_sums(even, odd, pair.even, pair.odd),
                                           pair_sums(next_even, next_odd, next.even, next.odd));
            exact[t] = i == 0 ? two : sum32(low64(exact[t], two), high64(exact[t], two));
        }
    }
    const __m128i by_parts = _mm_shuffle_epi8(scales, _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 0, 0, 0, 0, 0, 0, 0, 0));
    const __m256 scale = eight_powers(by_parts);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
        const __m256i corrected = sum32(exact[t], starts_of(*x[t]));
        sums[t] = add_exact(corrected, scale, _mm256_loadu_ps(x[t]->scale), sums[t]);
    }
}

// The blocks behind the last whole quad; what is missing counts as zero.
template <int Tokens>
TENFOLD_APART void add_last_quad(const uint8_t* codes, const uint8_t* scale, int64_t blocks,
                                 const Quad* const (&x)[Tokens], __m256 (&sums)[Tokens]) {
    uint8_t rest[kQuadPairs * 32] = {};
    Quad own[Tokens] = {};
    const Quad* whole[Tokens];
    std::memcpy(rest, codes, static_cast<size_t>(16 * blocks));
    for (int t = 0; t < Tokens; ++t) {
        std::memcpy(&own[t], x[t], static_cast<size_t>(panel_bytes((blocks + 1) / 2)));
        whole[t] = &own[t];
    }
    add_quad(rest, eight_of(scale, 0, blocks), whole, sums);
}

template <int Tokens>
TENFOLD_APART void multiply_in_order(const Product& p, int64_t first, int64_t last) {
    const int64_t in = p.weight.in;
    const uint8_t* codes = static_cast<const uint8_t*>(p.weight.codes) + first * (in / 2);
    const uint8_t* scale = static_cast<const uint8_t*>(p.weight.scale) + first * (in / 32);
    for (int64_t row = first; row < last; ++row) {
        for (int64_t pair = 0; pair < num_pairs(in); pair += kPairs) {
            const Quad* x[Tokens];
            __m256 sums[Tokens];
            for (int t = 0; t < Tokens; ++t) {
                x[t] = quads_of(p, pair, t);
                sums[t] = _mm256_setzero_ps();
            }
            int64_t blocks = blocks_of(in, pair);
            for (; blocks >= 8; blocks -= 8, codes += 128, scale += 8) {
                _mm_prefetch(reinterpret_cast<const char*>(codes) + kAheadBytes, _MM_HINT_T0);
                _mm_prefetch(reinterpret_cast<const char*>(codes) + kAheadBytes + 64, _MM_HINT_T0);
                add_quad(codes, load_eight(scale), x, sums);
                for (auto& quad : x) ++quad;
            }
            if (blocks > 0) add_last_quad(codes, scale, blocks, x, sums);
            codes += 16 * blocks;
            scale += blocks;
            for (int t = 0; t < Tokens; ++t) {
                float* const y = y_row(p, t, row);
                *y = p.add || pair > 0 ? *y + sum_of(sums[t]) : sum_of(sums[t]);
            }
        }
    }
}

void multiply_few(const Product& p, int64_t first, int64_t last) {
    switch (p.count) {
        case 1: return multiply_in_order<1>(p, first, last);
        case 2: return multiply_in_order<2>(p, first, last);
        case 3: return multiply_in_order<3>(p, first, last);
        default: return multiply_in_order<kFew>(p, first, last);
    }
}

// ------------------------------------------------------------------------------- more activation rows

using Rows = Group<kGroup>;  // weight rows side by side

// The scales of a panel of a group: of a block those of all rows.
class Scales {
public:
    void set(const Rows& rows, int64_t pair, int64_t blocks) {
        for (int64_t block = 0; block < blocks; block += 8) {
            for (int side = 0; side < kSide; ++side) set_side(rows.scale + side * kLanes, 2 * pair, block, blocks, side);
        }
    }

    Floats of(int64_t block) const {
        const __m256 first = eight_powers(load_eight(bytes_[block][0]));
#ifdef __AVX512VNNI__
        return _mm512_insertf32x8(_mm512_castps256_ps512(first), eight_powers(load_eight(bytes_[block][1])), 1);
#else
        return first;
#endif
    }

private:
    void set_side(const uint8_t* const* scales, int64_t from, int64_t block, int64_t blocks, int side) {
        __m128i row[kLanes];
        for (int r = 0; r < kLanes; ++r) row[r] = eight_of(scales[r] + from, block, blocks);
        const __m128i a = _mm_unpacklo_epi8(row[0], row[1]), b = _mm_unpacklo_epi8(row[2], row[3]);
        const __m128i c = _mm_unpacklo_epi8(row[4], row[5]), d = _mm_unpacklo_epi8(row[6], row[7]);
        const __m128i first = _mm_unpacklo_epi16(a, b), second = _mm_unpackhi_epi16(a, b);
        const __m128i third = _mm_unpacklo_epi16(c, d), fourth = _mm_unpackhi_epi16(c, d);
        const auto put = [&](int64_t at, __m128i two) {
            _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes_[block + at][side]), two);
            _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes_[block + at + 1][side]), _mm_unpackhi_epi64(two, two));
        };
        put(0, _mm_unpacklo_epi32(first, third));
        put(2, _mm_unpackhi_epi32(first, third));
        put(4, _mm_unpacklo_epi32(second, fourth));
        put(6, _mm_unpackhi_epi32(second, fourth));
    }

    uint8_t bytes_[2 * kPairs][kSide][kLanes];
};

// Sixteen bytes of the rows that share a vector by their lane within 128 bits.
inline Ints sixteen(const uint8_t* const* rows, int64_t offset) {
    const auto two = [=](int i) {
        const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + offset));
        const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i + 4] + offset));
        return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    };
#ifdef __AVX512VNNI__
    return _mm512_inserti64x4(_mm512_castsi256_si512(two(0)), two(8), 1);
#else
    return two(0);
#endif
}

// Four times four bytes of each row: those of the first eight columns, and so on.
inline void turned(const uint8_t* const* rows, int64_t offset, Ints (&out)[4]) {
    Ints v[4];
    for (int r = 0; r < 4; ++r) v[r] = sixteen(rows + r, offset);
    const Ints a = low32(v[0], v[1]), b = high32(v[0], v[1]), c = low32(v[2], v[3]), d = high32(v[2], v[3]);
    out[0] = low64(a, c);
    out[1] = high64(a, c);
    out[2] = low64(b, d);
    out[3] = high64(b, d);
}

// Block after block of some activation rows, up to six. They lie `stride` bytes apart, which an address can add once or
// twice to a register: two registers reach them all.
class Activations {
public:
    Activations(const Product& p, int64_t pair, int64_t i)
        : quad_(reinterpret_cast<const uint8_t*>(quads_of(p, pair, i))),
          stride_(panel_bytes(panel_width(p.weight.in, pair))) {}

    void to(int64_t block) {
        if (block % 8 == 0 && block > 0) quad_ += kQuadBytes;
        part_ = part_of(block);
        first_ = quad_ + offsetof(Quad, pair) + block % 8 / 2 * kPairBytes + block % 2 * 16;
        fourth_ = first_ + 3 * stride_;
    }

    // Row t's four columns, even or odd ones, `offset` bytes behind its first even ones.
    template <int t>
    const uint8_t* near() const {
        return t < 3 ? first_ : fourth_;
    }

    int64_t stride() const { return stride_; }
    int64_t part() const { return part_; }

    // What the sums of a block begin with, everywhere.
    Ints start(int t) const { return all_lanes(no_ints(), quad(t)->start[part_]); }

    Floats scale(int t) const { return all_floats(quad(t)->scale[part_]); }

private:
    const Quad* quad(int t) const { return reinterpret_cast<const Quad*>(quad_ + t * stride_); }

    const uint8_t* quad_;
    int64_t stride_;
    const uint8_t *first_ = nullptr, *fourth_ = nullptr;
    int64_t part_ = 0;
};

// y (+)= the parts of the rows of a group, added as sum_of adds them.
inline void put_parts(float* y, const Floats* part, int64_t stride, int64_t rows, bool add) {
    Floats four[4];
    for (int i = 0; i < 4; ++i) four[i] = part[i * stride] + part[(i + 4) * stride];
    put_group(y, (four[0] + four[2]) + (four[1] + four[3]), rows, add);
}

// Weights are decoded into a tile first.

struct Block {
    Ints codes[8];  // 2 w + 12: even columns, odd ones, even ones, ...
    Floats scale;
};

constexpr int64_t kGroupBlocks = 2 * kPairs;  // of one group in a tile
constexpr int kGroups = 2;                    // that are multiplied at a time, by kRegisterTokens activation rows
constexpr int64_t kRegisterTokens = 6;
constexpr int64_t kPanelTokens = 18;  // 23 KiB, at home in the first cache

TENFOLD_APART void unpack(const Rows& rows, int64_t in, int64_t pair, Block* to) {
    const int64_t blocks = blocks_of(in, pair);
    Scales scales;
    scales.set(rows, pair, blocks);
    for (int64_t block = 0; block < blocks; ++block, ++to) {
        Ints codes[4];
        turned(rows.codes, 32 * pair + 16 * block, codes);
        for (int i = 0; i < 4; ++i) {
            to->codes[2 * i] = even_of(codes[i]);
            to->codes[2 * i + 1] = odd_of(codes[i]);
        }
        to->scale = scales.of(block);
    }
}

#ifdef __AVX512VNNI__
#define TENFOLD_PRODUCTS                \
    "vpdpbusd %[x], %[a], %[to_a]\n\t"  \
    "vpdpbusd %[x], %[b], %[to_b]"
#else
#define TENFOLD_PRODUCTS                   \
    "vpmaddubsw %[x], %[a], %[more]\n\t"   \
    "vpaddw %[more], %[to_a], %[to_a]\n\t" \
    "vpmaddubsw %[x], %[b], %[x]\n\t"      \
    "vpaddw %[x], %[to_b], %[to_b]"
#endif

// Adds the products of four columns of two groups with those of row t. In this order: the compiler would multiply for
// all activation rows before it adds, and run out of registers. These lie in memory since before the loop.
#define TENFOLD_ADD_FOUR(address)                                                                          \
    __asm__("vpbroadcastd " address ", %[x]\n\t" TENFOLD_PRODUCTS                                          \
            : [to_a] "+v"(to_first), [to_b] "+v"(to_second), [x] "=&v"(four), [more] "=&v"(product)        \
            : [a] "v"(first), [b] "v"(second), [near] "r"(near), [stride] "r"(x.stride()), [at] "i"(offset), \
              "m"(*near))

template <int t, int offset>
inline void add_four(Ints first, Ints second, const Activations& x, Ints& to_first, Ints& to_second) {
    Ints four, product;
    const uint8_t* const near = x.near<t>();
    if constexpr (t % 3 == 0) {
        TENFOLD_ADD_FOUR("%c[at](%[near])");
    } else if constexpr (t % 3 == 1) {
        TENFOLD_ADD_FOUR("%c[at](%[near],%[stride])");
    } else {
        TENFOLD_ADD_FOUR("%c[at](%[near],%[stride],2)");
    }
}

#undef TENFOLD_ADD_FOUR
#undef TENFOLD_PRODUCTS

// Four columns of every row.
template <int offset, int Tokens, int... t>
inline void add_fours(Ints first, Ints second, const Activations& x, Ints (&sums)[kGroups][Tokens],
                      std::integer_sequence<int, t...>) {
    (add_four<t, offset>(first, second, x, sums[0][t], sums[1][t]), ...);
}

// A block's columns: four even ones, four odd ones, and so on.
template <int Tokens, int... i>
inline void add_columns(const Block* tile, const Activations& x, Ints (&sums)[kGroups][Tokens],
                        std::integer_sequence<int, i...>) {
    (add_fours<i % 2 * 32 + i / 2 * 4>(tile->codes[i], tile[kGroupBlocks].codes[i], x, sums,
                                       std::make_integer_sequence<int, Tokens>()), ...);
}

// One block. With AVX2 the 16 products that a lane sums may leave 16 bits on the way, which wraps around, but not in the
// end: with 12 less for each weight they add up to at most 16 * 12 * 127 < 2^15.
template <int Tokens>
inline void add_block(const Block* tile, const Activations& x, Floats (&sums)[kGroups][Tokens]) {
    Ints exact[kGroups][Tokens];
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) exact[0][t] = exact[1][t] = x.start(t);
    add_columns(tile, x, exact, std::make_integer_sequence<int, 8>());
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g) {
        const Floats scale = tile[g * kGroupBlocks].scale;
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t) sums[g][t] = add_exact(in_32_bits(exact[g][t]), scale, x.scale(t), sums[g][t]);
    }
}

template <int Tokens>
TENFOLD_APART void multiply_wide(const Product& p, const Block* tile, int64_t pair, int64_t i, int64_t row,
                                 int64_t last) {
    Floats sums[kParts][kGroups][Tokens];
    for (auto& of_part : sums) {
        for (auto& of_group : of_part) {
            for (auto& sum : of_group) sum = no_floats();
        }
    }
    for (int t = 0; t < Tokens; ++t) __builtin_prefetch(y_row(p, i + t, row), 1);
    Activations x(p, pair, i);
    for (int64_t block = 0; block < blocks_of(p.weight.in, pair); ++block) {
        x.to(block);
        add_block(tile + block, x, sums[x.part()]);
    }
    for (int g = 0; g < kGroups && row + kGroup * g < last; ++g) {
        for (int t = 0; t < Tokens; ++t) {
            float* const y = y_row(p, i + t, row + kGroup * g);
            put_parts(y, &sums[0][g][t], kGroups * Tokens, last - row - kGroup * g, p.add || pair > 0);
        }
    }
}

// `tokens` activation rows from i on, at most `Most`.
template <int Most = kRegisterTokens>
void multiply_tokens(const Product& p, const Block* tile, int64_t pair, int64_t i, int64_t tokens, int64_t row,
                     int64_t last) {
    if constexpr (Most > 1) {
        if (tokens < Most) return multiply_tokens<Most - 1>(p, tile, pair, i, tokens, row, last);
    }
    multiply_wide<Most>(p, tile, pair, i, row, last);
}

// The panel that begins with `pair` of weight rows [first, last), in a tile, times activation rows [i, stop).
void multiply_tile(const Product& p, Block* tile, int64_t pair, int64_t first, int64_t last, int64_t i, int64_t stop,
                   CodesAhead ahead) {
    constexpr int64_t kBoth = kGroups * kGroup;
    for (int64_t r = 0; r < round_up(last - first, kBoth); r += kGroup) {
        unpack(Rows(p.weight, first + r, last), p.weight.in, pair, tile + r / kGroup * kGroupBlocks);
    }
    const int64_t calls = divided(stop - i, kRegisterTokens) * divided(last - first, kBoth);
    const int64_t lines = divided(ahead.lines(), calls);
    for (int64_t home = i; home < stop; home += kPanelTokens) {
        const int64_t home_stop = smaller(home + kPanelTokens, stop);
        for (int64_t row = first; row < last; row += kBoth) {
            const Block* const at = tile + (row - first) / kGroup * kGroupBlocks;
            for (int64_t t = home, count = 0; t < home_stop; t += count) {
                count = tokens_of(home_stop - t, kRegisterTokens);
                ahead.ask(lines);
                multiply_tokens(p, at, pair, t, count, row, last);
            }
        }
    }
}

// Weight rows [first, last), panel by panel, times activation rows [i, stop): as many as stay near. Of few an unpacked
// weight has so few uses that its way to the second cache would cost more.
void multiply_near(const Product& p, Block* tile, int64_t first, int64_t last, int64_t i, int64_t stop) {
    const int64_t in = p.weight.in, tile_rows = stop - i <= kPanelTokens ? kGroups * kGroup : kTileRows;
    for (int64_t pair = 0; pair < num_pairs(in); pair += kPairs) {
        for (int64_t row = first; row < last; row += tile_rows) {
            const Place next = tile_behind({row, pair}, tile_rows, first, last, kPairs, num_pairs(in));
            const int64_t offset = next.row * (in / 2) + 32 * next.panel;
            const uint8_t* const codes = static_cast<const uint8_t*>(p.weight.codes) + offset;
            const int64_t rows = smaller(tile_rows, p.weight.out - next.row);
            const CodesAhead ahead(codes, in / 2, 16 * blocks_of(in, next.panel), rows);
            multiply_tile(p, tile, pair, row, smaller(row + tile_rows, last), i, stop, ahead);
        }
    }
}

void multiply_rows(const Product& p, int64_t first, int64_t last) {
    if (p.count <= kFew) return multiply_few(p, first, last);
    Block tile[kTileRows / kGroup * kGroupBlocks];
    const int64_t together = near_tokens(p.count, kPanelTokens);
    for (int64_t row = first; row < last; row += kNearRows) {
        for (int64_t i = 0; i < p.count; i += together) {
            multiply_near(p, tile, row, smaller(row + kNearRows, last), i, smaller(i + together, p.count));
        }
    }
}

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
