// Tiles of minimal filtering F(2x2, 3x3): 2x2 pixels of the result, which 4x4 of the source reach.
#pragma once

#include "conv_plan.h"
#include "vec.h"

namespace gankern {
namespace GANKERN_ISA {

using V = Vec<float>;

struct WinogradTiles {
    const Winograd& p;
    int64_t across, per_image, all;

    explicit WinogradTiles(const Winograd& plan)
        : p(plan),
          across((plan.result[1] + 1) / 2),
          per_image((plan.result[0] + 1) / 2 * across),
          all(plan.n * per_image) {}

    // Image, row and column of a tile's first pixel in the result.
    struct Place {
        int64_t n, y, x;
    };

    Place place(int64_t tile) const { return {tile / per_image, tile % per_image / across * 2, tile % across * 2}; }

    // The 16 pixels of the source that a tile sees; `nothing` where they are padding.
    void pixels(int64_t tile, const float* source, const float* nothing, const float* (&at)[16]) const {
        Place first = place(tile);
        for (int64_t i = 0; i < 16; ++i) {
            int64_t y = first.y + i / 4 - p.before[0], x = first.x + i % 4 - p.before[1];
            bool inside = y >= 0 && y < p.source[0] && x >= 0 && x < p.source[1];
            at[i] = inside ? source + ((first.n * p.source[0] + y) * p.source[1] + x) * p.source[2] : nothing;
        }
    }
};

// B^T d B of a 4x4 tile of pixels, whose channels begin at `at`; result[t] for the products of index t.
GANKERN_INLINE void transform_input(const float* const (&at)[16], int64_t c, V (&result)[16]) {
    V rows[16];
    for (int j = 0; j < 4; ++j) {
        V d0 = load(at[j] + c), d1 = load(at[4 + j] + c), d2 = load(at[8 + j] + c), d3 = load(at[12 + j] + c);
        rows[j] = d0 - d2;
        rows[4 + j] = d1 + d2;
        rows[8 + j] = d2 - d1;
        rows[12 + j] = d1 - d3;
    }
    for (int i = 0; i < 16; i += 4) {
        result[i] = rows[i] - rows[i + 2];
        result[i + 1] = rows[i + 1] + rows[i + 2];
        result[i + 2] = rows[i + 2] - rows[i + 1];
        result[i + 3] = rows[i + 1] - rows[i + 3];
    }
}

// Whether values are neither infinite nor NaN. Minimal filtering adds up pixels that a result does not see and takes
// them away again, which leaves a NaN of such a one, or where a sum overflows.
class Finite {
 public:
    GANKERN_INLINE V see(V values) {
        zeros_ += values * 0.0f;
        return values;
    }
    bool all() const {
        float lanes[kLanes<float>], sum = 0;
        store(lanes, zeros_);
        for (float lane : lanes) sum += lane;
        return sum == 0;
    }

 private:
    V zeros_{};
};

// 3x3 convolution of stride one, in conv_winograd.cpp. False where the result is not finite: it is then to be made by
// other means.
bool winograd(const Winograd& plan, const float* source, const float* weight, const float* bias,
              const ConvFinish& finish, float* result, float* scratch);

// 4x4 convolution of stride two, in conv_phases.cpp; the same holds.
bool convolve_phases(const PhasePlan& plan, const float* source, const float* weight, const float* bias,
                     const ConvFinish& finish, float* result, float* scratch);

}  // namespace GANKERN_ISA
}  // namespace gankern
