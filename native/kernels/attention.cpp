// Attention over packed rows, one softmax over all sources of a query and a sink.
//
// Rows are taken in blocks that fit the cache: decoded once, then scored and summed for all heads, and for the
// queries of a tile. Scores are in units of log2, and the reference point of the running softmax is an integer:
// changing it multiplies by a power of two, which rounds nothing. So how rows fall into blocks, which queries
// share a tile and which thread does what leave no trace in the result, to the last bit. Here rows become float32;
// those of V4, for eight heads or more, are multiplied as they are, by tiles or as whole numbers.
#include "attention_amx.hpp"
#include "attention_int16.hpp"
#include "attention_parts.hpp"
#include "kernels.hpp"
#include "lanes.hpp"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int64_t block_rows = 48;   // decoded rows of 512 channels: 100 KB, within the second-level cache
constexpr int64_t strip_rows = 12;   // of them, what is scored at a time: 25 KB, within the first
constexpr int64_t group = 4;         // heads that go through the inner loops together

struct Shape {
    int64_t width, value_dim;
    int64_t row_stride;    // floats from one decoded row, or query head, to the next; behind `width` are zeros
    int64_t value_stride;  // floats from one head's output to the next
};

// The running softmax of one query and some of its heads.
struct Query {
    float* q;       // [heads][row_stride], scaled to log2 units
    float* values;  // [heads][value_stride]
    float* top;     // [heads] reference points, integers
    float* total;   // [heads]
};

// ------------------------------------------------------------------------------------------ inner loops

#ifdef __AVX2__

// The sums of four vectors.
__m128 horizontal_sums(const __m256* v) {
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}

// The two loops over channels take vectors as wide as there are, all within a row's stride.
constexpr int64_t lanes = 8 * kSide;
constexpr int most_score_rows = 3 * kSide, most_value_vectors = 3 * kSide;  // 12 or 24 sums, in 16 or 32 registers

__m128 sums_of(const Floats* v) {
    __m256 eights[group];
    for (int h = 0; h < group; ++h) {
        eights[h] = row_of(v[h], 0);
        if (kSide == 2) eights[h] = _mm256_add_ps(eights[h], row_of(v[h], 1));
    }
    return horizontal_sums(eights);
}

// scores[r][h] = row r . head h.
template <int rows>
void score_rows(const float* q, const float* k, int64_t stride, int64_t width, float* scores) {
    Floats sums[rows][group];
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int h = 0; h < group; ++h) sums[r][h] = no_floats();
    }
    for (int64_t i = 0; i < width; i += lanes) {
        Floats row[rows];
#pragma GCC unroll 6
        for (int r = 0; r < rows; ++r) row[r] = load(k + r * stride + i);
#pragma GCC unroll 4
        for (int h = 0; h < group; ++h) {
            const Floats head = load(q + h * stride + i);
#pragma GCC unroll 6
            for (int r = 0; r < rows; ++r) sums[r][h] = add_product(head, row[r], sums[r][h]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) _mm_store_ps(scores + r * group, sums_of(sums[r]));
}

void score(const float* q, const float* k, int64_t rows, const Shape& s, float* scores) {
    constexpr int most = most_score_rows;
    int64_t r = 0;
    for (; r + most <= rows; r += most) {
        score_rows<most>(q, k + r * s.row_stride, s.row_stride, s.width, scores + r * group);
    }
    for (; r + 3 <= rows; r += 3) score_rows<3>(q, k + r * s.row_stride, s.row_stride, s.width, scores + r * group);
    for (; r < rows; ++r) score_rows<1>(q, k + r * s.row_stride, s.row_stride, s.width, scores + r * group);
}

__m128 largest_by_head(const float* scores, int64_t rows) {
    __m128 top = _mm_load_ps(scores);
    for (int64_t r = 1; r < rows; ++r) top = _mm_max_ps(_mm_load_ps(scores + r * group), top);
    return top;
}

// scores become shares; their sum is added to the total of each head, row by row.
void to_shares(float* scores, int64_t rows, const float* top, float* total) {
    const __m256 tops = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(top));
    __m128 sums = _mm_loadu_ps(total);
    if (rows % 2 != 0) _mm_store_ps(scores + rows * group, _mm_setzero_ps());
    for (int64_t r = 0; r < rows; r += 2) {
        const __m256 shares = share(_mm256_load_ps(scores + r * group), tops);
        _mm256_store_ps(scores + r * group, shares);
        sums = _mm_add_ps(sums, _mm256_castps256_ps128(shares));
        if (r + 1 < rows) sums = _mm_add_ps(sums, _mm256_extractf128_ps(shares, 1));
    }
    _mm_storeu_ps(total, sums);
}

