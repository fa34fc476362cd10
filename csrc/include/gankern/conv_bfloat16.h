// Convolution of channels_last images in bfloat16 on the matrix units (AMX) and its gradients; sums are in float32.
#pragma once

#include <cstdint>

#include "gankern/conv.h"

namespace gankern {

// As ConvFinish, of results in bfloat16: the bias comes first.
struct ConvBFloat16Finish {
    Activation activation;
    float negative_slope;
    const BFloat16* activated;   // null, or an activation's output, shaped as the result
    const float *scale, *shift;  // [channels of the result], both or null
};

// One image out of another: the output, or the gradient of the input (a transposed convolution's output).
struct ConvBFloat16 {
    ConvShape shape;
    ConvBFloat16Finish finish;
    const BFloat16* source;
    const float* weight;  // by weight_strides
    const float* bias;    // [channels of the result] or null
    BFloat16* result;
    float* scratch;  // conv_bfloat16_forward_scratch or conv_bfloat16_input_grad_scratch values
};

struct ConvBFloat16WeightGrad {
    ConvShape shape;
    const BFloat16* grad_output;
    const BFloat16* input;
    float* grad_weight;  // by weight_strides
    float* scratch;      // conv_bfloat16_weight_grad_scratch values
};

// Float32 values of working space.
int64_t conv_bfloat16_forward_scratch(const ConvShape& shape);
int64_t conv_bfloat16_input_grad_scratch(const ConvShape& shape);
int64_t conv_bfloat16_weight_grad_scratch(const ConvShape& shape);

}  // namespace gankern
