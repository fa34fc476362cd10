// Convolutions as matrix products whose left side is read where it lies: a pixel's taps are runs of values in the
// padded channels_last image. A tile of pixels by channels stays in registers, weights stream from the nearest cache.
#include "gankern/conv.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "conv_plan.h"
#include "gankern/parallel.h"
#include "kernels.h"
#include "vec.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

constexpr int kLane = kLanes<float>;
// Tiles of vectors by rows that leave registers for their factors: of 32 with AVX-512, of 16 else.
constexpr int kVectors = GANKERN_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int kWidth = kVectors * kLane;
static_assert(kConvBlock % kWidth == 0);

template <int V>
constexpr int kRows = GANKERN_VECTOR_BYTES == 64 ? (V == 4 ? 6 : V == 3 ? 8 : 12) : (V == 2 ? 6 : 8);

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

template <int R, int V>
struct Tile {
    Vec<float> sums[R][V];

    GANKERN_INLINE void clear() {
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) sums[r][v] = Vec<float>{};
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

// sums[pixel] = before[pixel] + (image[pixel + offset of k] * weight[k] summed over a chunk of runs).
template <int R, int V>
void multiply(const float* image, const int64_t* pixels, const Run* run, const Run* end, const float* weight,
              const float* before, int64_t before_row, float* sums) {
    Tile<R, V> tile;
    tile.clear();
    for (; run != end; ++run) {
        const float* at[R];
        for (int r = 0; r < R; ++r) at[r] = image + pixels[r] + run->offset;
        const float* w = weight + run->k * V * kLane;
        for (int64_t k = 0; k < run->length; ++k, w += V * kLane) {
            Vec<float> factor[V];
            for (int v = 0; v < V; ++v) factor[v] = load(w + v * kLane);
            for (int r = 0; r < R; ++r) {
                Vec<float> x = splat(at[r][k]);
                for (int v = 0; v < V; ++v) tile.sums[r][v] += x * factor[v];
            }
        }
    }
    tile.add(before, before_row);
    tile.store(sums, kWidth);
}

// A block of channels of one phase: all pixels of a piece of work, one chunk of the weights after the other. The bias
// comes right after the first chunk, as in oneDNN.
template <int V>
void multiply_all(const float* image, const int64_t* pixels, int64_t count, const Phase& phase, const float* weight,
                  const float* bias, float* sums) {
    for (size_t c = 0; c + 1 < phase.chunks.size(); ++c) {
        const Run *run = &phase.runs[phase.chunks[c]], *end = phase.runs.data() + phase.chunks[c + 1];
        const float* before = c == 0 ? bias : sums;
        int64_t row = c == 0 ? 0 : kWidth, p = 0;
        for (; p + kRows<V> <= count; p += kRows<V>)
            multiply<kRows<V>, V>(image, pixels + p, run, end, weight, before + p * row, row, sums + p * kWidth);
        with_constant<kRows<V> - 1>(static_cast<int>(count - p), [&](auto rows) {
            multiply<rows.value, V>(image, pixels + p, run, end, weight, before + p * row, row, sums + p * kWidth);
        });
    }
}

// One piece of the images with zeros around them.
void pad(const ConvPlan& p, const float* source, int64_t image, int64_t row, float* padded) {
    int64_t height = p.source[0], width = p.source[1], c = p.source[2];
    int64_t from = std::max<int64_t>(0, -p.before[1]), to = std::min(width, p.padded[1] - p.before[1]);
    int64_t left = std::clamp<int64_t>(p.before[1], 0, p.padded[1]), right = std::max(left, to + p.before[1]);
    int64_t images = std::min(p.images, p.n - image);
    for (int64_t n = image; n < image + images; ++n)
        for (int64_t r = 0; r < p.padded[0]; ++r, padded += p.padded[1] * c) {
            int64_t y = row * p.source_step[0] + r - p.before[0];
            if (y < 0 || y >= height || from >= to) {
                std::fill(padded, padded + p.padded[1] * c, 0.0f);
                continue;
            }
            const float* line = source + (n * height + y) * width * c;
            std::fill(padded, padded + left * c, 0.0f);
            std::copy(line + from * c, line + to * c, padded + left * c);
            std::fill(padded + right * c, padded + p.padded[1] * c, 0.0f);
        }
}

// Where the pixels of a phase begin in the padded images of a piece.
void place(const ConvPlan& p, const Phase& phase, int64_t images, int64_t rows, std::vector<int64_t>& pixels) {
    pixels.clear();
    for (int64_t n = 0; n < images; ++n)
        for (int64_t y = 0; y < rows; ++y)
            for (int64_t x = 0; x < phase.grid[1]; ++x)
                pixels.push_back(((n * p.padded[0] + y * p.source_step[0]) * p.padded[1] + x * p.source_step[1]) *
                                 p.source[2]);
}

// weight[block][k][channels of the block], one phase after the other; channels are filled up to vectors with zeros.
void pack(const ConvPlan& p, const float* weight, float* packed) {
    int64_t blocks = (p.result[2] + kWidth - 1) / kWidth;
    for (const Phase& phase : p.phases) {
        auto taps = static_cast<int64_t>(phase.taps.size());
        parallel_for(blocks * taps, p.threads, [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; ++item) {
                int64_t first = item / taps * kWidth, lanes = std::min<int64_t>(kWidth, p.result[2] - first);
                int64_t row = (lanes + kLane - 1) / kLane * kLane;
                const Tap& tap = phase.taps[item % taps];
                const float* from = weight + first * p.weight_result + tap.channel * p.weight_source +
                                    tap.i * p.weight_taps[0] + tap.j * p.weight_taps[1];
                float* to = packed + phase.packed + first * phase.depth + tap.k * row;
                for (int64_t c = 0; c < tap.channels; ++c, from += p.weight_source, to += row) {
                    for (int64_t l = 0; l < lanes; ++l) to[l] = from[l * p.weight_result];
                    std::fill(to + lanes, to + row, 0.0f);
                }
            }
        });
    }
}

