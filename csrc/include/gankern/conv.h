// Convolution of channels_last images, the gradient of its input (which is transposed convolution) and of its weight.
#pragma once

#include <cstdint>

#include "gankern/types.h"

namespace gankern {

// output[n, oy, ox, k] = sum over taps (i, j) and channels c of input[n, y, x, c] * weight[k, c, i, j] with
// y = oy * stride - padding + i * dilation, and x likewise; no groups. All values are float32.
struct ConvShape {
    int64_t n, height, width, channels;  // of the input
    int64_t out_height, out_width, out_channels;
    int64_t kernel[2], stride[2], padding[2], dilation[2];
    int64_t weight_strides[4];  // of weight and its gradient [out_channels, channels, kernel, kernel], in elements
    // Forward: channels whose products are summed up for themselves, by rows and columns of the kernel, before they are
    // added to the others; 0 where any order will do.
    int64_t sum_block;
    int threads;
};

// What becomes of a result's values before they are stored: value * scale + shift, then an activation or the product
// with its derivative.
struct ConvFinish {
    Activation activation;
    float negative_slope;
    const float* activated;      // null, or an activation's output, shaped as the result: where the derivative is taken
    const float *scale, *shift;  // [channels of the result], both or null
};

struct ConvForward {
    ConvShape shape;
    ConvFinish finish;
    const float* input;   // [n, height, width, channels]
    const float* weight;  // by weight_strides
    const float* bias;    // [out_channels] or null
    float* output;        // [n, out_height, out_width, out_channels]
    float* scratch;       // conv_forward_scratch values
};

struct ConvInputGrad {
    ConvShape shape;
    ConvFinish finish;
    const float* grad_output;  // [n, out_height, out_width, out_channels]
    const float* weight;
    const float* bias;  // [channels] or null: of a transposed convolution
    float* grad_input;  // [n, height, width, channels]
    float* scratch;     // conv_input_grad_scratch values
};

struct ConvWeightGrad {
    ConvShape shape;
    const float* grad_output;
    const float* input;
    float* grad_weight;  // by weight_strides
    float* scratch;      // conv_weight_grad_scratch values
};

// Float32 values that the kernels of any instruction set need as working space.
int64_t conv_forward_scratch(const ConvShape& shape);
int64_t conv_input_grad_scratch(const ConvShape& shape);
int64_t conv_weight_grad_scratch(const ConvShape& shape);

}  // namespace gankern
