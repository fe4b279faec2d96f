// The lightning indexer: scores of stored keys against all index heads, and the best rows of each query.
//
// Keys are unpacked in chunks, for all queries of a tile; a chunk's scores are filtered by what a query already
// has, so no scores are kept. Two ways to a dot product: where keys are e2m1 and a query lies on a grid as coarse
// (as deployed numerics see to), whole numbers of eight bits, which is exact, with AMX many queries' at a time
// (index_amx.hpp); else float32.
#include "decode_row.hpp"
#include "index_amx.hpp"
#include "kernels.hpp"
#include "scratch.hpp"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int64_t group = 4;         // heads that go through the inner loops together
constexpr int64_t chunk_keys = 96;   // keys unpacked at a time: 12 KB as bytes, 48 KB as float32, of 128 channels
constexpr int64_t float_keys = 24;   // keys of an inner loop over float32
constexpr int64_t byte_keys = 16;    // keys of a tile of bytes; two tiles are scored at a time
constexpr int64_t most_queries = 64;  // of a tile, for which keys are unpacked once

// ------------------------------------------------------------------------------------------ the best rows

// An order-preserving image of the score above the row's complement: of equal scores the smaller row is larger.
uint64_t ranked(float score, int64_t row) {
    const uint32_t bits = to_bits(score);
    const uint32_t ordered = (bits >> 31) != 0 ? ~bits : bits | 0x80000000U;
    return static_cast<uint64_t>(ordered) << 32 | static_cast<uint32_t>(~row);
}

float score_of(uint64_t rank) {
    const uint32_t ordered = static_cast<uint32_t>(rank >> 32);
    return from_bits((ordered >> 31) != 0 ? ordered & 0x7fffffffU : ~ordered);
}

uint64_t middle_of(uint64_t a, uint64_t b, uint64_t c) {
    if (a > b) return b > c ? b : a > c ? c : a;
    return a > c ? a : b > c ? c : b;
}

// The k-th largest, k >= 1, of distinct ranks, which are reordered.
uint64_t kth_largest(uint64_t* ranks, int64_t count, int64_t k) {
    int64_t first = 0, last = count - 1;
    while (first < last) {
        const uint64_t pivot = middle_of(ranks[first], ranks[(first + last) / 2], ranks[last]);
        int64_t i = first, j = last;
        while (i <= j) {
            while (ranks[i] > pivot) ++i;
            while (ranks[j] < pivot) --j;
            if (i > j) break;
            const uint64_t kept = ranks[i];
            ranks[i++] = ranks[j];
            ranks[j--] = kept;
        }
        if (k - 1 <= j) last = j;
        else if (k - 1 >= i) first = i;
        else break;
    }
    return ranks[k - 1];
}

// Candidates for the best k rows, ascending; once more than k were seen, only scores above the k-th count.
struct Best {
    uint64_t* ranks;   // [capacity(k)]
    uint64_t* sorted;  // [capacity(k)]
    int64_t k;
    int64_t count;
    float threshold;

    static int64_t capacity(int64_t k) { return 4 * k + 2 * chunk_keys; }

    // A later row that equals the k-th has lost to it; before there are k, the threshold is NaN and all pass.
    void add(const float* scores, int64_t scored, int64_t first_row) {
        int64_t i = 0;
#ifdef __AVX2__
        const __m256 limit = _mm256_set1_ps(threshold);
        for (; i + 8 <= scored; i += 8) {
            int32_t passed = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(scores + i), limit, _CMP_NLE_UQ));
            for (; passed != 0; passed &= passed - 1) {
                const int64_t place = i + __builtin_ctz(static_cast<uint32_t>(passed));
                ranks[count++] = ranked(scores[place], first_row + place);
            }
        }
#endif
        for (; i < scored; ++i) {
            if (!(scores[i] <= threshold)) ranks[count++] = ranked(scores[i], first_row + i);
        }
        if (count + chunk_keys > capacity(k)) shrink();
    }

    void shrink() {
        if (count <= k) return;
        __builtin_memcpy(sorted, ranks, static_cast<uint64_t>(count) * sizeof(uint64_t));
        const uint64_t worst = kth_largest(sorted, count, k);
        int64_t kept = 0;
        for (int64_t i = 0; i < count; ++i) {
            ranks[kept] = ranks[i];
            kept += ranks[i] >= worst ? 1 : 0;
        }
        count = kept;
        threshold = score_of(worst);
    }
};

void write_rows(const uint64_t* ranks, int64_t count, int64_t k, int32_t* out) {
    for (int64_t i = 0; i < k; ++i) out[i] = i < count ? static_cast<int32_t>(~static_cast<uint32_t>(ranks[i])) : -1;
}

// ------------------------------------------------------------------------------------------ float32

#ifdef __AVX2__

