// AVX2: what product_int8.cpp leaves to this file.
//
// A row's sum within a panel has eight parts, each of every eighth block of 32. For few activation rows weights go by
// row after row, as they lie in memory, four pairs of blocks at a time: eight blocks become a vector of their sums.
// More activation rows take eight weight rows side by side, four columns of each, and one block becomes a vector of
// eight rows' sums. Byte products are summed in 16 bits, a few of them or over a whole block, and in 32 bits before they
// become float32; exact until then, and the same parts either way.
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
    float scale[kParts];       // of each block, by parts: half its scale
    int16_t start[kParts][2];  // -12 times the sums of its bytes: of the first two of every four columns, of the others
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
    const __m128i twelve = _mm_set1_epi8(12);
    const __m128i even = _mm_maddubs_epi16(twelve, _mm_loadu_si128(reinterpret_cast<const __m128i*>(block.even)));
    const __m128i odd = _mm_maddubs_epi16(twelve, _mm_loadu_si128(reinterpret_cast<const __m128i*>(block.odd)));
    __m128i sums = _mm_add_epi16(even, odd);
    sums = _mm_add_epi16(sums, _mm_shuffle_epi32(sums, 0x4E));
    sums = _mm_add_epi16(sums, _mm_shuffle_epi32(sums, 0xB1));
    const int32_t start = _mm_cvtsi128_si32(_mm_sub_epi16(_mm_setzero_si128(), sums));
    std::memcpy(to.start[part], &start, sizeof(start));
}

inline const Quad* quads_of(const Product& p, int64_t pair, int64_t i) {
    const uint8_t* const panels = reinterpret_cast<const uint8_t*>(p.panels);
    return reinterpret_cast<const Quad*>(panels + panel_offset(p.weight.in, p.panel_rows, pair, p.first_row + i));
}

// The bytes 2 w + 12 of the even columns; those of the odd ones lie four bits higher.
inline __m256i even_of(__m256i codes) {
    const __m256i table = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    return _mm256_shuffle_epi8(table, _mm256_and_si256(codes, _mm256_set1_epi8(15)));
}

inline __m256i odd_of(__m256i codes) { return even_of(_mm256_srli_epi16(codes, 4)); }

inline __m256i in_32_bits(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

inline __m256 add_exact(__m256i exact, __m256 scale, __m256 x_scale, __m256 sum) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact), _mm256_mul_ps(scale, x_scale), sum);
}

// ------------------------------------------------------------------------------- few activation rows

constexpr int64_t kAheadBytes = 2048;  // of memory's delay, at some 10 GB/s

inline __m256i loaded(const void* bytes) { return _mm256_loadu_si256(static_cast<const __m256i*>(bytes)); }

inline __m256i pair_sums(__m256i even, __m256i odd, const int8_t* x_even, const int8_t* x_odd) {
    return in_32_bits(_mm256_add_epi16(_mm256_maddubs_epi16(even, loaded(x_even)),
                                       _mm256_maddubs_epi16(odd, loaded(x_odd))));
}

inline __m256i two_pairs(__m256i a, __m256i b) {
    return _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
}

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
            const __m256i two = two_pairs(pair_sums(even, odd, pair.even, pair.odd),
                                          pair_sums(next_even, next_odd, next.even, next.odd));
            if (i == 0) {
                exact[t] = two;
            } else {
                exact[t] = _mm256_add_epi32(_mm256_unpacklo_epi64(exact[t], two), _mm256_unpackhi_epi64(exact[t], two));
            }
        }
    }
    const __m128i by_parts = _mm_shuffle_epi8(scales, _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 0, 0, 0, 0, 0, 0, 0, 0));
    const __m256 scale = powers_of(by_parts);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
        const __m256i corrected = _mm256_add_epi32(exact[t], in_32_bits(loaded(x[t]->start)));
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

constexpr int kEight = 8;  // weight rows side by side

using Eight = Group<kEight>;

// The scales of a panel of a group: of a block all eight.
class Scales {
public:
    void set(const Eight& rows, int64_t pair, int64_t blocks) {
        for (int64_t block = 0; block < blocks; block += 8) {
            __m128i row[kEight];
            for (int r = 0; r < kEight; ++r) row[r] = eight_of(rows.scale[r] + 2 * pair, block, blocks);
            const __m128i a = _mm_unpacklo_epi8(row[0], row[1]), b = _mm_unpacklo_epi8(row[2], row[3]);
            const __m128i c = _mm_unpacklo_epi8(row[4], row[5]), d = _mm_unpacklo_epi8(row[6], row[7]);
            const __m128i first = _mm_unpacklo_epi16(a, b), second = _mm_unpackhi_epi16(a, b);
            const __m128i third = _mm_unpacklo_epi16(c, d), fourth = _mm_unpackhi_epi16(c, d);
            __m128i* const to = reinterpret_cast<__m128i*>(bytes_[block]);
            _mm_storeu_si128(to, _mm_unpacklo_epi32(first, third));
            _mm_storeu_si128(to + 1, _mm_unpackhi_epi32(first, third));
            _mm_storeu_si128(to + 2, _mm_unpacklo_epi32(second, fourth));
            _mm_storeu_si128(to + 3, _mm_unpackhi_epi32(second, fourth));
        }
    }