// values[h][0 .. lanes * vectors) += sum over rows of shares[r][h] * v[r].
template <int vectors>
void add_values(const float* shares, const float* v, int64_t rows, const Shape& s, float* values) {
    Floats sums[group][vectors];
    for (int h = 0; h < group; ++h) {
        for (int i = 0; i < vectors; ++i) sums[h][i] = load(values + h * s.value_stride + lanes * i);
    }
    for (int64_t r = 0; r < rows; ++r) {
        Floats row[vectors];
        for (int i = 0; i < vectors; ++i) row[i] = load(v + r * s.row_stride + lanes * i);
        for (int h = 0; h < group; ++h) {
            const Floats weight = all_floats(shares[r * group + h]);
            for (int i = 0; i < vectors; ++i) sums[h][i] = add_product(weight, row[i], sums[h][i]);
        }
    }
    for (int h = 0; h < group; ++h) {
        for (int i = 0; i < vectors; ++i) store(values + h * s.value_stride + lanes * i, sums[h][i]);
    }
}

constexpr int64_t value_tile = most_value_vectors * lanes;

template <int vectors = most_value_vectors>
void add_value_tile(const float* shares, const float* v, int64_t rows, const Shape& s, int64_t count, float* values) {
    if constexpr (vectors > 1) {
        if (count <= (vectors - 1) * lanes) return add_value_tile<vectors - 1>(shares, v, rows, s, count, values);
    }
    add_values<vectors>(shares, v, rows, s, values);
}

#else

void score(const float* q, const float* k, int64_t rows, const Shape& s, float* scores) {
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t h = 0; h < group; ++h) {
            float sum = 0.0F;
            for (int64_t i = 0; i < s.width; ++i) sum += q[h * s.row_stride + i] * k[r * s.row_stride + i];
            scores[r * group + h] = sum;
        }
    }
}

void to_shares(float* scores, int64_t rows, const float* top, float* total) {
    for (int64_t i = 0; i < rows * group; ++i) {
        scores[i] = share_of(scores[i], top[i % group]);
        total[i % group] += scores[i];
    }
}

constexpr int64_t value_tile = 16;

void add_value_tile(const float* shares, const float* v, int64_t rows, const Shape& s, int64_t count, float* values) {
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t h = 0; h < group; ++h) {
            float* sums = values + h * s.value_stride;
            for (int64_t i = 0; i < count; ++i) sums[i] += shares[r * group + h] * v[r * s.row_stride + i];
        }
    }
}

#endif

// ------------------------------------------------------------------------------------------ a query and a block

// Moves the reference points of four heads up to the largest score, and with them what was summed so far.
void raise_tops(const float* scores, int64_t rows, const Query& query, int64_t head, const Shape& s) {
    float largest[group];
#ifdef __AVX2__
    _mm_storeu_ps(largest, largest_by_head(scores, rows));
#else
    for (int64_t h = 0; h < group; ++h) {
        largest[h] = scores[h];
        for (int64_t r = 1; r < rows; ++r) {
            if (scores[r * group + h] > largest[h]) largest[h] = scores[r * group + h];
        }
    }
#endif
    for (int64_t h = 0; h < group; ++h) {
        float* const values = query.values + (head + h) * s.value_stride;
        raise_top(next_integer(largest[h]), query.top[head + h], query.total[head + h], values, s.value_dim);
    }
}

// All heads of a query against `rows` decoded rows; `scores` holds [heads / 4][block_rows][4].
template <class RowAt>
void attend_block(const Query& query, int64_t heads, const float* k, int64_t rows, const Shape& s, float* scores,
                  Ahead<RowAt> ahead) {
    const int64_t steps = heads / group * divided(rows, strip_rows);
    const int64_t each = divided(ahead.lines(), steps);
    for (int64_t r = 0; r < rows; r += strip_rows) {
        const int64_t count = rows - r < strip_rows ? rows - r : strip_rows;
        for (int64_t head = 0; head < heads; head += group) {
            ahead.ask(each);
            float* const of_strip = scores + head * block_rows + r * group;
            score(query.q + head * s.row_stride, k + r * s.row_stride, count, s, of_strip);
        }
    }
    for (int64_t head = 0; head < heads; head += group) {
        float* const of_group = scores + head * block_rows;
        raise_tops(of_group, rows, query, head, s);
        to_shares(of_group, rows, query.top + head, query.total + head);
    }
    for (int64_t i = 0; i < s.value_dim; i += value_tile) {
        const int64_t count = s.value_dim - i < value_tile ? s.value_dim - i : value_tile;
        for (int64_t head = 0; head < heads; head += group) {
            float* const values = query.values + head * s.value_stride + i;
            add_value_tile(scores + head * block_rows, k + i, rows, s, count, values);
        }
    }
}

