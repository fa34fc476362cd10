// The gradient of a convolution's weight as matrix products over pixels: channels of one side by vectors of the other's
// stay in registers while the pixels go by.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "conv_plan.h"
#include "conv_tile.h"
#include "gankern/conv.h"
#include "gankern/parallel.h"
#include "kernels.h"
#include "transpose.h"
#include "winograd.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

// Pixels of two sides that are multiplied, as places of their channels.
struct Pairs {
    std::vector<int64_t> left, right;

    void clear() {
        left.clear();
        right.clear();
    }
    void add_row(int64_t count, int64_t left_at, int64_t left_step, int64_t right_at, int64_t right_step) {
        size_t size = left.size();
        left.resize(size + count);
        right.resize(size + count);
        for (int64_t x = 0; x < count; ++x) {
            left[size + x] = left_at + x * left_step;
            right[size + x] = right_at + x * right_step;
        }
    }
};

// Pixels that are gone through at once: their gradients and one block of their images fit in the nearest cache.
constexpr int64_t kPixelChunk = 96;

// sums[row of R][V vectors] += left[pixel][row] * right[pixel] over pixels, which are added up for themselves: over all
// images rounding errors would pile up. The last of the vectors may be a part.
template <int R, int V>
void correlate(const float* left, const int64_t* left_at, const float* right, const int64_t* right_at, int64_t count,
               int part, float* sums, bool first) {
    Tile<R, V> tile;
    tile.clear();
    for (int64_t p = 0; p < count; ++p) {
        const float *x = left + left_at[p], *y = right + right_at[p];
        Vec<float> factor[V];
        for (int v = 0; v + 1 < V; ++v) factor[v] = load(y + v * kLane);
        factor[V - 1] = load(y + (V - 1) * kLane, part, 0.0f);
        for (int r = 0; r < R; ++r) {
            Vec<float> f = splat(x[r]);
            for (int v = 0; v < V; ++v) tile.sums[r][v] += f * factor[v];
        }
    }
    if (!first) tile.add(sums, kWidth);
    tile.store(sums, kWidth);
}

// A block of channels of some pixels, side by side: in an image, whose rows are as long as powers of two, they would
// drive each other out of the nearest cache.
template <int V>
struct Gathered {
    alignas(64) float values[kPixelChunk * V * kLane];
    int64_t at[kPixelChunk];

    void gather(const float* from, const int64_t* places, int64_t count, int part) {
        for (int64_t p = 0; p < count; ++p) {
            const float* pixel = from + places[p];
            float* to = values + p * V * kLane;
            at[p] = p * V * kLane;
            for (int v = 0; v + 1 < V; ++v) store(to + v * kLane, load(pixel + v * kLane));
            store(to + (V - 1) * kLane, load(pixel + (V - 1) * kLane, part, 0.0f));
        }
    }
};

// A block of the right side's channels, for the left side's [begin, end).
template <int V>
void correlate_all(const float* left, const float* right, const Pairs& pairs, int64_t begin, int64_t end, int part,
                   float* sums, bool first) {
    auto count = static_cast<int64_t>(pairs.left.size());
    bool often = end - begin > 2 * kRows<V>;
    Gathered<V> gathered;
    // Also where there are no pixels: the sums are then zero.
    for (int64_t at = 0; at == 0 || at < count; at += kPixelChunk, first = false) {
        int64_t pixels = std::min(kPixelChunk, count - at);
        const int64_t *left_at = pairs.left.data() + at, *right_at = pairs.right.data() + at;
        if (often) gathered.gather(right, right_at, pixels, part);
        for_each_tile<kRows<V>>(begin, end, [&](int64_t k, auto rows) {
            float* tile_sums = sums + k * kWidth;
            if (often)
                correlate<rows.value, V>(left + k, left_at, gathered.values, gathered.at, pixels, kLane, tile_sums,
                                         first);
            else
                correlate<rows.value, V>(left + k, left_at, right, right_at, pixels, part, tile_sums, first);
        });
    }
}

// sums[tap][block of right][row of left][kWidth of right]: left^T * right over the pairs of pixels of each tap.
struct Correlation {
    const ConvShape& shape;
    int64_t taps, rows, columns;  // kernel elements; channels of the left and of the right side
    const float *left, *right;
    float* sums;

