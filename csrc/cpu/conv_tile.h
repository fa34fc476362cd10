// A tile of a matrix product in registers: rows by vectors.
#pragma once

#include <type_traits>

#include "activation.h"
#include "conv_plan.h"
#include "vec.h"

namespace gankern {
namespace GANKERN_ISA {

inline constexpr int kLane = kLanes<float>;
// Tiles of vectors by rows that leave registers for their factors: of 32 with AVX-512, of 16 else.
inline constexpr int kVectors = GANKERN_VECTOR_BYTES == 64 ? 4 : 2;
inline constexpr int kWidth = kVectors * kLane;
static_assert(kConvBlock % kWidth == 0);

template <int V>
inline constexpr int kRows = GANKERN_VECTOR_BYTES == 64 ? (V == 4   ? 6
                                                           : V == 3 ? 8
                                                                    : 12)
                                                        : (V == 2 ? 6 : 8);

// Calls f with the number as a constant.
template <int Most, class F>
GANKERN_INLINE void with_constant(int value, const F& f) {
    if constexpr (Most > 0) {
        if (value == Most)
            f(std::integral_constant<int, Most>{});
        else
            with_constant<Most - 1>(value, f);
    }
}

// Calls f(first, rows) for tiles of up to R rows, rows a constant; what is left at the end is halved, since a tile of
// few rows waits for its own additions.
template <int R, class F>
GANKERN_INLINE void for_each_tile(int64_t begin, int64_t end, const F& f) {
    int64_t at = begin;
    for (; end - at >= 2 * R || end - at == R; at += R) f(at, std::integral_constant<int, R>{});
    while (at < end) {
        auto rows = static_cast<int>(end - at > R ? (end - at + 1) / 2 : end - at);
        with_constant<R>(rows, [&](auto constant) { f(at, constant); });
        at += rows;
    }
}

// What ConvFinish makes of values of the result at the place `at`, of channels from c on.
template <Activation act>
GANKERN_INLINE Vec<float> finished(const ConvFinish& finish, Vec<float> values, int64_t at, int64_t c, int part) {
    if (finish.scale) values = values * load(finish.scale + c, part, 0.0f) + load(finish.shift + c, part, 0.0f);
    if (!finish.activated) return activate<float, act>(values, finish.negative_slope);
    return activation_grad_by_output<float, act>(load(finish.activated + at, part, 0.0f), values,
                                                 finish.negative_slope);
}

template <int R, int V>
struct Tile {
    Vec<float> sums[R][V];

    GANKERN_INLINE void clear() {
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) sums[r][v] = Vec<float>{};
    }
    GANKERN_INLINE void load(const float* from, int64_t row) {
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) sums[r][v] = GANKERN_ISA::load(from + r * row + v * kLane);
    }
    // Adds rows[r][k] * weight[k] over k.
    GANKERN_INLINE void multiply(const float* const (&rows)[R], const float* weight, int64_t length) {
        for (int64_t k = 0; k < length; ++k, weight += V * kLane) {
            Vec<float> factor[V];
            for (int v = 0; v < V; ++v) factor[v] = GANKERN_ISA::load(weight + v * kLane);
            for (int r = 0; r < R; ++r) {
                Vec<float> x = splat(rows[r][k]);
                for (int v = 0; v < V; ++v) sums[r][v] += x * factor[v];
            }
        }
    }
    GANKERN_INLINE void add(const float* from, int64_t row) {
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) sums[r][v] += GANKERN_ISA::load(from + r * row + v * kLane);
    }
    GANKERN_INLINE void store(float* to, int64_t row) const {
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) GANKERN_ISA::store(to + r * row + v * kLane, sums[r][v]);
    }
};

}  // namespace GANKERN_ISA
}  // namespace gankern
