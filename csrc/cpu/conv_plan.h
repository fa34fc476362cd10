// How a convolution is cut into work for one thread and one matrix product after another; the same for every
// instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "gankern/conv.h"

namespace gankern {

constexpr int64_t kConvBlock = 64;  // channels of the result whose sums are gathered at once

// Values that lie side by side both in the images and in the packed weight.
struct Run {
    int64_t offset;  // in the images, from the place of the result's pixel
    int64_t length;
    int64_t k;  // row of the packed weight
};

// Runs [begin, end) whose weights fit in the nearest cache: a sum that is added to the others for itself, or a part of
// one that the next chunk carries on.
struct Chunk {
    int64_t begin, end;
    bool starts, ends;
};

// Pixels of a grid that see the same taps of the source; others would multiply zeros.
struct Zone {
    int64_t begin[2], end[2];
    std::vector<Run> runs;
    std::vector<Chunk> chunks;
};

// The pixels (origin + step * grid) of the result, whose taps have the same weights: with a stride of two, an input
// gradient has four such sets, forward one.
struct Phase {
    int64_t origin[2];
    int64_t grid[2];
    std::vector<int64_t> taps;  // places in the weight of two channels
    std::vector<Zone> zones;
    int64_t depth;   // rows of the packed weight: by blocks of channels, by taps, by channels of the block
    int64_t packed;  // where in the packed weights its own begin
};

// A result image as a function of a source image.
struct ConvPlan {
    int64_t n;
    int64_t source[3], result[3];                          // height, width, channels
    int64_t weight_result, weight_source, weight_taps[2];  // strides of the weight
    int64_t source_step[2], result_step[2];                // between neighbours of a grid
    std::vector<Phase> phases;
    bool in_blocks;  // whether blocks of channels are summed up for themselves
    int64_t block;   // channels of such a block; else all
    int64_t packed;  // values of the packed weights

    // Row of the packed weight.
    int64_t row(const Phase& phase, int64_t tap, int64_t channel) const {
        int64_t first = channel / block * block;
        int64_t channels = block < source[2] - first ? block : source[2] - first;
        return first * static_cast<int64_t>(phase.taps.size()) + tap * channels + channel - first;
    }

    int64_t images, rows;  // of the grid in one piece of work
    int threads;

    int64_t grid_rows() const;
    int64_t bands() const { return (grid_rows() + rows - 1) / rows; }
    int64_t pieces() const { return (n + images - 1) / images * bands(); }
    int64_t sums() const;  // values of working space for one piece: sums, and where they are carried on, parts of them
};

ConvPlan plan_forward(const ConvShape& shape);
ConvPlan plan_input_grad(const ConvShape& shape);

constexpr int64_t kWinogradTiles = 64;  // of 2x2 pixels in one piece of work

// A 3x3 convolution of stride one: result(y) = sum over i of source(y - before + i) * weight(i), or of weight(2 - i).
struct Winograd {
    int64_t n;
    int64_t source[3], result[3];
    int64_t weight_result, weight_source, weight_taps[2];
    int64_t before[2];
    bool flipped;
    int threads;
};

// Whether minimal filtering does it: the transforms pay for themselves with enough channels and pixels.
bool is_winograd(const ConvShape& shape);
Winograd winograd_forward(const ConvShape& shape);
Winograd winograd_input_grad(const ConvShape& shape);
int64_t winograd_piece(const Winograd& plan);  // values of working space for one thread
// The same for the weight's gradient: also where every thread's sums fit in its cache.
bool is_winograd_weight_grad(const ConvShape& shape);
int64_t winograd_share(const ConvShape& shape);

// A 4x4 convolution of stride two as convolutions of stride one with 2x2 kernels: every other pixel of the wide side's
// images, in both directions, is an image of its own. Forward they are four sources of one result, backward four
// results of one source.
struct PhaseGrid {
    int64_t size[2], origin[2];  // of the result's pixels
    int64_t source_origin[4][2];
    int64_t tap[4][2], tap_step;  // elements of the kernel that a source meets: tap + {0, 1} * tap_step
};

struct PhasePlan {
    int64_t n;
    int64_t source[3], result[3];
    int64_t weight_result, weight_source, weight_taps[2];
    int64_t source_step, result_step;
    int64_t sources;  // of each grid
    std::vector<PhaseGrid> grids;
    int threads;

    int64_t depth() const { return sources * source[2]; }  // terms of a sum
    int64_t tiles(const PhaseGrid& grid) const { return n * ((grid.size[0] + 1) / 2) * ((grid.size[1] + 1) / 2); }
    int64_t piece() const;  // tiles of 2x2 pixels in one piece of work
};

// Whether minimal filtering of its phases does it.
bool is_phased(const ConvShape& shape);
PhasePlan phased_forward(const ConvShape& shape);
PhasePlan phased_input_grad(const ConvShape& shape);
int64_t phased_working(const PhasePlan& plan);  // values of working space for one thread

// Values of an input image [height, width, channels] that a weight's gradient is a sum over, for a tap or a few.
struct Reach {
    int64_t begin[2], end[2];  // of the output's pixels
    int64_t offset;            // in the input, from the place of the output's pixel
};

Reach reach(const ConvShape& shape, int64_t i, int64_t j);

// Images, or rows of one, that a weight's gradient is summed over at once.
struct ConvPiece {
    int64_t image, images, row, rows;
};

struct ConvPieces {
    int64_t n, height, images, rows, bands, count;

    ConvPiece at(int64_t i) const {
        int64_t image = i / bands * images, row = i % bands * rows;
        return {image, images < n - image ? images : n - image, row, rows < height - row ? rows : height - row};
    }
};

// At least one, where need be without pixels.
ConvPieces conv_pieces(const ConvShape& shape);

// Whether the gradient of the weight has too few input channels for vectors of them, and a row of the kernel covers
// values that lie side by side.
bool conv_is_stem(const ConvShape& shape);

}  // namespace gankern
