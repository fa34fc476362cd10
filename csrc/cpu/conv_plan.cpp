#include "conv_plan.h"

#include <algorithm>

namespace gankern {
namespace {

// Rows of the packed weight that are used together: 64 of these rows of 64 values fill half of a 32 KB cache.
constexpr int64_t kChunk = 96;
// Pixels whose sums and taps stay in the second cache while the weights go by: more where the weights come from behind
// it, each time anew.
constexpr int64_t kPixels = 144, kManyPixels = 576;
constexpr int64_t kManyWeights = 1 << 18;
// Values of padded images that a piece of a weight's gradient reads again and again from the second cache.
constexpr int64_t kPaddedValues = 1 << 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Offsets {
    int64_t i, j;   // of the kernel
    int64_t at[2];  // in the source, from the place of the grid's pixel
};

// Taps of `block` channels are summed up together.
void finish(ConvPlan& p, const std::vector<std::vector<Offsets>>& seen, int64_t block) {
    int64_t least[2] = {0, 0}, most[2] = {0, 0};
    bool any = false;
    for (const auto& taps : seen)
        for (const Offsets& o : taps) {
            for (int d = 0; d < 2; ++d) {
                least[d] = any ? std::min(least[d], o.at[d]) : o.at[d];
                most[d] = any ? std::max(most[d], o.at[d]) : o.at[d];
            }
            any = true;
        }
    int64_t columns = 0;
    for (const Phase& phase : p.phases) columns = std::max(columns, phase.grid[1]);
    for (int d = 0; d < 2; ++d) {
        p.before[d] = -least[d];
        p.extent[d] = most[d] - least[d] + 1;
    }
    p.padded[1] = std::max<int64_t>(columns - 1, 0) * p.source_step[1] + p.extent[1];
    p.packed = 0;
    for (size_t f = 0; f < p.phases.size(); ++f) {
        Phase& phase = p.phases[f];
        int64_t k = 0;
        for (int64_t c = 0; c < p.source[2]; c += block) {
            int64_t channels = std::min(block, p.source[2] - c);
            phase.chunks.push_back(static_cast<int64_t>(phase.runs.size()));
            for (const Offsets& o : seen[f]) {
                phase.taps.push_back({o.i, o.j, c, channels, k});
                int64_t offset = ((o.at[0] + p.before[0]) * p.padded[1] + o.at[1] + p.before[1]) * p.source[2] + c;
                if (!phase.runs.empty() && phase.runs.back().offset + phase.runs.back().length == offset)
                    phase.runs.back().length += channels;
                else
                    phase.runs.push_back({offset, channels, k});
                k += channels;
            }
        }
        phase.chunks.push_back(static_cast<int64_t>(phase.runs.size()));
        phase.depth = k;
        phase.packed = p.packed;
        p.packed += k * round_up(p.result[2], 16);
    }
}

void cut_runs(ConvPlan& p) {
    for (Phase& phase : p.phases) {
        std::vector<Run> cut;
        phase.chunks = {0};
        int64_t room = kChunk;
        for (Run run : phase.runs)
            while (run.length > 0) {
                int64_t length = std::min(run.length, room);
                cut.push_back({run.offset, length, run.k});
                run = {run.offset + length, run.length - length, run.k + length};
                room -= length;
                if (room == 0) {
                    phase.chunks.push_back(static_cast<int64_t>(cut.size()));
                    room = kChunk;
                }
            }
        if (phase.chunks.back() != static_cast<int64_t>(cut.size()))
            phase.chunks.push_back(static_cast<int64_t>(cut.size()));
        phase.runs = std::move(cut);
    }
}

// As many rows of a grid, and where it is small as many images, as have about so many pixels.
void cut_images(ConvPlan& p, int64_t pixels, int64_t most_images) {
    int64_t columns = 1;
    for (const Phase& phase : p.phases) columns = std::max(columns, phase.grid[1]);
    int64_t all = std::max<int64_t>(p.grid_rows(), 1);
    p.rows = std::clamp<int64_t>(pixels / columns, 1, all);
    // Bands of one height, not full ones and a rest.
    p.rows = ceil_div(all, ceil_div(all, p.rows));
    p.images = std::max<int64_t>(1, std::min(pixels / (all * columns), most_images));
    p.padded[0] = (p.rows - 1) * p.source_step[0] + p.extent[0];
}

ConvPlan forward(const ConvShape& s, int64_t block) {
    ConvPlan p{};
    p.n = s.n;
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
    p.threads = s.threads;
    std::vector<Offsets> taps;
    for (int64_t i = 0; i < s.kernel[0]; ++i)
        for (int64_t j = 0; j < s.kernel[1]; ++j)
            taps.push_back({i, j, {i * s.dilation[0] - s.padding[0], j * s.dilation[1] - s.padding[1]}});
    Phase whole{};
    whole.grid[0] = s.out_height;
    whole.grid[1] = s.out_width;
    p.phases = {whole};
    finish(p, {taps}, block);
    return p;
}

}  // namespace

int64_t ConvPlan::grid_rows() const {
    int64_t most = 0;
    for (const Phase& phase : phases) most = std::max(most, phase.grid[0]);
    return most;
}

int64_t ConvPlan::source_values() const { return images * padded[0] * padded[1] * source[2] + kConvBlock; }

int64_t ConvPlan::pixels() const {
    int64_t columns = 0;
    for (const Phase& phase : phases) columns = std::max(columns, phase.grid[1]);
    return images * rows * columns;
}

ConvPlan plan_forward(const ConvShape& s) {
    ConvPlan p = forward(s, s.sum_block > 0 ? s.sum_block : s.channels);
    if (s.sum_block == 0) cut_runs(p);
    cut_images(p, p.packed < kManyWeights ? kPixels : kManyPixels, p.n / p.threads);
    return p;
}

ConvPlan plan_weight_grad(const ConvShape& s) {
    ConvPlan p = forward(s, s.channels);
    int64_t row = p.padded[1] * p.source[2] * p.source_step[0];
    int64_t rows = std::max<int64_t>(1, kPaddedValues / std::max<int64_t>(row, 1));
    cut_images(p, rows * std::max<int64_t>(s.out_width, 1), p.n);
    return p;
}

ConvPlan plan_input_grad(const ConvShape& s) {
    ConvPlan p{};
    p.n = s.n;
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
    p.threads = s.threads;
    std::vector<std::vector<Offsets>> seen;
    for (int64_t y = 0; y < std::min(s.stride[0], s.height); ++y)
        for (int64_t x = 0; x < std::min(s.stride[1], s.width); ++x) {
            // From the last tap to the first: neighbours in the source are then neighbours in the weight.
            std::vector<Offsets> taps;
            for (int64_t i = s.kernel[0] - 1; i >= 0; --i)
                for (int64_t j = s.kernel[1] - 1; j >= 0; --j) {
                    int64_t dy = y + s.padding[0] - i * s.dilation[0], dx = x + s.padding[1] - j * s.dilation[1];
                    if (dy % s.stride[0] == 0 && dx % s.stride[1] == 0)
                        taps.push_back({i, j, {dy / s.stride[0], dx / s.stride[1]}});
                }
            Phase phase{};
            phase.origin[0] = y;
            phase.origin[1] = x;
            phase.grid[0] = ceil_div(s.height - y, s.stride[0]);
            phase.grid[1] = ceil_div(s.width - x, s.stride[1]);
            p.phases.push_back(phase);
            seen.push_back(taps);
        }
    finish(p, seen, p.source[2]);
    cut_runs(p);
    cut_images(p, p.packed < kManyWeights ? kPixels : kManyPixels, p.n / p.threads);
    return p;
}

namespace {

int64_t image_scratch(const ConvPlan& p) {
    return p.packed + p.threads * (p.source_values() + p.pixels() * kConvBlock);
}

}  // namespace

int64_t conv_forward_scratch(const ConvShape& shape) { return image_scratch(plan_forward(shape)); }
int64_t conv_input_grad_scratch(const ConvShape& shape) { return image_scratch(plan_input_grad(shape)); }

int64_t conv_weight_grad_scratch(const ConvShape& shape) {
    ConvPlan p = plan_weight_grad(shape);
    int64_t blocks = 0;
    for (const Run& run : p.phases[0].runs) blocks += ceil_div(run.length, kConvBlock);
    return p.threads * p.source_values() + blocks * kConvBlock * shape.out_channels;
}

}  // namespace gankern