    __m256 of(int64_t block) const { return powers_of(load_eight(bytes_[block])); }

private:
    uint8_t bytes_[2 * kPairs][kEight];
};

// Four times four bytes of eight rows each: those of the first eight columns, and so on.
inline void turned(const uint8_t* const* rows, int64_t offset, __m256i (&out)[4]) {
    __m256i v[4];
    for (int r = 0; r < 4; ++r) {
        const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r] + offset));
        const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r + 4] + offset));
        v[r] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }
    const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
    const __m256i c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
    out[0] = _mm256_unpacklo_epi64(a, c);
    out[1] = _mm256_unpackhi_epi64(a, c);
    out[2] = _mm256_unpacklo_epi64(b, d);
    out[3] = _mm256_unpackhi_epi64(b, d);
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
    __m256i start(int t) const {
        int32_t both;
        std::memcpy(&both, quad(t)->start[part_], sizeof(both));
        return _mm256_set1_epi32(both);
    }

    __m256 scale(int t) const { return _mm256_broadcast_ss(&quad(t)->scale[part_]); }

private:
    const Quad* quad(int t) const { return reinterpret_cast<const Quad*>(quad_ + t * stride_); }

    const uint8_t* quad_;
    int64_t stride_;
    const uint8_t *first_ = nullptr, *fourth_ = nullptr;
    int64_t part_ = 0;
};

// y (+)= the parts of eight rows, added as sum_of adds them.
inline void put_eight(float* y, const __m256* part, int64_t stride, int64_t rows, bool add) {
    __m256 four[4];
    for (int i = 0; i < 4; ++i) four[i] = _mm256_add_ps(part[i * stride], part[(i + 4) * stride]);
    const __m256 sums = _mm256_add_ps(_mm256_add_ps(four[0], four[2]), _mm256_add_ps(four[1], four[3]));
    put(y, _mm256_castps256_ps128(sums), smaller(kQuad, rows), add);
    if (rows > kQuad) put(y + kQuad, _mm256_extractf128_ps(sums, 1), smaller(kQuad, rows - kQuad), add);
}

// Weights are decoded into a tile first.

struct Block {
    __m256i codes[8];  // 2 w + 12: even columns, odd ones, even ones, ...
    __m256 scale;
};

constexpr int64_t kGroupBlocks = 2 * kPairs;  // of one group in a tile
constexpr int kGroups = 2;                    // that are multiplied at a time, by kRegisterTokens activation rows
constexpr int64_t kRegisterTokens = 6;
constexpr int64_t kPanelTokens = 18;  // 23 KiB, at home in the first cache

// `next`, as many bytes of each row, comes next.
TENFOLD_APART void unpack(const Eight& rows, int64_t in, int64_t pair, const Eight& next, int64_t next_pair,
                          Block* to) {
    const int64_t blocks = blocks_of(in, pair);
    for (const uint8_t* codes : next.codes) prefetch_lines(codes + 32 * next_pair, 16 * blocks);
    Scales scales;
    scales.set(rows, pair, blocks);
    for (int64_t block = 0; block < blocks; ++block, ++to) {
        __m256i codes[4];
        turned(rows.codes, 32 * pair + 16 * block, codes);
        for (int i = 0; i < 4; ++i) {
            to->codes[2 * i] = even_of(codes[i]);
            to->codes[2 * i + 1] = odd_of(codes[i]);
        }
        to->scale = scales.of(block);
    }
}

// Adds the products of four columns of two groups with those of row t, by pairs. In this order: the compiler would
// multiply for all activation rows before it adds, and run out of registers. These lie in memory since before the loop.
template <int t, int offset>
inline void add_four(__m256i first, __m256i second, const Activations& x, __m256i& first_pairs, __m256i& second_pairs) {
    __m256i four, product;
    const uint8_t* const near = x.near<t>();
#define TENFOLD_ADD_FOUR(address)                                                                   \
    __asm__("vpbroadcastd " address ", %2\n\t"                                                      \
            "vpmaddubsw %2, %4, %3\n\t"                                                             \
            "vpaddw %3, %0, %0\n\t"                                                                 \
            "vpmaddubsw %2, %5, %2\n\t"                                                             \
            "vpaddw %2, %1, %1"                                                                     \
            : "+x"(first_pairs), "+x"(second_pairs), "=&x"(four), "=&x"(product)                    \
            : "x"(first), "x"(second), "r"(near), "r"(x.stride()), "i"(offset), "m"(*near))
    if constexpr (t % 3 == 0) {
        TENFOLD_ADD_FOUR("%c8(%6)");
    } else if constexpr (t % 3 == 1) {
        TENFOLD_ADD_FOUR("%c8(%6,%7)");
    } else {
        TENFOLD_ADD_FOUR("%c8(%6,%7,2)");
    }
#undef TENFOLD_ADD_FOUR
}

