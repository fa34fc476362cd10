// Convolutions as matrix products whose left side is read where it lies: a pixel's taps are runs of values in the
// padded channels_last image. A tile of pixels by channels stays in registers, weights stream from the nearest cache.
#include "gankern/conv.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "conv_plan.h"
#include "gankern/parallel.h"
#include "kernels.h"
#include "transpose.h"
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
constexpr int kRows = GANKERN_VECTOR_BYTES == 64 ? (V == 4   ? 6
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

// A block of channels of one zone: all its pixels in a piece of work, one chunk of the weights after the other. The
// bias comes right after the first chunk, as in oneDNN.
template <int V>
void multiply_all(const float* image, const int64_t* pixels, int64_t count, const Zone& zone, const float* weight,
                  const float* bias, float* sums) {
    for (size_t c = 0; c + 1 < zone.chunks.size(); ++c) {
        const Run *run = zone.runs.data() + zone.chunks[c], *end = zone.runs.data() + zone.chunks[c + 1];
        const float* before = c == 0 ? bias : sums;
        int64_t row = c == 0 ? 0 : kWidth, p = 0;
        for (; p + kRows<V> <= count; p += kRows<V>)
            multiply<kRows<V>, V>(image, pixels + p, run, end, weight, before + p * row, row, sums + p * kWidth);
        with_constant<kRows<V> - 1>(static_cast<int>(count - p), [&](auto rows) {
            multiply<rows.value, V>(image, pixels + p, run, end, weight, before + p * row, row, sums + p * kWidth);
        });
    }
}

// Places of pixels in the images that are read and in the result.
struct Places {
    std::vector<int64_t> from, to;
};

void place(const ConvPlan& p, const Phase& phase, const Zone& zone, int64_t image, int64_t images, int64_t row,
           Places& places) {
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
}

// The weight as convolve() reads it: [block of the result's channels][row][channels of the block], one phase after the
// other; channels are filled up to vectors with zeros.
class Packing {
 public:
    Packing(const ConvPlan& plan, const float* weight, float* packed) : p_(plan), weight_(weight), packed_(packed) {
        for (const Phase& phase : p_.phases)
            for (size_t t = 0; t < phase.taps.size(); ++t)
                taps_.push_back({phase.taps[t].offset, &phase, static_cast<int64_t>(t)});
        std::sort(taps_.begin(), taps_.end(), [](const Target& a, const Target& b) { return a.offset < b.offset; });
        for (size_t t = 0; t < taps_.size(); ++t)
            side_by_side_ = side_by_side_ && taps_[t].offset == taps_[0].offset + static_cast<int64_t>(t);
        int64_t last = taps_.empty() ? 0 : taps_.back().offset;
        end_ = weight + (p_.result[2] - 1) * p_.weight_result + (p_.source[2] - 1) * p_.weight_source + last + 1;
    }

    void run() const {
        int64_t blocks = (p_.result[2] + kWidth - 1) / kWidth, shares = (p_.source[2] + kLane - 1) / kLane;
        parallel_for(taps_.empty() ? 0 : blocks * shares, p_.threads, [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; ++item) pack(item / shares * kWidth, item % shares * kLane);
        });
    }

 private:
    struct Target {
        int64_t offset;
        const Phase* phase;
        int64_t tap;
    };

    float* row(const Target& target, int64_t channel, int64_t first, int64_t width) const {
        const Phase& phase = *target.phase;
        return packed_ + phase.packed + first * phase.depth + p_.row(phase, target.tap, channel) * width;
    }

    // Up to a vector of the source's channels, for a block of the result's.
    void pack(int64_t first, int64_t channel) const {
        int64_t lanes = std::min<int64_t>(kWidth, p_.result[2] - first), width = (lanes + kLane - 1) / kLane * kLane;
        int64_t channels = std::min<int64_t>(kLane, p_.source[2] - channel);
        for (int64_t v = 0; v < width; v += kLane) {
            int part = static_cast<int>(std::min<int64_t>(kLane, lanes - v));
            const float* from = weight_ + (first + v) * p_.weight_result + channel * p_.weight_source;
            auto put = [&](const Target& target, int64_t c, Vec<float> values) {
                store(row(target, channel + c, first, width) + v, values);
            };
            // Along whatever lies side by side in the weight.
            if (p_.weight_result == 1)
                for (const Target& t : taps_)
                    for (int64_t c = 0; c < channels; ++c)
                        put(t, c, load(from + c * p_.weight_source + t.offset, part, 0.0f));
            else if (side_by_side_ && taps_.size() > 1)
                for (int64_t c = 0; c < channels; ++c)
                    for_each_column(from + c * p_.weight_source + taps_[0].offset, p_.weight_result, part,
                                    static_cast<int64_t>(taps_.size()), end_,
                                    [&](int64_t t, Vec<float> values) { put(taps_[t], c, values); });
            else if (p_.weight_source == 1)
                for (const Target& t : taps_)
                    for_each_column(from + t.offset, p_.weight_result, part, channels, end_,
                                    [&](int64_t c, Vec<float> values) { put(t, c, values); });
            else
                for (const Target& t : taps_)
                    for (int64_t c = 0; c < channels; ++c)
                        for_each_column(from + c * p_.weight_source + t.offset, p_.weight_result, part, 1, end_,
                                        [&](int64_t, Vec<float> values) { put(t, c, values); });
        }
    }

    const ConvPlan& p_;
    const float* weight_;
    float* packed_;
    std::vector<Target> taps_;
    bool side_by_side_ = true;
    const float* end_;
};

