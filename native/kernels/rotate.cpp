// Rotations of channels: RoPE and the Hadamard transform.
#include "../threads.hpp"
#include "kernels.hpp"
#include "row_parts.hpp"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace tenfold::TENFOLD_ISA {
namespace {

#ifdef __AVX2__

// Sums and differences of elements 1, 2 and 4 apart, for every eight.
int64_t transform_eights(float* x, int64_t width) {
    if (width < 8) return 1;
    const __m256 odd = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), second = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
    const __m256 high = _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);
    for (int64_t i = 0; i < width; i += 8) {
        __m256 v = _mm256_loadu_ps(x + i);
        v = _mm256_fmadd_ps(v, odd, _mm256_permute_ps(v, 0xb1));
        v = _mm256_fmadd_ps(v, second, _mm256_permute_ps(v, 0x4e));
        v = _mm256_fmadd_ps(v, high, _mm256_permute2f128_ps(v, v, 0x01));
        _mm256_storeu_ps(x + i, v);
    }
    return 8;
}

#else

int64_t transform_eights(float*, int64_t) { return 1; }

#endif

}  // namespace

void turn(int64_t position, const float* frequencies, int64_t pairs, float sign, float* cos, float* sin) {
    const float p = static_cast<float>(position);
    for (int64_t i = 0; i < pairs; ++i) {
        const float angle = p * frequencies[i];
        cos[i] = __builtin_cosf(angle);
        sin[i] = sign * __builtin_sinf(angle);
    }
}

void rotate_row(const float* x, const float* cos, const float* sin, int64_t pairs, bool interleaved, float* out) {
    // Pairs lie `step` apart and start `next` apart.
    const int64_t next = interleaved ? 2 : 1, step = interleaved ? 1 : pairs;
    int64_t i = 0;
#ifdef __AVX2__
    for (; interleaved && i + 4 <= pairs; i += 4) {
        const __m256 v = _mm256_loadu_ps(x + 2 * i);
        const __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
        const __m256 c = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(cos + i)), twice);
        const __m256 s = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(sin + i)), twice);
        const __m256 crossed = _mm256_mul_ps(_mm256_permute_ps(v, 0xb1), s);
        _mm256_storeu_ps(out + 2 * i, _mm256_addsub_ps(_mm256_mul_ps(v, c), crossed));
    }
#endif
    for (; i < pairs; ++i) {
        const float a = x[i * next], b = x[i * next + step];
        out[i * next] = a * cos[i] - b * sin[i];
        out[i * next + step] = a * sin[i] + b * cos[i];
    }
}

// By sums and differences of elements ever further apart.
void spread_row(float* x, int64_t width) {
    const float factor = 1.0F / __builtin_sqrtf(static_cast<float>(width));
    for (int64_t half = transform_eights(x, width); half < width; half *= 2) {
        for (int64_t first = 0; first < width; first += 2 * half) {
            float* const low = x + first;
            float* const high = low + half;
            for (int64_t i = 0; i < half; ++i) {
                const float a = low[i], b = high[i];
                low[i] = a + b;
                high[i] = a - b;
            }
        }
    }
    for (int64_t i = 0; i < width; ++i) x[i] *= factor;
}

void rope(const float* x, const int64_t* positions, const float* frequencies, float* out, int64_t n, int64_t rows,
          int64_t pairs, int64_t token_stride, int64_t row_stride, int32_t inverse, int32_t interleaved,
          int32_t threads) {
    split_rows(n, n * rows * pairs * 2, threads, [=](int64_t first, int64_t last) {
        for (int64_t token = first; token < last; ++token) {
            float cos[most_pairs], sin[most_pairs];
            turn(positions[token], frequencies, pairs, inverse != 0 ? -1.0F : 1.0F, cos, sin);
            for (int64_t row = 0; row < rows; ++row) {
                const float* const from = x + token * token_stride + row * row_stride;
                rotate_row(from, cos, sin, pairs, interleaved != 0, out + (token * rows + row) * 2 * pairs);
            }
        }
    });
}

void hadamard(const float* x, float* out, int64_t rows, int64_t width, int32_t threads) {
    split_rows(rows, rows * width, threads, [=](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            __builtin_memcpy(out + row * width, x + row * width, static_cast<uint64_t>(width) * 4);
            spread_row(out + row * width, width);
        }
    });
}

}  // namespace tenfold::TENFOLD_ISA
