// L1 distances between the samples of a batch, and the features that minibatch discrimination makes of them, over
// m of n samples, b features and c kernel dims.
#pragma once

#include "gankern/types.h"

namespace gankern {

struct MinibatchShape {
    Dtype dtype;
    int64_t n, b, c;
    int threads;
    int lanes;  // values of one vector of the kernels' instruction set: KernelTable::vector_lanes
};

// Every tensor is contiguous. Scratch is 64-byte aligned and holds as many 64-byte lines as the functions below say.

struct MinibatchDiscriminationForward {
    MinibatchShape shape;
    const void* m;  // [n, b, c]
    void* output;   // [n, b]
    void* scratch;
    bool include_self;
};

struct MinibatchDiscriminationBackward {
    MinibatchShape shape;
    const void* grad_output;  // [n, b]
    const void* m;            // [n, b, c]
    void* grad_m;             // [n, b, c]
    void* scratch;
};

// Derivatives of sum(cotangent * backward(grad_output, m)).
struct MinibatchDiscriminationDoubleBackward {
    MinibatchShape shape;
    const void* cotangent;    // [n, b, c]
    const void* grad_output;  // [n, b]
    const void* m;            // [n, b, c]
    void* grad_grad_output;   // [n, b]
    void* grad_m;             // [n, b, c]
    void* scratch;
};

struct L1DistanceForward {
    MinibatchShape shape;
    const void* m;  // [n, b, c]
    void* output;   // [n, n, b]
    void* scratch;
};

struct L1DistanceBackward {
    MinibatchShape shape;
    const void* grad_output;  // [n, n, b]
    const void* m;            // [n, b, c]
    void* grad_m;             // [n, b, c]
    void* scratch;
};

// Directional derivative of the distances.
struct L1DistanceTangent {
    MinibatchShape shape;
    const void* tangent;  // [n, b, c]
    const void* m;        // [n, b, c]
    void* output;         // [n, n, b]
    void* scratch;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the pairs of samples are shared out. Whole features go to the threads, each with a workspace of its own; a few
// features of many samples are each cut into parts, summed in order. The cut follows from the shape alone, so that the
// bits are the same for any number of threads.
struct PairPlan {
    static constexpr int64_t kRows = 4;     // samples i of a tile
    static constexpr int64_t kPanels = 4;   // vectors of samples j of a tile, at most
    static constexpr int64_t kSigns = 256;  // lines of signs that a tile of more than one vector may have
    static constexpr int64_t kItems = 16;
    static constexpr int64_t kLongWork = 1 << 20, kShortWork = 1 << 17;

    int64_t panels, b, c, width, parts;
    int threads;

    explicit PairPlan(const MinibatchShape& s)
        : panels(ceil_div(s.n, s.lanes)), b(s.b), c(s.c), width(kPanels), parts(1), threads(s.threads) {
        while (width > 1 && width * kRows * c > kSigns) width /= 2;
        double work = static_cast<double>(s.n) * static_cast<double>(s.n) * static_cast<double>(s.c + 1);
        if (s.b < kItems && work >= kLongWork) parts = ceil_div(kItems, s.b);
        if (work * static_cast<double>(s.b) < kShortWork) threads = 1;
    }
    int64_t values() const { return panels * c; }  // lines of one feature of m
    int64_t feature() const { return 2 * values() + panels; }
    int64_t part() const { return values() + 2 * panels + (width + 1) * kRows * c; }
    int64_t slots() const { return parts > 1 ? b : threads; }
    int64_t slot() const { return feature() + parts * part(); }
    int64_t lines() const { return slots() * slot(); }
};

// How distances are shared out: blocks of rows i against blocks of columns j, m as n * b rows of c values.
struct DistancePlan {
    static constexpr int64_t kRows = 16;
    static constexpr int64_t kBlock = 256;  // values of a row in a block, unless 16 samples have more
    static constexpr int64_t kShortWork = 1 << 16;

    int64_t lanes, n, b, c, panels, period, columns;
    int threads;

    explicit DistancePlan(const MinibatchShape& s)
        : lanes(s.lanes), n(s.n), b(s.b), c(s.c), panels(ceil_div(n * b, lanes)), period(b) {
        // A row of m repeats with b; short periods are stretched until vectors stay aligned to them.
        while (period < lanes || (b < lanes && period % lanes)) period += b;
        columns = b * kRows < kBlock ? kBlock / b : kRows;
        threads = static_cast<double>(n) * static_cast<double>(n * b) * static_cast<double>(c + 1) < kShortWork
                      ? 1
                      : s.threads;
    }
    int64_t values() const { return panels * c; }
    int64_t row() const { return ceil_div(period + lanes, lanes) * c; }  // lines of one repeated row
    int64_t block() const { return ceil_div(columns * b, lanes) + 2; }   // lines of a block of one output row
    int64_t slot() const { return kRows * (2 * row() + block()); }
    int64_t lines() const { return 2 * values() + threads * slot(); }
};

inline int64_t minibatch_discrimination_scratch(const MinibatchShape& s) { return PairPlan(s).lines(); }
inline int64_t l1_distance_scratch(const MinibatchShape& s) { return DistancePlan(s).lines(); }

}  // namespace gankern
