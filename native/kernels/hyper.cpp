// Hyper-connections: the residual streams mixed into a sub-layer's input and merged with its output (spec 2.1).
//
// Sixteen tokens make a tile: their projections share a pass over `fn`; the Sinkhorn iterations of eight run side
// by side, a lane each. Every token is computed as if alone, so tiles and threads leave no trace in the result.
#include "kernels.hpp"
#include "lanes.hpp"
#include "row_parts.hpp"
#include "scratch.hpp"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int64_t lanes = 8;
constexpr int64_t tile_tokens = 16;    // with them comes a pass over `fn`, 1.5 MB at 4 streams of 4096
constexpr int64_t most_streams = 8;
constexpr int64_t chunk = 512;         // channels projected at a time: 48 KB of `fn` at 24 outputs

float sigmoid(float x) { return 1.0F / (1.0F + __builtin_expf(-x)); }

// ------------------------------------------------------------------------------------------ projection

#ifdef __AVX2__

// sums[t][o] += x[t] . fn[o] over `eights` vectors, lane by lane; rows lie `width` apart, tokens' sums `stride`.
template <int tokens, int outputs>
void add_products(const float* x, const float* fn, int64_t width, int64_t eights, float* sums, int64_t stride) {
    __m256 dots[tokens][outputs];
    for (auto& row : dots) {
        for (auto& dot : row) dot = _mm256_setzero_ps();
    }
    for (int64_t i = 0; i < eights; ++i) {
        __m256 weights[outputs];
        for (int o = 0; o < outputs; ++o) weights[o] = _mm256_loadu_ps(fn + o * width + 8 * i);
        for (int t = 0; t < tokens; ++t) {
            const __m256 v = _mm256_loadu_ps(x + t * width + 8 * i);
            for (int o = 0; o < outputs; ++o) dots[t][o] = _mm256_fmadd_ps(v, weights[o], dots[t][o]);
        }
    }
    for (int t = 0; t < tokens; ++t) {
        for (int o = 0; o < outputs; ++o) {
            float* const sum = sums + t * stride + 8 * o;
            _mm256_storeu_ps(sum, _mm256_add_ps(_mm256_loadu_ps(sum), dots[t][o]));
        }
    }
}

template <int tokens>
void add_outputs(const float* x, const float* fn, int64_t width, int64_t eights, int64_t outputs, float* sums,
                 int64_t stride) {
    int64_t o = 0;
    for (; o + 3 <= outputs; o += 3) add_products<tokens, 3>(x, fn + o * width, width, eights, sums + 8 * o, stride);
    for (; o < outputs; ++o) add_products<tokens, 1>(x, fn + o * width, width, eights, sums + 8 * o, stride);
}

// out[t][o] = x[t] . fn[o]; `sums` has room for eight numbers each.
void project(const float* x, const float* fn, int64_t tokens, int64_t width, int64_t outputs, float* sums, float* out,
             int64_t out_stride) {
    const int64_t stride = 8 * outputs, whole = width / 8 * 8;
    __builtin_memset(sums, 0, static_cast<uint64_t>(tokens * stride) * 4);
    for (int64_t c = 0; c < whole; c += chunk) {
        const int64_t eights = (whole - c < chunk ? whole - c : chunk) / 8;
        int64_t t = 0;
        for (; t + 4 <= tokens; t += 4) {
            add_outputs<4>(x + t * width + c, fn + c, width, eights, outputs, sums + t * stride, stride);
        }
        for (; t < tokens; ++t) {
            add_outputs<1>(x + t * width + c, fn + c, width, eights, outputs, sums + t * stride, stride);
        }
    }
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t o = 0; o < outputs; ++o) {
            float dot = sum_of(_mm256_loadu_ps(sums + t * stride + 8 * o));
            for (int64_t c = whole; c < width; ++c) dot += x[t * width + c] * fn[o * width + c];
            out[t * out_stride + o] = dot;
        }
    }
}

float mean_square(const float* x, int64_t width) {
    __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t i = 0;
    for (; i + 32 <= width; i += 32) {
        for (int k = 0; k < 4; ++k) {
            const __m256 v = _mm256_loadu_ps(x + i + 8 * k);
            sums[k] = _mm256_fmadd_ps(v, v, sums[k]);
        }
    }
    float sum = sum_of(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
    for (; i < width; ++i) sum += x[i] * x[i];
    return sum / static_cast<float>(width);
}

#else

void project(const float* x, const float* fn, int64_t tokens, int64_t width, int64_t outputs, float*, float* out,
             int64_t out_stride) {
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t o = 0; o < outputs; ++o) {
            double dot = 0.0;
            for (int64_t c = 0; c < width; ++c) dot += static_cast<double>(x[t * width + c]) * fn[o * width + c];
            out[t * out_stride + o] = static_cast<float>(dot);
        }
    }
}