// Sums of one block of channels to their places in the result.
void spread(const ConvPlan& p, const Phase& phase, int64_t image, int64_t images, int64_t row, int64_t rows,
            int64_t first, const float* sums, float* result) {
    int lanes = static_cast<int>(std::min<int64_t>(kWidth, p.result[2] - first));
    for (int64_t n = image; n < image + images; ++n)
        for (int64_t y = row; y < row + rows; ++y)
            for (int64_t x = 0; x < phase.grid[1]; ++x, sums += kWidth) {
                int64_t at_y = phase.origin[0] + y * p.result_step[0], at_x = phase.origin[1] + x * p.result_step[1];
                float* to = result + ((n * p.result[0] + at_y) * p.result[1] + at_x) * p.result[2] + first;
                for_each_vec<float>(lanes, [&](int64_t l, int part) { store(to + l, part, load(sums + l)); });
            }
}

void convolve(const ConvPlan& p, const float* source, const float* weight, const float* bias, float* result,
              float* scratch) {
    if (p.n == 0) return;
    float* packed = scratch;
    pack(p, weight, packed);
    int64_t blocks = (p.result[2] + kWidth - 1) / kWidth, pieces = p.pieces(), bands = p.bands();
    // Few pieces: threads share one by its blocks of channels.
    int64_t shares = std::min(blocks, (p.threads + pieces - 1) / std::max<int64_t>(pieces, 1));
    int64_t working = p.source_values() + p.pixels() * kConvBlock, tasks = pieces * shares;
    parallel_for_each(tasks, p.threads, [&](int thread, int64_t task) {
        float* padded = scratch + p.packed + thread * working;
        float* sums = padded + p.source_values();
        int64_t piece = task / shares, share = task % shares;
        int64_t image = piece / bands * p.images, row = piece % bands * p.rows;
        int64_t images = std::min(p.images, p.n - image);
        std::vector<int64_t> pixels;
        pad(p, source, image, row, padded);
        for (const Phase& phase : p.phases) {
            int64_t rows = std::min(p.rows, phase.grid[0] - row);
            if (rows <= 0) continue;
            place(p, phase, images, rows, pixels);
            auto count = static_cast<int64_t>(pixels.size());
            for (int64_t b = blocks * share / shares; b < blocks * (share + 1) / shares; ++b) {
                int64_t first = b * kWidth, lanes = std::min<int64_t>(kWidth, p.result[2] - first);
                float offset[kWidth] = {};
                if (bias) std::copy_n(bias + first, lanes, offset);
                const float* w = packed + phase.packed + first * phase.depth;
                if (phase.depth == 0) std::fill(sums, sums + count * kWidth, 0.0f);
                with_constant<kVectors>(static_cast<int>((lanes + kLane - 1) / kLane), [&](auto v) {
                    multiply_all<v.value>(padded, pixels.data(), count, phase, w, offset, sums);
                });
                spread(p, phase, image, images, row, rows, first, sums, result);
            }
        }
    });
}

// sums[k of R][V vectors] += grad[pixel][k] * image[pixel] over pixels, which are added up for themselves: over all
// images rounding errors would pile up.
template <int R, int V>
void correlate(const float* image, const int64_t* pixels, int64_t count, const float* grad, int64_t channels,
               float* sums, bool first) {
    Tile<R, V> tile;
    tile.clear();
    for (int64_t p = 0; p < count; ++p, grad += channels) {
        const float* x = image + pixels[p];
        Vec<float> factor[V];
        for (int v = 0; v < V; ++v) factor[v] = load(x + v * kLane);
        for (int r = 0; r < R; ++r) {
            Vec<float> g = splat(grad[r]);
            for (int v = 0; v < V; ++v) tile.sums[r][v] += g * factor[v];
        }
    }
    if (!first) tile.add(sums, kWidth);
    tile.store(sums, kWidth);
}

