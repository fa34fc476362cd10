// What becomes of sums in float32 before they are stored in bfloat16.
#pragma once

#include <immintrin.h>

#include "activation.h"
#include "gankern/conv_bfloat16.h"
#include "vec.h"

namespace gankern {
namespace GANKERN_ISA {

// Stores `values` at result + at, of channels from c on.
template <Activation act>
GANKERN_INLINE void store_finished(const ConvBFloat16Finish& finish, Vec<float> values, BFloat16* result, int64_t at,
                                   int64_t c, __mmask16 lanes) {
    if (finish.scale)
        values = values * (Vec<float>)_mm512_maskz_loadu_ps(lanes, finish.scale + c) +
                 (Vec<float>)_mm512_maskz_loadu_ps(lanes, finish.shift + c);
    if (finish.activated) {
        __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, finish.activated + at));
        auto activated = (Vec<float>)_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
        values = activation_grad_by_output<float, act>(activated, values, finish.negative_slope);
    } else {
        values = activate<float, act>(values, finish.negative_slope);
    }
    _mm256_mask_storeu_epi16(result + at, lanes, (__m256i)_mm512_cvtneps_pbh((__m512)values));
}

// Where the result has few channels.
void conv_bfloat16_few(const ConvBFloat16& a);

}  // namespace GANKERN_ISA
}  // namespace gankern
