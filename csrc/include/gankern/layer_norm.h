// Layer normalisation of rows, its backward and the derivative of its input gradient.
//
// With xhat = (x - mean) * rstd, a = weight * grad_output and P(u) = u - mean(u) - xhat * mean(u * xhat):
//   grad_input = rstd * P(a)
// and for the cotangent v of grad_input, with p = mean(v * xhat), q = mean(a * xhat), A = mean(v * a) - mean(v) *
// mean(a):
//   d/d grad_output = weight * rstd * P(v)
//   d/d weight      = sum over rows of grad_output * rstd * P(v)
//   d/d input       = -rstd^2 * ((A - p * q) * xhat + q * P(v) + p * P(a))
#pragma once

#include "gankern/types.h"

namespace gankern {

struct LayerNormShape {
    Dtype dtype;
    int64_t rows, size;
    int threads;
};

struct LayerNormForward {
    LayerNormShape shape;
    const void* input;   // [rows, size]
    const void* weight;  // [size] or null for ones
    const void* bias;    // [size] or null for zeros
    void* output;        // [rows, size]
    double* mean;        // [rows]
    double* rstd;        // [rows]
    double eps;
};

struct LayerNormBackward {
    LayerNormShape shape;
    const void* grad_output;  // [rows, size]
    const void* input;        // [rows, size]
    const void* weight;       // [size] or null
    const double* mean;       // [rows]
    const double* rstd;       // [rows]
    void* grad_input;         // [rows, size]
    void* grad_weight;        // [size] or null
    void* grad_bias;          // [size] or null
    void* scratch;            // acc [2, layer_norm_parts(rows), size] where a gradient of a parameter is wanted
};

struct LayerNormDoubleBackward {
    LayerNormShape shape;
    const void* tangent;      // [rows, size]: cotangent of grad_input
    const void* grad_output;  // [rows, size]
    const void* input;        // [rows, size]
    const void* weight;       // [size] or null
    const double* mean;       // [rows]
    const double* rstd;       // [rows]
    void* grad_grad_output;   // [rows, size]
    void* grad_input;         // [rows, size]
    void* grad_weight;        // [size] or null
    void* scratch;            // acc [layer_norm_parts(rows), size] where grad_weight is wanted
};

// Sums over rows are cut into so many parts, whatever the number of threads.
constexpr int64_t layer_norm_parts(int64_t rows) { return rows < 16 ? rows : 16; }

}  // namespace gankern