// Columns become rows: v[i] lane j <-> v[j] lane i.
inline __attribute__((always_inline)) void transpose(__m256* v) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        v[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}

// keys[c][lane ...] = rows[lane][c] for 8 rows of `stride` floats; keys of all channels lie float_keys apart.
void spread_keys(const float* rows, int64_t stride, float* keys) {
    for (int64_t c = 0; c < stride; c += 8) {
        __m256 v[8];
        for (int i = 0; i < 8; ++i) v[i] = _mm256_load_ps(rows + i * stride + c);
        transpose(v);
        for (int i = 0; i < 8; ++i) _mm256_store_ps(keys + (c + i) * float_keys, v[i]);
    }
}

// scores of float_keys keys = sum over heads of weight * relu(head . key).
template <int Heads>
void score_heads(const float* q, const float* weights, int64_t heads, int64_t dim, int64_t stride, const float* keys,
                 float* scores) {
    __m256 total[3] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int64_t head = 0; head < heads; head += Heads) {
        __m256 sums[Heads][3];
        for (auto& row : sums) {
            for (auto& sum : row) sum = _mm256_setzero_ps();
        }
        const float* const channels = q + head * stride;
        for (int64_t c = 0; c < dim; ++c) {
            const __m256 key[3] = {_mm256_load_ps(keys + c * float_keys), _mm256_load_ps(keys + c * float_keys + 8),
                                   _mm256_load_ps(keys + c * float_keys + 16)};
            for (int h = 0; h < Heads; ++h) {
                const __m256 channel = _mm256_broadcast_ss(channels + h * stride + c);
                for (int i = 0; i < 3; ++i) sums[h][i] = _mm256_fmadd_ps(channel, key[i], sums[h][i]);
            }
        }
        for (int h = 0; h < Heads; ++h) {
            const __m256 weight = _mm256_broadcast_ss(weights + head + h);
            for (int i = 0; i < 3; ++i) {
                total[i] = _mm256_fmadd_ps(_mm256_max_ps(sums[h][i], _mm256_setzero_ps()), weight, total[i]);
            }
        }
    }
    for (int i = 0; i < 3; ++i) _mm256_storeu_ps(scores + 8 * i, total[i]);
}

void score_floats(const float* q, const float* weights, int64_t heads, int64_t dim, int64_t stride, const float* keys,
                  float* scores) {
    if (heads <= 2) return score_heads<2>(q, weights, heads, dim, stride, keys, scores);
    score_heads<group>(q, weights, heads, dim, stride, keys, scores);
}

#else

void spread_keys(const float* rows, int64_t stride, float* keys) {
    for (int64_t i = 0; i < 8; ++i) {
        for (int64_t c = 0; c < stride; ++c) keys[c * float_keys + i] = rows[i * stride + c];
    }
}

void score_floats(const float* q, const float* weights, int64_t heads, int64_t dim, int64_t stride, const float* keys,
                  float* scores) {
    for (int64_t i = 0; i < float_keys; ++i) {
        float total = 0.0F;
        for (int64_t head = 0; head < heads; ++head) {
            float sum = 0.0F;
            for (int64_t c = 0; c < dim; ++c) sum += q[head * stride + c] * keys[c * float_keys + i];
            if (!(sum < 0.0F)) total += weights[head] * sum;
        }
        scores[i] = total;
    }
}

#endif

// ------------------------------------------------------------------------------------------ bytes

// 16 keys as bytes, twice their e2m1 value. Blocks of 32 channels one after another; in a block words of four
// channels (even ones of a group of 8, then the odd ones) of the first eight keys, then of the others.
struct ByteKeys {
    int8_t* words;       // [dim / 4][16 keys][4]
    int16_t* correction; // [dim / 32][16 keys][2]: -12 times the sum of the key's channels, for the query's offset
    float* scales;       // [dim / 32][16 keys]
};

// A query as unsigned bytes: twice its value in units of the block's scale, plus 12; channels in the keys' order.
struct ByteQuery {
    uint8_t* bytes;  // [heads][dim]
    float* scales;   // [heads][dim / 32], with the factors of two of query and key
};

// One block of 32 channels; false if some number is not among the whole numbers from -12 to 12 halves of a scale.
bool to_bytes(const float* x, uint8_t* bytes, float* scale) {
    float largest = 0.0F;
    for (int i = 0; i < 32; ++i) {
        const float size = __builtin_fabsf(x[i]);
        if (!(size <= largest)) largest = size;
    }
    const uint32_t exponent = to_bits(largest) >> 23;
    if (exponent < 8 && largest != 0.0F) return false;
    if (exponent > 250) return false;
    // The largest is 4 to 8 times 2^(exponent - 129); twice as much is to be whole.
    const float up = largest == 0.0F ? 0.0F : from_bits((257 - exponent) << 23);
    *scale = largest == 0.0F ? 0.0F : from_bits((exponent - 4) << 23);  // three halvings: units, query and key
    bool fits = true;
    for (int i = 0; i < 32; ++i) {
        const float doubled = x[i] * up;
        const int32_t whole = doubled >= -12.0F && doubled <= 12.0F ? static_cast<int32_t>(doubled) : 13;
        fits = fits && static_cast<float>(whole) == doubled;
        bytes[i / 8 * 8 + i % 2 * 4 + i % 8 / 2] = static_cast<uint8_t>(whole + 12);
    }
    return fits;
}

