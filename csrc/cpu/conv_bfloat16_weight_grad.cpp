// The gradient of a convolution's weight in bfloat16: a product over the pixels of the output's gradient, turned, and
// the input's pixels that each tap sees, in pairs.
#include <algorithm>
#include <vector>

#include "conv_bfloat16_plan.h"
#include "gankern/conv_bfloat16.h"
#include "gankern/parallel.h"
#include "kernels.h"
#include "matrix_units.h"
#include "transpose.h"
#include "vec.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

using namespace tiles;

alignas(64) const BFloat16 kZeros[kBlock] = {};

// 32 pixels of the output: a step of the sums.
struct Pixels {
    int64_t from[kStep];  // in the gradient of the output
    int64_t at[kStep];    // in the input, without the taps' offsets
    alignas(64) int32_t y[kStep], x[kStep];
    int count;
};

void place(const ConvShape& s, const WeightPlan& p, int64_t step, Pixels* found) {
    const int64_t grid[2] = {s.out_height, s.out_width};
    found->count = static_cast<int>(std::min(kStep, s.n * grid[0] * grid[1] - step * kStep));
    Walk walk(s.n, p.images, grid, step * kStep);
    for (int i = 0; i < found->count; ++i, walk.next()) {
        found->from[i] = ((walk.image * grid[0] + walk.y) * grid[1] + walk.x) * s.out_channels;
        int64_t y = walk.y * s.stride[0] - s.padding[0], x = walk.x * s.stride[1] - s.padding[1];
        found->at[i] = ((walk.image * s.height + y) * s.width + x) * s.channels;
        found->y[i] = static_cast<int32_t>(y), found->x[i] = static_cast<int32_t>(x);
    }
}

// Pixels whose tap lies in the image.
uint32_t inside(const ConvShape& s, const Pixels& pixels, int64_t i, int64_t j) {
    auto within = [](const int32_t* at, int64_t offset, int64_t size) {
        __m512i moved = _mm512_add_epi32(_mm512_load_si512(at), _mm512_set1_epi32(static_cast<int32_t>(offset)));
        return _mm512_cmplt_epu32_mask(moved, _mm512_set1_epi32(static_cast<int32_t>(size)));
    };
    uint32_t found = 0;
    for (int half = 0; half < 2; ++half) {
        uint32_t seen = within(pixels.y + half * 16, i * s.dilation[0], s.height) &
                        within(pixels.x + half * 16, j * s.dilation[1], s.width);
        found |= seen << (half * 16);
    }
    return found & first_lanes(pixels.count);
}

// Two rows of 16 values as 16 pairs.
GANKERN_INLINE __m512i paired(__m256i first, __m256i second) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

// 16 channels of 32 pixels of the output's gradient, a channel a row; zeros behind the last.
void turn(const ConvShape& s, const BFloat16* grad_output, const Pixels& pixels, int64_t channel, BFloat16* to) {
    auto lanes = static_cast<__mmask16>(first_lanes(std::min(kSide, s.out_channels - channel)));
    Vec<float> rows[kSide];
    auto values = [&](int i) {
        return i < pixels.count ? _mm256_maskz_loadu_epi16(lanes, grad_output + pixels.from[i] + channel)
                                : _mm256_setzero_si256();
    };
    for (int i = 0; i < kSide; ++i) rows[i] = (Vec<float>)_mm512_castsi512_ps(paired(values(2 * i), values(2 * i + 1)));
    transpose(rows);
    for (int i = 0; i < kSide; ++i) _mm512_storeu_ps(to + i * kStep, (__m512)rows[i]);
}

