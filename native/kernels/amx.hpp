// The tiles of AMX: their shapes, and what compilers do not know of them.
#pragma once

#ifdef __AMX_INT8__

#include <immintrin.h>

#include <cstdint>

namespace tenfold::TENFOLD_ISA {
namespace {

// Rows, and bytes of each, of a tile; none of one that is not used.
struct TileShape {
    int64_t rows, bytes;
};

// The shapes of all eight tiles, for one thread and until the object is gone.
class Tiles {
public:
    explicit Tiles(const TileShape (&shapes)[8]) {
        alignas(64) uint8_t words[64] = {1};
        for (int tile = 0; tile < 8; ++tile) {
            words[16 + 2 * tile] = static_cast<uint8_t>(shapes[tile].bytes);
            words[48 + tile] = static_cast<uint8_t>(shapes[tile].rows);
        }
        _tile_loadconfig(words);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// Tiles are loaded from memory and stored there, which a compiler may not know.
inline void settle_memory() { __asm__ volatile("" ::: "memory"); }

}  // namespace
}  // namespace tenfold::TENFOLD_ISA

#endif
