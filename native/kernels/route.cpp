// The router: from a token's logits to its experts and their weights (spec 2.7, 5.5).
#include "../threads.hpp"
#include "kernels.hpp"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int64_t most_experts = 1024;

float sigmoid(float x) { return 1.0F / (1.0F + __builtin_expf(-x)); }

float sqrt_softplus(float x) {
    const float above = x > 0.0F ? x : 0.0F;
    return __builtin_sqrtf(above + __builtin_log1pf(__builtin_expf(-__builtin_fabsf(x))));
}

// The place of the largest of those not taken; of equal ones the first.
int64_t best_of(const float* values, const bool* taken, int64_t count) {
    int64_t best = -1;
    for (int64_t i = 0; i < count; ++i) {
        if (!taken[i] && (best < 0 || values[i] > values[best])) best = i;
    }
    return best;
}

struct Call {
    const float *logits, *bias;
    int64_t* ids;
    float* weights;
    int64_t experts, topk, groups, topk_group;
    float scaling;
    bool softplus, chosen;

    void score(int64_t token, float* scores) const {
        const float* const from = logits + token * experts;
        for (int64_t e = 0; e < experts; ++e) scores[e] = softplus ? sqrt_softplus(from[e]) : sigmoid(from[e]);
    }

    // All experts outside the best groups are taken away; a group counts its two best.
    void keep_groups(const float* choice, bool* taken) const {
        const int64_t size = experts / groups;
        float value[most_experts];
        bool kept[most_experts] = {};
        for (int64_t g = 0; g < groups; ++g) {
            bool used[most_experts] = {};
            const int64_t first = best_of(choice + g * size, used, size);
            used[first] = true;
            value[g] = choice[g * size + first] + choice[g * size + best_of(choice + g * size, used, size)];
        }
        for (int64_t i = 0; i < topk_group; ++i) kept[best_of(value, kept, groups)] = true;
        for (int64_t e = 0; e < experts; ++e) taken[e] = !kept[e / size];
    }

    void choose(const float* scores, int64_t* to) const {
        float choice[most_experts];
        bool taken[most_experts] = {};
        for (int64_t e = 0; e < experts; ++e) choice[e] = bias == nullptr ? scores[e] : scores[e] + bias[e];
        if (groups > 1) keep_groups(choice, taken);
        for (int64_t i = 0; i < topk; ++i) {
            to[i] = best_of(choice, taken, experts);
            taken[to[i]] = true;
        }
    }

    void run(int64_t token) const {
        float scores[most_experts];
        int64_t* const own = ids + token * topk;
        score(token, scores);
        if (!chosen) choose(scores, own);
        float sum = 0.0F;
        for (int64_t i = 0; i < topk; ++i) sum += scores[own[i]];
        for (int64_t i = 0; i < topk; ++i) weights[token * topk + i] = scores[own[i]] / sum * scaling;
    }
};

}  // namespace

void route(const float* logits, const float* bias, int64_t* ids, float* weights, int64_t n, int64_t experts,
           int64_t topk, int64_t groups, int64_t topk_group, float scaling, int32_t softplus, int32_t chosen,
           int32_t threads) {
    const Call call{logits, bias, ids, weights, experts, topk, groups, topk_group, scaling, softplus != 0, chosen != 0};
    split_rows(n, n * experts * 8, threads, [&call](int64_t first, int64_t last) {
        for (int64_t token = first; token < last; ++token) call.run(token);
    });
}

}  // namespace tenfold::TENFOLD_ISA
