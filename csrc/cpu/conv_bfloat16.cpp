// Convolutions in bfloat16: products whose left side are tiles of 16 pixels. Where those lie at a constant distance in
// the image they are loaded from there, else from copies with zeros for what lies outside.
#include "gankern/conv_bfloat16.h"

#include <algorithm>
#include <vector>

#include "conv_bfloat16_finish.h"
#include "conv_bfloat16_plan.h"
#include "conv_weight.h"
#include "gankern/parallel.h"
#include "kernels.h"
#include "matrix_units.h"
#include "vec.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

using namespace tiles;

// Channels of zeros: one row serves as all.
alignas(64) const BFloat16 kZeros[kStep] = {};

// The weight as pairs of source channels for each channel of the result: [phase][block][step][tile].
void pack_weight(const ImagePlan& p, const float* weight, BFloat16* packed) {
    struct Target {
        const Phase* phase;
        int64_t tap;
    };
    std::vector<WeightTap<Target>> taps;
    for (const Phase& phase : p.phases) {
        for (size_t t = 0; t < phase.taps.size(); ++t)
            taps.push_back({phase.taps[t].weight, {&phase, static_cast<int64_t>(t)}});
        // Terms beyond the last.
        int64_t steps = p.steps(phase), terms = static_cast<int64_t>(phase.taps.size()) * p.source[2];
        if (terms % kStep)
            for (int64_t b = 0; b < p.blocks(); ++b) {
                BFloat16* last = packed + phase.packed + ((b + 1) * steps - 1) * 2 * kTile;
                clear_values(2 * kTile, last);
            }
    }
    WeightColumns<Target> columns({p.result[2], p.source[2], p.weight_result, p.weight_source}, weight,
                                  std::move(taps));
    // Pairs of channels stay in one share: even numbers of them.
    columns.run(p.threads, [&](const Target& target, int64_t first, int64_t channel, Vec<float> values) {
        int64_t term = target.tap * p.source[2] + channel, block = first / kBlock, tile = first % kBlock / kSide;
        int64_t step = block * p.steps(*target.phase) + term / kStep;
        BFloat16* pair = packed + target.phase->packed + (step * 2 + tile) * kTile + term % kStep / 2 * kStep;
        __m512i bits = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)values));
        if (term % 2)
            _mm512_mask_storeu_epi16(pair, 0xaaaaaaaa, _mm512_slli_epi32(bits, 16));
        else
            _mm512_mask_storeu_epi16(pair, 0x55555555, bits);
    });
}

// 16 pixels of a phase's grid, or fewer at its end.
struct Pixels {
    int count;
    alignas(64) int32_t y[kSide], x[kSide];  // in the source, without the taps' offsets
    alignas(64) int64_t from[kSide], to[kSide];
    bool regular;  // whether a constant distance lies between them
};

Pixels pixels_at(const ImagePlan& p, const Phase& phase, int64_t first, int64_t end) {
    Pixels found{};
    found.count = static_cast<int>(std::min(kSide, end - first));
    Walk walk(p.n, p.images, phase.grid, first);
    for (int i = 0; i < found.count; ++i, walk.next()) {
        int64_t from_y = walk.y * p.source_step[0], from_x = walk.x * p.source_step[1];
        found.y[i] = static_cast<int32_t>(from_y), found.x[i] = static_cast<int32_t>(from_x);
        found.from[i] = ((walk.image * p.source[0] + from_y) * p.source[1] + from_x) * p.source[2];
        int64_t to_y = phase.origin[0] + walk.y * p.result_step[0], to_x = phase.origin[1] + walk.x * p.result_step[1];
        found.to[i] = ((walk.image * p.result[0] + to_y) * p.result[1] + to_x) * p.result[2];
    }
    found.regular = found.count == kSide;
    for (int i = 2; i < found.count; ++i)
        found.regular = found.regular && found.from[i] - found.from[i - 1] == found.from[1] - found.from[0];
    return found;
}

// Pixels whose tap lies in the image.
GANKERN_INLINE uint32_t inside(const ImagePlan& p, const Pixels& pixels, const Tap& tap) {
    auto within = [&](const int32_t* at, int64_t offset, int64_t size) {
        __m512i moved = _mm512_add_epi32(_mm512_load_si512(at), _mm512_set1_epi32(static_cast<int32_t>(offset)));
        return _mm512_cmplt_epu32_mask(moved, _mm512_set1_epi32(static_cast<int32_t>(size)));
    };
    uint32_t found = within(pixels.y, tap.at[0], p.source[0]) & within(pixels.x, tap.at[1], p.source[1]);
    return found & ((1u << pixels.count) - 1);
}