#ifdef __AVX2__

// Two blocks' scales of eight keys, `e8m0_value` of the bytes at `offset`.
void spread_scales(const uint8_t* const* rows, int64_t offset, int64_t half, float* scales) {
    int32_t codes[8];
    for (int i = 0; i < 8; ++i) {
        uint16_t both;
        __builtin_memcpy(&both, rows[i] + offset, 2);
        codes[i] = both;
    }
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    for (int block = 0; block < 2; ++block) {
        const __m256i code = block == 0 ? _mm256_and_si256(both, _mm256_set1_epi32(255)) : _mm256_srli_epi32(both, 8);
        __m256i bits = _mm256_slli_epi32(code, 23);
        const __m256i none = _mm256_cmpeq_epi32(code, _mm256_setzero_si256());
        bits = _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x00400000), none);
        const __m256i nan = _mm256_cmpeq_epi32(code, _mm256_set1_epi32(255));
        bits = _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7fc00000), nan);
        _mm256_store_si256(reinterpret_cast<__m256i*>(scales + block * byte_keys + half * 8), bits);
    }
}

// Eight keys of half a tile; those that do not exist are rows of zeros.
void spread_bytes(const uint8_t* const* rows, const RowLayout& layout, int64_t half, const ByteKeys& to) {
    const __m256i doubled = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
    const __m256i low = _mm256_set1_epi8(15), offset = _mm256_set1_epi8(12);
    for (int64_t c = 0; c < layout.coded; c += 64) {
        __m256 v[8];
        for (int i = 0; i < 8; ++i) v[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(rows[i] + c / 2));
        transpose(v);
        for (int block = 0; block < 2; ++block) {
            __m256i sum = _mm256_setzero_si256();
            for (int i = 0; i < 8; ++i) {
                const __m256i pairs = _mm256_castps_si256(v[block * 4 + i / 2]);
                const __m256i codes = _mm256_and_si256(i % 2 == 0 ? pairs : _mm256_srli_epi16(pairs, 4), low);
                const __m256i values = _mm256_shuffle_epi8(doubled, codes);
                int8_t* const words = to.words + ((c + block * 32) / 4 + i) * byte_keys * 4 + half * 32;
                _mm256_store_si256(reinterpret_cast<__m256i*>(words), values);
                sum = _mm256_sub_epi16(sum, _mm256_maddubs_epi16(offset, values));
            }
            int16_t* const correction = to.correction + (c / 32 + block) * byte_keys * 2 + half * 16;
            _mm256_store_si256(reinterpret_cast<__m256i*>(correction), sum);
        }
    }
    for (int64_t b = 0; b < layout.coded / 32; b += 2) {
        spread_scales(rows, layout.scale_offset + b, half, to.scales + b * byte_keys);
    }
}

#ifdef __AVX512VNNI__

// sums[h] += head h . key over a block of 32 channels, for two tiles of 16 keys.
template <int Heads>
inline __attribute__((always_inline)) void add_block(const ByteKeys& keys, int64_t block, const uint8_t* bytes,
                                                     int64_t dim, const float* scales, __m512 (*sums)[2]) {
    const int64_t blocks = dim / 32;
    const __m512i ones = _mm512_set1_epi16(1);
    __m512i dots[Heads][2];
    for (int t = 0; t < 2; ++t) {
        const int16_t* const correction = keys.correction + (t * blocks + block) * byte_keys * 2;
        const __m512i start = _mm512_madd_epi16(_mm512_load_si512(correction), ones);
        for (int h = 0; h < Heads; ++h) dots[h][t] = start;
    }
    for (int i = 0; i < 8; ++i) {
        const int8_t* const words = keys.words + (8 * block + i) * byte_keys * 4;
        const __m512i key[2] = {_mm512_load_si512(words), _mm512_load_si512(words + byte_keys * dim)};
        for (int h = 0; h < Heads; ++h) {
            int32_t word;
            __builtin_memcpy(&word, bytes + h * dim + 4 * i, 4);
            const __m512i four = _mm512_set1_epi32(word);
            for (int t = 0; t < 2; ++t) dots[h][t] = _mm512_dpbusd_epi32(dots[h][t], four, key[t]);
        }
    }
    for (int t = 0; t < 2; ++t) {
        const __m512 key_scale = _mm512_load_ps(keys.scales + (t * blocks + block) * byte_keys);
        for (int h = 0; h < Heads; ++h) {
            const __m512 scale = _mm512_mul_ps(key_scale, _mm512_set1_ps(scales[h * blocks]));
            sums[h][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[h][t]), scale, sums[h][t]);
        }
    }
}