// Four columns of every row.
template <int offset, int Tokens, int... t>
inline void add_fours(__m256i first, __m256i second, const Activations& x, __m256i (&pairs)[kGroups][Tokens],
                      std::integer_sequence<int, t...>) {
    (add_four<t, offset>(first, second, x, pairs[0][t], pairs[1][t]), ...);
}

// A block's columns: four even ones, four odd ones, and so on.
template <int Tokens, int... i>
inline void add_columns(const Block* tile, const Activations& x, __m256i (&pairs)[kGroups][Tokens],
                        std::integer_sequence<int, i...>) {
    (add_fours<i % 2 * 32 + i / 2 * 4>(tile->codes[i], tile[kGroupBlocks].codes[i], x, pairs,
                                       std::make_integer_sequence<int, Tokens>()), ...);
}

// One block. The 16 products that a lane sums may leave 16 bits on the way, which wraps around, but not in the end: with
// 12 less for each weight they add up to at most 16 * 12 * 127 < 2^15.
template <int Tokens>
inline void add_block(const Block* tile, const Activations& x, __m256 (&sums)[kGroups][Tokens]) {
    __m256i pairs[kGroups][Tokens];
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) pairs[0][t] = pairs[1][t] = x.start(t);
    add_columns(tile, x, pairs, std::make_integer_sequence<int, 8>());
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g) {
        const __m256 scale = tile[g * kGroupBlocks].scale;
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t) sums[g][t] = add_exact(in_32_bits(pairs[g][t]), scale, x.scale(t), sums[g][t]);
    }
}

template <int Tokens>
TENFOLD_APART void multiply_wide(const Product& p, const Block* tile, int64_t pair, int64_t i, int64_t row,
                                 int64_t last) {
    __m256 sums[kParts][kGroups][Tokens];
    for (auto& of_part : sums) {
        for (auto& of_group : of_part) {
            for (auto& sum : of_group) sum = _mm256_setzero_ps();
        }
    }
    Activations x(p, pair, i);
    for (int64_t block = 0; block < blocks_of(p.weight.in, pair); ++block) {
        x.to(block);
        add_block(tile + block, x, sums[x.part()]);
    }
    for (int g = 0; g < kGroups && row + kEight * g < last; ++g) {
        for (int t = 0; t < Tokens; ++t) {
            float* const y = y_row(p, i + t, row + kEight * g);
            put_eight(y, &sums[0][g][t], kGroups * Tokens, last - row - kEight * g, p.add || pair > 0);
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

void multiply_tile(const Product& p, Block* tile, int64_t pair, int64_t first, int64_t last, int64_t tile_rows) {
    const int64_t in = p.weight.in, stop = pair + panel_width(in, pair);
    const bool more = stop < num_pairs(in);
    for (int64_t r = 0; r < round_up(last - first, kGroups * kEight); r += kEight) {
        const Eight rows(p.weight, first + r, last);
        const Eight after(p.weight, first + r + tile_rows, p.weight.out);
        unpack(rows, in, pair, more ? rows : after, more ? stop : 0, tile + r / kEight * kGroupBlocks);
    }
    for (int64_t home = 0; home < p.count; home += kPanelTokens) {
        const int64_t home_stop = smaller(home + kPanelTokens, p.count);
        for (int64_t row = first; row < last; row += kGroups * kEight) {
            const Block* const at = tile + (row - first) / kEight * kGroupBlocks;
            for (int64_t i = home, count = 0; i < home_stop; i += count) {
                count = tokens_of(home_stop - i, kRegisterTokens);
                multiply_tokens(p, at, pair, i, count, row, last);
            }
        }
    }
}

void multiply_rows(const Product& p, int64_t first, int64_t last) {
    if (p.count <= kFew) return multiply_few(p, first, last);
    Block tile[kTileRows / kEight * kGroupBlocks];
    // Of few activation rows an unpacked weight has so few uses that its way to the second cache would cost more.
    const int64_t rows = p.count <= kPanelTokens ? kGroups * kEight : kTileRows;
    for (int64_t row = first; row < last; row += rows) {
        for (int64_t pair = 0; pair < num_pairs(p.weight.in); pair += kPairs) {
            multiply_tile(p, tile, pair, row, smaller(row + rows, last), rows);
        }
    }
}

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
