// Convolutions as matrix products whose left side is read where it lies: a pixel's taps are runs of values in the
// channels_last image. A tile of pixels by channels stays in registers, weights stream from the nearest cache.
#include "gankern/conv.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "conv_plan.h"
#include "conv_tile.h"
#include "conv_weight.h"
#include "gankern/parallel.h"
#include "kernels.h"
#include "vec.h"
#include "winograd.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

// Adds image[pixel + offset of k] * weight[k], summed over a chunk of runs, to `carried`, what the last chunk left, and
// at the end of a sum to what was there before.
template <int R, int V>
void multiply(const float* image, const int64_t* pixels, const Run* runs, const Chunk& chunk, const float* weight,
              const float* before, int64_t before_row, float* carried, float* sums) {
    Tile<R, V> tile;
    if (chunk.starts)
        tile.clear();
    else
        tile.load(carried, kWidth);
    for (int64_t i = chunk.begin; i < chunk.end; ++i) {
        const float* at[R];
        for (int r = 0; r < R; ++r) at[r] = image + pixels[r] + runs[i].offset;
        tile.multiply(at, weight + runs[i].k * V * kLane, runs[i].length);
    }
    if (chunk.ends) tile.add(before, before_row);
    tile.store(chunk.ends ? sums : carried, kWidth);
}

// A block of channels of one zone: all its pixels in a piece of work, one chunk of the weights after the other. The
// bias comes right after the first sum, as in oneDNN.
template <int V>
void multiply_all(const float* image, const int64_t* pixels, int64_t count, const Zone& zone, const float* weight,
                  const float* bias, float* carried, float* sums) {
    const float* before = bias;
    for (const Chunk& chunk : zone.chunks) {
        int64_t row = before == bias ? 0 : kWidth;
        for_each_tile<kRows<V>>(0, count, [&](int64_t p, auto rows) {
            multiply<rows.value, V>(image, pixels + p, zone.runs.data(), chunk, weight, before + p * row, row,
                                    carried + p * kWidth, sums + p * kWidth);
        });
        if (chunk.ends) before = sums;
    }
}

// Places of pixels in the images that are read and in the result.
struct Places {
    std::vector<int64_t> from, to;
};

Places place(const ConvPlan& p, const Phase& phase, const Zone& zone, int64_t image, int64_t images, int64_t row) {
    Places places;
    int64_t top = std::max(zone.begin[0], row), bottom = std::min(zone.end[0], row + p.rows);
    int64_t width = zone.end[1] - zone.begin[1], count = images * std::max<int64_t>(bottom - top, 0) * width;
    places.from.resize(count);
    places.to.resize(count);
    int64_t *from = places.from.data(), *to = places.to.data();
    for (int64_t n = image; n < image + images; ++n)
        for (int64_t y = top; y < bottom; ++y, from += width, to += width) {
            int64_t line = (n * p.source[0] + y * p.source_step[0]) * p.source[1] + zone.begin[1] * p.source_step[1];
            int64_t at = (n * p.result[0] + phase.origin[0] + y * p.result_step[0]) * p.result[1] + phase.origin[1] +
                         zone.begin[1] * p.result_step[1];
            for (int64_t x = 0; x < width; ++x) {
                from[x] = (line + x * p.source_step[1]) * p.source[2];
                to[x] = (at + x * p.result_step[1]) * p.result[2];
            }
        }
    return places;
}

// The weight as convolve() reads it: [block of the result's channels][row][channels of the block], one phase after the
// other; channels are filled up to vectors with zeros.
void pack_weight(const ConvPlan& p, const float* weight, float* packed) {
    struct Target {
        const Phase* phase;
        int64_t tap;
    };
    std::vector<WeightTap<Target>> taps;
    for (const Phase& phase : p.phases)
        for (size_t t = 0; t < phase.taps.size(); ++t)
            taps.push_back({phase.taps[t], {&phase, static_cast<int64_t>(t)}});
    WeightColumns<Target> columns({p.result[2], p.source[2], p.weight_result, p.weight_source}, weight,
                                  std::move(taps));
    columns.run(p.threads, [&](const Target& to, int64_t channel, int64_t c, Vec<float> values) {
        int64_t first = channel / kWidth * kWidth, lanes = std::min<int64_t>(kWidth, p.result[2] - first);
        int64_t width = (lanes + kLane - 1) / kLane * kLane;
        float* block = packed + to.phase->packed + first * to.phase->depth;
        store(block + p.row(*to.phase, to.tap, c) * width + channel - first, values);
    });
}