float mean_square(const float* x, int64_t width) {
    double sum = 0.0;
    for (int64_t i = 0; i < width; ++i) sum += static_cast<double>(x[i]) * x[i];
    return static_cast<float>(sum / static_cast<double>(width));
}

#endif

// ------------------------------------------------------------------------------------------ Sinkhorn

struct Matrices {
    float entry[most_streams * most_streams][lanes];  // [row * m + column][token]
};

// Divides each line of m entries by its sum + eps; a line starts at i * across and steps by `along`.
void normalise(Matrices& a, int64_t m, int64_t across, int64_t along, float eps) {
    for (int64_t i = 0; i < m; ++i) {
        float sum[lanes];
        for (int64_t lane = 0; lane < lanes; ++lane) sum[lane] = a.entry[i * across][lane];
        for (int64_t j = 1; j < m; ++j) {
            for (int64_t lane = 0; lane < lanes; ++lane) sum[lane] += a.entry[i * across + j * along][lane];
        }
        for (int64_t lane = 0; lane < lanes; ++lane) sum[lane] += eps;
        for (int64_t j = 0; j < m; ++j) {
            for (int64_t lane = 0; lane < lanes; ++lane) a.entry[i * across + j * along][lane] /= sum[lane];
        }
    }
}

void exponentials(Matrices& a, int64_t m) {
    for (int64_t row = 0; row < m; ++row) {
        for (int64_t lane = 0; lane < lanes; ++lane) {
            float top = a.entry[row * m][lane];
            for (int64_t j = 1; j < m; ++j) {
                const float next = a.entry[row * m + j][lane];
                top = next > top ? next : top;
            }
            for (int64_t j = 0; j < m; ++j) {
                a.entry[row * m + j][lane] = __builtin_expf(a.entry[row * m + j][lane] - top);
            }
        }
    }
}

// Softmax of the rows, then columns, rows, columns ... towards a doubly stochastic matrix.
void sinkhorn(Matrices& a, int64_t m, float eps, int64_t iterations) {
    exponentials(a, m);
    normalise(a, m, m, 1, 0.0F);
    for (int64_t i = 0; i < m * m; ++i) {
        for (int64_t lane = 0; lane < lanes; ++lane) a.entry[i][lane] += eps;
    }
    normalise(a, m, 1, m, eps);
    for (int64_t i = 1; i < iterations; ++i) {
        normalise(a, m, m, 1, eps);
        normalise(a, m, 1, m, eps);
    }
}

// ------------------------------------------------------------------------------------------ tiles

struct Call {
    const float *streams, *fn, *base, *scale, *norm;
    float *x, *post, *combination, *mixed;  // mixed [n, outputs]: the projection, not yet normed
    int64_t n, m, d, outputs;
    float norm_eps, eps;
    int64_t iterations;

    int64_t width() const { return m * d; }
    int64_t tiles() const { return (n + tile_tokens - 1) / tile_tokens; }
    int64_t tokens(int64_t tile) const {
        const int64_t rest = n - tile * tile_tokens;
        return rest < tile_tokens ? rest : tile_tokens;
    }

    // fn times the streams of a tile, for some of the outputs.
    void project_tile(int64_t tile, int64_t first, int64_t last, float* sums) const {
        const float* const from = streams + tile * tile_tokens * width();
        project(from, fn + first * width(), tokens(tile), width(), last - first, sums,
                mixed + tile * tile_tokens * outputs + first, outputs);
    }

    void finish_tile(int64_t tile) const {
        const int64_t first = tile * tile_tokens, last = first + tokens(tile);
        for (int64_t token = first; token < last; token += lanes) {
            finish_tokens(token, last - token < lanes ? last - token : lanes);
        }
    }

    // What the projection gives rise to. Without a combination it is the collapse behind the last layer.
    void finish_tokens(int64_t first, int64_t count) const {
        Matrices matrices{};
        for (int64_t lane = 0; lane < count; ++lane) {
            const int64_t token = first + lane;
            const float* const from = streams + token * width();
            float* const mix = mixed + token * outputs;
            const float factor = 1.0F / __builtin_sqrtf(mean_square(from, width()) + norm_eps);
            for (int64_t i = 0; i < outputs; ++i) {
                mix[i] = mix[i] * factor * scale[i < m ? 0 : i < 2 * m ? 1 : 2] + base[i];
            }
            for (int64_t i = 0; i < m; ++i) mix[i] = sigmoid(mix[i]) + eps;
            weighted_streams(from, mix, x + token * d);
            norm_row(x + token * d, norm, x + token * d, d, norm_eps);
            if (combination == nullptr) continue;
            for (int64_t i = 0; i < m; ++i) post[token * m + i] = 2.0F * sigmoid(mix[m + i]);
            for (int64_t i = 0; i < m * m; ++i) matrices.entry[i][lane] = mix[2 * m + i];
        }
        if (combination == nullptr) return;
        sinkhorn(matrices, m, eps, iterations);
        for (int64_t lane = 0; lane < count; ++lane) {
            float* const to = combination + (first + lane) * m * m;
            for (int64_t i = 0; i < m * m; ++i) to[i] = matrices.entry[i][lane];
        }
    }

