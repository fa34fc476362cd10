// 4x4 convolution of stride two by minimal filtering F(2x2, 2x2) of its phases (Winograd, "Arithmetic Complexity of
// Computations", 1980; Lavin and Gray, 2016, for the tiles): nine products for four pixels of a phase instead of
// sixteen.
#include <algorithm>
#include <atomic>
#include <vector>

#include "conv_plan.h"
#include "conv_tile.h"
#include "gankern/parallel.h"
#include "kernels.h"
#include "transpose.h"
#include "winograd.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

// Rows of a block of weights that stay in the nearest cache; their products are added up for themselves.
constexpr int64_t kDepth = 96;

// The 16 elements of the kernel between a channel of the source and a vector of channels of the result.
void load_taps(const PhasePlan& p, const float* weight, V (&taps)[16]) {
    if (p.weight_taps[0] == 4 && p.weight_taps[1] == 1) {
        const float* end = weight + (kLane - 1) * p.weight_result + 16;
        for_each_column(weight, p.weight_result, kLane, 16, end, [&](int64_t t, V values) { taps[t] = values; });
        return;
    }
    for (int64_t t = 0; t < 16; ++t) {
        const float* from = weight + t / 4 * p.weight_taps[0] + t % 4 * p.weight_taps[1];
        float lanes[kLane];
        for (int64_t l = 0; l < kLane; ++l) lanes[l] = from[l * p.weight_result];
        taps[t] = load(lanes);
    }
}

// G g G^T of the 2x2 taps of each phase: g0, g0 + g1 and g1 in each direction. To
// weights[grid][product][block of the result's channels][source, its channel][channel of the block].
void transform_weights(const PhasePlan& p, const float* weight, float* weights) {
    int64_t channels = p.source[2], outputs = p.result[2], per_product = p.depth() * outputs;
    int64_t vectors = outputs / kLane;
    parallel_for(vectors * channels, p.threads, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
            int64_t k = item / channels * kLane, c = item % channels;
            int64_t first = k / kWidth * kWidth, width = std::min<int64_t>(kWidth, outputs - first);
            V taps[16];
            load_taps(p, weight + k * p.weight_result + c * p.weight_source, taps);
            float* to = weights + first * p.depth() + k - first;
            for (const PhaseGrid& grid : p.grids) {
                for (int64_t q = 0; q < p.sources; ++q) {
                    float* row = to + (q * channels + c) * width;
                    const V* g = taps + 4 * grid.tap[q][0] + grid.tap[q][1];
                    int64_t down = 4 * grid.tap_step, right = grid.tap_step;
                    V rows[3][2] = {{g[0], g[right]}, {g[0] + g[down], g[right] + g[down + right]}, {}};
                    rows[2][0] = g[down];
                    rows[2][1] = g[down + right];
                    for (int64_t i = 0; i < 3; ++i) {
                        store(row + 3 * i * per_product, rows[i][0]);
                        store(row + (3 * i + 1) * per_product, rows[i][0] + rows[i][1]);
                        store(row + (3 * i + 2) * per_product, rows[i][1]);
                    }
                }
                to += 9 * per_product;
            }
        }
    });
}

struct Place {
    int64_t n, y, x;  // image, and pixel of the grid
};

Place place(const PhaseGrid& grid, int64_t tile) {
    int64_t across = (grid.size[1] + 1) / 2, per_image = (grid.size[0] + 1) / 2 * across;
    return {tile / per_image, tile % per_image / across * 2, tile % across * 2};
}

// B^T d B of the 3x3 pixels of a source that a tile sees: d0 - d1, d1 and d2 - d1 in each direction.
void transform_input(const PhasePlan& p, const PhaseGrid& grid, int64_t q, const Place& tile, const float* source,
                     const float* nothing, float* to, int64_t step) {
    const float* at[9];
    for (int i = 0; i < 9; ++i) {
        int64_t y = grid.source_origin[q][0] + (tile.y + i / 3) * p.source_step;
        int64_t x = grid.source_origin[q][1] + (tile.x + i % 3) * p.source_step;
        bool inside = y >= 0 && y < p.source[0] && x >= 0 && x < p.source[1];
        at[i] = inside ? source + ((tile.n * p.source[0] + y) * p.source[1] + x) * p.source[2] : nothing;
    }
    for (int64_t c = 0; c < p.source[2]; c += kLane) {
        V rows[9];
        for (int j = 0; j < 3; ++j) {
            V d0 = load(at[j] + c), d1 = load(at[3 + j] + c), d2 = load(at[6 + j] + c);
            rows[j] = d0 - d1;
            rows[3 + j] = d1;
            rows[6 + j] = d2 - d1;
        }
        for (int i = 0; i < 9; i += 3) {
            store(to + i * step + c, rows[i] - rows[i + 1]);
            store(to + (i + 1) * step + c, rows[i + 1]);
            store(to + (i + 2) * step + c, rows[i + 2] - rows[i + 1]);
        }
    }
}

