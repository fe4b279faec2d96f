#include <cstring>

#include "../threads.hpp"
#include "kernels.hpp"
#include "product.hpp"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int kGate = 0, kDown = 1, kUp = 2;  // w1, w2, w3
constexpr int kGateAndUp[] = {kGate, kUp};

// What one expert is to the caller: six addresses, codes and scales of w1, w2, w3.
struct Bank {
    const void* const* addresses;
    Format gate_format, down_format;
    int64_t experts, hidden, inner;

    Matrix matrix(int64_t expert, int which) const {
        const void* const* at = addresses + 6 * expert + 2 * which;
        if (which == kDown) return {down_format, at[0], at[1], hidden, inner};
        return {gate_format, at[0], at[1], inner, hidden};
    }
};

// The (token, expert) pairs by expert, then by token. `stop[e]` is where expert e's pairs end, `count` where all do.
struct Pairs {
    const int32_t *token, *place;
    const int32_t* stop;
    int64_t count;
};

Pairs sort_pairs(const int64_t* ids, int64_t n, int64_t topk, int64_t experts, int32_t* memory) {
    int32_t *token = memory, *place = memory + n * topk, *next = memory + 2 * n * topk;
    for (int64_t e = 0; e <= experts; ++e) next[e] = 0;
    for (int64_t i = 0; i < n * topk; ++i) ++next[ids[i] + 1];
    for (int64_t e = 0; e < experts; ++e) next[e + 1] += next[e];
    for (int64_t i = 0; i < n * topk; ++i) {  // next[e], where e's pairs start, moves on to where they stop
        const int32_t to = next[ids[i]]++;
        token[to] = static_cast<int32_t>(i / topk);
        place[to] = static_cast<int32_t>(i);
    }
    return {token, place, next, n * topk};
}

// Calls run(expert, first, last) for each expert's pairs within [begin, end).
template <class Run>
void for_experts(const Pairs& pairs, int64_t experts, int64_t begin, int64_t end, const Run& run) {
    int64_t first = begin;
    for (int64_t expert = 0; expert < experts && first < end; ++expert) {
        const int64_t last = smaller(pairs.stop[expert], end);
        if (last > first) run(expert, first, last);
        first = last > first ? last : first;
    }
}

#ifdef __AVX2__

// Within 2 units of the last place; infinite from 88.4 on (exp: from 88.7 on), at least e^-87, NaN for NaN.
__m256 exp8(__m256 x) {
    x = _mm256_max_ps(_mm256_set1_ps(-87.0F), _mm256_min_ps(_mm256_set1_ps(89.0F), x));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504F)), 8);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375F), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4F), r);
    __m256 p = _mm256_set1_ps(1.9875691500e-4F);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3F));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3F));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2F));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1F));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1F));
    p = _mm256_fmadd_ps(_mm256_mul_ps(p, r), r, _mm256_add_ps(r, _mm256_set1_ps(1.0F)));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

// Bounds stand first: of a NaN and a bound, min and max return their second operand.
__m256 gated8(__m256 gate, __m256 up, __m256 limit, __m256 weight) {
    gate = _mm256_min_ps(limit, gate);
    up = _mm256_max_ps(_mm256_sub_ps(_mm256_setzero_ps(), limit), _mm256_min_ps(limit, up));
    const __m256 minus = _mm256_sub_ps(_mm256_setzero_ps(), gate);
    const __m256 silu = _mm256_div_ps(gate, _mm256_add_ps(_mm256_set1_ps(1.0F), exp8(minus)));
    return _mm256_mul_ps(_mm256_mul_ps(silu, up), weight);
}

void gate_row(float* gate, const float* up, int64_t width, float limit, float weight) {
    const __m256 limits = _mm256_set1_ps(limit), weights = _mm256_set1_ps(weight);
    int64_t i = 0;
    for (; i + 8 <= width; i += 8) {
        _mm256_storeu_ps(gate + i, gated8(_mm256_loadu_ps(gate + i), _mm256_loadu_ps(up + i), limits, weights));
    }
    if (i < width) {
        float gates[8] = {}, ups[8] = {};
        for (int64_t j = i; j < width; ++j) gates[j - i] = gate[j], ups[j - i] = up[j];
        _mm256_storeu_ps(gates, gated8(_mm256_loadu_ps(gates), _mm256_loadu_ps(ups), limits, weights));
        for (int64_t j = i; j < width; ++j) gate[j] = gates[j - i];
    }
}

#else

void gate_row(float* gate, const float* up, int64_t width, float limit, float weight) {
    for (int64_t i = 0; i < width; ++i) {
        const float g = gate[i] > limit ? limit : gate[i];
        const float u = up[i] > limit ? limit : (up[i] < -limit ? -limit : up[i]);
        gate[i] = g / (1.0F + __builtin_expf(-g)) * u * weight;
    }
}

#endif

// The memory of a slice of pairs.
struct Scratch {
    float *x = nullptr, *gate = nullptr, *up = nullptr, *inner = nullptr, *end = nullptr;
    Scratch() = default;
    Scratch(float* memory, int64_t slice, const Bank& bank)
        : x(memory), gate(x + slice * padded(bank.hidden)), up(gate + slice * bank.inner),
          inner(up + slice * bank.inner), end(inner + slice * padded(bank.inner)) {}
};

struct Layer {
    const float* x;
    const float* weights;  // null: 1 each
    float* out;
    Bank bank;
    Pairs pairs;
    Scratch scratch;
    float limit;
    int64_t begin, end;  // the slice of pairs at work

    int64_t rows() const { return end - begin; }
};

// What follows is done for the routed experts and the shared one side by side, so that threads wait but once.
struct Layers {
    const Layer* of;
    int64_t count;
    int32_t threads;

