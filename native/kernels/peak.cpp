// What this machine reaches at best: the limits that the other kernels are measured against.
#include "../threads.hpp"
#include "amx.hpp"
#include "kernels.hpp"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int64_t kMany = 1 << 20;  // large enough for split_rows to use all threads
constexpr int kChains = 12;         // independent sums, enough to hide the latency of one
[[maybe_unused]] constexpr int kSumChains = 6;  // the same where additions of whole numbers take a cycle

#ifdef __AVX2__

// A checksum, so that no load can be left out.
int64_t read_range(const uint8_t* data, int64_t begin, int64_t end) {
    __m256i sums[4] = {};
    int64_t at = begin;
    for (; at + 128 <= end; at += 128) {
        for (int i = 0; i < 4; ++i) {
            sums[i] = _mm256_xor_si256(sums[i], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + at + 32 * i)));
        }
        _mm_prefetch(reinterpret_cast<const char*>(data + at + 4096), _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(data + at + 4160), _MM_HINT_T1);
    }
    const __m256i all = _mm256_xor_si256(_mm256_xor_si256(sums[0], sums[1]), _mm256_xor_si256(sums[2], sums[3]));
    int64_t lanes[4];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), all);
    int64_t sum = lanes[0] ^ lanes[1] ^ lanes[2] ^ lanes[3];
    for (; at < end; ++at) sum ^= data[at];
    return sum;
}

#ifdef __AVX512F__

int64_t multiply_float32(int64_t rounds, const float* seed) {
    __m512 sums[kChains];
    for (int i = 0; i < kChains; ++i) sums[i] = _mm512_set1_ps(seed[0]);
    const __m512 factor = _mm512_set1_ps(seed[1]), term = _mm512_set1_ps(seed[2]);
    for (int64_t round = 0; round < rounds; ++round) {
        for (int i = 0; i < kChains; ++i) sums[i] = _mm512_fmadd_ps(sums[i], factor, term);
    }
    for (int i = 1; i < kChains; ++i) sums[0] = _mm512_add_ps(sums[0], sums[i]);
    return static_cast<int64_t>(_mm512_cvtss_f32(sums[0]));
}

constexpr int64_t kFloatsPerRound = kChains * 16;

#else

int64_t multiply_float32(int64_t rounds, const float* seed) {
    __m256 sums[kChains];
    for (int i = 0; i < kChains; ++i) sums[i] = _mm256_set1_ps(seed[0]);
    const __m256 factor = _mm256_set1_ps(seed[1]), term = _mm256_set1_ps(seed[2]);
    for (int64_t round = 0; round < rounds; ++round) {
        for (int i = 0; i < kChains; ++i) sums[i] = _mm256_fmadd_ps(sums[i], factor, term);
    }
    for (int i = 1; i < kChains; ++i) sums[0] = _mm256_add_ps(sums[0], sums[i]);
    return static_cast<int64_t>(_mm256_cvtss_f32(sums[0]));
}

constexpr int64_t kFloatsPerRound = kChains * 8;

#endif

// Products of bytes, summed as the index and the int8 products do: in tiles, by vpdpbusd, or in pairs to 16 bits.
#ifdef __AMX_INT8__

int64_t multiply_int8(int64_t rounds, const int8_t* seed) {
    constexpr TileShape whole = {16, 64};
    alignas(64) int8_t bytes[2][1024];
    alignas(64) int32_t sums[256];
    for (int i = 0; i < 1024; ++i) {
        bytes[0][i] = seed[1];
        bytes[1][i] = seed[2];
        sums[i / 4] = seed[0];
    }
    settle_memory();
    const Tiles tiles({whole, whole, whole, whole, whole, whole, whole, whole});
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums, 64);
    _tile_loadd(2, sums, 64);
    _tile_loadd(3, sums, 64);
    _tile_loadd(4, bytes[0], 64);
    _tile_loadd(5, bytes[1], 64);
    for (int64_t round = 0; round < rounds; ++round) {
        _tile_dpbssd(0, 4, 5);
        _tile_dpbssd(1, 4, 5);
        _tile_dpbssd(2, 4, 5);
        _tile_dpbssd(3, 4, 5);
    }
    _tile_stored(0, sums, 64);
    settle_memory();
    return sums[0];
}

constexpr int64_t kBytesPerRound = 4 * 16 * 16 * 64;

#elif defined(__AVX512VNNI__)

int64_t multiply_int8(int64_t rounds, const int8_t* seed) {
    __m512i sums[kChains];
    for (int i = 0; i < kChains; ++i) sums[i] = _mm512_set1_epi32(seed[0]);
    const __m512i weights = _mm512_set1_epi8(seed[1]), values = _mm512_set1_epi8(seed[2]);
    for (int64_t round = 0; round < rounds; ++round) {
        for (int i = 0; i < kChains; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], weights, values);
    }
    for (int i = 1; i < kChains; ++i) sums[0] = _mm512_add_epi32(sums[0], sums[i]);
    return _mm512_cvtsi512_si32(sums[0]);
}

constexpr int64_t kBytesPerRound = kChains * 64;

#else

int64_t multiply_int8(int64_t rounds, const int8_t* seed) {
    __m256i sums[kSumChains];
#pragma GCC unroll 6
    for (int i = 0; i < kSumChains; ++i) sums[i] = _mm256_set1_epi16(seed[0]);
    __m256i weights = _mm256_set1_epi8(seed[1]);
    const __m256i values = _mm256_set1_epi8(seed[2]);
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 6
        for (int i = 0; i < kSumChains; ++i) {
            __asm__ volatile("" : "+x"(weights));  // else the product would be computed once
            sums[i] = _mm256_add_epi16(sums[i], _mm256_maddubs_epi16(weights, values));
        }
    }