// ------------------------------------------------------------------------------------------ a tile of queries

struct Worker {
    static constexpr bool zeroed = true;
    const Attention& call;
    Shape shape;
    float *k, *scores, *q, *values, *top, *total;

    static Shape shape_of(const Attention& c) {
        return {c.width, c.value_dim, padded_stride(c.width), padded_stride(c.value_dim)};
    }

    static int64_t bytes(const Attention& c) {
        const Shape s = shape_of(c);
        const int64_t heads = c.tile * c.part_heads;
        return Scratch::bytes_of<float>(block_rows * s.row_stride) + Scratch::bytes_of<float>(block_rows * c.part_heads) +
               Scratch::bytes_of<float>(heads * s.row_stride) + Scratch::bytes_of<float>(heads * s.value_stride) +
               2 * Scratch::bytes_of<float>(heads);
    }

    Worker(Scratch& scratch, const Attention& c)
        : call(c),
          shape(shape_of(c)),
          k(scratch.take<float>(block_rows * shape.row_stride)),
          scores(scratch.take<float>(block_rows * c.part_heads)),
          q(scratch.take<float>(c.tile * c.part_heads * shape.row_stride)),
          values(scratch.take<float>(c.tile * c.part_heads * shape.value_stride)),
          top(scratch.take<float>(c.tile * c.part_heads)),
          total(scratch.take<float>(c.tile * c.part_heads)) {}

    Query query(int64_t i) const {
        const int64_t head = i * call.part_heads;
        return {q + head * shape.row_stride, values + head * shape.value_stride, top + head, total + head};
    }

    void run(int64_t task) const {
        const Part part(call, task);
        for (int64_t i = 0; i < part.count; ++i) begin(query(i), part.first + i, part.first_head, part.heads);
        for (int64_t source = 0; source < call.num_sources; ++source) {
            const Rows& rows = call.sources[source];
            if (rows.columns < 0) {
                attend_range(rows, part.first, part.count, part.heads);
                continue;
            }
            for (int64_t i = 0; i < part.count; ++i) attend_list(rows, part.first + i, query(i), part.heads);
        }
        for (int64_t i = 0; i < part.count; ++i) finish(query(i), part.first + i, part.first_head, part.heads);
    }

    // Heads behind the last one stay zero: they fill the last group of four.
    void begin(const Query& to, int64_t row, int64_t first_head, int64_t heads) const {
        const Shape& s = shape;
        const float scale = call.scale * log2_e;
        __builtin_memset(to.values, 0, static_cast<uint64_t>(call.part_heads * s.value_stride) * 4);
        __builtin_memset(to.q, 0, static_cast<uint64_t>(call.part_heads * s.row_stride) * 4);
        for (int64_t h = 0; h < heads; ++h) {
            const float* const from = call.q + (row * call.heads + first_head + h) * s.width;
            for (int64_t i = 0; i < s.width; ++i) to.q[h * s.row_stride + i] = from[i] * scale;
        }
        for (int64_t h = 0; h < call.part_heads; ++h) {
            begin_softmax(call, h < heads ? first_head + h : -1, to.top[h], to.total[h]);
        }
    }

    // Blocks over the union of the tile's ranges; each query uses its own part of a block.
    void attend_range(const Rows& rows, int64_t first, int64_t count, int64_t heads) const {
        int64_t low = rows.start[first], high = rows.stop[first];
        const int64_t row_bytes = rows.layout.row_bytes;
        const uint8_t* const end = rows.packed + rows.num_rows * row_bytes;
        const auto in_order = [](int64_t) -> const uint8_t* { return nullptr; };
        for (int64_t i = 1; i < count; ++i) {
            if (rows.start[first + i] < low) low = rows.start[first + i];
            if (rows.stop[first + i] > high) high = rows.stop[first + i];
        }
        for (int64_t from = low; from < high; from += block_rows) {
            const int64_t to = from + block_rows < high ? from + block_rows : high;
            for (int64_t row = from; row < to; ++row) {
                const uint8_t* const packed = rows.packed + row * row_bytes;
                if (row + block_rows < high) ask_for(packed + block_rows * row_bytes, row_bytes, end);
                decode_row(packed, rows.layout, k + (row - from) * shape.row_stride);
            }
            for (int64_t i = 0; i < count; ++i) {
                const int64_t start = rows.start[first + i] > from ? rows.start[first + i] : from;
                const int64_t stop = rows.stop[first + i] < to ? rows.stop[first + i] : to;
                if (start >= stop) continue;
                const float* const seen = k + (start - from) * shape.row_stride;
                attend_block(query(i), round_up(heads, group), seen, stop - start, shape, scores,
                             Ahead<decltype(in_order)>(in_order, row_bytes, 0));
            }
        }
    }