    int64_t blocks() const { return (columns + kWidth - 1) / kWidth; }

    // pair(tap, piece, pairs) finds a tap's pixels in a piece of work. A thread owns a part of the sums and goes
    // through all pieces, so that each sum has one order.
    template <class Pair>
    void run(const Pair& pair) const {
        parallel_for(taps * blocks() * rows, shape.threads,
                     [&](int64_t begin, int64_t end) { add(conv_pieces(shape), begin, end, pair); });
    }

    // The products of all pieces to the sums [begin, end).
    template <class Pair>
    void add(const ConvPieces& pieces, int64_t begin, int64_t end, const Pair& pair) const {
        int64_t per_tap = blocks() * rows;
        Pairs pairs;
        for (int64_t p = 0; p < pieces.count; ++p)
            for (int64_t item = begin; item < end;) {
                int64_t tap = item / per_tap, tap_end = std::min(end, (tap + 1) * per_tap);
                pairs.clear();
                pair(tap, pieces.at(p), pairs);
                while (item < tap_end) {
                    int64_t block = item / rows % blocks(), r = item % rows;
                    int64_t last = std::min(rows, r + tap_end - item);
                    int64_t width = std::min<int64_t>(kWidth, columns - block * kWidth);
                    int vectors = static_cast<int>((width + kLane - 1) / kLane);
                    int part = static_cast<int>(width - (vectors - 1) * kLane);
                    with_constant<kVectors>(vectors, [&](auto v) {
                        correlate_all<v.value>(left, right + block * kWidth, pairs, r, last, part,
                                               sums + (item - r) * kWidth, p == 0);
                    });
                    item += last - r;
                }
            }
    }
};

// The sums of taps, blocks of channels, output channels and channels to their places in the weight's gradient.
void spread_sums(const ConvWeightGrad& a, int64_t taps, int64_t blocks) {
    const ConvShape& s = a.shape;
    const int64_t (&step)[4] = s.weight_strides;
    int64_t tap_sums = blocks * s.out_channels * kWidth;
    const float* end = a.scratch + taps * tap_sums;
    parallel_for(s.out_channels, s.threads, [&](int64_t begin, int64_t stop) {
        for (int64_t k = begin; k < stop; ++k)
            for (int64_t c = 0; c < s.channels; c += kWidth) {
                int64_t width = std::min<int64_t>(kWidth, s.channels - c);
                const float* from = a.scratch + (c / kWidth * s.out_channels + k) * kWidth;
                float* to = a.grad_weight + k * step[0] + c * step[1];
                bool side_by_side = step[3] == 1 && step[2] == s.kernel[1];
                for (int64_t t = 0; t < taps && side_by_side; t += kLane) {
                    int part = static_cast<int>(std::min<int64_t>(kLane, taps - t));
                    for_each_column(from + t * tap_sums, tap_sums, part, width, end,
                                    [&](int64_t i, Vec<float> sums) { store(to + i * step[1] + t, part, sums); });
                }
                for (int64_t t = 0; t < taps && !side_by_side; ++t)
                    for (int64_t i = 0; i < width; ++i)
                        to[i * step[1] + t / s.kernel[1] * step[2] + t % s.kernel[1] * step[3]] =
                            from[t * tap_sums + i];
            }
    });
}

