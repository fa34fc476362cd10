// Tiles of the matrix units: 16 rows of 64 bytes each, four of sums and four of factors.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "conv_bfloat16_plan.h"
#include "gankern/parallel.h"
#include "vec.h"

namespace gankern {
namespace GANKERN_ISA {

// Tiles are set up as long as it lives. Others in the process set up their own before they use them.
class TileScope {
 public:
    TileScope() {
        struct alignas(64) Config {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        };
        static const Config config;
        asm volatile("ldtilecfg %0" ::"m"(config));
    }
    ~TileScope() { _tile_release(); }
    TileScope(const TileScope&) = delete;
    TileScope& operator=(const TileScope&) = delete;
};

// 16 rows of a product's left side.
struct Rows {
    const BFloat16* at;
    int64_t stride;  // of rows, in bytes
    int64_t step;    // values from one step to the next: 32, or 0 where all are zero
};

// Tiles of sums, 2 x 2 or fewer; sums in memory are one tile after the other.
template <int M, int N>
struct SumTiles {
    static constexpr int64_t kSize = tiles::kSide * tiles::kSide;

    static GANKERN_INLINE void clear() {
        _tile_zero(0);
        if constexpr (N > 1) _tile_zero(1);
        if constexpr (M > 1) _tile_zero(2);
        if constexpr (M > 1 && N > 1) _tile_zero(3);
    }
    static GANKERN_INLINE void load(const float* sums) {
        _tile_loadd(0, sums, 64);
        if constexpr (N > 1) _tile_loadd(1, sums + kSize, 64);
        if constexpr (M > 1) _tile_loadd(2, sums + 2 * kSize, 64);
        if constexpr (M > 1 && N > 1) _tile_loadd(3, sums + 3 * kSize, 64);
    }
    static GANKERN_INLINE void store(float* sums) {
        _tile_stored(0, sums, 64);
        if constexpr (N > 1) _tile_stored(1, sums + kSize, 64);
        if constexpr (M > 1) _tile_stored(2, sums + 2 * kSize, 64);
        if constexpr (M > 1 && N > 1) _tile_stored(3, sums + 3 * kSize, 64);
    }
    // As rows of a matrix.
    static GANKERN_INLINE void store_rows(float* to, int64_t row) {
        _tile_stored(0, to, 4 * row);
        if constexpr (N > 1) _tile_stored(1, to + tiles::kSide, 4 * row);
        if constexpr (M > 1) _tile_stored(2, to + tiles::kSide * row, 4 * row);
        if constexpr (M > 1 && N > 1) _tile_stored(3, to + tiles::kSide * (row + 1), 4 * row);
    }
    // One step of 32 terms. The right side holds pairs of terms side by side.
    static GANKERN_INLINE void multiply(const BFloat16* a0, int64_t stride0, const BFloat16* a1, int64_t stride1,
                                        const BFloat16* b) {
        _tile_loadd(6, b, 64);
        _tile_loadd(4, a0, stride0);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (N > 1) {
            _tile_loadd(7, b + tiles::kTile, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (M > 1) {
            _tile_loadd(5, a1, stride1);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (N > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
};

// The intrinsics that load tiles do not tell the compiler that they read memory.
GANKERN_INLINE void finish_writes() { asm volatile("" ::: "memory"); }

template <class F>
GANKERN_INLINE void with_tiles(int64_t m, int64_t n, const F& f) {
    if (m > 1)
        n > 1 ? f(SumTiles<2, 2>{}) : f(SumTiles<2, 1>{});
    else
        n > 1 ? f(SumTiles<1, 2>{}) : f(SumTiles<1, 1>{});
}

GANKERN_INLINE __mmask32 first_lanes(int64_t count) {
    return count >= 32 ? ~__mmask32{0} : static_cast<__mmask32>((1u << count) - 1);
}

GANKERN_INLINE void copy_values(const BFloat16* from, int64_t count, BFloat16* to) {
    for (; count > 32; count -= 32, from += 32, to += 32) _mm512_storeu_si512(to, _mm512_loadu_si512(from));
    __mmask32 lanes = _bzhi_u32(~0u, static_cast<uint32_t>(count));
    _mm512_mask_storeu_epi16(to, lanes, _mm512_maskz_loadu_epi16(lanes, from));
}

GANKERN_INLINE void clear_values(int64_t count, BFloat16* to) {
    for (int64_t i = 0; i < count; i += 32)
        _mm512_mask_storeu_epi16(to + i, first_lanes(count - i), _mm512_setzero_si512());
}

// The images with their borders, put at `room`; as they are where they have none.
inline const BFloat16* with_border(const tiles::Border& b, const BFloat16* images, float* room, int threads) {
    if (!b.any()) return images;
    auto* to = reinterpret_cast<BFloat16*>(room);
    int64_t row = b.whole(1) * b.channels, values = b.size[1] * b.channels, left = b.before[1] * b.channels;
    parallel_for(b.n * b.whole(0), threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            int64_t y = i % b.whole(0) - b.before[0];
            bool inside = y >= 0 && y < b.size[0];
            clear_values(inside ? left : row, to + i * row);
            if (!inside) continue;
            copy_values(images + (i / b.whole(0) * b.size[0] + y) * values, values, to + i * row + left);
            clear_values(row - left - values, to + i * row + left + values);
        }
    });
    return to;
}

}  // namespace GANKERN_ISA
}  // namespace gankern