// The scores of two tiles, `Heads` heads at a time; the same sums in the same order as with AVX2.
template <int Heads>
void score_bytes(const ByteQuery& query, const float* weights, int64_t heads, int64_t dim, const ByteKeys& keys,
                 float* scores) {
    const int64_t blocks = dim / 32;
    __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t head = 0; head < heads; head += Heads) {
        __m512 sums[Heads][2];
        for (auto& of_head : sums) of_head[0] = of_head[1] = _mm512_setzero_ps();
        for (int64_t b = 0; b < blocks; ++b) {
            const uint8_t* const bytes = query.bytes + head * dim + 32 * b;
            add_block<Heads>(keys, b, bytes, dim, query.scales + head * blocks + b, sums);
        }
        for (int h = 0; h < Heads; ++h) {
            const __m512 weight = _mm512_set1_ps(weights[head + h]);
            for (int t = 0; t < 2; ++t) {
                total[t] = _mm512_fmadd_ps(_mm512_max_ps(sums[h][t], _mm512_setzero_ps()), weight, total[t]);
            }
        }
    }
    for (int t = 0; t < 2; ++t) _mm512_storeu_ps(scores + byte_keys * t, total[t]);
}

void score_two_tiles(const ByteQuery& query, const float* weights, int64_t heads, int64_t dim, const ByteKeys& keys,
                     float* scores) {
    if (heads <= 2) return score_bytes<2>(query, weights, heads, dim, keys, scores);
    score_bytes<group>(query, weights, heads, dim, keys, scores);
}

#else

// Adds the products of four channels of one head with those of sixteen keys, by pairs; in this order, since the compiler
// would multiply for all heads before it adds, and run out of registers.
inline void add_word(const uint8_t* word, __m256i first, __m256i second, __m256i& first_dots, __m256i& second_dots) {
    __m256i four, product;
    __asm__("vpbroadcastd %6, %2\n\t"
            "vpmaddubsw %4, %2, %3\n\t"
            "vpaddw %3, %0, %0\n\t"
            "vpmaddubsw %5, %2, %2\n\t"
            "vpaddw %2, %1, %1"
            : "+x"(first_dots), "+x"(second_dots), "=&x"(four), "=&x"(product)
            : "x"(first), "x"(second), "m"(*reinterpret_cast<const uint8_t(*)[4]>(word)));
}

// sums[h] += head h . key over a block of 32 channels, for `Tiles` tiles of 16 keys, from the block's first channel in
// the first of them on. No sum leaves 16 bits: 24 * 12 * 2 * 8 < 2^15. A function of its own, as it was measured.
template <int Heads, int Tiles>
__attribute__((noinline)) void add_block(const ByteKeys& keys, int64_t block, const uint8_t* bytes, int64_t dim,
                                         const float* scales, __m256* sums) {
    const int64_t blocks = dim / 32;
    const __m256i* const words = reinterpret_cast<const __m256i*>(keys.words) + 16 * block;
    const __m256i* const start = reinterpret_cast<const __m256i*>(keys.correction) + 2 * block;
    const int64_t next_words = dim / 2, next_start = 2 * blocks;
    __m256i dots[Heads][2 * Tiles];
#pragma GCC unroll 4
    for (auto& of_head : dots) {
#pragma GCC unroll 4
        for (int v = 0; v < 2 * Tiles; ++v) of_head[v] = start[v / 2 * next_start + v % 2];
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
#pragma GCC unroll 2
        for (int tile = 0; tile < Tiles; ++tile) {
            const __m256i first = words[tile * next_words + 2 * i], second = words[tile * next_words + 2 * i + 1];
#pragma GCC unroll 4
            for (int h = 0; h < Heads; ++h) {
                add_word(bytes + h * dim + 4 * i, first, second, dots[h][2 * tile], dots[h][2 * tile + 1]);
            }
        }
    }
    const __m256i ones = _mm256_set1_epi16(1);
    const float* const key_scales = keys.scales + byte_keys * block;
#pragma GCC unroll 4
    for (int v = 0; v < 2 * Tiles; ++v) {
        const __m256 key_scale = _mm256_load_ps(key_scales + v / 2 * byte_keys * blocks + v % 2 * 8);
#pragma GCC unroll 4
        for (int h = 0; h < Heads; ++h) {
            const __m256 scale = _mm256_mul_ps(key_scale, _mm256_broadcast_ss(scales + h * blocks));
            const __m256 exact = _mm256_cvtepi32_ps(_mm256_madd_epi16(dots[h][v], ones));
            __m256& sum = sums[2 * Tiles * h + v];
            sum = _mm256_fmadd_ps(exact, scale, sum);
        }
    }
}

