// What becomes of sums in float32 before they are stored in bfloat16.
#pragma once

#include <immintrin.h>

#include "activation.h"
#include "gankern/conv_bfloat16.h"
#include "vec.h"

namespace gankern {
namespace GANKERN_ISA {

// Values of 16 channels, or fewer, on their way to memory.
template <Activation act>
class Finish {
 public:
    Finish(const ConvBFloat16Finish& finish, const float* bias, int64_t channel, __mmask16 lanes)
        : lanes_(lanes), affine_(finish.scale), slope_(finish.negative_slope), activated_(finish.activated) {
        auto part = [&](const float* from) { return (Vec<float>)_mm512_maskz_loadu_ps(lanes, from + channel); };
        if (bias) bias_ = part(bias);
        if (affine_) scale_ = part(finish.scale), shift_ = part(finish.shift);
    }

    GANKERN_INLINE void store(Vec<float> values, BFloat16* result, int64_t at) const {
        values += bias_;
        if (affine_) values = values * scale_ + shift_;
        if (activated_) {
            __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes_, activated_ + at));
            auto activated = (Vec<float>)_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
            values = activation_grad_by_output<float, act>(activated, values, slope_);
        } else {
            values = activate<float, act>(values, slope_);
        }
        _mm256_mask_storeu_epi16(result + at, lanes_, (__m256i)_mm512_cvtneps_pbh((__m512)values));
    }

 private:
    __mmask16 lanes_;
    bool affine_;
    float slope_;
    const BFloat16* activated_;
    Vec<float> bias_{}, scale_{}, shift_{};
};

// Where the result has few channels.
void conv_bfloat16_few(const ConvBFloat16& a);

}  // namespace GANKERN_ISA
}  // namespace gankern