// sums[tile] = input[tile] * weight over all terms, for a block of channels of the result.
template <int W>
void multiply(const float* input, const float* weight, int64_t depth, int64_t tiles, float* sums) {
    for (int64_t k = 0; k < depth; k += kDepth)
        for_each_tile<kRows<W>>(0, tiles, [&](int64_t first, auto rows) {
            Tile<rows.value, W> tile;
            tile.clear();
            const float* at[rows.value];
            for (int r = 0; r < rows.value; ++r) at[r] = input + (first + r) * depth + k;
            tile.multiply(at, weight + k * W * kLane, std::min(kDepth, depth - k));
            if (k > 0) tile.add(sums + first * kWidth, kWidth);
            tile.store(sums + first * kWidth, kWidth);
        });
}

}  // namespace

bool convolve_phases(const PhasePlan& p, const float* source, const float* weight, const float* bias,
                     const ConvFinish& finish, float* result, float* scratch) {
    int64_t depth = p.depth(), channels = p.source[2], outputs = p.result[2], size = p.piece();
    int64_t blocks = (outputs + kWidth - 1) / kWidth, per_product = depth * outputs;
    auto grids = static_cast<int64_t>(p.grids.size());
    transform_weights(p, weight, scratch);
    std::vector<float> nothing(channels, 0.0f);
    std::atomic<bool> finite{true};
    std::vector<int64_t> pieces(grids + 1, 0);
    for (int64_t g = 0; g < grids; ++g) pieces[g + 1] = pieces[g] + (p.tiles(p.grids[g]) + size - 1) / size;
    parallel_for_each(pieces[grids], p.threads, [&](int thread, int64_t task) {
        int64_t g = std::upper_bound(pieces.begin(), pieces.end(), task) - pieces.begin() - 1;
        const PhaseGrid& grid = p.grids[g];
        const float* weights = scratch + 9 * g * per_product;
        float* inputs = scratch + 9 * grids * per_product + thread * phased_working(p);
        float* sums = inputs + 9 * size * depth;
        Finite seen;
        int64_t begin = (task - pieces[g]) * size, tiles = std::min(size, p.tiles(grid) - begin);
        for (int64_t t = 0; t < tiles; ++t)
            for (int64_t q = 0; q < p.sources; ++q)
                transform_input(p, grid, q, place(grid, begin + t), source, nothing.data(),
                                inputs + t * depth + q * channels, size * depth);
        for (int64_t b = 0; b < blocks; ++b) {
            int64_t first = b * kWidth, width = std::min<int64_t>(kWidth, outputs - first);
            for (int64_t i = 0; i < 9; ++i)
                with_constant<kVectors>(static_cast<int>(width / kLane), [&](auto vectors) {
                    multiply<vectors.value>(inputs + i * size * depth, weights + i * per_product + first * depth, depth,
                                            tiles, sums + i * size * kWidth);
                });
            with_activation(finish.activation, [&](auto act) {
                for (int64_t t = 0; t < tiles; ++t) {
                    Place tile = place(grid, begin + t);
                    for (int64_t c = 0; c < width; c += kLane) {
                        // A^T m A: m0 + m1 and m1 + m2 in each direction.
                        V rows[2][3];
                        for (int64_t j = 0; j < 3; ++j) {
                            const float* m = sums + (j * size + t) * kWidth + c;
                            V middle = load(m + 3 * size * kWidth);
                            rows[0][j] = load(m) + middle;
                            rows[1][j] = middle + load(m + 6 * size * kWidth);
                        }
                        V offset = bias ? load(bias + first + c) : V{};
                        for (int64_t i = 0; i < 2 && tile.y + i < grid.size[0]; ++i)
                            for (int64_t j = 0; j < 2 && tile.x + j < grid.size[1]; ++j) {
                                int64_t y = grid.origin[0] + (tile.y + i) * p.result_step;
                                int64_t x = grid.origin[1] + (tile.x + j) * p.result_step;
                                int64_t to = ((tile.n * p.result[0] + y) * p.result[1] + x) * outputs + first + c;
                                V values = seen.see(rows[i][j] + rows[i][j + 1] + offset);
                                store(result + to, finished<act>(finish, values, to, first + c, kLane));
                            }
                    }
                }
            });
        }
        if (!seen.all()) finite = false;
    });
    return finite;
}

}  // namespace GANKERN_ISA
}  // namespace gankern