// The scores of `Tiles` tiles of 16 keys, which lie behind one another.
template <int Heads, int Tiles>
void score_bytes(const ByteQuery& query, const float* weights, int64_t heads, int64_t dim, const ByteKeys& keys,
                 float* scores) {
    constexpr int kVectors = 2 * Tiles;
    const int64_t blocks = dim / 32;
    __m256 total[kVectors];
    for (auto& of_keys : total) of_keys = _mm256_setzero_ps();
    for (int64_t head = 0; head < heads; head += Heads) {
        __m256 sums[Heads * kVectors];
        for (auto& sum : sums) sum = _mm256_setzero_ps();
        for (int64_t b = 0; b < blocks; ++b) {
            const uint8_t* const bytes = query.bytes + head * dim + 32 * b;
            add_block<Heads, Tiles>(keys, b, bytes, dim, query.scales + head * blocks + b, sums);
        }
        for (int h = 0; h < Heads; ++h) {
            const __m256 weight = _mm256_broadcast_ss(weights + head + h);
            for (int v = 0; v < kVectors; ++v) {
                const __m256 positive = _mm256_max_ps(sums[kVectors * h + v], _mm256_setzero_ps());
                total[v] = _mm256_fmadd_ps(positive, weight, total[v]);
            }
        }
    }
    for (int v = 0; v < kVectors; ++v) _mm256_storeu_ps(scores + 8 * v, total[v]);
}

// The scores of two tiles.
void score_two_tiles(const ByteQuery& query, const float* weights, int64_t heads, int64_t dim, const ByteKeys& keys,
                     float* scores) {
    if (heads <= 2) return score_bytes<2, 2>(query, weights, heads, dim, keys, scores);
    score_bytes<group, 1>(query, weights, heads, dim, keys, scores);
    const ByteKeys second{keys.words + byte_keys * dim, keys.correction + byte_keys * dim / 16,
                          keys.scales + byte_keys * (dim / 32)};
    score_bytes<group, 1>(query, weights, heads, dim, second, scores + byte_keys);
}

#endif

bool has_byte_keys(const RowLayout& layout) {
    return layout.code_bits == 4 && layout.block == 32 && layout.coded % 64 == 0 && layout.plain == 0 &&
           layout.scale_bytes == 1;
}

#else

// Bytes gain nothing without vectors: float32 is as exact, save for the order of a sum.
void spread_bytes(const uint8_t* const*, const RowLayout&, int64_t, const ByteKeys&) {}
void score_two_tiles(const ByteQuery&, const float*, int64_t, int64_t, const ByteKeys&, float*) {}
bool has_byte_keys(const RowLayout&) { return false; }

#endif

// ------------------------------------------------------------------------------------------ a tile of queries

// Tasks are tiles of queries times parts of the keys; there are parts only where there are fewer queries than threads.
struct Call {
    const float* q;
    const float* weights;
    const uint8_t* keys;
    RowLayout layout;
    const int64_t* visible;
    int32_t* out;
    int64_t n, heads, dim, k;
    float factor;
    int64_t tile, parts;
    uint64_t* part_ranks;  // [n][parts][k], for more than one part
    int64_t* part_counts;  // [n][parts]

    // Unpacking a key costs what the scores of five heads do, or of more; few heads share it among more queries.
    static int64_t most_queries_of(int64_t heads) { return heads <= 8 ? most_queries : most_queries / 4; }

    int64_t padded_heads() const { return round_up(heads, group); }
    int64_t stride() const { return round_up(dim, 8); }
    int64_t key_bytes() const { return chunk_keys * dim; }
};

#ifdef __AMX_INT8__

// A tile of queries as matrices. What does not fit that is left to the other ways: a query or a chunk of keys.
class Matrices {
public:
    static int64_t bytes(const Call& c) {
        if (!fits(c)) return 0;
        const int64_t heads = round_up(c.tile * c.heads, tile_side);
        return Scratch::bytes_of<int8_t>(heads * folded_dim) + Scratch::bytes_of<float>(heads) +
               Scratch::bytes_of<int8_t>(chunk_keys * folded_dim) + Scratch::bytes_of<float>(chunk_keys) +
               Scratch::bytes_of<float>(c.tile * chunk_keys);
    }

