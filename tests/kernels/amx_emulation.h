// What the tile instructions of AMX do, by Intel's manual, in plain C++: for machines that have none.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace amx {

struct Shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];  // of a row
    uint8_t rows[16];
};

struct Tile {
    uint8_t rows[16][64];
};

thread_local Shapes shapes;
thread_local Tile tiles[8];

// Where a processor would fault.
inline void require(bool holds) {
    if (!holds) abort();
}

inline void loadconfig(const void* from) {
    memcpy(&shapes, from, sizeof shapes);
    require(shapes.palette == 1 && shapes.start_row == 0);
    for (uint8_t byte : shapes.reserved) require(byte == 0);
    for (int t = 0; t < 16; ++t) {
        require(t < 8 ? shapes.rows[t] <= 16 && shapes.bytes[t] <= 64 : shapes.rows[t] == 0 && shapes.bytes[t] == 0);
    }
    memset(tiles, 0, sizeof tiles);
}

inline void release() { memset(&shapes, 0, sizeof shapes); }

inline void zero(int t) {
    require(shapes.palette == 1);
    memset(&tiles[t], 0, sizeof tiles[t]);
}

inline void load(int t, const void* base, int64_t stride) {
    zero(t);
    for (int row = 0; row < shapes.rows[t]; ++row) {
        memcpy(tiles[t].rows[row], (const uint8_t*)base + row * stride, shapes.bytes[t]);
    }
}

inline void store(int t, void* base, int64_t stride) {
    require(shapes.palette == 1);
    for (int row = 0; row < shapes.rows[t]; ++row) {
        memcpy((uint8_t*)base + row * stride, tiles[t].rows[row], shapes.bytes[t]);
    }
}

// c [m, n] += signed bytes of a [m, k] times unsigned bytes of b [k, n], four of both in each lane.
inline void dpbsud(int c, int a, int b) {
    require(shapes.palette == 1 && c != a && c != b && a != b);
    require(shapes.rows[a] == shapes.rows[c] && shapes.bytes[b] == shapes.bytes[c]);
    require(shapes.bytes[a] == 4 * shapes.rows[b] && shapes.bytes[c] % 4 == 0);
    for (int m = 0; m < shapes.rows[c]; ++m) {
        uint32_t sums[16];
        memcpy(sums, tiles[c].rows[m], sizeof sums);
        for (int k = 0; k < shapes.rows[b]; ++k) {
            for (int n = 0; n < shapes.bytes[c] / 4; ++n) {
                for (int i = 0; i < 4; ++i) {
                    sums[n] += (int8_t)tiles[a].rows[m][4 * k + i] * (int)tiles[b].rows[k][4 * n + i];
                }
            }
        }
        memcpy(tiles[c].rows[m], sums, sizeof sums);
    }
}

}  // namespace amx

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#define _tile_loadconfig amx::loadconfig
#define _tile_release amx::release
#define _tile_zero amx::zero
#define _tile_loadd amx::load
#define _tile_stored amx::store
#define _tile_dpbsud amx::dpbsud