// Up to 32 columns of one step in pairs of pixels; `row` gives a pixel's values. Where there are two tiles, four
// columns of the one are followed by four of the other: as they come from interleaving within quarters of vectors.
template <class Row>
GANKERN_INLINE void pair_up(const Row& row, int64_t columns, BFloat16* to) {
    for (int i = 0; i < kSide; ++i) {
        __m512i a = row(2 * i), b = row(2 * i + 1);
        if (columns > kSide) {
            _mm512_storeu_si512(to + i * kStep, _mm512_unpacklo_epi16(a, b));
            _mm512_storeu_si512(to + kTile + i * kStep, _mm512_unpackhi_epi16(a, b));
        } else {
            _mm512_storeu_si512(to + i * kStep, paired(_mm512_castsi512_si256(a), _mm512_castsi512_si256(b)));
        }
    }
}

class WeightGrad {
 public:
    explicit WeightGrad(const ConvBFloat16WeightGrad& args) : a_(args), p_(plan_weight_grad(args.shape)), s_(p_.shape) {
        float* scratch = a_.scratch + p_.border.room();
        turned_ = reinterpret_cast<BFloat16*>(scratch);
        parts_ = scratch + p_.turned() / 2;
        working_ = parts_ + (p_.parts > 1 ? p_.parts * p_.groups * p_.sums : 0);
        if (!p_.by_taps) find_runs();
    }