// Few input channels: vectors run along the output channels, and the values under a row of the kernel are the rows of
// the product. The images are copied with zeros around them, so that every pixel has all of them. False where the
// result is not finite: a zero may then have been multiplied by what is not.
bool stem_weight_grad(const ConvWeightGrad& a) {
    const ConvShape& s = a.shape;
    int64_t height = (s.out_height - 1) * s.stride[0] + (s.kernel[0] - 1) * s.dilation[0] + 1;
    int64_t width = (s.out_width - 1) * s.stride[1] + s.kernel[1], line = width * s.channels;
    float* padded = a.scratch;
    parallel_for(s.n * height, s.threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            int64_t y = r % height - s.padding[0], left = std::min(s.padding[1], width);
            int64_t columns = y < 0 || y >= s.height ? 0 : std::min(s.width, width - left);
            float* to = padded + r * line;
            std::fill_n(to, line, 0.0f);
            if (columns > 0)
                std::copy_n(a.input + (r / height * s.height + y) * s.width * s.channels, columns * s.channels,
                            to + left * s.channels);
        }
    });
    int64_t run = s.kernel[1] * s.channels, out_line = s.out_width * s.out_channels;
    Correlation product{s, s.kernel[0], run, s.out_channels, padded, a.grad_output, padded + s.n * height * line};
    product.run([&](int64_t i, const ConvPiece& piece, Pairs& pairs) {
        for (int64_t n = piece.image; n < piece.image + piece.images; ++n)
            for (int64_t y = piece.row; y < piece.row + piece.rows; ++y)
                pairs.add_row(s.out_width, (n * height + y * s.stride[0] + i * s.dilation[0]) * line,
                              s.stride[1] * s.channels, (n * s.out_height + y) * out_line, s.out_channels);
    });
    bool finite = true;
    for (int64_t k = 0; k < s.out_channels; ++k)
        for (int64_t i = 0; i < s.kernel[0]; ++i)
            for (int64_t r = 0; r < run; ++r) {
                const int64_t (&step)[4] = s.weight_strides;
                int64_t row = (i * product.blocks() + k / kWidth) * run + r;
                float value = product.sums[row * kWidth + k % kWidth];
                finite = finite && std::isfinite(value);
                a.grad_weight[k * step[0] + r % s.channels * step[1] + i * step[2] + r / s.channels * step[3]] = value;
            }
    return finite;
}