// Taps that lie side by side in the image, too.
struct Run {
    int64_t offset, values, term;
};

// Left sides of the products of one task; copies are put at `copies`.
class Factors {
 public:
    Factors(const ImagePlan& p, const Phase& phase, const BFloat16* source, BFloat16* copies)
        : p_(p), phase_(phase), source_(source), copies_(copies), row_(p.row(phase)) {
        int64_t term = 0;
        for (const Tap& tap : phase.taps) {
            if (runs_.empty() || offset(tap) != runs_.back().offset + runs_.back().values)
                runs_.push_back({offset(tap), 0, term});
            runs_.back().values += p.source[2], term += p.source[2];
        }
    }

    void add(const Pixels& pixels, Rows* rows) {
        if (p_.by_taps) {
            for (size_t t = 0; t < phase_.taps.size(); ++t) rows[t] = tap(pixels, phase_.taps[t]);
        } else {
            rows[0] = side_by_side(pixels);
        }
    }

 private:
    int64_t offset(const Tap& tap) const { return (tap.at[0] * p_.source[1] + tap.at[1]) * p_.source[2]; }

    Rows tap(const Pixels& pixels, const Tap& tap) {
        uint32_t seen = inside(p_, pixels, tap);
        if (seen == 0) return {kZeros, 0, 0};
        const BFloat16* from = source_ + offset(tap);
        if (seen == 0xffff && pixels.regular)
            return {from + pixels.from[0], 2 * (pixels.from[1] - pixels.from[0]), kStep};
        BFloat16* to = copies_;
        for (int i = 0; i < kSide; ++i, to += row_)
            if (seen >> i & 1)
                copy_values(from + pixels.from[i], p_.source[2], to);
            else
                clear_values(p_.source[2], to);
        Rows copied{copies_, 2 * row_, kStep};
        copies_ = to;
        return copied;
    }

    // Rows behind the last pixel are left as they are: nothing of theirs is stored.
    Rows side_by_side(const Pixels& pixels) {
        int64_t channels = p_.source[2], terms = static_cast<int64_t>(phase_.taps.size()) * channels;
        int64_t padding = p_.steps(phase_) * kStep - terms;
        Rows copied{copies_, 2 * row_, kStep};
        for (int i = 0; i < pixels.count; ++i, copies_ += row_) {
            for (const Run& run : runs_)
                copy_values(source_ + pixels.from[i] + run.offset, run.values, copies_ + run.term);
            clear_values(padding, copies_ + terms);
        }
        copies_ += (kSide - pixels.count) * row_;
        return copied;
    }

    const ImagePlan& p_;
    const Phase& phase_;
    const BFloat16* source_;
    BFloat16* copies_;
    int64_t row_;
    std::vector<Run> runs_;
};

// Steps [begin, end) of one tap, or of all where they lie side by side.
struct Part {
    int64_t tap, begin, end;
};

// Parts that share the nearest cache.
std::vector<std::vector<Part>> parts_of(const ImagePlan& p, const Phase& phase) {
    std::vector<std::vector<Part>> chunks;
    int64_t taps = p.by_taps ? static_cast<int64_t>(phase.taps.size()) : 1;
    int64_t steps = p.by_taps ? p.source[2] / kStep : p.steps(phase), room = 0;
    for (int64_t t = 0; t < taps; ++t)
        for (int64_t s = 0; s < steps;) {
            if (room == 0) chunks.emplace_back(), room = kStepsAtOnce;
            int64_t taken = std::min(room, steps - s);
            chunks.back().push_back({t, s, s + taken});
            s += taken, room -= taken;
        }
    if (chunks.empty()) chunks.emplace_back();
    return chunks;
}

// Up to 32 channels of up to 16 pixels.
template <Activation act>
void store_sums(const ConvBFloat16& a, const float* sums, const Pixels& pixels, int64_t first, int64_t lanes) {
    for (int64_t j = 0; j < lanes; j += kSide) {
        auto part = static_cast<__mmask16>(first_lanes(std::min(kSide, lanes - j)));
        const Finish<act> finish(a.finish, a.bias, first + j, part);
        const float* row = sums + j * kSide;
        BFloat16* result = a.result;
        for (int i = 0; i < pixels.count; ++i) finish.store(load(row + i * kSide), result, pixels.to[i] + first + j);
    }
}

