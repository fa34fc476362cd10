// Normalisation of groups of channels, its backward and the derivative of its input gradient: layer_norm.h's formulas
// on rows [samples * groups] of channels * inner values, with one weight a channel. Instance norm has one channel a
// group.
#pragma once

#include "gankern/types.h"

namespace gankern {

struct GroupNormShape {
    Dtype dtype;
    int64_t samples, groups, channels, inner;  // channels of one group; inner values of one channel
    bool channels_last;                        // [samples, inner, groups, channels] instead
    int threads;
};

struct GroupNormForward {
    GroupNormShape shape;
    const void* input;   // [samples, groups, channels, inner]
    const void* weight;  // [groups, channels] or null for ones
    const void* bias;    // [groups, channels] or null for zeros
    void* output;        // as input
    double* mean;        // [samples, groups]
    double* rstd;        // [samples, groups]
    double eps;
};

struct GroupNormBackward {
    GroupNormShape shape;
    const void* grad_output;  // as input
    const void* input;        // [samples, groups, channels, inner]
    const void* weight;       // [groups, channels] or null
    const double* mean;       // [samples, groups]
    const double* rstd;       // [samples, groups]
    void* grad_input;         // as input
    void* grad_weight;        // [groups, channels] or null
    void* grad_bias;          // [groups, channels] or null, as grad_weight
    double* scratch;          // [2, samples, groups, channels] where grad_weight is wanted
};

struct GroupNormDoubleBackward {
    GroupNormShape shape;
    const void* tangent;      // as input: cotangent of grad_input
    const void* grad_output;  // as input
    const void* input;        // [samples, groups, channels, inner]
    const void* weight;       // [groups, channels] or null
    const double* mean;       // [samples, groups]
    const double* rstd;       // [samples, groups]
    void* grad_grad_output;   // as input
    void* grad_input;         // as input
    void* grad_weight;        // [groups, channels] or null
    double* scratch;          // [samples, groups, channels] where grad_weight is wanted
};

}  // namespace gankern