// The adjoint of minimal filtering: the products' gradients are summed up over tiles and transformed once at the end.
// False where the result is not finite.
bool winograd_weight_grad(const ConvWeightGrad& a) {
    Winograd p = winograd_forward(a.shape);
    WinogradTiles tiles_of(p);
    int64_t channels = p.source[2], outputs = p.result[2], blocks = (channels + kWidth - 1) / kWidth;
    int64_t pieces = (tiles_of.all + kWinogradTiles - 1) / kWinogradTiles;
    int64_t shares = std::min<int64_t>(p.threads, pieces), working = winograd_share(a.shape);
    int64_t sum_size = 16 * blocks * outputs * kWidth;
    std::vector<float> nothing(std::max(channels, outputs), 0.0f);
    // A thread has sums of its own, so that what it transforms stays in its cache.
    parallel_for(shares, p.threads, [&](int64_t first_share, int64_t last_share) {
        for (int64_t share = first_share; share < last_share; ++share) {
            float* sums = a.scratch + share * working;
            float* inputs = sums + sum_size;
            float* grads = inputs + 16 * kWinogradTiles * channels;
            Pairs pairs;
            pairs.add_row(kWinogradTiles, 0, outputs, 0, channels);
            int64_t begin = pieces * share / shares, end = pieces * (share + 1) / shares;
            for (int64_t piece = begin; piece < end; ++piece) {
                int64_t from = piece * kWinogradTiles, tiles = std::min(kWinogradTiles, tiles_of.all - from);
                pairs.left.resize(tiles);
                for (int64_t t = 0; t < tiles; ++t) {
                    const float* at[16];
                    tiles_of.pixels(from + t, a.input, nothing.data(), at);
                    for (int64_t c = 0; c < channels; c += kLane) {
                        V values[16];
                        transform_input(at, c, values);
                        for (int64_t i = 0; i < 16; ++i)
                            store(inputs + (i * kWinogradTiles + t) * channels + c, values[i]);
                    }
                    auto [n, y, x] = tiles_of.place(from + t);
                    const float* grad[2][2];
                    for (int64_t i = 0; i < 2; ++i)
                        for (int64_t j = 0; j < 2; ++j)
                            grad[i][j] =
                                y + i < p.result[0] && x + j < p.result[1]
                                    ? a.grad_output + ((n * p.result[0] + y + i) * p.result[1] + x + j) * outputs
                                    : nothing.data();
                    for (int64_t k = 0; k < outputs; k += kLane) {
                        // A g A^T.
                        V rows[4][2];
                        for (int64_t j = 0; j < 2; ++j) {
                            V g0 = load(grad[0][j] + k), g1 = load(grad[1][j] + k);
                            rows[0][j] = g0;
                            rows[1][j] = g0 + g1;
                            rows[2][j] = g0 - g1;
                            rows[3][j] = -g1;
                        }
                        for (int64_t i = 0; i < 4; ++i) {
                            float* to = grads + (4 * i * kWinogradTiles + t) * outputs + k;
                            int64_t step = kWinogradTiles * outputs;
                            store(to, rows[i][0]);
                            store(to + step, rows[i][0] + rows[i][1]);
                            store(to + 2 * step, rows[i][0] - rows[i][1]);
                            store(to + 3 * step, -rows[i][1]);
                        }
                    }
                }
                for (int64_t i = 0; i < 16; ++i)
                    for (int64_t b = 0; b < blocks; ++b) {
                        auto vectors = static_cast<int>(std::min<int64_t>(kWidth, channels - b * kWidth) / kLane);
                        with_constant<kVectors>(vectors, [&](auto v) {
                            correlate_all<v.value>(grads + i * kWinogradTiles * outputs,
                                                   inputs + i * kWinogradTiles * channels + b * kWidth, pairs, 0,
                                                   outputs, kLane, sums + (i * blocks + b) * outputs * kWidth,
                                                   piece == begin);
                        });
                    }
            }
        }
    });
    const int64_t (&step)[4] = a.shape.weight_strides;
    std::atomic<bool> finite{true};
    parallel_for(outputs, p.threads, [&](int64_t begin, int64_t end) {
        Finite seen;
        for (int64_t k = begin; k < end; ++k)
            for (int64_t c = 0; c < channels; c += kLane) {
                // G^T m G, of the sums of all shares.
                V rows[3][4], result[3][3];
                for (int64_t j = 0; j < 4; ++j) {
                    V m[4];
                    for (int64_t i = 0; i < 4; ++i) {
                        const float* from =
                            a.scratch + (((4 * i + j) * blocks + c / kWidth) * outputs + k) * kWidth + c % kWidth;
                        m[i] = load(from);
                        for (int64_t share = 1; share < shares; ++share) m[i] += load(from + share * working);
                    }
                    V half = (m[1] + m[2]) * 0.5f;
                    rows[0][j] = m[0] + half;
                    rows[1][j] = (m[1] - m[2]) * 0.5f;
                    rows[2][j] = m[3] + half;
                }
                for (int64_t i = 0; i < 3; ++i) {
                    V half = (rows[i][1] + rows[i][2]) * 0.5f;
                    result[i][0] = rows[i][0] + half;
                    result[i][1] = (rows[i][1] - rows[i][2]) * 0.5f;
                    result[i][2] = rows[i][3] + half;
                }
                for (int64_t t = 0; t < 9; ++t) {
                    float lanes[kLane];
                    store(lanes, seen.see(result[t / 3][t % 3]));
                    float* to = a.grad_weight + k * step[0] + c * step[1] + t / 3 * step[2] + t % 3 * step[3];
                    for (int64_t l = 0; l < kLane; ++l) to[l * step[1]] = lanes[l];
                }
            }
        if (!seen.all()) finite = false;
    });
    return finite;
}

}  // namespace

void conv_weight_grad(const ConvWeightGrad& a) {
    const ConvShape& s = a.shape;
    if (conv_is_stem(s) && stem_weight_grad(a)) return;
    if (is_winograd_weight_grad(s) && winograd_weight_grad(a)) return;
    int64_t taps = s.kernel[0] * s.kernel[1];
    Correlation product{s, taps, s.out_channels, s.channels, a.grad_output, a.input, a.scratch};
    product.run([&](int64_t tap, const ConvPiece& piece, Pairs& pairs) {
        Reach r = reach(s, tap / s.kernel[1], tap % s.kernel[1]);
        for (int64_t n = piece.image; n < piece.image + piece.images; ++n)
            for (int64_t y = std::max(piece.row, r.begin[0]); y < std::min(piece.row + piece.rows, r.end[0]); ++y) {
                int64_t from = (n * s.height + y * s.stride[0]) * s.width + r.begin[1] * s.stride[1];
                pairs.add_row(r.end[1] - r.begin[1],
                              ((n * s.out_height + y) * s.out_width + r.begin[1]) * s.out_channels, s.out_channels,
                              from * s.channels + r.offset, s.stride[1] * s.channels);
            }
    });
    spread_sums(a, taps, product.blocks());
}

}  // namespace GANKERN_ISA
}  // namespace gankern