void task(const ImagePlan& p, const ConvBFloat16& a, const BFloat16* source, const BFloat16* weight, int64_t index,
          float* working) {
    const Phase* phase = &p.phases.back();
    while (phase->first_task > index) --phase;
    int64_t piece = (index - phase->first_task) / p.shares, share = (index - phase->first_task) % p.shares;
    int64_t first = piece * p.pixels, end = std::min(first + p.pixels, p.n * phase->grid[0] * phase->grid[1]);
    float* sums = working;
    std::vector<Pixels> pixels;
    int64_t taps = p.by_taps ? static_cast<int64_t>(phase->taps.size()) : 1;
    std::vector<Rows> rows(static_cast<size_t>((end - first + kSide - 1) / kSide * taps));
    Factors factors(p, *phase, source, reinterpret_cast<BFloat16*>(working + p.pixels / kBlock * kSums));
    for (int64_t at = first; at < end; at += kSide) {
        pixels.push_back(pixels_at(p, *phase, at, end));
        if (!phase->taps.empty()) factors.add(pixels.back(), rows.data() + (pixels.size() - 1) * taps);
    }
    finish_writes();
    auto count = static_cast<int64_t>(pixels.size());
    auto chunks = parts_of(p, *phase);
    int64_t steps = p.steps(*phase), of_tap = p.by_taps ? p.source[2] / kStep : steps;
    TileScope scope;
    for (int64_t b = p.blocks() * share / p.shares; b < p.blocks() * (share + 1) / p.shares; ++b) {
        int64_t lanes = std::min(kBlock, p.result[2] - b * kBlock);
        const BFloat16* columns = weight + phase->packed + b * steps * 2 * kTile;
        for (const auto& chunk : chunks)
            for (int64_t tile = 0; tile < count; tile += 2) {
                const Rows* left = rows.data() + tile * taps;
                bool pair = tile + 1 < count;
                float* to = sums + tile / 2 * kSums;
                with_tiles(pair ? 2 : 1, lanes > kSide ? 2 : 1, [&](auto tiles) {
                    if (&chunk == &chunks.front())
                        tiles.clear();
                    else
                        tiles.load(to);
                    for (const Part& part : chunk) {
                        Rows one = left[part.tap], two = pair ? left[taps + part.tap] : one;
                        if (one.step == 0 && two.step == 0) continue;
                        const BFloat16* right = columns + (part.tap * of_tap + part.begin) * 2 * kTile;
                        const BFloat16 *up = one.at + part.begin * one.step, *down = two.at + part.begin * two.step;
                        for (int64_t s = part.begin; s < part.end; ++s) {
                            tiles.multiply(up, one.stride, down, two.stride, right);
                            up += one.step, down += two.step, right += 2 * kTile;
                        }
                    }
                    tiles.store(to);
                });
                if (&chunk != &chunks.back()) continue;
                with_activation(a.finish.activation, [&](auto act) {
                    for (int64_t t = tile; t < std::min(tile + 2, count); ++t)
                        store_sums<act>(a, to + (t - tile) * 2 * kSide * kSide, pixels[static_cast<size_t>(t)],
                                        b * kBlock, lanes);
                });
            }
    }
}

void convolve(const ImagePlan& p, const ConvBFloat16& a) {
    if (p.tasks == 0) return;
    const BFloat16* source = with_border(p.border, a.source, a.scratch, p.threads);
    auto* weight = reinterpret_cast<BFloat16*>(a.scratch + p.border.room());
    float* working = a.scratch + p.border.room() + p.packed / 2;
    pack_weight(p, a.weight, weight);
    parallel_for_each(p.tasks, p.threads, [&](int thread, int64_t index) {
        task(p, a, source, weight, index, working + thread * p.working());
    });
}

}  // namespace

void conv_bfloat16_forward(const ConvBFloat16& a) { convolve(plan_forward(a.shape), a); }

void conv_bfloat16_input_grad(const ConvBFloat16& a) {
    if (has_few_channels(a.shape)) return conv_bfloat16_few(a);
    convolve(plan_input_grad(a.shape), a);
}

}  // namespace GANKERN_ISA
}  // namespace gankern
