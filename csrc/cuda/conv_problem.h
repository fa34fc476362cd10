// Convolutions, transposed ones and the input gradients of both as one problem: see Problem in
// gankern/ops/conv_act/gpu.py.
#pragma once

#include "device.h"

// What is known of one dim of the images.
struct Dim {
    int source, result, kernel, result_step, source_step, offset, dilation, tap_step, reach;
};

struct Problem {
    int images, source_c, result_c;
    Dim h, w;
};

// The parameters of a kernel that make up a Problem.
#define GANKERN_PROBLEM                                                                                       \
    index_t images, index_t source_h, index_t source_w, index_t source_c, index_t result_h, index_t result_w, \
        index_t result_c, index_t kernel_h, index_t kernel_w, index_t result_step_h, index_t result_step_w,   \
        index_t source_step_h, index_t source_step_w, index_t offset_h, index_t offset_w, index_t dilation_h, \
        index_t dilation_w, index_t tap_step_h, index_t tap_step_w, index_t reach_h, index_t reach_w
#define GANKERN_PROBLEM_DIM(d)                                                                         \
    Dim {                                                                                              \
        int(source_##d), int(result_##d), int(kernel_##d), int(result_step_##d), int(source_step_##d), \
            int(offset_##d), int(dilation_##d), int(tap_step_##d), int(reach_##d)                      \
    }
#define GANKERN_THE_PROBLEM \
    Problem { int(images), int(source_c), int(result_c), GANKERN_PROBLEM_DIM(h), GANKERN_PROBLEM_DIM(w) }

// One dim of a phase: pixels of the result that see the same taps.
struct Phase {
    int origin, grid;        // of the result's pixels
    int first, taps, begin;  // first tap, number of taps, and the source's pixel of the first pixel and tap
    __device__ Phase(const Dim& d, int from) : origin(from), first(d.kernel) {
        grid = (d.result - origin + d.result_step - 1) / d.result_step;
        for (int i = d.tap_step - 1; i >= 0; --i)
            if ((origin + d.offset - d.dilation * i) % d.result_step == 0) first = i < d.kernel ? i : d.kernel;
        taps = (d.kernel - first + d.tap_step - 1) / d.tap_step;
        begin = (origin + d.offset - d.dilation * first) / d.result_step;
    }
};

// A pixel of a phase: where it lies in the result, and what its first tap sees of the source.
struct Pixel {
    bool inside;
    index_t to, from;
    int y, x;
    __device__ Pixel(const Problem& p, const Phase& h, const Phase& w, int number) {
        int column = number % w.grid, row = number / w.grid % h.grid, image = number / w.grid / h.grid;
        inside = image < p.images;
        y = row * p.h.source_step + h.begin;
        x = column * p.w.source_step + w.begin;
        from = ((static_cast<index_t>(image) * p.h.source + y) * p.w.source + x) * p.source_c;
        index_t line = static_cast<index_t>(image) * p.h.result + h.origin + row * p.h.result_step;
        to = (line * p.w.result + w.origin + column * p.w.result_step) * p.result_c;
    }
};

// What becomes of a sum on its way to memory: see Finish in gankern/ops/conv_act/gpu.py.
enum { kNone, kRelu, kLeakyRelu, kTanh };

template <class A>
__device__ inline A activate(A z, int activation, A slope) {
    if (activation == kRelu) return z <= 0 ? A(0) : z;  // a NaN stays
    if (activation == kLeakyRelu) return z > 0 ? z : z * slope;
    return activation == kTanh ? tanh(z) : z;
}

template <class A>
__device__ inline A activate_backward(A grad, A output, int activation, A slope) {
    if (activation == kRelu) return output <= 0 ? A(0) : grad;
    if (activation == kLeakyRelu) return output > 0 ? grad : grad * slope;
    return activation == kTanh ? grad * (1 - output * output) : grad;
}
