// The kernels, declared for the instruction set that a file is being built for, and the table of each build.
//
// Every file of this folder is compiled once per instruction set, with TENFOLD_ISA naming the namespace. What a
// kernel file calls must be its own: an inline function of the standard library would exist once per instruction
// set under one name, and the linker might keep the copy that this CPU cannot run.
#pragma once

#include <cstdint>

#include "rows.hpp"

namespace tenfold {

// One line of a table; the last line has no name. `run` is cast back to the kernel's own type by the caller; `replay`
// calls it with arguments that lie in slots of eight bytes.
struct Kernel {
    const char* name;
    void (*run)();
    void (*replay)(const uint64_t* slots);
};

namespace scalar {
extern const Kernel kernels[];
}
#ifdef TENFOLD_BUILT_AMX
namespace amx {
extern const Kernel kernels[];
}
#endif
#ifdef TENFOLD_BUILT_AVX512
namespace avx512 {
extern const Kernel kernels[];
}
#endif
#ifdef TENFOLD_BUILT_AVX2
namespace avx2 {
extern const Kernel kernels[];
}
#endif

#ifdef TENFOLD_ISA
namespace TENFOLD_ISA {

// out[r, :] = weight * x[r, :] / sqrt(mean(x[r, :]^2) + eps); rows are dense, out may be x, weight null, width >= 1.
void rms_norm(const float* x, const float* weight, float* out, int64_t rows, int64_t width, float eps,
              int32_t threads);

// y[t, g * out + o] = x[t, g, :] . weight[g * out + o, :] for a weight as it is stored (product.hpp has the formats);
// in >= 1. `panels` has room for slice * groups * padded(in) numbers; the rows are taken `slice` at a time.
void linear(const float* x, const void* codes, const void* scale, float* y, float* panels, int64_t n, int64_t groups,
            int64_t out, int64_t in, int64_t slice, int32_t format, int32_t threads);

// One of several matrices on the same x: codes, scales, rows, format, and which of the packed forms of x is its own:
// 0 for the first, then the same as before where the format is, else one more.
struct Stacked {
    const void *codes, *scale;
    int64_t out, format, panels;
};

// y = x times each of the matrices, dense, one after the other; as `linear`, in one go. `panels` has room for
// slice * padded(in) numbers for each packed form.
void linear_each(const float* x, const Stacked* stack, int64_t count, float* y, float* panels, int64_t n, int64_t in,
                 int64_t slice, int32_t threads);

// out[t, :] = sum over i of weights[t, i] * w2 (silu(w1 x[t]) * w3 x[t]) of expert ids[t, i], in the order of expert
// ids, gate and up clamped by `limit`. `addresses` holds codes and scales of w1, w2, w3 by expert; `pairs_memory`
// room for 2 * n * topk + num_experts + 1 numbers, `memory` for slice * (padded(hidden) + 2 * inner + padded(inner)).
// Experts outside [first_expert, last_expert) are left out; `out` begins with zeros where first_expert is 0, else they are
// added to it. With a shared expert (or null) what it makes of each token, summed in its `out` [n, hidden], is added at last;
// `pairs_memory` has room for n + 1 more then, and `memory` for its own slice of ceil(slice / topk) behind the other.
struct SharedExpert {
    const void* const* addresses;
    float* out;
    int64_t inner, gate_format, down_format;
};
void experts(const float* x, const int64_t* ids, const float* weights, const void* const* addresses,
             const SharedExpert* shared, float* out, int32_t* pairs_memory, float* memory, int64_t n, int64_t topk,
             int64_t num_experts, int64_t first_expert, int64_t last_expert, int64_t hidden, int64_t inner,
             int64_t slice, int32_t gate_format, int32_t down_format, float limit, int32_t threads);

// out[n, heads, value_dim] = softmax(scale * q . rows and sink) over all rows of all sources; sink [heads] or null.
// The last 2 * pairs channels of an output are turned back by its query's position, position + its number.
// refused: the first source that lists a row it does not have, and nothing is done, or -1.
void sparse_attention(const float* q, const Rows* sources, int64_t num_sources, const float* sink,
                      const float* frequencies, float* out, int64_t n, int64_t heads, int64_t width, int64_t value_dim,
                      int64_t position, int64_t pairs, float scale, int32_t* refused, int32_t threads);

// out[n, k] = of the first visible[i] keys the k rows with the largest sum over heads of factor * weights * relu(q . key),
// ascending, -1 at the end; of equal ones the smaller row. q [n, heads, dim], weights [n, heads].
void select_rows(const float* q, const float* weights, const uint8_t* keys, const RowLayout* layout,
                 const int64_t* visible, int32_t* out, int64_t n, int64_t heads, int64_t dim, int64_t k, float factor,
                 int32_t threads);

// Rows to their packed form and back, bit for bit as the reference.
void pack_rows(const float* x, const RowLayout* layout, uint8_t* out, int64_t rows, int32_t threads);
void unpack_rows(const uint8_t* packed, const RowLayout* layout, float* out, int64_t rows, int32_t threads);

// out[i, :] = row ids[i] of a table [.., width]: of float32 or bf16 as float32, `copies` times; of int64.
void embed(const void* table, const int64_t* ids, float* out, int64_t n, int64_t copies, int64_t width, int32_t bf16,
           int32_t threads);
void look_up(const int64_t* table, const int64_t* ids, int64_t* out, int64_t n, int64_t width);

// Hyper-connections of up to 8 streams. streams [n, m, d]; fn [outputs, m * d], base [outputs] and mixed (scratch)
// [n, outputs] with outputs = (2 + m) * m for mix, m for collapse; scale [3] and [1]; x [n, d], normed with `norm`;
// post [n, m]; combination [n, m, m]; y [n, d]. Sums run over the combination's first index.
void hc_mix(const float* streams, const float* fn, const float* base, const float* scale, const float* norm, float* x,
            float* post, float* combination, float* mixed, int64_t n, int64_t m, int64_t d, float norm_eps, float eps,
            int64_t iterations, int32_t threads);
void hc_collapse(const float* streams, const float* fn, const float* base, const float* scale, const float* norm,
                 float* x, float* mixed, int64_t n, int64_t m, int64_t d, float norm_eps, float eps, int32_t threads);
void hc_merge(const float* streams, const float* y, const float* post, const float* combination, float* out, int64_t n,
              int64_t m, int64_t d, int32_t threads);

// Turns [n, rows, 2 * pairs], rows and tokens as far apart as said, to dense out; up to 256 pairs.
void rope(const float* x, const int64_t* positions, const float* frequencies, float* out, int64_t n, int64_t rows,
          int64_t pairs, int64_t token_stride, int64_t row_stride, int32_t inverse, int32_t interleaved,
          int32_t threads);

// Rows [n, rows, width] through the steps asked for, in this order; the last 2 * pairs channels turn. To dense out:
// numbers, or packed rows with turn_pack; turn_round gives the numbers that packed rows would hold.
constexpr int32_t turn_norm = 1, turn_spread = 2, turn_pack = 4, turn_round = 8;
void turn_rows(const float* x, const float* weight, const int64_t* positions, const float* frequencies,
               const RowLayout* layout, void* out, int64_t n, int64_t rows, int64_t width, int64_t pairs, float eps,
               int32_t steps, int32_t threads);

// out[row] = x[row] times the orthonormal Sylvester-Hadamard matrix; width is a power of two.
void hadamard(const float* x, float* out, int64_t rows, int64_t width, int32_t threads);

// out [entries, dim] = values pooled by softmax of gates over [groups, ratio] tokens; entries = groups, or with
// overlap groups - 1, each of the first dim channels of a group and the last dim channels of the next.
void compress(const float* values, const float* gates, float* out, int64_t groups, int64_t ratio, int64_t dim,
              int64_t group_stride, int64_t row_stride, int32_t overlap, int32_t threads);

// Scores of logits [n, experts] (square root of softplus, or sigmoid); where ids [n, topk] are not `chosen` already,
// the best by score + bias (or null) within the best groups; weights [n, topk] = scores, normed, times scaling.
void route(const float* logits, const float* bias, int64_t* ids, float* weights, int64_t n, int64_t experts,
           int64_t topk, int64_t groups, int64_t topk_group, float scaling, int32_t softplus, int32_t chosen,
           int32_t threads);

// One token each of n sessions, their memory given by addresses (tenfold.ops.BatchOps).
//
// Row i of rows to row places[i] at its address; with a ring > 0 modulo that, into either of its two copies.
void store_rows(const uint8_t* rows, uint8_t* const* addresses, const int64_t* places, int64_t n, int64_t row_bytes,
                int64_t ring);
// Values [n, width], and gates plus their place's row of ape [ratio, width], to the compressor states; a group that is
// complete becomes a row, as by `compress` and `turn_rows` with these steps.
void compress_step(const float* values, const float* gates, const float* ape, float* const* states,
                   uint8_t* const* rows, const int64_t* positions, const float* norm, const float* frequencies,
                   const RowLayout* layout, int64_t n, int64_t ratio, int64_t width, int64_t pairs, float eps,
                   int32_t overlap, int32_t steps);
// `select_rows` and `sparse_attention` of one query each; `packed` of up to most_sources sources holds an address for
// each. What sources list is not checked: they come from here.
constexpr int64_t most_sources = 4;
void select_sessions(const float* q, const float* weights, const uint8_t* const* keys, const RowLayout* layout,
                     const int64_t* visible, int32_t* out, int64_t n, int64_t heads, int64_t dim, int64_t k,
                     float factor, int32_t threads);
void attend_sessions(const float* q, const Rows* sources, int64_t num_sources, const float* sink,
                     const float* frequencies, float* out, int64_t n, int64_t heads, int64_t width, int64_t value_dim,
                     const int64_t* positions, int64_t pairs, float scale, int32_t threads);

// Limits: reads `bytes` bytes once; runs `rounds` rounds of multiply-adds in registers on every thread and says how
// many operations these were, a multiply-add being two. `seed` holds three numbers the compiler cannot know.
void peak_read(const uint8_t* data, int64_t bytes, int64_t* sum, int32_t threads);
void peak_float32(int64_t rounds, const float* seed, int64_t* operations, int32_t threads);
void peak_int8(int64_t rounds, const int8_t* seed, int64_t* operations, int32_t threads);
void peak_int16(int64_t rounds, const int16_t* seed, int64_t* operations, int32_t threads);

}  // namespace TENFOLD_ISA
#endif

}  // namespace tenfold
