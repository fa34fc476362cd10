// Means over windows that tile the image, kernel equal to stride, and the spreading of gradients over them.
#pragma once

#include "gankern/types.h"

namespace gankern {

struct AvgPool {
    Dtype dtype;
    int64_t planes, height, width;  // of the large image; what the last whole window leaves over counts for nothing
    int64_t kernel_height, kernel_width;
    const void* from;  // forward: [planes, height, width]; backward: the gradient of the means
    void* to;          // forward: [planes, height / kernel_height, width / kernel_width]; backward: the large image
    int threads;
};

}  // namespace gankern
