#include "conv_bfloat16_plan.h"

#include <algorithm>

namespace gankern {
namespace tiles {
namespace {

constexpr int64_t kMostPixels = 256;       // of a task: their sums stay near while the weights stream by
constexpr int64_t kMostFactors = 1 << 20;  // values of a task's packed rows
constexpr int64_t kTasksPerThread = 4;     // so that no thread waits long for the last
constexpr int64_t kNarrow = 17;            // pixels of a row from which on tiles lie within rows
constexpr int64_t kImages = 32;            // at most at once: few enough for the second cache
constexpr int64_t kFewChannels = 8;        // of which all taps together fill tiles better than each by itself
constexpr int64_t kFewProducts = 1 << 16;  // of a band: so that they stay in the second cache

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Along one direction: elements of the kernel that result pixels (origin + step * grid) see.
struct Seen {
    int64_t element, at;
};

std::vector<Seen> seen(const ConvShape& s, int d, int64_t origin, bool forward) {
    std::vector<Seen> found;
    for (int64_t i = 0; i < s.kernel[d]; ++i) {
        int64_t reach = i * s.dilation[d];
        if (forward)
            found.push_back({i, reach - s.padding[d]});
        else if (int64_t at = origin + s.padding[d] - reach; at % s.stride[d] == 0)
            found.push_back({i, at / s.stride[d]});
    }
    std::sort(found.begin(), found.end(), [](const Seen& a, const Seen& b) { return a.at < b.at; });
    return found;
}

void add_phase(ImagePlan& p, const ConvShape& s, int64_t y, int64_t x, bool forward) {
    Phase phase{{y, x}, {}, {}, p.packed, 0};
    for (int d = 0; d < 2; ++d) phase.grid[d] = ceil_div(p.result[d] - phase.origin[d], p.result_step[d]);
    if (phase.grid[0] <= 0 || phase.grid[1] <= 0) return;
    std::vector<Seen> rows = seen(s, 0, y, forward), columns = seen(s, 1, x, forward);
    for (const Seen& i : rows)
        for (const Seen& j : columns)
            phase.taps.push_back({{i.at, j.at}, i.element * s.weight_strides[2] + j.element * s.weight_strides[3]});
    p.packed += p.blocks() * p.steps(phase) * 2 * kTile;
    p.phases.push_back(std::move(phase));
}

void surround(ImagePlan& p) {
    for (int d = 0; d < 2; ++d) {
        for (const Phase& phase : p.phases)
            for (const Tap& tap : phase.taps) {
                int64_t last = (phase.grid[d] - 1) * p.source_step[d] + tap.at[d];
                p.border.before[d] = std::max(p.border.before[d], -tap.at[d]);
                p.border.after[d] = std::max(p.border.after[d], last - p.source[d] + 1);
            }
        for (Phase& phase : p.phases)
            for (Tap& tap : phase.taps) tap.at[d] += p.border.before[d];
        p.source[d] = p.border.whole(d);
    }
}

void cut(ImagePlan& p) {
    int64_t rows = 0, largest = 0;
    bool narrow = true;
    for (const Phase& phase : p.phases) {
        rows = std::max(rows, p.row(phase) * static_cast<int64_t>(p.by_taps ? phase.taps.size() : 1));
        largest = std::max(largest, p.n * phase.grid[0] * phase.grid[1]);
        narrow = narrow && phase.grid[1] < kNarrow;
    }
    p.images = p.by_taps && narrow && p.n >= kSide ? std::min(p.n, kImages) : 1;
    // Where tiles hold one pixel of many images, taps outside are left out instead.
    p.border = {p.n, {p.source[0], p.source[1]}, p.source[2], {}, {}};
    if (p.images == 1) surround(p);
    int64_t most = std::min(kMostPixels, kMostFactors / std::max<int64_t>(rows, 1));
    int64_t wanted = kTasksPerThread * p.threads;
    int64_t fair = ceil_div(largest * static_cast<int64_t>(p.phases.size()), wanted);
    p.pixels = std::max(kBlock, std::min(most, fair) / kBlock * kBlock);
    int64_t pieces = 0;
    for (const Phase& phase : p.phases) pieces += ceil_div(p.n * phase.grid[0] * phase.grid[1], p.pixels);
    p.shares = pieces >= wanted || pieces == 0 ? 1 : std::min(p.blocks(), ceil_div(wanted, pieces));
    p.tasks = 0;
    for (Phase& phase : p.phases) {
        phase.first_task = p.tasks;
        p.tasks += ceil_div(p.n * phase.grid[0] * phase.grid[1], p.pixels) * p.shares;
    }
}

}  // namespace

int64_t ImagePlan::row(const Phase& phase) const {
    // A tile's rows in different lines of the nearest cache.
    return by_taps ? source[2] + kStep : steps(phase) * kStep + kStep;
}

int64_t ImagePlan::working() const {
    int64_t factors = 0;
    for (const Phase& phase : phases)
        factors = std::max(factors, row(phase) * static_cast<int64_t>(by_taps ? phase.taps.size() : 1));
    return pixels / kBlock * kSums + (pixels * factors + 1) / 2;
}

ImagePlan plan_forward(const ConvShape& s) {
    ImagePlan p{};
    p.n = s.n;
    p.source[0] = s.height, p.source[1] = s.width, p.source[2] = s.channels;
    p.result[0] = s.out_height, p.result[1] = s.out_width, p.result[2] = s.out_channels;
    p.weight_result = s.weight_strides[0], p.weight_source = s.weight_strides[1];
    for (int d = 0; d < 2; ++d) p.source_step[d] = s.stride[d], p.result_step[d] = 1;
    p.by_taps = s.channels % kStep == 0;
    p.threads = s.threads;
    add_phase(p, s, 0, 0, true);
    cut(p);
    return p;
}

ImagePlan plan_input_grad(const ConvShape& s) {
    ImagePlan p{};
    p.n = s.n;
    p.source[0] = s.out_height, p.source[1] = s.out_width, p.source[2] = s.out_channels;
    p.result[0] = s.height, p.result[1] = s.width, p.result[2] = s.channels;
    p.weight_result = s.weight_strides[1], p.weight_source = s.weight_strides[0];
    for (int d = 0; d < 2; ++d) p.source_step[d] = 1, p.result_step[d] = s.stride[d];
    p.by_taps = s.out_channels % kStep == 0;
    p.threads = s.threads;
    for (int64_t y = 0; y < s.stride[0]; ++y)
        for (int64_t x = 0; x < s.stride[1]; ++x) add_phase(p, s, y, x, false);
    cut(p);
    return p;
}

bool has_few_channels(const ConvShape& s) { return s.channels <= kFewChannels; }

FewPlan plan_few(const ConvShape& s) {
    FewPlan p{};
    p.blocks = ceil_div(s.kernel[0] * s.kernel[1] * s.channels, kBlock);
    p.packed = ceil_div(s.out_channels, kStep) * p.blocks * 2 * kTile;
    auto source_rows = [&](int64_t rows) {
        int64_t reach = (s.kernel[0] - 1) * s.dilation[0];
        return std::min(s.out_height, (rows - 1 + reach) / s.stride[0] + 1);
    };
    auto values = [&](int64_t rows) {
        return ceil_div(source_rows(rows) * s.out_width, kBlock) * kBlock * p.columns();
    };
    p.bands = std::min(s.height, ceil_div(kTasksPerThread * s.threads, std::max<int64_t>(s.n, 1)));
    while (p.bands < s.height && values(ceil_div(s.height, p.bands)) > kFewProducts) ++p.bands;
    p.products = values(ceil_div(s.height, p.bands));
    int64_t wide = (s.out_width - 1) * s.stride[1] + (s.kernel[1] - 1) * s.dilation[1] + 1;
    p.row = std::max(wide, s.width + s.padding[1]) * s.channels;
    p.row = ceil_div(p.row, kSide) * kSide;
    p.copies = kBlock * ceil_div(s.out_channels, kStep) * kStep / 2;
    p.threads = s.threads;
    return p;
}

WeightPlan plan_weight_grad(const ConvShape& s) {
    WeightPlan p{};
    p.shape = s;
    int64_t pixels = s.n * s.out_height * s.out_width, taps = s.kernel[0] * s.kernel[1];
    p.rows = ceil_div(s.out_channels, kSide);
    p.steps = ceil_div(pixels, kStep);
    p.by_taps = s.channels >= kStep;
    p.blocks = p.by_taps ? taps : ceil_div(taps * s.channels, kBlock);
    p.groups = p.by_taps ? ceil_div(s.channels, kBlock) : 1;
    p.images = p.by_taps && s.out_width < kSide && s.n >= kStep ? kStep : 1;
    p.border = {s.n, {s.height, s.width}, s.channels, {}, {}};
    const int64_t out[2] = {s.out_height, s.out_width};
    for (int d = 0; d < 2 && p.images == 1; ++d) {
        int64_t last = (out[d] - 1) * s.stride[d] - s.padding[d] + (s.kernel[d] - 1) * s.dilation[d];
        p.border.before[d] = s.padding[d];
        p.border.after[d] = std::max<int64_t>(0, last - p.border.size[d] + 1);
        p.shape.padding[d] = 0;
    }
    p.shape.height = p.border.whole(0), p.shape.width = p.border.whole(1);
    p.sums = p.blocks * ceil_div(p.rows, 2) * kSums;
    int64_t at_once = std::max<int64_t>(ceil_div(p.steps, kWeightSteps), 1);
    p.parts = std::min(at_once, std::max<int64_t>(1, ceil_div(kTasksPerThread * s.threads, p.groups)));
    p.threads = s.threads;
    return p;
}

int64_t WeightPlan::turned() const { return groups > 1 ? rows * steps * kTile : 0; }

int64_t WeightPlan::working() const {
    int64_t tiles = 2 * (by_taps ? 1 : blocks) + (groups == 1 ? rows : 0);
    return (parts == 1 ? sums : 0) + kWeightSteps * kTile / 2 * tiles;
}

}  // namespace tiles

int64_t conv_bfloat16_forward_scratch(const ConvShape& shape) {
    tiles::ImagePlan p = tiles::plan_forward(shape);
    return p.border.room() + p.packed / 2 + p.threads * p.working();
}

int64_t conv_bfloat16_input_grad_scratch(const ConvShape& shape) {
    if (tiles::has_few_channels(shape)) {
        tiles::FewPlan p = tiles::plan_few(shape);
        return p.packed / 2 + p.threads * p.working();
    }
    tiles::ImagePlan p = tiles::plan_input_grad(shape);
    return p.border.room() + p.packed / 2 + p.threads * p.working();
}

int64_t conv_bfloat16_weight_grad_scratch(const ConvShape& shape) {
    tiles::WeightPlan p = tiles::plan_weight_grad(shape);
    int64_t parts = p.parts > 1 ? p.parts * p.groups * p.sums : 0;
    return p.border.room() + p.turned() / 2 + parts + p.threads * p.working();
}

}  // namespace gankern