// A block of up to kWidth values of a run, for the output channels [begin, end).
template <int V>
void correlate_all(const float* image, const int64_t* pixels, int64_t count, const float* grad, int64_t channels,
                   int64_t begin, int64_t end, float* sums, bool first) {
    int64_t k = begin;
    for (; k + kRows<V> <= end; k += kRows<V>)
        correlate<kRows<V>, V>(image, pixels, count, grad + k, channels, sums + k * kWidth, first);
    with_constant<kRows<V> - 1>(static_cast<int>(end - k), [&](auto rows) {
        correlate<rows.value, V>(image, pixels, count, grad + k, channels, sums + k * kWidth, first);
    });
}

// Pixels that are gone through at once: their gradients and one block of their images fit in the nearest cache.
constexpr int64_t kPixelChunk = 96;

// A block of a run: the values [offset, offset + width) from a pixel, which are rows k of the weight.
struct Block {
    int64_t offset, width, k;
};

}  // namespace

void conv_forward(const ConvForward& a) {
    convolve(plan_forward(a.shape), a.input, a.weight, a.bias, a.output, a.scratch);
}

void conv_input_grad(const ConvInputGrad& a) {
    convolve(plan_input_grad(a.shape), a.grad_output, a.weight, nullptr, a.grad_input, a.scratch);
}

void conv_weight_grad(const ConvWeightGrad& a) {
    ConvPlan p = plan_weight_grad(a.shape);
    const Phase& phase = p.phases[0];
    std::vector<Block> blocks;
    for (const Run& run : phase.runs)
        for (int64_t at = 0; at < run.length; at += kWidth)
            blocks.push_back({run.offset + at, std::min<int64_t>(kWidth, run.length - at), run.k + at});
    int64_t channels = p.result[2], out_row = p.result[1] * channels, bands = p.bands();
    auto size = static_cast<int64_t>(blocks.size());
    float* all_sums = a.scratch + p.threads * p.source_values();
    // A thread owns a share of the sums and goes through all images, so that each sum has one order.
    auto threads = static_cast<int>(std::min<int64_t>(p.threads, size * channels));
    parallel_for(threads, threads, [&](int64_t first_thread, int64_t last_thread) {
        for (int64_t thread = first_thread; thread < last_thread; ++thread) {
            float* padded = a.scratch + thread * p.source_values();
            int64_t begin = size * channels * thread / threads, end = size * channels * (thread + 1) / threads;
            std::vector<int64_t> pixels;
            bool first = true;
            for (int64_t piece = 0; piece < p.pieces(); ++piece) {
                int64_t image = piece / bands * p.images, row = piece % bands * p.rows;
                int64_t images = std::min(p.images, p.n - image), rows = std::min(p.rows, phase.grid[0] - row);
                pad(p, a.input, image, row, padded);
                place(p, phase, images, rows, pixels);
                // Pixels of one image lie one after the other in the gradient; of whole images those of several do.
                const float* grad = a.grad_output + image * p.result[0] * out_row + row * out_row;
                auto count = static_cast<int64_t>(pixels.size());
                for (int64_t at = 0; at < count; at += kPixelChunk, first = false)
                    for (int64_t item = begin; item < end;) {
                        int64_t b = item / channels, k = item % channels;
                        int64_t last = std::min(channels, k + end - item);
                        auto vectors = static_cast<int>((blocks[b].width + kLane - 1) / kLane);
                        with_constant<kVectors>(vectors, [&](auto v) {
                            correlate_all<v.value>(padded + blocks[b].offset, &pixels[at],
                                                   std::min(kPixelChunk, count - at), grad + at * channels, channels,
                                                   k, last, all_sums + b * channels * kWidth, first);
                        });
                        item += last - k;
                    }
            }
            for (int64_t item = begin; item < end; ++item) {
                const Block& block = blocks[item / channels];
                const float* sums = all_sums + item * kWidth;
                float* to = a.grad_weight + item % channels * a.shape.weight_strides[0];
                for (int64_t v = 0; v < block.width; ++v) {
                    const Tap& tap = phase.taps[(block.k + v) / p.source[2]];
                    int64_t c = (block.k + v) % p.source[2];
                    to[c * p.weight_source + tap.i * p.weight_taps[0] + tap.j * p.weight_taps[1]] =
                        first ? 0.0f : sums[v];
                }
            }
        }
    });
}

}  // namespace GANKERN_ISA
}  // namespace gankern