    Matrices(Scratch& scratch, const Call& c) : call_(c), fits_(fits(c)) {
        if (!fits_) return;
        const int64_t heads = round_up(c.tile * c.heads, tile_side);
        queries_ = {scratch.take<int8_t>(heads * folded_dim), scratch.take<float>(heads)};
        keys_ = {scratch.take<int8_t>(chunk_keys * folded_dim), scratch.take<float>(chunk_keys)};
        scores_ = scratch.take<float>(c.tile * chunk_keys);
    }

    // Query i of the tile, of which `to_bytes` made `from`.
    void begin(int64_t i, const ByteQuery& from, bool exact, const float* weights) {
        if (!fits_) return;
        has_[i] = exact;
        for (int64_t h = 0; has_[i] && h < call_.heads; ++h) {
            const int64_t row = i * call_.heads + h;
            has_[i] = fold_head(from.bytes + h * folded_dim, from.scales + h * (folded_dim / 32), weights[h],
                                queries_.bytes + row * folded_dim, queries_.weights + row);
        }
    }

    // Scores a chunk of `num_keys` keys for the first `count` queries.
    void score(const uint8_t* rows, int64_t num_keys, int64_t count) {
        scored_ = fits_;
        for (int64_t key = 0; scored_ && key < num_keys; key += tile_side) {
            const int64_t rest = num_keys - key < tile_side ? num_keys - key : tile_side;
            const uint8_t* packed[tile_side];
            for (int64_t j = 0; j < tile_side; ++j) {
                packed[j] = rows + (key + (j < rest ? j : 0)) * call_.layout.row_bytes;
            }
            scored_ = fold_keys(packed, call_.layout, rest, {keys_.words + key * folded_dim, keys_.scales + key});
        }
        if (!scored_) return;
        score_folded(queries_, count * call_.heads, call_.heads, keys_, num_keys, scores_, chunk_keys);
    }

    // The scores of query i, the keys' scales applied; null where another way has to find them.
    const float* scores_of(int64_t i, int64_t num_keys) const {
        if (!scored_ || !has_[i]) return nullptr;
        float* const scores = scores_ + i * chunk_keys;
        for (int64_t key = 0; key < num_keys; key += tile_side) {
            const __m512 scale = _mm512_load_ps(keys_.scales + key);
            _mm512_store_ps(scores + key, _mm512_mul_ps(_mm512_load_ps(scores + key), scale));
        }
        return scores;
    }

private:
    static bool fits(const Call& c) { return has_byte_keys(c.layout) && c.dim == folded_dim; }

    const Call& call_;
    bool fits_, scored_ = false;
    bool has_[most_queries] = {};
    FoldedQuery queries_ = {};
    FoldedKeys keys_ = {};
    float* scores_ = nullptr;
    Tiles tiles_{{whole_tile, whole_tile, whole_tile, whole_tile, whole_tile, whole_tile, whole_tile, whole_tile}};
};

#else

struct Matrices {
    static int64_t bytes(const Call&) { return 0; }
    Matrices(Scratch&, const Call&) {}
    void begin(int64_t, const ByteQuery&, bool, const float*) {}
    void score(const uint8_t*, int64_t, int64_t) {}
    const float* scores_of(int64_t, int64_t) const { return nullptr; }
};

#endif

struct Worker {
    const Call& call;
    float* float_keys_of_chunk;
    float* rows;
    float* q;
    float* weights;
    ByteKeys byte_keys_of_chunk;
    ByteQuery byte_query;
    uint8_t* no_key;
    uint64_t *ranks, *sorted;
    float* scores;
    Matrices matrices;
    Best best[most_queries] = {};
    bool exact[most_queries] = {};  // on the bytes' grid

    static int64_t bytes(const Call& c) {
        const int64_t heads = c.tile * c.padded_heads();
        return Scratch::bytes_of<float>(chunk_keys * c.stride()) + Scratch::bytes_of<float>(8 * c.stride()) +
               Scratch::bytes_of<float>(heads * c.stride()) + Scratch::bytes_of<float>(heads) +
               Scratch::bytes_of<int8_t>(c.key_bytes()) + Scratch::bytes_of<int16_t>(c.key_bytes() / 16) +
               Scratch::bytes_of<float>(c.key_bytes() / 32) + Scratch::bytes_of<uint8_t>(heads * c.dim) +
               Scratch::bytes_of<float>(heads * c.dim / 32) + Scratch::bytes_of<uint8_t>(c.layout.row_bytes) +
               Scratch::bytes_of<uint64_t>(c.tile * Best::capacity(c.k)) +
               Scratch::bytes_of<uint64_t>(Best::capacity(c.k)) + Scratch::bytes_of<float>(chunk_keys) +
               Matrices::bytes(c);
    }

