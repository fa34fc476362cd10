// Gradient of a convolution's input where that has few channels: a critic's first layer.
#pragma once

#include "gankern/types.h"

namespace gankern {

// grad_input[n, y, x, c] = sum over the taps (i, j) and output channels k that reach it, all channels_last:
// grad_output[n, oy, ox, k] * weight[k, i, j, c] with y = oy * stride - padding + i * dilation, and x likewise.
struct StemInputGrad {
    Dtype dtype;                         // float32 or float64
    int64_t n, height, width, channels;  // of the input
    int64_t out_height, out_width, out_channels;
    int64_t kernel[2], stride[2], padding[2], dilation[2];
    const void* grad_output;  // [n, out_height, out_width, out_channels]
    const void* weight;       // [out_channels, kernel, kernel, channels]
    void* grad_input;         // [n, height, width, channels]
    void* scratch;            // stem_input_grad_scratch values of dtype
    int threads;
};

// Values that one row of taps takes in the kernel: padded to whole blocks of vectors of any instruction set.
constexpr int64_t stem_input_grad_row(int64_t taps) { return (taps + 47) / 48 * 48; }

// Space for the padded weight.
constexpr int64_t stem_input_grad_scratch(int64_t taps, int64_t out_channels) {
    return stem_input_grad_row(taps) * out_channels;
}

}  // namespace gankern