    void attend_list(const Rows& rows, int64_t row, const Query& to, int64_t heads) const {
        const int32_t* const index = rows.index + row * rows.columns;
        int64_t used = 0;
        while (used < rows.columns && index[used] >= 0) ++used;
        const auto asking = [&](int64_t from) {  // for the rows of a block
            const auto row_at = [=](int64_t i) { return rows.packed + index[from + i] * rows.layout.row_bytes; };
            const int64_t rest = used - from;
            return Ahead<decltype(row_at)>(row_at, rows.layout.row_bytes, rest < block_rows ? rest : block_rows);
        };
        asking(0).ask(block_rows);
        for (int64_t from = 0; from < used; from += block_rows) {
            const int64_t rest = used - from, count = rest < block_rows ? rest : block_rows;
            for (int64_t i = 0; i < count; ++i) {
                decode_row(rows.packed + index[from + i] * rows.layout.row_bytes, rows.layout, k + i * shape.row_stride);
            }
            attend_block(to, round_up(heads, group), k, count, shape, scores, asking(from + count));
        }
    }

    void finish(const Query& from, int64_t row, int64_t first_head, int64_t heads) const {
        const Shape& s = shape;
        finish_heads(call, row, first_head, heads, [&](int64_t h, float* to) {
            for (int64_t i = 0; i < s.value_dim; ++i) to[i] = from.values[h * s.value_stride + i] / from.total[h];
        });
    }
};

bool within(const Rows& rows, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        if (rows.columns < 0) {
            const int64_t start = rows.start[i], stop = rows.stop[i];
            if (start < stop && (start < 0 || stop > rows.num_rows)) return false;
            continue;
        }
        const int32_t* const index = rows.index + i * rows.columns;
        for (int64_t c = 0; c < rows.columns && index[c] >= 0; ++c) {
            if (index[c] >= rows.num_rows) return false;
        }
    }
    return true;
}

// Rows seen by all queries together, at most.
int64_t count_rows(const Rows& rows, int64_t n) {
    if (rows.columns >= 0) return n * rows.columns;
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += rows.stop[i] > rows.start[i] ? rows.stop[i] - rows.start[i] : 0;
    return count;
}

// Few heads: more queries in a tile, so that a row is decoded for some 64 heads.
int64_t queries_together(int64_t heads) { return heads >= 64 ? 1 : 64 / heads; }

template <class Worker>
void run_tasks(const Attention& call, int32_t threads) {
    share_tasks(call.tiles * call.head_parts, threads, [&call](const auto& next) {
        Scratch scratch(Worker::bytes(call), Worker::zeroed);
        const Worker worker(scratch, call);
        for (int64_t task = next(); task >= 0; task = next()) worker.run(task);
    });
}

}  // namespace

void sparse_attention(const float* q, const Rows* sources, int64_t num_sources, const float* sink,
                      const float* frequencies, float* out, int64_t n, int64_t heads, int64_t width, int64_t value_dim,
                      int64_t position, int64_t pairs, float scale, int32_t* refused, int32_t threads) {
    *refused = -1;
    int64_t rows = 0;
    for (int64_t i = 0; i < num_sources; ++i) {
        rows += count_rows(sources[i], n);
        if (within(sources[i], n)) continue;
        *refused = static_cast<int32_t>(i);
        return;
    }
    if (n == 0 || heads == 0) return;
    if (rows * heads * width < 1 << 17) threads = 1;  // some 5 us: not worth a fork
    Attention call{q, sources, num_sources, sink, frequencies, out, n, heads, width, value_dim, position, pairs, scale};
#if defined(__AMX_BF16__)
    if (suits_blocks(call)) {
        split_tasks(call, queries_of_tiles(heads), kTileSide, threads);
        return run_tasks<TileWorker>(call, threads);
    }
#elif defined(__AVX2__)
    if (suits_blocks(call)) {
        split_tasks(call, queries_together(round_up(heads, kHeadsSummed)), kHeadsSummed, threads);
        return run_tasks<Int16Worker>(call, threads);
    }
#endif
    split_tasks(call, queries_together(round_up(heads, group)), group, threads);
    run_tasks<Worker>(call, threads);
}

}  // namespace tenfold::TENFOLD_ISA
