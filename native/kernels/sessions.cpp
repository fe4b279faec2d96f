// One token each of several sessions, whose memory is given by addresses: by the kernels of one token each, so that what
// a session gets is what it gets alone.
#include "kernels.hpp"
#include "scratch.hpp"

namespace tenfold::TENFOLD_ISA {
namespace {

// Calls run(session, threads). Of many sessions each is one thread's, which decodes its rows for all heads; few are
// taken one after the other, each by all threads.
template <class Run>
void for_sessions(int64_t n, int32_t threads, const Run& run) {
    if (n < 2 * threads) {
        for (int64_t i = 0; i < n; ++i) run(i, threads);
        return;
    }
    share_tasks(n, threads, [&run](const auto& next) {
        for (int64_t i = next(); i >= 0; i = next()) run(i, 1);
    });
}

}  // namespace

void store_rows(const uint8_t* rows, uint8_t* const* addresses, const int64_t* places, int64_t n, int64_t row_bytes,
                int64_t ring) {
    for (int64_t i = 0; i < n; ++i) {
        const uint8_t* row = rows + i * row_bytes;
        const int64_t place = ring > 0 ? places[i] % ring : places[i];
        __builtin_memcpy(addresses[i] + place * row_bytes, row, static_cast<size_t>(row_bytes));
        if (ring > 0) __builtin_memcpy(addresses[i] + (ring + place) * row_bytes, row, static_cast<size_t>(row_bytes));
    }
}

void compress_step(const float* values, const float* gates, const float* ape, float* const* states,
                   uint8_t* const* rows, const int64_t* positions, const float* norm, const float* frequencies,
                   const RowLayout* layout, int64_t n, int64_t ratio, int64_t width, int64_t pairs, float eps,
                   int32_t overlap, int32_t steps) {
    const int64_t slot = 2 * width, current = overlap != 0 ? ratio : 0, dim = overlap != 0 ? width / 2 : width;
    const size_t bytes = static_cast<size_t>(width) * sizeof(float);
    Scratch scratch(Scratch::bytes_of<float>(dim));
    float* entry = scratch.take<float>(dim);
    for (int64_t i = 0; i < n; ++i) {
        const int64_t pending = positions[i] % ratio;
        float* to = states[i] + (current + pending) * slot;
        __builtin_memcpy(to, values + i * width, bytes);
        for (int64_t c = 0; c < width; ++c) to[width + c] = gates[i * width + c] + ape[pending * width + c];
        if (pending + 1 < ratio) continue;
        compress(states[i], states[i] + width, entry, overlap != 0 ? 2 : 1, ratio, dim, ratio * slot, slot, overlap, 1);
        const int64_t first = positions[i] - pending;  // where the group's first token stands
        turn_rows(entry, norm, &first, frequencies, layout, rows[i] + positions[i] / ratio * layout->row_bytes, 1, 1,
                  dim, pairs, eps, steps, 1);
        if (overlap == 0) continue;
        __builtin_memcpy(states[i], states[i] + ratio * slot, static_cast<size_t>(ratio * slot) * sizeof(float));
    }
}

void select_sessions(const float* q, const float* weights, const uint8_t* const* keys, const RowLayout* layout,
                     const int64_t* visible, int32_t* out, int64_t n, int64_t heads, int64_t dim, int64_t k,
                     float factor, int32_t threads) {
    int64_t scored = 0;
    for (int64_t i = 0; i < n; ++i) scored += visible[i] > k ? visible[i] : 0;
    if (scored * heads * dim < 1 << 18) threads = 1;  // some 5 us: not worth a fork
    for_sessions(n, threads, [=](int64_t i, int32_t own) {
        select_rows(q + i * heads * dim, weights + i * heads, keys[i], layout, visible + i, out + i * k, 1, heads, dim,
                    k, factor, own);
    });
}

void attend_sessions(const float* q, const Rows* sources, int64_t num_sources, const float* sink,
                     const float* frequencies, float* out, int64_t n, int64_t heads, int64_t width, int64_t value_dim,
                     const int64_t* positions, int64_t pairs, float scale, int32_t threads) {
    for_sessions(n, threads, [=](int64_t i, int32_t own) {
        Rows mine[most_sources];
        for (int64_t s = 0; s < num_sources; ++s) {
            mine[s] = sources[s];
            __builtin_memcpy(&mine[s].packed, sources[s].packed + i * static_cast<int64_t>(sizeof(void*)), sizeof(void*));
            if (mine[s].columns < 0) {
                mine[s].start += i;
                mine[s].stop += i;
            } else {
                mine[s].index += i * mine[s].columns;
            }
        }
        int32_t refused;
        sparse_attention(q + i * heads * width, mine, num_sources, sink, frequencies, out + i * heads * value_dim, 1,
                         heads, width, value_dim, positions[i], pairs, scale, &refused, own);
    });
}

}  // namespace tenfold::TENFOLD_ISA
