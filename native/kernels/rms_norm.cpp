#include "../threads.hpp"
#include "kernels.hpp"
#include "lanes.hpp"
#include "row_parts.hpp"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace tenfold::TENFOLD_ISA {
namespace {

#ifdef __AVX2__

float sum_of_squares(const float* x, int64_t width) {
    __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t i = 0;
    for (; i + 32 <= width; i += 32) {
        for (int lane = 0; lane < 4; ++lane) {  // four chains hide the latency of the multiply-add
            const __m256 v = _mm256_loadu_ps(x + i + 8 * lane);
            sums[lane] = _mm256_fmadd_ps(v, v, sums[lane]);
        }
    }
    float sum = sum_of(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
    for (; i < width; ++i) sum += x[i] * x[i];
    return sum;
}

void scale_row(const float* x, const float* weight, float* out, int64_t width, float scale) {
    const __m256 scales = _mm256_set1_ps(scale);
    int64_t i = 0;
    for (; i + 8 <= width; i += 8) {
        const __m256 normed = _mm256_mul_ps(_mm256_loadu_ps(x + i), scales);
        _mm256_storeu_ps(out + i, weight == nullptr ? normed : _mm256_mul_ps(normed, _mm256_loadu_ps(weight + i)));
    }
    for (; i < width; ++i) out[i] = x[i] * scale * (weight == nullptr ? 1.0F : weight[i]);
}

#else

// In double: the build the others are compared with must not add an error of its own over a long row.
float sum_of_squares(const float* x, int64_t width) {
    double sum = 0;
    for (int64_t i = 0; i < width; ++i) sum += static_cast<double>(x[i]) * x[i];
    return static_cast<float>(sum);
}

void scale_row(const float* x, const float* weight, float* out, int64_t width, float scale) {
    for (int64_t i = 0; i < width; ++i) out[i] = x[i] * scale * (weight == nullptr ? 1.0F : weight[i]);
}

#endif

}  // namespace

void norm_row(const float* x, const float* weight, float* out, int64_t width, float eps) {
    const float mean = sum_of_squares(x, width) / static_cast<float>(width);
    scale_row(x, weight, out, width, 1.0F / __builtin_sqrtf(mean + eps));
}

void rms_norm(const float* x, const float* weight, float* out, int64_t rows, int64_t width, float eps,
              int32_t threads) {
    split_rows(rows, rows * width, threads, [=](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) norm_row(x + row * width, weight, out + row * width, width, eps);
    });
}

}  // namespace tenfold::TENFOLD_ISA
