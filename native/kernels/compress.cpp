// The compressor's pooling: a softmax over the tokens of a group, channel by channel (spec 2.4).
#include "../threads.hpp"
#include "kernels.hpp"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace tenfold::TENFOLD_ISA {
namespace {

// Tokens whose values and gates an entry pools: `rows` of them, `stride` floats apart; some entries have two spans.
struct Span {
    const float* values;
    const float* gates;
};

#ifdef __AVX2__

// e^x for x <= 0 with a relative error of 2e-7; 0 below -87, and for -inf.
__m256 exponential(__m256 x) {
    constexpr float terms[6] = {1.9875691500e-4F, 1.3981999507e-3F, 8.3334519073e-3F,
                                4.1665795894e-2F, 1.6666665459e-1F, 5.0000001201e-1F};
    const __m256 at_least = _mm256_max_ps(_mm256_set1_ps(-100.0F), x);
    const __m256 whole = _mm256_round_ps(_mm256_mul_ps(at_least, _mm256_set1_ps(1.44269504088896341F)),
                                         _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 part = _mm256_fnmadd_ps(whole, _mm256_set1_ps(0.693359375F), at_least);
    part = _mm256_fnmadd_ps(whole, _mm256_set1_ps(-2.12194440e-4F), part);
    __m256 sum = _mm256_set1_ps(terms[0]);
    for (int i = 1; i < 6; ++i) sum = _mm256_fmadd_ps(sum, part, _mm256_set1_ps(terms[i]));
    sum = _mm256_fmadd_ps(_mm256_mul_ps(sum, part), part, _mm256_add_ps(part, _mm256_set1_ps(1.0F)));
    const __m256 exponent = _mm256_max_ps(whole, _mm256_set1_ps(-127.0F));
    const __m256i biased = _mm256_cvtps_epi32(_mm256_add_ps(exponent, _mm256_set1_ps(127.0F)));
    return _mm256_mul_ps(sum, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
}

// Eight channels from c.
void pool_eight(const Span* spans, int64_t num_spans, int64_t rows, int64_t stride, int64_t c, float* out) {
    __m256 top = _mm256_set1_ps(-__builtin_inff());
    for (int64_t k = 0; k < num_spans; ++k) {
        for (int64_t r = 0; r < rows; ++r) top = _mm256_max_ps(_mm256_loadu_ps(spans[k].gates + r * stride + c), top);
    }
    __m256 total = _mm256_setzero_ps(), sum = _mm256_setzero_ps();
    for (int64_t k = 0; k < num_spans; ++k) {
        for (int64_t r = 0; r < rows; ++r) {
            const __m256 share = exponential(_mm256_sub_ps(_mm256_loadu_ps(spans[k].gates + r * stride + c), top));
            total = _mm256_add_ps(total, share);
            sum = _mm256_fmadd_ps(share, _mm256_loadu_ps(spans[k].values + r * stride + c), sum);
        }
    }
    _mm256_storeu_ps(out + c, _mm256_div_ps(sum, total));
}

int64_t in_eights(int64_t count) { return count / 8; }

#else

void pool_eight(const Span*, int64_t, int64_t, int64_t, int64_t, float*) {}
int64_t in_eights(int64_t) { return 0; }

#endif

void pool_channel(const Span* spans, int64_t num_spans, int64_t rows, int64_t stride, int64_t c, float* out) {
    float top = -__builtin_inff();
    for (int64_t i = 0; i < num_spans * rows; ++i) {
        const float gate = spans[i / rows].gates[i % rows * stride + c];
        top = gate > top ? gate : top;
    }
    float total = 0.0F, sum = 0.0F;
    for (int64_t i = 0; i < num_spans * rows; ++i) {
        const float share = __builtin_expf(spans[i / rows].gates[i % rows * stride + c] - top);
        total += share;
        sum += share * spans[i / rows].values[i % rows * stride + c];
    }
    out[c] = sum / total;
}

}  // namespace

void compress(const float* values, const float* gates, float* out, int64_t groups, int64_t ratio, int64_t dim,
              int64_t group_stride, int64_t row_stride, int32_t overlap, int32_t threads) {
    const int64_t entries = overlap != 0 ? groups - 1 : groups, num_spans = overlap != 0 ? 2 : 1;
    split_rows(entries, entries * ratio * dim * num_spans, threads, [=](int64_t first, int64_t last) {
        for (int64_t entry = first; entry < last; ++entry) {
            const int64_t from = entry * group_stride, own = from + group_stride + dim;
            const Span spans[2] = {{values + from, gates + from}, {values + own, gates + own}};
            for (int64_t i = 0; i < in_eights(dim); ++i) {
                pool_eight(spans, num_spans, ratio, row_stride, 8 * i, out + entry * dim);
            }
            for (int64_t c = 8 * in_eights(dim); c < dim; ++c) {
                pool_channel(spans, num_spans, ratio, row_stride, c, out + entry * dim);
            }
        }
    });
}

}  // namespace tenfold::TENFOLD_ISA
