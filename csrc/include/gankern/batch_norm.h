// Normalisation of channels over a batch, its backward and the derivative of its input gradient: layer_norm.h's
// formulas on rows [channels] of samples * inner values, with one weight a row.
#pragma once

#include "gankern/types.h"

namespace gankern {

struct BatchNormShape {
    Dtype dtype;
    int64_t samples, channels, inner;  // inner values of one channel of one sample
    bool channels_last;                // [samples, inner, channels] instead
    int threads;
};

struct BatchNormForward {
    BatchNormShape shape;
    const void* input;   // [samples, channels, inner]
    const void* weight;  // [channels] or null for ones
    const void* bias;    // [channels] or null for zeros
    void* output;        // as input
    double* mean;        // [channels]
    double* rstd;        // [channels]
    double* var;         // [channels], unbiased: running statistics are of it
    double eps;
};

struct BatchNormBackward {
    BatchNormShape shape;
    const void* grad_output;  // as input
    const void* input;        // [samples, channels, inner]
    const void* weight;       // [channels] or null
    const double* mean;       // [channels]
    const double* rstd;       // [channels]
    void* grad_input;         // as input
    void* grad_weight;        // [channels] or null
    void* grad_bias;          // [channels] or null, as grad_weight
};

struct BatchNormDoubleBackward {
    BatchNormShape shape;
    const void* tangent;      // as input: cotangent of grad_input
    const void* grad_output;  // as input
    const void* input;        // [samples, channels, inner]
    const void* weight;       // [channels] or null
    const double* mean;       // [channels]
    const double* rstd;       // [channels]
    void* grad_grad_output;   // as input
    void* grad_input;         // as input
    void* grad_weight;        // [channels] or null
};

}  // namespace gankern