    Worker(Scratch& scratch, const Call& c)
        : call(c),
          float_keys_of_chunk(scratch.take<float>(chunk_keys * c.stride())),
          rows(scratch.take<float>(8 * c.stride())),
          q(scratch.take<float>(c.tile * c.padded_heads() * c.stride())),
          weights(scratch.take<float>(c.tile * c.padded_heads())),
          byte_keys_of_chunk{scratch.take<int8_t>(c.key_bytes()), scratch.take<int16_t>(c.key_bytes() / 16),
                             scratch.take<float>(c.key_bytes() / 32)},
          byte_query{scratch.take<uint8_t>(c.tile * c.padded_heads() * c.dim),
                     scratch.take<float>(c.tile * c.padded_heads() * c.dim / 32)},
          no_key(scratch.take<uint8_t>(c.layout.row_bytes)),
          ranks(scratch.take<uint64_t>(c.tile * Best::capacity(c.k))),
          sorted(scratch.take<uint64_t>(Best::capacity(c.k))),
          scores(scratch.take<float>(chunk_keys)),
          matrices(scratch, c) {}

    ByteQuery byte_query_of(int64_t i) const {
        const int64_t head = i * call.padded_heads();
        return {byte_query.bytes + head * call.dim, byte_query.scales + head * (call.dim / 32)};
    }

    ByteKeys byte_keys_from(int64_t key) const {
        return {byte_keys_of_chunk.words + key * call.dim, byte_keys_of_chunk.correction + key * call.dim / 16,
                byte_keys_of_chunk.scales + key * (call.dim / 32)};
    }

    void run(int64_t task) {
        const int64_t first = task / call.parts * call.tile, part = task % call.parts;
        const int64_t count = call.n - first < call.tile ? call.n - first : call.tile;
        int64_t last_key = 0;
        for (int64_t i = 0; i < count; ++i) {
            begin(i, first + i);
            if (call.visible[first + i] > last_key) last_key = call.visible[first + i];
        }
        const int64_t chunks = (last_key + chunk_keys - 1) / chunk_keys;
        for (int64_t chunk = chunks * part / call.parts; chunk < chunks * (part + 1) / call.parts; ++chunk) {
            score_chunk(chunk * chunk_keys, last_key, first, count);
        }
        for (int64_t i = 0; i < count; ++i) finish(i, first + i, part);
    }

    // Everything that is visible is selected: no scores are needed.
    bool takes_all(int64_t row) const { return call.visible[row] <= call.k; }

    void begin(int64_t i, int64_t row) {
        best[i] = {ranks + i * Best::capacity(call.k), sorted, call.k, 0, __builtin_nanf("")};
        const int64_t heads = call.padded_heads(), blocks = call.dim / 32;
        const float* const from = call.q + row * call.heads * call.dim;
        for (int64_t h = 0; h < heads; ++h) {  // heads that fill the last group keep a weight and channels of zero
            weights[i * heads + h] = h < call.heads ? call.weights[row * call.heads + h] * call.factor : 0.0F;
        }
        exact[i] = has_byte_keys(call.layout);
        const ByteQuery to = byte_query_of(i);
        for (int64_t b = 0; exact[i] && b < call.heads * blocks; ++b) {
            exact[i] = to_bytes(from + b * 32, to.bytes + b * 32, to.scales + b);
        }
        matrices.begin(i, to, exact[i], weights + i * heads);
        if (exact[i]) return;
        for (int64_t h = 0; h < call.heads; ++h) {
            float* const head = q + (i * heads + h) * call.stride();
            __builtin_memcpy(head, from + h * call.dim, static_cast<uint64_t>(call.dim) * 4);
        }
    }

