// Element types and small enums shared by every kernel.
#pragma once

#include <cstdint>

namespace gankern {

// Storage types; arithmetic is in float for kFloat32 and kBFloat16, in double for kFloat64.
enum class Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2 };

enum class Activation : int { kNone = 0, kRelu = 1, kLeakyRelu = 2, kTanh = 3 };

struct BFloat16 {
    uint16_t bits;
};

}  // namespace gankern
