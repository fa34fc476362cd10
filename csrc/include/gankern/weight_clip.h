// Weight clipping over a list of tensors, alone and as the end of an RMSProp step.
#pragma once

#include "gankern/types.h"

namespace gankern {

// Tensors of one dtype, each walked as flat memory.
struct TensorList {
    Dtype dtype;
    int64_t count;
    const int64_t* sizes;  // [count] numbers of elements
    int threads;
};

struct ClipWeights {
    TensorList list;
    void* const* params;
    double bound;
};

struct RmspropClip {
    TensorList list;
    void* const* params;
    const void* const* grads;
    void* const* square_avgs;
    void* const* grad_avgs;         // null unless centered
    void* const* momentum_buffers;  // null without momentum
    double lr, alpha, eps, weight_decay, momentum;
    bool maximize;
    double bound;  // infinity for none
};

}  // namespace gankern
