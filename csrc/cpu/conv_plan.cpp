#include "conv_plan.h"

#include <algorithm>

namespace gankern {
namespace {

// Rows of the packed weight that are used together: with 64 channels each they fill half of the nearest cache.
constexpr int64_t kChunk = 96;
// The same where a sum goes on in the next chunk.
constexpr int64_t kCarriedChunk = 128;
// Pixels whose sums stay in the second cache while the weights go by: more where the weights come from behind it, each
// time anew.
constexpr int64_t kPixels = 288, kManyPixels = 576;
constexpr int64_t kManyWeights = 1 << 18;
// Pixels that a weight's gradient is summed over at once: their channels stay in the second cache for all taps.
constexpr int64_t kPiece = 768;
// Sums of products' gradients that a thread's second cache has room for.
constexpr int64_t kManySums = 1 << 18;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// A tap as a phase sees it: of the kernel, and where in the source from the place of the grid's pixel.
struct Seen {
    int64_t tap[2], at[2];
};

using SeenByPhase = std::vector<std::vector<Seen>>;

// Grid positions [begin, end) of one axis from which a tap lies inside the source.
void inside(const ConvPlan& p, const Phase& phase, int d, int64_t at, int64_t& begin, int64_t& end) {
    begin = std::clamp<int64_t>(ceil_div(-at, p.source_step[d]), 0, phase.grid[d]);
    if (at > 0) begin = 0;
    end = std::clamp<int64_t>(floor_div(p.source[d] - 1 - at, p.source_step[d]) + 1, begin, phase.grid[d]);
}

int64_t columns(const ConvPlan& p) {
    int64_t most = 1;
    for (const Phase& phase : p.phases) most = std::max(most, phase.grid[1]);
    return most;
}

// As many rows of a grid, and where it is small as many images, as have about so many pixels.
void cut_images(ConvPlan& p, int64_t pixels) {
    int64_t width = columns(p), all = std::max<int64_t>(p.grid_rows(), 1);
    p.rows = std::clamp<int64_t>(pixels / width, 1, all);
    // Bands of one height, not full ones and a rest.
    p.rows = ceil_div(all, ceil_div(all, p.rows));
    p.images = std::max<int64_t>(1, std::min(pixels / (all * width), p.n / p.threads));
}

void number_taps(ConvPlan& p, const SeenByPhase& seen) {
    for (size_t f = 0; f < p.phases.size(); ++f) {
        Phase& phase = p.phases[f];
        for (const Seen& s : seen[f]) phase.taps.push_back(s.tap[0] * p.weight_taps[0] + s.tap[1] * p.weight_taps[1]);
        phase.depth = static_cast<int64_t>(phase.taps.size()) * p.source[2];
        phase.packed = p.packed;
        p.packed += phase.depth * round_up(p.result[2], 16);
    }
}

// Appends runs [begin, size) in chunks of up to `room` rows of weights; where the order of sums is given they are one
// sum.
void cut_runs(const std::vector<Run>& runs, bool one_sum, int64_t room, Zone& zone) {
    auto begin = static_cast<int64_t>(zone.runs.size());
    int64_t rows = 0;
    bool starts = true;
    auto close = [&](bool ends) {
        auto end = static_cast<int64_t>(zone.runs.size());
        zone.chunks.push_back({begin, end, starts, ends});
        begin = end;
        rows = 0;
        starts = ends;
    };
    for (size_t i = 0; i < runs.size(); ++i)
        for (Run run = runs[i]; run.length > 0;) {
            if (rows == room) close(!one_sum);
            int64_t length = std::min(run.length, room - rows);
            zone.runs.push_back({run.offset, length, run.k});
            run = {run.offset + length, run.length - length, run.k + length};
            rows += length;
        }
    if (rows > 0) close(true);
}

void find_runs(const ConvPlan& p, const Phase& phase, const std::vector<Seen>& seen, Zone& zone) {
    for (int64_t c = 0; c < p.source[2]; c += p.block) {
        std::vector<Run> runs;
        int64_t channels = std::min(p.block, p.source[2] - c), rows = 0;
        for (size_t t = 0; t < seen.size(); ++t) {
            const Seen& s = seen[t];
            bool visible = true;
            for (int d = 0; d < 2; ++d) {
                int64_t begin, end;
                inside(p, phase, d, s.at[d], begin, end);
                visible = visible && begin <= zone.begin[d] && zone.end[d] <= end;
            }
            if (!visible) continue;
            int64_t offset = (s.at[0] * p.source[1] + s.at[1]) * p.source[2] + c;
            int64_t k = p.row(phase, static_cast<int64_t>(t), c);
            bool joins = !runs.empty() && runs.back().offset + runs.back().length == offset &&
                         runs.back().k + runs.back().length == k;
            if (joins)
                runs.back().length += channels;
            else
                runs.push_back({offset, channels, k});
            rows += channels;
        }
        // Of one sum, parts of one size.
        int64_t parts = std::max<int64_t>(ceil_div(rows, kCarriedChunk), 1);
        cut_runs(runs, p.in_blocks, p.in_blocks ? std::max<int64_t>(ceil_div(rows, parts), 1) : kChunk, zone);
    }
}

// Positions of one axis at which the set of taps inside the source changes.
std::vector<int64_t> borders(const ConvPlan& p, const Phase& phase, const std::vector<Seen>& seen, int d) {
    std::vector<int64_t> found = {0, phase.grid[d]};
    for (const Seen& s : seen) {
        int64_t begin, end;
        inside(p, phase, d, s.at[d], begin, end);
        found.insert(found.end(), {begin, end});
    }
    std::sort(found.begin(), found.end());
    found.erase(std::unique(found.begin(), found.end()), found.end());
    return found;
}

void find_zones(ConvPlan& p, const SeenByPhase& seen) {
    for (size_t f = 0; f < p.phases.size(); ++f) {
        Phase& phase = p.phases[f];
        auto ys = borders(p, phase, seen[f], 0), xs = borders(p, phase, seen[f], 1);
        for (size_t y = 0; y + 1 < ys.size(); ++y)
            for (size_t x = 0; x + 1 < xs.size(); ++x) {
                Zone zone{{ys[y], xs[x]}, {ys[y + 1], xs[x + 1]}, {}, {}};
                find_runs(p, phase, seen[f], zone);
                phase.zones.push_back(zone);
            }
    }
}

void cut(ConvPlan& p, const SeenByPhase& seen, int64_t sum_block) {
    p.in_blocks = sum_block > 0;
    p.block = p.in_blocks ? std::min(sum_block, p.source[2]) : p.source[2];
    number_taps(p, seen);
    cut_images(p, p.packed < kManyWeights ? kPixels : kManyPixels);
    find_zones(p, seen);
}

}  // namespace

int64_t ConvPlan::grid_rows() const {
    int64_t most = 0;
    for (const Phase& phase : phases) most = std::max(most, phase.grid[0]);
    return most;
}

int64_t ConvPlan::sums() const { return (in_blocks ? 2 : 1) * images * rows * columns(*this) * kConvBlock; }

ConvPlan plan_forward(const ConvShape& s) {
    ConvPlan p{};
    p.n = s.n;
    p.threads = s.threads;
    int64_t source[3] = {s.height, s.width, s.channels}, result[3] = {s.out_height, s.out_width, s.out_channels};
    std::copy(source, source + 3, p.source);
    std::copy(result, result + 3, p.result);
    p.weight_result = s.weight_strides[0];
    p.weight_source = s.weight_strides[1];
    for (int d = 0; d < 2; ++d) {
        p.weight_taps[d] = s.weight_strides[2 + d];
        p.source_step[d] = s.stride[d];
        p.result_step[d] = 1;
    }
    std::vector<Seen> taps;
    for (int64_t i = 0; i < s.kernel[0]; ++i)
        for (int64_t j = 0; j < s.kernel[1]; ++j)
            taps.push_back({{i, j}, {i * s.dilation[0] - s.padding[0], j * s.dilation[1] - s.padding[1]}});
    Phase whole{};
    whole.grid[0] = s.out_height;
    whole.grid[1] = s.out_width;
    p.phases = {whole};
    cut(p, {taps}, s.sum_block);
    return p;
}

ConvPlan plan_input_grad(const ConvShape& s) {
    ConvPlan p{};
    p.n = s.n;
    p.threads = s.threads;
    int64_t source[3] = {s.out_height, s.out_width, s.out_channels}, result[3] = {s.height, s.width, s.channels};
    std::copy(source, source + 3, p.source);
    std::copy(result, result + 3, p.result);
    p.weight_result = s.weight_strides[1];
    p.weight_source = s.weight_strides[0];
    for (int d = 0; d < 2; ++d) {
        p.weight_taps[d] = s.weight_strides[2 + d];
        p.source_step[d] = 1;
        p.result_step[d] = s.stride[d];
    }
    SeenByPhase seen;
    for (int64_t y = 0; y < std::min(s.stride[0], s.height); ++y)
        for (int64_t x = 0; x < std::min(s.stride[1], s.width); ++x) {
            // From the last tap to the first: neighbours in the source are then neighbours in the weight.
            std::vector<Seen> taps;
            for (int64_t i = s.kernel[0] - 1; i >= 0; --i)
                for (int64_t j = s.kernel[1] - 1; j >= 0; --j) {
                    int64_t dy = y + s.padding[0] - i * s.dilation[0], dx = x + s.padding[1] - j * s.dilation[1];
                    if (dy % s.stride[0] == 0 && dx % s.stride[1] == 0)
                        taps.push_back({{i, j}, {dy / s.stride[0], dx / s.stride[1]}});
                }
            Phase phase{};
            phase.origin[0] = y;
            phase.origin[1] = x;
            phase.grid[0] = ceil_div(s.height - y, s.stride[0]);
            phase.grid[1] = ceil_div(s.width - x, s.stride[1]);
            p.phases.push_back(phase);
            seen.push_back(taps);
        }
    cut(p, seen, 0);
    return p;
}

Reach reach(const ConvShape& s, int64_t i, int64_t j) {
    Reach r{};
    int64_t tap[2] = {i, j}, size[2] = {s.height, s.width}, out[2] = {s.out_height, s.out_width}, at[2];
    for (int d = 0; d < 2; ++d) {
        at[d] = tap[d] * s.dilation[d] - s.padding[d];
        r.begin[d] = at[d] >= 0 ? 0 : std::min(ceil_div(-at[d], s.stride[d]), out[d]);
        r.end[d] = std::clamp<int64_t>(floor_div(size[d] - 1 - at[d], s.stride[d]) + 1, r.begin[d], out[d]);
    }
    r.offset = (at[0] * s.width + at[1]) * s.channels;
    return r;
}

namespace {

int64_t image_scratch(const ConvPlan& p) { return p.packed + p.threads * p.sums(); }

}  // namespace

bool is_winograd(const ConvShape& s) {
    bool fits = s.sum_block == 0 && s.channels % 16 == 0 && s.out_channels % 16 == 0;
    for (int d = 0; d < 2; ++d)
        fits = fits && s.kernel[d] == 3 && s.stride[d] == 1 && s.dilation[d] == 1 && s.padding[d] <= 2;
    return fits && s.channels >= 32 && s.out_channels >= 32 && s.n * s.out_height * s.out_width >= 1024;
}

Winograd winograd_forward(const ConvShape& s) {
    return {s.n,
            {s.height, s.width, s.channels},
            {s.out_height, s.out_width, s.out_channels},
            s.weight_strides[0],
            s.weight_strides[1],
            {s.weight_strides[2], s.weight_strides[3]},
            {s.padding[0], s.padding[1]},
            false,
            s.threads};
}

Winograd winograd_input_grad(const ConvShape& s) {
    return {s.n,
            {s.out_height, s.out_width, s.out_channels},
            {s.height, s.width, s.channels},
            s.weight_strides[1],
            s.weight_strides[0],
            {s.weight_strides[2], s.weight_strides[3]},
            {2 - s.padding[0], 2 - s.padding[1]},
            true,
            s.threads};
}

bool is_winograd_weight_grad(const ConvShape& s) {
    return is_winograd(s) && 16 * s.channels * s.out_channels <= kManySums;
}

int64_t winograd_share(const ConvShape& s) {
    return 16 * (round_up(s.channels, kConvBlock) * s.out_channels + kWinogradTiles * (s.channels + s.out_channels));
}

int64_t winograd_piece(const Winograd& p) { return 16 * kWinogradTiles * (p.source[2] + kConvBlock); }

namespace {

int64_t winograd_scratch(const Winograd& p) { return 16 * p.source[2] * p.result[2] + p.threads * winograd_piece(p); }

}  // namespace

bool is_phased(const ConvShape& s) {
    bool fits = s.sum_block == 0 && s.channels % 16 == 0 && s.out_channels % 16 == 0;
    for (int d = 0; d < 2; ++d)
        fits = fits && s.kernel[d] == 4 && s.stride[d] == 2 && s.dilation[d] == 1 && s.padding[d] <= 3;
    // On smaller images as much is saved by the padding that is left out.
    return fits && s.channels >= 32 && s.out_channels >= 32 && std::min(s.out_height, s.out_width) >= 6 &&
           s.n * s.out_height * s.out_width >= 1024;
}

namespace {

PhasePlan phases(const ConvShape& s, bool forward) {
    PhasePlan p{};
    int64_t wide[3] = {s.height, s.width, s.channels}, narrow[3] = {s.out_height, s.out_width, s.out_channels};
    std::copy_n(forward ? wide : narrow, 3, p.source);
    std::copy_n(forward ? narrow : wide, 3, p.result);
    p.n = s.n;
    p.threads = s.threads;
    p.weight_result = s.weight_strides[forward ? 0 : 1];
    p.weight_source = s.weight_strides[forward ? 1 : 0];
    std::copy_n(s.weight_strides + 2, 2, p.weight_taps);
    p.source_step = forward ? 2 : 1;
    p.result_step = forward ? 1 : 2;
    p.sources = forward ? 4 : 1;
    return p;
}

}  // namespace

PhasePlan phased_forward(const ConvShape& s) {
    PhasePlan p = phases(s, true);
    PhaseGrid grid{{s.out_height, s.out_width}, {0, 0}, {}, {}, 2};
    for (int q = 0; q < 4; ++q)
        for (int d = 0; d < 2; ++d) {
            int64_t phase = d == 0 ? q / 2 : q % 2;
            grid.source_origin[q][d] = phase - s.padding[d];
            grid.tap[q][d] = phase;
        }
    p.grids = {grid};
    return p;
}

PhasePlan phased_input_grad(const ConvShape& s) {
    PhasePlan p = phases(s, false);
    for (int r = 0; r < 4; ++r) {
        PhaseGrid grid{};
        for (int d = 0; d < 2; ++d) {
            // input = 2 * t - padding + phase gathers output t with tap `phase` and output t - 1 with tap 2 + phase.
            int64_t phase = d == 0 ? r / 2 : r % 2, first = ceil_div(s.padding[d] - phase, 2);
            grid.origin[d] = 2 * first - s.padding[d] + phase;
            grid.size[d] = std::max<int64_t>(ceil_div((d == 0 ? s.height : s.width) - grid.origin[d], 2), 0);
            grid.source_origin[0][d] = first - 1;
            grid.tap[0][d] = 2 + phase;
        }
        grid.tap_step = -2;
        p.grids.push_back(grid);
    }
    return p;
}

int64_t PhasePlan::piece() const {
    // Transformed pixels that a second cache holds beside the weights that go by.
    return std::clamp<int64_t>(kManySums / (9 * depth()), 24, 96);
}

int64_t phased_working(const PhasePlan& p) { return 9 * p.piece() * (p.depth() + kConvBlock); }

namespace {

int64_t phased_scratch(const PhasePlan& p) {
    auto grids = static_cast<int64_t>(p.grids.size());
    return grids * 9 * p.depth() * p.result[2] + p.threads * phased_working(p);
}

}  // namespace

int64_t conv_forward_scratch(const ConvShape& s) {
    // Minimal filtering gives up where its result is not finite.
    int64_t plain = image_scratch(plan_forward(s));
    if (is_phased(s)) return std::max(plain, phased_scratch(phased_forward(s)));
    return is_winograd(s) ? std::max(plain, winograd_scratch(winograd_forward(s))) : plain;
}

int64_t conv_input_grad_scratch(const ConvShape& s) {
    int64_t plain = image_scratch(plan_input_grad(s));
    if (is_phased(s)) return std::max(plain, phased_scratch(phased_input_grad(s)));
    return is_winograd(s) ? std::max(plain, winograd_scratch(winograd_input_grad(s))) : plain;
}

ConvPieces conv_pieces(const ConvShape& s) {
    int64_t width = std::max<int64_t>(s.out_width, 1), height = std::max<int64_t>(s.out_height, 1);
    ConvPieces p{s.n, s.out_height, 1, std::clamp<int64_t>(kPiece / width, 1, height), 1, 1};
    p.bands = ceil_div(height, p.rows);
    if (p.bands == 1) p.images = std::max<int64_t>(kPiece / (width * height), 1);
    p.count = std::max<int64_t>(ceil_div(s.n, p.images) * p.bands, 1);
    return p;
}

bool conv_is_stem(const ConvShape& s) { return s.channels <= 8 && s.dilation[1] == 1; }

int64_t conv_weight_grad_scratch(const ConvShape& s) {
    // Of the widest blocks; narrower ones hold no more. What makes it otherwise gives up where the result is not
    // finite.
    int64_t taps = s.kernel[0] * s.kernel[1], plain = taps * s.out_channels * round_up(s.channels, kConvBlock);
    if (is_winograd_weight_grad(s)) return std::max(plain, s.threads * winograd_share(s));
    if (!conv_is_stem(s)) return plain;
    int64_t height = (s.out_height - 1) * s.stride[0] + (s.kernel[0] - 1) * s.dilation[0] + 1;
    int64_t padded = s.n * height * ((s.out_width - 1) * s.stride[1] + s.kernel[1]) * s.channels;
    return std::max(plain, padded + taps * s.channels * round_up(s.out_channels, kConvBlock));
}

}  // namespace gankern