void convolve(const ConvPlan& p, const float* source, const float* weight, const float* bias, float* result,
              float* scratch) {
    if (p.n == 0) return;
    float* packed = scratch;
    Packing(p, weight, packed).run();
    int64_t blocks = (p.result[2] + kWidth - 1) / kWidth, pieces = p.pieces(), bands = p.bands();
    // Few pieces: threads share one by its blocks of channels.
    int64_t shares = std::min(blocks, (p.threads + pieces - 1) / std::max<int64_t>(pieces, 1));
    int64_t tasks = pieces * shares;
    parallel_for_each(tasks, p.threads, [&](int thread, int64_t task) {
        float* sums = scratch + p.packed + thread * p.pixels() * kConvBlock;
        int64_t piece = task / shares, share = task % shares;
        int64_t image = piece / bands * p.images, row = piece % bands * p.rows;
        int64_t images = std::min(p.images, p.n - image);
        Places places;
        for (const Phase& phase : p.phases)
            for (const Zone& zone : phase.zones) {
                place(p, phase, zone, image, images, row, places);
                auto count = static_cast<int64_t>(places.to.size());
                for (int64_t b = blocks * share / shares; b < blocks * (share + 1) / shares; ++b) {
                    int64_t first = b * kWidth, lanes = std::min<int64_t>(kWidth, p.result[2] - first);
                    float offset[kWidth] = {};
                    if (bias) std::copy_n(bias + first, lanes, offset);
                    const float* w = packed + phase.packed + first * phase.depth;
                    // No taps, no chunks: pixels that no output saw.
                    for (int64_t i = 0; i < count && zone.chunks.size() < 2; ++i)
                        std::copy_n(offset, kWidth, sums + i * kWidth);
                    with_constant<kVectors>(static_cast<int>((lanes + kLane - 1) / kLane), [&](auto v) {
                        multiply_all<v.value>(source, places.from.data(), count, zone, w, offset, sums);
                    });
                    for (int64_t i = 0; i < count; ++i)
                        for_each_vec<float>(lanes, [&](int64_t l, int part) {
                            store(result + places.to[i] + first + l, part, load(sums + i * kWidth + l));
                        });
                }
            }
    });
}

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