    void run() {
        input_ = with_border(p_.border, a_.input, a_.scratch, p_.threads);
        if (p_.groups > 1) {
            parallel_for_each(p_.steps, p_.threads, [&](int, int64_t step) {
                Pixels pixels;
                place(s_, p_, step, &pixels);
                turn_all(pixels, turned_ + step * kTile, p_.steps);
            });
        }
        parallel_for_each(p_.groups * p_.parts, p_.threads, [&](int thread, int64_t task) {
            int64_t group = task / p_.parts, part = task % p_.parts;
            float* working = working_ + thread * p_.working();
            float* sums = p_.parts > 1 ? parts_ + task * p_.sums : working;
            auto* room = reinterpret_cast<BFloat16*>(working + (p_.parts > 1 ? 0 : p_.sums));
            int64_t begin = p_.steps * part / p_.parts, end = p_.steps * (part + 1) / p_.parts;
            for (int64_t step = begin; step == begin || step < end; step += kWeightSteps)
                add(group, step, std::min(kWeightSteps, end - step), step == begin, room, sums);
            if (p_.parts == 1) store_group(group, sums, 0, s_.out_channels);
        });
        if (p_.parts == 1) return;
        parallel_for(p_.groups * s_.out_channels, p_.threads, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                int64_t group = i / s_.out_channels, row = i % s_.out_channels;
                store_group(group, parts_ + group * p_.parts * p_.sums, row, row + 1);
            }
        });
    }

 private:
    int64_t pairs() const { return (p_.rows + 1) / 2; }

    int64_t columns(int64_t group, int64_t block) const {
        int64_t all =
            p_.by_taps ? s_.channels - group * kBlock : s_.kernel[0] * s_.kernel[1] * s_.channels - block * kBlock;
        return std::min(kBlock, all);
    }

    int64_t offset(int64_t i, int64_t j) const {
        return (i * s_.dilation[0] * s_.width + j * s_.dilation[1]) * s_.channels;
    }

    // A step of the output's gradient, turned: its tiles are so many others apart.
    void turn_all(const Pixels& pixels, BFloat16* to, int64_t apart) const {
        for (int64_t row = 0; row < p_.rows; ++row)
            turn(s_, a_.grad_output, pixels, row * kSide, to + row * apart * kTile);
    }

    // Adds up a few steps for all blocks of a group; the factors are made in `room`.
    void add(int64_t group, int64_t first, int64_t steps, bool fresh, BFloat16* room, float* sums) const {
        Pixels pixels[kWeightSteps];
        for (int64_t i = 0; i < steps; ++i) place(s_, p_, first + i, pixels + i);
        const BFloat16* left = turned_ + first * kTile;
        BFloat16* right = room;
        int64_t apart = p_.steps;
        if (p_.groups == 1) {
            left = room, apart = kWeightSteps;
            for (int64_t i = 0; i < steps; ++i) turn_all(pixels[i], room + i * kTile, apart);
            right += p_.rows * apart * kTile;
        }
        if (!p_.by_taps) gather(pixels, steps, right);
        TileScope scope;
        for (int64_t block = 0; block < p_.blocks; ++block) {
            int64_t kept[kWeightSteps], count = 0;
            BFloat16* factors = right;
            if (p_.by_taps) {
                count = pair_tap(pixels, steps, group * kBlock, block, kept, right);
            } else {
                factors = right + block * kWeightSteps * 2 * kTile;
                for (; count < steps; ++count) kept[count] = count;
            }
            finish_writes();
            for (int64_t pair = 0; pair < pairs(); ++pair) {
                const BFloat16* up = left + 2 * pair * apart * kTile;
                const BFloat16* down = up + apart * kTile;
                float* to = sums + (block * pairs() + pair) * kSums;
                with_tiles(2 * pair + 1 < p_.rows ? 2 : 1, columns(group, block) > kSide ? 2 : 1, [&](auto tiles) {
                    if (fresh)
                        tiles.clear();
                    else
                        tiles.load(to);
                    for (int64_t i = 0; i < count; ++i)
                        tiles.multiply(up + kept[i] * kTile, 64, down + kept[i] * kTile, 64, factors + i * 2 * kTile);
                    tiles.store(to);
                });
            }
        }
    }

    // Pairs of pixels of one tap; the number of steps in which a pixel sees it.
    int64_t pair_tap(const Pixels* pixels, int64_t steps, int64_t channel, int64_t tap, int64_t* kept,
                     BFloat16* to) const {
        int64_t i = tap / s_.kernel[1], j = tap % s_.kernel[1], count = 0;
        for (int64_t step = 0; step < steps; ++step) {
            uint32_t seen = inside(s_, pixels[step], i, j);
            if (seen == 0) continue;
            const BFloat16* from = input_ + offset(i, j) + channel;
            int64_t columns = s_.channels - channel;
            __mmask32 lanes = first_lanes(columns);
            auto pair = [&](auto place_of) {
                auto row = [&](int at) { return _mm512_maskz_loadu_epi16(lanes, place_of(at)); };
                pair_up(row, columns, to + count * 2 * kTile);
            };
            const int64_t* at = pixels[step].at;
            if (seen == ~uint32_t{0})
                pair([&](int k) { return from + at[k]; });
            else
                pair([&](int k) { return seen >> k & 1 ? from + at[k] : kZeros; });
            kept[count++] = step;
        }
        return count;
    }

    // Pairs of pixels of all taps side by side; none falls outside.
    void gather(const Pixels* pixels, int64_t steps, BFloat16* to) const {
        int64_t filled = s_.kernel[0] * s_.kernel[1] * s_.channels;
        for (int64_t step = 0; step < steps; ++step) {
            const Pixels& px = pixels[step];
            for (int64_t block = 0; block < p_.blocks; ++block) {
                auto row = [&](int at) {
                    __m512i values = _mm512_setzero_si512();
                    if (at >= px.count) return values;
                    for (const Run& run : runs_[block])
                        values = _mm512_mask_loadu_epi16(values, run.lanes, input_ + px.at[at] + run.from);
                    return values;
                };
                pair_up(row, filled - block * kBlock, to + (block * kWeightSteps + step) * 2 * kTile);
            }
        }
    }

    void find_runs() {
        int64_t filled = s_.kernel[0] * s_.kernel[1] * s_.channels;
        int64_t length = (s_.dilation[1] == 1 ? s_.kernel[1] : 1) * s_.channels;
        for (int64_t column = 0; column < filled;) {
            int64_t tap = column / length * length / s_.channels, skipped = column % length, lane = column % kBlock;
            int64_t count = std::min(length - skipped, kBlock - lane);
            int64_t from = offset(tap / s_.kernel[1], tap % s_.kernel[1]) + skipped - lane;
            if (lane == 0) runs_.emplace_back();
            runs_.back().push_back({first_lanes(count) << lane, from});
            column += count;
        }
    }

    Vec<float> total(const float* at) const {
        Vec<float> sum = load(at);
        for (int64_t part = 1; part < p_.parts; ++part) sum += load(at + part * p_.sums);
        return sum;
    }

    // The sums of 16 columns, the first or second of a block of so many.
    Vec<float> sums_of(const float* sums, int64_t block, int64_t row, int64_t half, int64_t columns) const {
        int64_t tile = row / kSide;
        const float* at = sums + (block * pairs() + tile / 2) * kSums + (tile % 2 * 2 * kSide + row % kSide) * kSide;
        if (columns <= kSide) return total(at);
        auto first = (__m512)total(at), second = (__m512)total(at + kSide * kSide);
        const __m512i order = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        __m512i from = _mm512_add_epi32(order, _mm512_set1_epi32(static_cast<int>(half) * 8));
        return (Vec<float>)_mm512_permutex2var_ps(first, from, second);
    }

    // Rows [begin, end) of a group's sums, parts added up, go to the gradient.
    void store_group(int64_t group, const float* sums, int64_t begin, int64_t end) const {
        int64_t taps = s_.kernel[0] * s_.kernel[1];
        const int64_t* strides = s_.weight_strides;
        auto place_of = [&](int64_t tap) { return tap / s_.kernel[1] * strides[2] + tap % s_.kernel[1] * strides[3]; };
        bool side_by_side = strides[3] == 1 && strides[2] == s_.kernel[1];
        for (int64_t k = begin; k < end; ++k) {
            float* row = a_.grad_weight + k * strides[0];
            if (!p_.by_taps) {
                for (int64_t i = 0; i < taps * s_.channels; i += kSide) {
                    Vec<float> values = sums_of(sums, i / kBlock, k, i % kBlock / kSide, columns(group, i / kBlock));
                    for (int64_t l = i; l < std::min(i + kSide, taps * s_.channels); ++l)
                        row[place_of(l / s_.channels) + l % s_.channels * strides[1]] = values[l - i];
                }
                continue;
            }
            for (int64_t c = group * kBlock, half = 0; half < 2 && c < s_.channels; c += kSide, ++half) {
                int64_t lanes = std::min(kSide, s_.channels - c);
                float* to = row + c * strides[1];
                for (int64_t t = 0; t < taps; t += kSide) {
                    int64_t count = std::min(kSide, taps - t);
                    Vec<float> values[kSide]{};
                    for (int64_t i = 0; i < count; ++i)
                        values[i] = sums_of(sums, t + i, k, half, columns(group, t + i));
                    if (side_by_side && taps > 1) {
                        transpose(values);
                        for (int64_t l = 0; l < lanes; ++l)
                            _mm512_mask_storeu_ps(to + l * strides[1] + t, static_cast<__mmask16>(first_lanes(count)),
                                                  (__m512)values[l]);
                    } else if (strides[1] == 1) {
                        for (int64_t i = 0; i < count; ++i)
                            _mm512_mask_storeu_ps(to + place_of(t + i), static_cast<__mmask16>(first_lanes(lanes)),
                                                  (__m512)values[i]);
                    } else {
                        for (int64_t i = 0; i < count; ++i)
                            for (int64_t l = 0; l < lanes; ++l) to[place_of(t + i) + l * strides[1]] = values[i][l];
                    }
                }
            }
        }
    }

    // Values that lie side by side in the input and in a block of columns: lanes of a vector loaded from there.
    struct Run {
        __mmask32 lanes;
        int64_t from;
    };

    const ConvBFloat16WeightGrad& a_;
    const WeightPlan p_;
    const ConvShape& s_;
    const BFloat16* input_ = nullptr;
    BFloat16* turned_;
    float *parts_, *working_;
    std::vector<std::vector<Run>> runs_;  // of each block
};

}  // namespace

void conv_bfloat16_weight_grad(const ConvBFloat16WeightGrad& a) { WeightGrad(a).run(); }

}  // namespace GANKERN_ISA
}  // namespace gankern