void convolve(const ConvPlan& p, const float* source, const float* weight, const float* bias, const ConvFinish& finish,
              float* result, float* scratch) {
    if (p.n == 0) return;
    float* packed = scratch;
    pack_weight(p, weight, packed);
    int64_t blocks = (p.result[2] + kWidth - 1) / kWidth, pieces = p.pieces(), bands = p.bands();
    // Few pieces: threads share one by its blocks of channels.
    int64_t shares = std::min(blocks, (p.threads + pieces - 1) / std::max<int64_t>(pieces, 1));
    int64_t tasks = pieces * shares;
    parallel_for_each(tasks, p.threads, [&](int thread, int64_t task) {
        float* sums = scratch + p.packed + thread * p.sums();
        float* carried = sums + (p.in_blocks ? p.sums() / 2 : 0);
        int64_t piece = task / shares, share = task % shares;
        int64_t image = piece / bands * p.images, row = piece % bands * p.rows;
        int64_t images = std::min(p.images, p.n - image);
        std::vector<Places> places;
        for (const Phase& phase : p.phases)
            for (const Zone& zone : phase.zones) places.push_back(place(p, phase, zone, image, images, row));
        // All zones before the next block: its weights stay in the second cache.
        for (int64_t b = blocks * share / shares; b < blocks * (share + 1) / shares; ++b) {
            int64_t first = b * kWidth, lanes = std::min<int64_t>(kWidth, p.result[2] - first);
            float offset[kWidth] = {};
            if (bias) std::copy_n(bias + first, lanes, offset);
            auto at = places.begin();
            for (const Phase& phase : p.phases)
                for (const Zone& zone : phase.zones) {
                    const Places& pixels = *at++;
                    auto count = static_cast<int64_t>(pixels.to.size());
                    const float* w = packed + phase.packed + first * phase.depth;
                    // No taps, no chunks: pixels that no output saw.
                    for (int64_t i = 0; i < count && zone.chunks.empty(); ++i)
                        std::copy_n(offset, kWidth, sums + i * kWidth);
                    with_constant<kVectors>(static_cast<int>((lanes + kLane - 1) / kLane), [&](auto v) {
                        multiply_all<v.value>(source, pixels.from.data(), count, zone, w, offset, carried, sums);
                    });
                    with_activation(finish.activation, [&](auto act) {
                        for (int64_t i = 0; i < count; ++i)
                            for_each_vec<float>(lanes, [&](int64_t l, int part) {
                                int64_t to = pixels.to[i] + first + l;
                                Vec<float> values = load(sums + i * kWidth + l);
                                store(result + to, part, finished<act>(finish, values, to, first + l, part));
                            });
                    });
                }
        }
    });
}

}  // namespace

void conv_forward(const ConvForward& a) {
    if (is_winograd(a.shape) &&
        winograd(winograd_forward(a.shape), a.input, a.weight, a.bias, a.finish, a.output, a.scratch))
        return;
    if (is_phased(a.shape) &&
        convolve_phases(phased_forward(a.shape), a.input, a.weight, a.bias, a.finish, a.output, a.scratch))
        return;
    convolve(plan_forward(a.shape), a.input, a.weight, a.bias, a.finish, a.output, a.scratch);
}

void conv_input_grad(const ConvInputGrad& a) {
    if (is_winograd(a.shape) &&
        winograd(winograd_input_grad(a.shape), a.grad_output, a.weight, a.bias, a.finish, a.grad_input, a.scratch))
        return;
    if (is_phased(a.shape) &&
        convolve_phases(phased_input_grad(a.shape), a.grad_output, a.weight, a.bias, a.finish, a.grad_input, a.scratch))
        return;
    convolve(plan_input_grad(a.shape), a.grad_output, a.weight, a.bias, a.finish, a.grad_input, a.scratch);
}

}  // namespace GANKERN_ISA
}  // namespace gankern
