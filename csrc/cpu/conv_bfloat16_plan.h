// How a bfloat16 convolution is cut into tiles and work for one thread. A tile holds 16 rows of 64 bytes.
#pragma once

#include <cstdint>
#include <vector>

#include "gankern/conv_bfloat16.h"

namespace gankern {
namespace tiles {

constexpr int64_t kSide = 16;               // rows of a tile, and its columns of sums
constexpr int64_t kStep = 32;               // terms of a sum in one row
constexpr int64_t kBlock = 2 * kSide;       // rows and columns of four tiles of sums
constexpr int64_t kTile = kSide * kStep;    // values of a tile of factors
constexpr int64_t kSums = kBlock * kBlock;  // values of four tiles of sums
constexpr int64_t kStepsAtOnce = 16;        // steps whose weights fit in the nearest cache, for one block of columns

// Zeros around images, so that no tap falls outside.
struct Border {
    int64_t n, size[2], channels;  // of the images without
    int64_t before[2], after[2];   // rows and columns of zeros

    bool any() const { return before[0] || before[1] || after[0] || after[1]; }
    int64_t whole(int d) const { return before[d] + size[d] + after[d]; }
    // Float32 values of room for the images with their borders, where they have any.
    int64_t room() const { return any() ? (n * whole(0) * whole(1) * channels + 31) / 32 * 16 : 0; }
};

struct Tap {
    int64_t at[2];   // of the source's pixel, from the grid's
    int64_t weight;  // place in the weight of two channels
};

// The pixels (origin + result_step * grid) of the result, whose taps have the same weights.
struct Phase {
    int64_t origin[2], grid[2];
    std::vector<Tap> taps;  // in the order of their pixels
    int64_t packed;         // where in the packed weights its own begin
    int64_t first_task;
};

struct ImagePlan {
    int64_t n;
    int64_t source[3], result[3];  // height, width, channels; of the source with its border
    Border border;
    int64_t weight_result, weight_source;
    int64_t source_step[2], result_step[2];
    std::vector<Phase> phases;
    bool by_taps;    // whether steps hold channels of one tap; else all taps' channels lie side by side
    int64_t images;  // of which the same pixel comes first, before the next pixel
    int64_t pixels;  // of a phase in one task
    int64_t shares;  // tasks that share these pixels, by blocks of channels
    int64_t packed;  // values of the packed weights
    int64_t tasks;
    int threads;

    int64_t steps(const Phase& phase) const {
        return (static_cast<int64_t>(phase.taps.size()) * source[2] + kStep - 1) / kStep;
    }
    int64_t blocks() const { return (result[2] + kBlock - 1) / kBlock; }  // of channels of the result
    int64_t row(const Phase& phase) const;                                // values of a packed row of a tile's factors
    int64_t working() const;  // float32 values of working space for one thread
};

// Walks through the pixels of a grid, `images` images at a time.
class Walk {
 public:
    Walk(int64_t n, int64_t images, const int64_t (&grid)[2], int64_t first) : n_(n), images_(images), grid_(grid) {
        int64_t area = grid[0] * grid[1];
        group_ = first / (images * area) * images;
        int64_t width = size(), at = first - group_ * area;
        image = group_ + at % width, y = at / width / grid[1], x = at / width % grid[1];
    }
    void next() {
        if (++image < group_ + size()) return;
        image = group_;
        if (++x < grid_[1]) return;
        x = 0;
        if (++y < grid_[0]) return;
        y = 0;
        image = group_ += images_;
    }

    int64_t image, y, x;

 private:
    int64_t size() const { return images_ < n_ - group_ ? images_ : n_ - group_; }

    int64_t n_, images_, group_;
    const int64_t (&grid_)[2];
};

ImagePlan plan_forward(const ConvShape& shape);
ImagePlan plan_input_grad(const ConvShape& shape);

// An input gradient of few channels: all taps of a source pixel at once, added up by rows of the result.
struct FewPlan {
    int64_t blocks;    // of 32 columns, which are taps by channels
    int64_t packed;    // values of the packed weight
    int64_t bands;     // of rows of one image's result
    int64_t products;  // float32 values of one band's source pixels times taps
    int64_t row;       // values of a row of the result, with what falls outside
    int64_t copies;    // float32 values of room for 32 source pixels
    int threads;

    int64_t columns() const { return blocks * kBlock; }
    int64_t working() const { return products + (row > copies ? row : copies); }
};

bool has_few_channels(const ConvShape& shape);
FewPlan plan_few(const ConvShape& shape);

// The gradient of the weight: a product [out_channels, pixels] x [pixels, columns], columns being taps by channels.
struct WeightPlan {
    ConvShape shape;  // of the input with its border
    Border border;
    int64_t rows;    // tiles of out_channels
    int64_t steps;   // of 32 pixels
    int64_t parts;   // of the pixels, with sums of their own
    int64_t blocks;  // of 32 columns, in one group
    int64_t groups;  // of 32 channels by all taps
    bool by_taps;    // whether a block holds channels of one tap; else all taps' channels lie side by side
    int64_t images;  // as in ImagePlan
    int64_t sums;    // float32 values of the sums of one group and part
    int threads;

    int64_t turned() const;   // values of the output's gradient, turned for all groups; one has no need to keep it
    int64_t working() const;  // float32 values of working space for one thread
};

constexpr int64_t kWeightSteps = 8;  // of pixels, at once

WeightPlan plan_weight_grad(const ConvShape& shape);

}  // namespace tiles
}  // namespace gankern
