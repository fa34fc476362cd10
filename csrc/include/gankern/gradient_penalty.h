// The elementwise ends of a gradient penalty: the points where it is taken, and the loss with its derivative.
#pragma once

#include "gankern/types.h"

namespace gankern {

// points = alpha * real + (1 - alpha) * fake, one alpha a sample.
struct Interpolate {
    Dtype dtype;
    int64_t n, size;    // samples, values a sample
    const void* real;   // [n, size]
    const void* fake;   // [n, size]
    const void* alpha;  // acc [n]
    void* points;       // [n, size]
    int threads;
};

// loss = weight * mean(f(||grad_i||)) and cotangent = d loss / d grad, where f is, with excess = norm - target,
// norm^2 (squared), max(excess, 0)^2 (one-sided) or excess^2. The subgradient at norm 0 is 0.
struct PenaltyTail {
    Dtype dtype;
    int64_t n, size;
    const void* grad;  // [n, size]
    void* cotangent;   // [n, size]
    void* loss;        // [1], of dtype
    double* scratch;   // [n]
    double weight, target;
    bool one_sided, squared;
    int threads;
};

}  // namespace gankern
