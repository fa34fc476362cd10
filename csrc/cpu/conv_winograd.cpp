// 3x3 convolution of stride one by minimal filtering F(2x2, 3x3) (Lavin and Gray, "Fast Algorithms for Convolutional
// Neural Networks", 2016, section 4.1): four products an output pixel and pair of channels instead of nine.
#include <algorithm>
#include <atomic>
#include <vector>

#include "conv_plan.h"
#include "conv_tile.h"
#include "gankern/parallel.h"
#include "kernels.h"
#include "winograd.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

// G g G^T for the weights between two channels.
void transform_weight(const Winograd& p, const float* weight, int64_t k, int64_t c, float* to, int64_t step) {
    float g[3][3], rows[4][3];
    for (int64_t i = 0; i < 3; ++i)
        for (int64_t j = 0; j < 3; ++j)
            g[i][j] = weight[k * p.weight_result + c * p.weight_source + (p.flipped ? 2 - i : i) * p.weight_taps[0] +
                             (p.flipped ? 2 - j : j) * p.weight_taps[1]];
    for (int j = 0; j < 3; ++j) {
        rows[0][j] = g[0][j];
        rows[1][j] = 0.5f * (g[0][j] + g[1][j] + g[2][j]);
        rows[2][j] = 0.5f * (g[0][j] - g[1][j] + g[2][j]);
        rows[3][j] = g[2][j];
    }
    for (int i = 0; i < 4; ++i) {
        float all = rows[i][0] + rows[i][2];
        to[(4 * i) * step] = rows[i][0];
        to[(4 * i + 1) * step] = 0.5f * (all + rows[i][1]);
        to[(4 * i + 2) * step] = 0.5f * (all - rows[i][1]);
        to[(4 * i + 3) * step] = rows[i][2];
    }
}

// sums[tile] = input[tile] * weight over all channels of the source, for a block of those of the result.
template <int W>
void multiply(const float* input, const float* weight, int64_t channels, int64_t tiles, float* sums) {
    for_each_tile<kRows<W>>(0, tiles, [&](int64_t first, auto rows) {
        Tile<rows.value, W> tile;
        tile.clear();
        const float* at[rows.value];
        for (int r = 0; r < rows.value; ++r) at[r] = input + (first + r) * channels;
        tile.multiply(at, weight, channels);
        tile.store(sums + first * kWidth, kWidth);
    });
}

}  // namespace

bool winograd(const Winograd& p, const float* source, const float* weight, const float* bias, const ConvFinish& finish,
              float* result, float* scratch) {
    int64_t channels = p.source[2], outputs = p.result[2], blocks = (outputs + kWidth - 1) / kWidth;
    // weights[product][block of channels of the result][channel of the source][channel of the block]
    float* weights = scratch;
    int64_t per_product = channels * outputs;
    parallel_for(outputs, p.threads, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
            int64_t first = k / kWidth * kWidth, width = std::min<int64_t>(kWidth, outputs - first);
            for (int64_t c = 0; c < channels; ++c)
                transform_weight(p, weight, k, c, weights + first * channels + c * width + k - first, per_product);
        }
    });
    std::vector<float> nothing(channels, 0.0f);
    std::atomic<bool> finite{true};
    WinogradTiles tiles_of(p);
    int64_t pieces = (tiles_of.all + kWinogradTiles - 1) / kWinogradTiles;
    parallel_for_each(pieces, p.threads, [&](int thread, int64_t piece) {
        float* inputs = scratch + 16 * per_product + thread * winograd_piece(p);
        float* sums = inputs + 16 * kWinogradTiles * channels;
        Finite seen;
        int64_t begin = piece * kWinogradTiles, tiles = std::min<int64_t>(kWinogradTiles, tiles_of.all - begin);
        for (int64_t t = 0; t < tiles; ++t) {
            const float* at[16];
            tiles_of.pixels(begin + t, source, nothing.data(), at);
            for (int64_t c = 0; c < channels; c += kLane) {
                V values[16];
                transform_input(at, c, values);
                for (int64_t i = 0; i < 16; ++i) store(inputs + (i * kWinogradTiles + t) * channels + c, values[i]);
            }
        }
        for (int64_t b = 0; b < blocks; ++b) {
            int64_t first = b * kWidth, width = std::min<int64_t>(kWidth, outputs - first);
            for (int64_t i = 0; i < 16; ++i)
                with_constant<kVectors>(static_cast<int>(width / kLane), [&](auto vectors) {
                    multiply<vectors.value>(inputs + i * kWinogradTiles * channels,
                                            weights + i * per_product + first * channels, channels, tiles,
                                            sums + i * kWinogradTiles * kWidth);
                });
            with_activation(finish.activation, [&](auto act) {
                auto put = [&](int64_t at, int64_t c, V values) {
                    store(result + at, finished<act>(finish, seen.see(values), at, first + c, kLane));
                };
                for (int64_t t = 0; t < tiles; ++t) {
                    auto [n, y, x] = tiles_of.place(begin + t);
                    for (int64_t c = 0; c < width; c += kLane) {
                        // A^T m A.
                        V rows[2][4];
                        for (int64_t j = 0; j < 4; ++j) {
                            auto m = [&](int64_t i) {
                                return load(sums + ((4 * i + j) * kWinogradTiles + t) * kWidth + c);
                            };
                            V m1 = m(1), m2 = m(2);
                            rows[0][j] = m(0) + m1 + m2;
                            rows[1][j] = m1 - m2 - m(3);
                        }
                        V offset = bias ? load(bias + first + c) : V{};
                        for (int64_t i = 0; i < 2 && y + i < p.result[0]; ++i) {
                            V* r = rows[i];
                            int64_t to = ((n * p.result[0] + y + i) * p.result[1] + x) * outputs + first + c;
                            put(to, c, r[0] + r[1] + r[2] + offset);
                            if (x + 1 < p.result[1]) put(to + outputs, c, r[1] - r[2] - r[3] + offset);
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