    template <class Run>
    void split(int64_t elements_of_row, const Run& run) const {
        int64_t rows = 0;
        for (int64_t i = 0; i < count; ++i) rows += of[i].rows();
        split_work(rows * elements_of_row, threads, [this, &run](const Share& share) {
            for (int64_t i = 0; i < count; ++i) run(of[i], share);
        });
    }
};

void pack_tokens(const Layer& l, const Share& share) {
    for (int64_t i = first_of(share, l.rows()); i < last_of(share, l.rows()); ++i) {
        const float* const x = l.x + l.pairs.token[l.begin + i] * l.bank.hidden;
        pack_row(l.bank.gate_format, x, l.bank.hidden, l.scratch.x, l.rows(), i);
    }
}

void multiply_gates(const Layer& l, const Share& share) {
    const int64_t inner = l.bank.inner, units = quads(inner);
    const int64_t first = first_of(share, units) * kQuad, last = smaller(last_of(share, units) * kQuad, inner);
    for_experts(l.pairs, l.bank.experts, l.begin, l.end, [&](int64_t expert, int64_t from, int64_t to) {
        for (const int which : kGateAndUp) {
            float* y = (which == kGate ? l.scratch.gate : l.scratch.up) + (from - l.begin) * inner;
            const Product product{l.bank.matrix(expert, which), l.scratch.x, l.rows(), from - l.begin, to - from,
                                  y, inner, nullptr, 0, false};
            multiply(product, first, last);
        }
    });
}

void pack_gated(const Layer& l, const Share& share) {
    const int64_t inner = l.bank.inner;
    for (int64_t i = first_of(share, l.rows()); i < last_of(share, l.rows()); ++i) {
        float* gate = l.scratch.gate + i * inner;
        const float weight = l.weights == nullptr ? 1.0F : l.weights[l.pairs.place[l.begin + i]];
        gate_row(gate, l.scratch.up + i * inner, inner, l.limit, weight);
        pack_row(l.bank.down_format, gate, inner, l.scratch.inner, l.rows(), i);
    }
}

// Each thread adds all experts to its own columns of the output, so a token's sum has one order.
void multiply_down(const Layer& l, const Share& share) {
    const int64_t hidden = l.bank.hidden, units = quads(hidden);
    const int64_t first = first_of(share, units) * kQuad, last = smaller(last_of(share, units) * kQuad, hidden);
    for_experts(l.pairs, l.bank.experts, l.begin, l.end, [&](int64_t expert, int64_t from, int64_t to) {
        const Product product{l.bank.matrix(expert, kDown), l.scratch.inner, l.rows(), from - l.begin, to - from,
                              l.out, hidden, l.pairs.token + from, 0, true};
        multiply(product, first, last);
    });
}

// One layer or two, slice after slice; what is left of the longer one goes on alone.
void run_slices(Layer* layers, int64_t count, const int64_t* slices, int32_t threads) {
    const Layers both{layers, count, threads};
    const int64_t hidden = layers->bank.hidden, inner = layers->bank.inner;
    for (bool more = true; more;) {
        more = false;
        for (int64_t i = 0; i < count; ++i) {
            layers[i].begin = layers[i].end;
            layers[i].end = smaller(layers[i].begin + slices[i], layers[i].pairs.count);
            more = more || layers[i].rows() > 0;
        }
        both.split(hidden, pack_tokens);
        both.split(inner * hidden, multiply_gates);
        both.split(inner, pack_gated);
        both.split(inner * hidden, multiply_down);
    }
}

Pairs pairs_of_one(int64_t n, int32_t* memory) {
    for (int64_t i = 0; i < n; ++i) memory[i] = static_cast<int32_t>(i);
    memory[n] = static_cast<int32_t>(n);
    return {memory, memory, memory + n, n};
}

}  // namespace

void experts(const float* x, const int64_t* ids, const float* weights, const void* const* addresses,
             const SharedExpert* shared, float* out, int32_t* pairs_memory, float* memory, int64_t n, int64_t topk,
             int64_t num_experts, int64_t first_expert, int64_t last_expert, int64_t hidden, int64_t inner,
             int64_t slice, int32_t gate_format, int32_t down_format, float limit, int32_t threads) {
    const Bank bank{addresses, static_cast<Format>(gate_format), static_cast<Format>(down_format),
                    num_experts, hidden, inner};
    Pairs pairs = sort_pairs(ids, n, topk, num_experts, pairs_memory);
    const int64_t begin = first_expert == 0 ? 0 : pairs.stop[first_expert - 1];
    pairs.count = last_expert == 0 ? 0 : pairs.stop[last_expert - 1];
    const Scratch scratch(memory, slice, bank);
    const uint64_t out_bytes = static_cast<uint64_t>(n * hidden) * sizeof(float);
    if (first_expert == 0) std::memset(out, 0, out_bytes);
    Layer layers[2] = {{x, weights, out, bank, pairs, scratch, limit, begin, begin}};
    int64_t slices[2] = {slice, (slice + topk - 1) / topk};
    if (shared == nullptr) return run_slices(layers, 1, slices, threads);

    const Bank one{shared->addresses, static_cast<Format>(shared->gate_format),
                   static_cast<Format>(shared->down_format), 1, hidden, shared->inner};
    std::memset(shared->out, 0, out_bytes);
    layers[1] = {x, nullptr, shared->out, one, pairs_of_one(n, pairs_memory + 2 * n * topk + num_experts + 1),
                 Scratch(scratch.end, slices[1], one), limit, 0, 0};
    run_slices(layers, 2, slices, threads);
    split_rows(n * hidden, n * hidden, threads, [=](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) out[i] += shared->out[i];
    });
}

}  // namespace tenfold::TENFOLD_ISA
