// How a convolution is cut into work for one thread and one matrix product after another; the same for every
// instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "gankern/conv.h"

namespace gankern {

constexpr int64_t kConvBlock = 64;  // channels of the result whose sums are gathered at once

// Some channels of the source behind one element of the kernel: rows of the packed weight.
struct Tap {
    int64_t i, j;
    int64_t channel, channels;
    int64_t k;  // first row
};

// Values that lie side by side both in the padded images and in the packed weight.
struct Run {
    int64_t offset;  // in the padded images, from the place of the result's pixel
    int64_t length;
    int64_t k;  // row of the packed weight
};

// The pixels (origin + step * grid) of the result, all of which see the same taps: with a stride of two, an input
// gradient has four such sets, forward one.
struct Phase {
    int64_t origin[2];
    int64_t grid[2];
    std::vector<Tap> taps;
    std::vector<Run> runs;
    std::vector<int64_t> chunks;  // where in runs a part begins that is summed up for itself; ends with size
    int64_t depth;                // rows of the packed weight
    int64_t packed;               // where in the packed weights its own begin
};

// A result image as a function of a source image that is padded on the way.
struct ConvPlan {
    int64_t n;
    int64_t source[3], result[3];  // height, width, channels
    int64_t weight_result, weight_source, weight_taps[2];  // strides of the weight
    int64_t source_step[2], result_step[2];                // between neighbours of a grid
    int64_t before[2];                                     // rows above and columns to the left; negative to crop
    int64_t extent[2];                                     // rows and columns that all taps of a pixel span
    std::vector<Phase> phases;
    int64_t images, rows;  // of the grid in one piece of work
    int64_t padded[2];     // rows and columns of one image in it
    int64_t packed;        // values of the packed weights
    int threads;

    int64_t grid_rows() const;
    int64_t bands() const { return (grid_rows() + rows - 1) / rows; }
    int64_t pieces() const { return (n + images - 1) / images * bands(); }
    int64_t source_values() const;  // of one piece, padded, with room for a vector read past the end
    int64_t pixels() const;         // of the grid in one piece, at most
};

ConvPlan plan_forward(const ConvShape& shape);
ConvPlan plan_input_grad(const ConvShape& shape);
ConvPlan plan_weight_grad(const ConvShape& shape);

}  // namespace gankern