// sums[row of R][V vectors] += left[pixel][row] * right[pixel] over pixels, which are added up for themselves: over all
// images rounding errors would pile up. The last of the vectors may be a part.
template <int R, int V>
void correlate(const float* left, const float* right, const Pairs& pairs, int64_t begin, int64_t end, int part,
               float* sums, bool first) {
    Tile<R, V> tile;
    tile.clear();
    for (int64_t p = begin; p < end; ++p) {
        const float *x = left + pairs.left[p], *y = right + pairs.right[p];
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

// Pixels that are gone through at once: their gradients and one block of their images fit in the nearest cache.
constexpr int64_t kPixelChunk = 96;
// Pixels of a piece of work: their images stay in the second cache for all output channels and taps.
constexpr int64_t kPiece = 768;

// A block of the right side's channels, for the left side's [begin, end).
template <int V>
void correlate_all(const float* left, const float* right, const Pairs& pairs, int64_t begin, int64_t end, int part,
                   float* sums, bool first) {
    auto count = static_cast<int64_t>(pairs.left.size());
    // Also where there are no pixels: the sums are then zero.
    for (int64_t at = 0; at == 0 || at < count; at += kPixelChunk, first = false) {
        int64_t k = begin, stop = std::min(at + kPixelChunk, count);
        for (; k + kRows<V> <= end; k += kRows<V>)
            correlate<kRows<V>, V>(left + k, right, pairs, at, stop, part, sums + k * kWidth, first);
        with_constant<kRows<V> - 1>(static_cast<int>(end - k), [&](auto rows) {
            correlate<rows.value, V>(left + k, right, pairs, at, stop, part, sums + k * kWidth, first);
        });
    }
}

// sums[tap][block of right][row of left][kWidth of right]: left^T * right over the pairs of pixels of each tap.
struct Correlation {
    int64_t taps, rows, columns;  // kernel elements; channels of the left and of the right side
    const float *left, *right;
    float* sums;
    int threads;

    int64_t blocks() const { return (columns + kWidth - 1) / kWidth; }

    // visit(f) calls f(first image, images, first row, rows) for pieces of work; pair(tap, piece, pairs) finds a tap's
    // pixels in one. A thread owns a share of the sums and goes through all pieces, so that each sum has one order.
    template <class Visit, class Pair>
    void run(const Visit& visit, const Pair& pair) const {
        int64_t per_tap = blocks() * rows;
        parallel_for(taps * per_tap, threads, [&](int64_t begin, int64_t end) {
            Pairs pairs;
            bool first = true;
            visit([&](int64_t image, int64_t images, int64_t row, int64_t lines) {
                for (int64_t item = begin; item < end;) {
                    int64_t tap = item / per_tap, tap_end = std::min(end, (tap + 1) * per_tap);
                    pairs.clear();
                    pair(tap, image, images, row, lines, pairs);
                    while (item < tap_end) {
                        int64_t block = item / rows % blocks(), r = item % rows;
                        int64_t last = std::min(rows, r + tap_end - item);
                        int64_t width = std::min<int64_t>(kWidth, columns - block * kWidth);
                        int vectors = static_cast<int>((width + kLane - 1) / kLane);
                        int part = static_cast<int>(width - (vectors - 1) * kLane);
                        with_constant<kVectors>(vectors, [&](auto v) {
                            correlate_all<v.value>(left, right + block * kWidth, pairs, r, last, part,
                                                   sums + (item - r) * kWidth, first);
                        });
                        item += last - r;
                    }
                }
                first = false;
            });
        });
    }
};

// Whole images or rows of one that have about kPiece pixels; one piece without pixels where there are none.
template <class F>
void for_each_piece(const ConvShape& s, const F& f) {
    int64_t width = std::max<int64_t>(s.out_width, 1), height = std::max<int64_t>(s.out_height, 1);
    int64_t rows = std::clamp<int64_t>(kPiece / width, 1, height);
    int64_t images = rows == height ? std::max<int64_t>(kPiece / (width * height), 1) : 1;
    for (int64_t n = 0; n == 0 || n < s.n; n += images)
        for (int64_t y = 0; y == 0 || y < s.out_height; y += rows)
            f(n, std::min(images, s.n - n), y, std::min(rows, s.out_height - y));
}

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
// the product. The images are copied with zeros around them, so that every pixel has all of them.
void stem_weight_grad(const ConvWeightGrad& a) {
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
            std::copy_n(a.input + (r / height * s.height + y) * s.width * s.channels, columns * s.channels,
                        to + left * s.channels);
        }
    });
    int64_t run = s.kernel[1] * s.channels, out_line = s.out_width * s.out_channels;
    Correlation product{s.kernel[0], run, s.out_channels, padded, a.grad_output, padded + s.n * height * line,
                        s.threads};
    product.run([&](const auto& f) { for_each_piece(s, f); },
                [&](int64_t i, int64_t image, int64_t images, int64_t row, int64_t rows, Pairs& pairs) {
                    for (int64_t n = image; n < image + images; ++n)
                        for (int64_t y = row; y < row + rows; ++y)
                            pairs.add_row(s.out_width, (n * height + y * s.stride[0] + i * s.dilation[0]) * line,
                                          s.stride[1] * s.channels, (n * s.out_height + y) * out_line, s.out_channels);
                });
    for (int64_t k = 0; k < s.out_channels; ++k)
        for (int64_t i = 0; i < s.kernel[0]; ++i)
            for (int64_t r = 0; r < run; ++r) {
                const int64_t (&step)[4] = s.weight_strides;
                int64_t row = (i * product.blocks() + k / kWidth) * run + r;
                a.grad_weight[k * step[0] + r % s.channels * step[1] + i * step[2] + r / s.channels * step[3]] =
                    product.sums[row * kWidth + k % kWidth];
            }
}

}  // namespace

void conv_forward(const ConvForward& a) {
    convolve(plan_forward(a.shape), a.input, a.weight, a.bias, a.output, a.scratch);
}

void conv_input_grad(const ConvInputGrad& a) {
    convolve(plan_input_grad(a.shape), a.grad_output, a.weight, nullptr, a.grad_input, a.scratch);
}

void conv_weight_grad(const ConvWeightGrad& a) {
    const ConvShape& s = a.shape;
    if (conv_is_stem(s)) return stem_weight_grad(a);
    int64_t taps = s.kernel[0] * s.kernel[1];
    Correlation product{taps, s.out_channels, s.channels, a.grad_output, a.input, a.scratch, s.threads};
    product.run(
        [&](const auto& f) { for_each_piece(s, f); },
        [&](int64_t tap, int64_t image, int64_t images, int64_t row, int64_t rows, Pairs& pairs) {
            Reach r = reach(s, tap / s.kernel[1], tap % s.kernel[1]);
            for (int64_t n = image; n < image + images; ++n)
                for (int64_t y = std::max(row, r.begin[0]); y < std::min(row + rows, r.end[0]); ++y)
                    pairs.add_row(
                        r.end[1] - r.begin[1], ((n * s.out_height + y) * s.out_width + r.begin[1]) * s.out_channels,
                        s.out_channels,
                        ((n * s.height + y * s.stride[0]) * s.width + r.begin[1] * s.stride[1]) * s.channels + r.offset,
                        s.stride[1] * s.channels);
        });
    spread_sums(a, taps, product.blocks());
}

}  // namespace GANKERN_ISA
}  // namespace gankern
