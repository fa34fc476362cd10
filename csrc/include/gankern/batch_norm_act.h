// Batch normalisation + activation over tensors of n images, c channels and hw pixels.
#pragma once

#include "gankern/types.h"

namespace gankern {

// Pointers marked "acc" are float for float and bfloat16 tensors, double for double tensors.
struct BatchNormActShape {
    Dtype dtype;
    int64_t n, c, hw;
    bool channels_last;  // memory order n, hw, c instead of n, c, hw
    Activation activation;
    double negative_slope;
    int threads;
};

struct BatchNormActForward {
    BatchNormActShape shape;
    const void* input;   // [n, c, hw]
    const void* weight;  // acc [c] or null for ones
    const void* bias;    // acc [c] or null for zeros
    void* output;        // [n, c, hw]
    void* mean;          // acc [c]; written when training, read otherwise
    void* invstd;        // acc [c]; written when training, read otherwise
    void* var;           // acc [c]; biased variance, written when training
    double* scratch;     // batch_norm_act_scratch(c) values
    bool training;
    double eps;
};

struct BatchNormActBackward {
    BatchNormActShape shape;
    const void* grad_output;  // [n, c, hw]
    const void* input;        // [n, c, hw]
    const void* weight;       // acc [c] or null
    const void* bias;         // acc [c] or null
    const void* mean;         // acc [c]
    const void* invstd;       // acc [c]
    void* grad_input;         // [n, c, hw]
    void* grad_weight;        // acc [c]
    void* grad_bias;          // acc [c]
    double* scratch;
    bool training;  // false: mean and invstd are constants
};

// A reduction over one channel is cut into at most so many parts.
constexpr int64_t kBatchNormActParts = 32;

// Number of doubles that the kernels need as scratch.
constexpr int64_t batch_norm_act_scratch(int64_t channels) { return 2 * (kBatchNormActParts + 1) * channels; }

}  // namespace gankern
