// The rows that a query sees, of all its sources, counted through and taken in blocks: which of them lie together is
// the query's own affair, so that neither its company nor where a chunk of the text begins leaves a trace. A block that
// the queries of a task have in common is decoded once.
#pragma once

#include "attention_parts.hpp"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int64_t kFewestHeads = 8;  // fewer would not be worth the decoding, nor fill a tile
constexpr int64_t kBlockRows = 128;
constexpr int64_t kAskAtFirst = 16;  // rows of which the first line is asked for before anything else
constexpr int64_t kCodesTogether = 64;  // under one scale

// Rows whose numbers are e4m3 codes times powers of two.
inline bool suits_blocks(const RowLayout& l) {
    return l.code_bits == 8 && l.scale_bytes == 1 && l.block == kCodesTogether && l.coded % kCodesTogether == 0 &&
           l.plain % 32 == 0;
}

inline bool suits_blocks(const Attention& call) {
    if (call.heads < kFewestHeads) return false;
    for (int64_t i = 0; i < call.num_sources; ++i) {
        const RowLayout &layout = call.sources[i].layout, &first = call.sources[0].layout;
        if (!suits_blocks(layout) || __builtin_memcmp(&layout, &first, sizeof first) != 0) return false;
    }
    return call.num_sources > 0;
}

// Packed rows of one query, one after the other whatever source they are from.
struct Block {
    int64_t query = 0, count = 0;
    const uint8_t* rows[kBlockRows] = {};

    bool has_rows_of(const Block& other) const {
        return count == other.count && __builtin_memcmp(rows, other.rows, static_cast<uint64_t>(count) * 8) == 0;
    }
};

// The blocks of a tile's queries: the first of each, then the second of each.
class Blocks {
public:
    Blocks(const Attention& call, const Part& part, int64_t* sources, int64_t* rows)
        : call_(call), part_(part), source_(sources), row_(rows) {
        for (int64_t i = 0; i < part.count; ++i) source_[i] = row_[i] = 0;
    }

    bool next(Block& to) {
        for (int64_t tried = 0; tried < part_.count; ++tried) {
            to.query = query_;
            query_ = query_ + 1 < part_.count ? query_ + 1 : 0;
            fill(to);
            if (to.count > 0) return true;
        }
        return false;
    }

private:
    void fill(Block& to) {
        int64_t &source = source_[to.query], &row = row_[to.query];
        to.count = 0;
        for (; source < call_.num_sources; ++source, row = 0) {
            const Rows& rows = call_.sources[source];
            const int64_t query = part_.first + to.query, row_bytes = rows.layout.row_bytes;
            if (rows.columns < 0) {
                const int64_t start = rows.start[query], stop = rows.stop[query];
                while (start + row < stop && to.count < kBlockRows) {
                    to.rows[to.count++] = rows.packed + (start + row++) * row_bytes;
                }
                if (start + row < stop) return;
            } else {
                const int32_t* const index = rows.index + query * rows.columns;
                while (row < rows.columns && index[row] >= 0 && to.count < kBlockRows) {
                    to.rows[to.count++] = rows.packed + index[row++] * row_bytes;
                }
                if (row < rows.columns && index[row] >= 0) return;
            }
        }
    }

    const Attention& call_;
    const Part& part_;
    int64_t *source_, *row_;  // where each query goes on
    int64_t query_ = 0;
};

// All blocks of a part: decode(block), unless its rows are those decoded last, and attend(block, whether it is its
// query's first, the next block). Bit i of what comes back: query i has seen any rows.
template <class Decode, class Attend>
uint64_t each_block(const Attention& call, const Part& part, int64_t* sources, int64_t* rows, const Decode& decode,
                    const Attend& attend) {
    Blocks blocks(call, part, sources, rows);
    Block two[2], decoded;
    uint64_t begun = 0;
    bool more = blocks.next(two[0]);
    for (int64_t i = 0; i < kAskAtFirst && i < two[0].count; ++i) __builtin_prefetch(two[0].rows[i], 0, 2);
    for (int64_t at = 0; more; at = 1 - at) {
        const Block& now = two[at];
        more = blocks.next(two[1 - at]);
        if (!now.has_rows_of(decoded)) {
            decode(now);
            decoded = now;
        }
        if (!more) two[1 - at].count = 0;
        const uint64_t bit = uint64_t{1} << now.query;
        attend(now, (begun & bit) == 0, two[1 - at]);
        begun |= bit;
    }
    return begun;
}

// Pieces of a task's memory are listed once, for their sum and for their places.
struct CountBytes {
    int64_t bytes = 0;
    template <class T>
    void operator()(T*&, int64_t count) {
        bytes += Scratch::bytes_of<T>(count);
    }
};

struct TakePieces {
    Scratch& scratch;
    template <class T>
    void operator()(T*& piece, int64_t count) {
        piece = scratch.take<T>(count);
    }
};

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