    void weighted_streams(const float* from, const float* weights, float* to) const {
        for (int64_t c = 0; c < d; ++c) to[c] = weights[0] * from[c];
        for (int64_t j = 1; j < m; ++j) {
            const float weight = weights[j];
            const float* const stream = from + j * d;
            for (int64_t c = 0; c < d; ++c) to[c] += weight * stream[c];
        }
    }
};

constexpr int64_t outputs_each = 3;  // of a projection that is split because there are few tokens

void mix(const Call& call, int32_t threads) {
    const int64_t sums = Scratch::bytes_of<float>(tile_tokens * call.outputs * 8);
    if (call.tiles() >= 2 * threads) {
        share_tasks(call.tiles(), threads, [&call, sums](const auto& next) {
            Scratch scratch(sums);
            float* const own = scratch.take<float>(tile_tokens * call.outputs * 8);
            for (int64_t tile = next(); tile >= 0; tile = next()) {
                call.project_tile(tile, 0, call.outputs, own);
                call.finish_tile(tile);
            }
        });
        return;
    }
    const int64_t parts = (call.outputs + outputs_each - 1) / outputs_each;
    const int32_t useful = call.n * call.width() * call.outputs < 16384 ? 1 : threads;
    share_tasks(call.tiles() * parts, useful, [&call, parts, sums](const auto& next) {
        Scratch scratch(sums);
        float* const own = scratch.take<float>(tile_tokens * call.outputs * 8);
        for (int64_t task = next(); task >= 0; task = next()) {
            const int64_t first = task % parts * outputs_each, last = first + outputs_each;
            call.project_tile(task / parts, first, last < call.outputs ? last : call.outputs, own);
        }
    });
    share_tasks(call.tiles(), useful, [&call](const auto& next) {
        for (int64_t tile = next(); tile >= 0; tile = next()) call.finish_tile(tile);
    });
}

// ------------------------------------------------------------------------------------------ merge

// coefficients [k][post, j = 0 .. m - 1] of one token.
void merge_token(const float* streams, const float* y, const float* coefficients, int64_t m, int64_t d, float* out) {
    int64_t c = 0;
#ifdef __AVX2__
    for (; c + 8 <= d; c += 8) {
        const __m256 own = _mm256_loadu_ps(y + c);
        __m256 from[most_streams];
        for (int64_t j = 0; j < m; ++j) from[j] = _mm256_loadu_ps(streams + j * d + c);
        const float* coefficient = coefficients;
        for (int64_t k = 0; k < m; ++k) {
            __m256 sum = _mm256_mul_ps(_mm256_broadcast_ss(coefficient++), own);
            for (int64_t j = 0; j < m; ++j) sum = _mm256_fmadd_ps(_mm256_broadcast_ss(coefficient++), from[j], sum);
            _mm256_storeu_ps(out + k * d + c, sum);
        }
    }
#endif
    for (; c < d; ++c) {
        for (int64_t k = 0; k < m; ++k) {
            const float* const coefficient = coefficients + k * (m + 1);
            float sum = coefficient[0] * y[c];
            for (int64_t j = 0; j < m; ++j) sum += coefficient[1 + j] * streams[j * d + c];
            out[k * d + c] = sum;
        }
    }
}

}  // namespace

void hc_mix(const float* streams, const float* fn, const float* base, const float* scale, const float* norm, float* x,
            float* post, float* combination, float* mixed, int64_t n, int64_t m, int64_t d, float norm_eps, float eps,
            int64_t iterations, int32_t threads) {
    mix({streams, fn, base, scale, norm, x, post, combination, mixed, n, m, d, (2 + m) * m, norm_eps, eps, iterations},
        threads);
}

void hc_collapse(const float* streams, const float* fn, const float* base, const float* scale, const float* norm,
                 float* x, float* mixed, int64_t n, int64_t m, int64_t d, float norm_eps, float eps, int32_t threads) {
    mix({streams, fn, base, scale, norm, x, nullptr, nullptr, mixed, n, m, d, m, norm_eps, eps, 0}, threads);
}

void hc_merge(const float* streams, const float* y, const float* post, const float* combination, float* out, int64_t n,
              int64_t m, int64_t d, int32_t threads) {
    split_rows(n, n * m * d, threads, [=](int64_t first, int64_t last) {
        for (int64_t token = first; token < last; ++token) {
            float coefficients[most_streams * (most_streams + 1)];
            for (int64_t k = 0; k < m; ++k) {
                coefficients[k * (m + 1)] = post[token * m + k];
                for (int64_t j = 0; j < m; ++j) {
                    coefficients[k * (m + 1) + 1 + j] = combination[(token * m + j) * m + k];
                }
            }
            merge_token(streams + token * m * d, y + token * d, coefficients, m, d, out + token * m * d);
        }
    });
}

}  // namespace tenfold::TENFOLD_ISA