    void score_chunk(int64_t first_key, int64_t last_key, int64_t first, int64_t count) {
        bool unpacked[2] = {false, false}, as_matrices = false;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t rest = call.visible[first + i] - first_key;
            if (takes_all(first + i) || rest <= 0) continue;
            const int64_t seen = rest < chunk_keys ? rest : chunk_keys;
            if (!as_matrices) {
                const int64_t num_keys = last_key - first_key < chunk_keys ? last_key - first_key : chunk_keys;
                matrices.score(call.keys + first_key * call.layout.row_bytes, num_keys, count);
                as_matrices = true;
            }
            if (const float* const found = matrices.scores_of(i, seen)) {
                best[i].add(found, seen, first_key);
                continue;
            }
            if (!unpacked[exact[i]]) unpack(first_key, last_key, exact[i]);
            unpacked[exact[i]] = true;
            if (exact[i]) score_as_bytes(i, seen);
            else score_as_floats(i, seen);
            best[i].add(scores, seen, first_key);
        }
    }

    void score_as_bytes(int64_t i, int64_t seen) {
        const float* const of_heads = weights + i * call.padded_heads();
        for (int64_t key = 0; key < seen; key += 2 * byte_keys) {
            score_two_tiles(byte_query_of(i), of_heads, call.heads, call.dim, byte_keys_from(key), scores + key);
        }
    }

    void score_as_floats(int64_t i, int64_t seen) {
        const int64_t heads = call.padded_heads();
        for (int64_t key = 0; key < seen; key += float_keys) {
            score_floats(q + i * heads * call.stride(), weights + i * heads, call.heads, call.dim, call.stride(),
                         float_keys_of_chunk + key * call.stride(), scores + key);
        }
    }

    void unpack(int64_t first_key, int64_t last_key, bool as_bytes) {
        const int64_t count = last_key - first_key < chunk_keys ? last_key - first_key : chunk_keys;
        const int64_t unit = as_bytes ? 2 * byte_keys : float_keys;
        const int64_t row_bytes = call.layout.row_bytes;
        for (int64_t i = 0; i < round_up(count, unit); i += 8) {
            const int64_t ahead = first_key + i + 2 * chunk_keys;
            if (ahead < last_key) ask_for(call.keys + ahead * row_bytes, 8 * row_bytes, call.keys + last_key * row_bytes);
            const uint8_t* packed[8];
            for (int64_t j = 0; j < 8; ++j) {
                packed[j] = i + j < count ? call.keys + (first_key + i + j) * call.layout.row_bytes : no_key;
            }
            if (as_bytes) {
                spread_bytes(packed, call.layout, i % byte_keys / 8, byte_keys_from(i / byte_keys * byte_keys));
                continue;
            }
            for (int64_t j = 0; j < 8; ++j) decode_row(packed[j], call.layout, rows + j * call.stride());
            const int64_t tile = i / float_keys * float_keys;
            spread_keys(rows, call.stride(), float_keys_of_chunk + tile * call.stride() + i % float_keys);
        }
    }

    void finish(int64_t i, int64_t row, int64_t part) {
        int32_t* const out = call.out + row * call.k;
        if (takes_all(row)) {
            for (int64_t c = 0; c < call.k; ++c) out[c] = c < call.visible[row] ? static_cast<int32_t>(c) : -1;
            return;
        }
        best[i].shrink();
        if (call.parts == 1) {
            write_rows(best[i].ranks, best[i].count, call.k, out);
            return;
        }
        const int64_t slot = row * call.parts + part;
        call.part_counts[slot] = best[i].count;
        __builtin_memcpy(call.part_ranks + slot * call.k, best[i].ranks, static_cast<uint64_t>(best[i].count) * 8);
    }
};

// The best of what the parts of the keys found; they come in order of their rows.
void merge_parts(const Call& call, int64_t row) {
    const int64_t most = call.parts * call.k;
    Scratch scratch(2 * Scratch::bytes_of<uint64_t>(most));
    Best best{scratch.take<uint64_t>(most), scratch.take<uint64_t>(most), call.k, 0, 0.0F};
    for (int64_t slot = row * call.parts; slot < (row + 1) * call.parts; ++slot) {
        const uint64_t bytes = static_cast<uint64_t>(call.part_counts[slot]) * 8;
        __builtin_memcpy(best.ranks + best.count, call.part_ranks + slot * call.k, bytes);
        best.count += call.part_counts[slot];
    }
    best.shrink();
    write_rows(best.ranks, best.count, call.k, call.out + row * call.k);
}

}  // namespace

void select_rows(const float* q, const float* weights, const uint8_t* keys, const RowLayout* layout,
                 const int64_t* visible, int32_t* out, int64_t n, int64_t heads, int64_t dim, int64_t k, float factor,
                 int32_t threads) {
    if (n == 0 || k == 0) return;
    int64_t scored = 0;
    for (int64_t row = 0; row < n; ++row) scored += visible[row] > k ? visible[row] : 0;
    if (scored * heads * dim < 1 << 18) threads = 1;  // some 5 us: not worth a fork
    const int64_t even = (n + 4 * threads - 1) / (4 * threads), parts = n < threads ? threads : 1;
    const int64_t most = Call::most_queries_of(heads);
    Call call{q, weights, keys, *layout, visible, out, n, heads, dim, k, factor, even < most ? even : most, parts,
              nullptr, nullptr};
    const int64_t slots = parts == 1 ? 0 : n * parts;
    Scratch shared(Scratch::bytes_of<uint64_t>(slots * k) + Scratch::bytes_of<int64_t>(slots));
    call.part_ranks = shared.take<uint64_t>(slots * k);
    call.part_counts = shared.take<int64_t>(slots);
    share_tasks((n + call.tile - 1) / call.tile * parts, threads, [&call](const auto& next) {
        Scratch scratch(Worker::bytes(call));
        Worker worker(scratch, call);
        for (int64_t task = next(); task >= 0; task = next()) worker.run(task);
    });
    for (int64_t row = 0; row < n && parts > 1; ++row) {
        if (visible[row] > k) merge_parts(call, row);
    }
}

}  // namespace tenfold::TENFOLD_ISA