#pragma GCC unroll 6
    for (int i = 1; i < kSumChains; ++i) sums[0] = _mm256_add_epi16(sums[0], sums[i]);
    return _mm256_extract_epi16(sums[0], 0);
}

constexpr int64_t kBytesPerRound = kSumChains * 32;

#endif

// Products of numbers of 16 bits, summed by twos as the FP8 products do: by vpdpwssd, or vpmaddwd and an addition.
#ifdef __AVX512VNNI__

int64_t multiply_int16(int64_t rounds, const int16_t* seed) {
    __m512i sums[kChains];
    for (int i = 0; i < kChains; ++i) sums[i] = _mm512_set1_epi32(seed[0]);
    const __m512i weights = _mm512_set1_epi16(seed[1]), values = _mm512_set1_epi16(seed[2]);
    for (int64_t round = 0; round < rounds; ++round) {
        for (int i = 0; i < kChains; ++i) sums[i] = _mm512_dpwssd_epi32(sums[i], weights, values);
    }
    for (int i = 1; i < kChains; ++i) sums[0] = _mm512_add_epi32(sums[0], sums[i]);
    return _mm512_cvtsi512_si32(sums[0]);
}

constexpr int64_t kWordsPerRound = kChains * 32;

#else

int64_t multiply_int16(int64_t rounds, const int16_t* seed) {
    __m256i sums[kSumChains];
#pragma GCC unroll 6
    for (int i = 0; i < kSumChains; ++i) sums[i] = _mm256_set1_epi32(seed[0]);
    __m256i weights = _mm256_set1_epi16(seed[1]);
    const __m256i values = _mm256_set1_epi16(seed[2]);
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 6
        for (int i = 0; i < kSumChains; ++i) {
            __asm__ volatile("" : "+x"(weights));  // else the product would be computed once
            sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(weights, values));
        }
    }
#pragma GCC unroll 6
    for (int i = 1; i < kSumChains; ++i) sums[0] = _mm256_add_epi32(sums[0], sums[i]);
    return _mm_cvtsi128_si32(_mm256_castsi256_si128(sums[0]));
}

constexpr int64_t kWordsPerRound = kSumChains * 16;

#endif

#else

int64_t read_range(const uint8_t* data, int64_t begin, int64_t end) {
    int64_t sum = 0, at = begin;
    for (; at + 8 <= end; at += 8) {
        int64_t word;
        __builtin_memcpy(&word, data + at, sizeof(word));
        sum ^= word;
    }
    for (; at < end; ++at) sum ^= data[at];
    return sum;
}

int64_t multiply_float32(int64_t rounds, const float* seed) {
    float sums[kChains];
    for (int i = 0; i < kChains; ++i) sums[i] = seed[0];
    for (int64_t round = 0; round < rounds; ++round) {
        for (int i = 0; i < kChains; ++i) sums[i] = sums[i] * seed[1] + seed[2];
    }
    for (int i = 1; i < kChains; ++i) sums[0] += sums[i];
    return static_cast<int64_t>(sums[0]);
}

template <class Number>
int64_t multiply_whole(int64_t rounds, const Number* seed) {
    int32_t sums[kChains];
    for (int i = 0; i < kChains; ++i) sums[i] = seed[0];
    for (int64_t round = 0; round < rounds; ++round) {
        for (int i = 0; i < kChains; ++i) {
            sums[i] += seed[1] * static_cast<int8_t>(seed[2] ^ sums[i]);
            __asm__ volatile("" : "+r"(sums[i]));  // else what many rounds make of it would be computed at once
        }
    }
    for (int i = 1; i < kChains; ++i) sums[0] += sums[i];
    return sums[0];
}

int64_t multiply_int8(int64_t rounds, const int8_t* seed) { return multiply_whole(rounds, seed); }
int64_t multiply_int16(int64_t rounds, const int16_t* seed) { return multiply_whole(rounds, seed); }

constexpr int64_t kFloatsPerRound = kChains, kBytesPerRound = kChains, kWordsPerRound = kChains;

#endif

// Every thread multiplies; a multiply-add is two operations.
template <class Number>
void count(int64_t rounds, const Number* seed, int64_t (*multiply)(int64_t, const Number*), int64_t each,
           int64_t* operations, int32_t threads) {
    *operations = 0;
    split_rows(threads, kMany, threads, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t kept = multiply(rounds, seed) == 1 ? 1 : 0;  // used, so that it is computed
            __atomic_fetch_add(operations, 2 * each * rounds + kept, __ATOMIC_RELAXED);
        }
    });
}

}  // namespace

void peak_read(const uint8_t* data, int64_t bytes, int64_t* sum, int32_t threads) {
    *sum = 0;
    split_rows(bytes, kMany, threads, [=](int64_t begin, int64_t end) {
        const int64_t part = read_range(data, begin, end);
        __atomic_fetch_xor(sum, part, __ATOMIC_RELAXED);
    });
}

void peak_float32(int64_t rounds, const float* seed, int64_t* operations, int32_t threads) {
    count(rounds, seed, multiply_float32, kFloatsPerRound, operations, threads);
}

void peak_int8(int64_t rounds, const int8_t* seed, int64_t* operations, int32_t threads) {
    count(rounds, seed, multiply_int8, kBytesPerRound, operations, threads);
}

void peak_int16(int64_t rounds, const int16_t* seed, int64_t* operations, int32_t threads) {
    count(rounds, seed, multiply_int16, kWordsPerRound, operations, threads);
}

}  // namespace tenfold::TENFOLD_ISA
