// Activations of vectors and their derivatives.
#pragma once

#include "gankern/types.h"
#include "vec.h"

namespace gankern {
namespace GANKERN_ISA {

template <class A, Activation act>
GANKERN_INLINE Vec<A> activate(Vec<A> z, A slope) {
    if constexpr (act == Activation::kRelu) return (z < 0) ? Vec<A>{} : z;  // a NaN stays
    if constexpr (act == Activation::kLeakyRelu) return (z > 0) ? z : z * slope;
    if constexpr (act == Activation::kTanh) return tanh(z);
    return z;
}

// The gradient of an activation's input z.
template <class A, Activation act>
GANKERN_INLINE Vec<A> activation_grad(Vec<A> z, Vec<A> grad, A slope) {
    if constexpr (act == Activation::kRelu) return (z <= 0) ? Vec<A>{} : grad;  // a NaN lets it through, as in torch
    if constexpr (act == Activation::kLeakyRelu) return (z > 0) ? grad : grad * slope;
    if constexpr (act == Activation::kTanh) {
        Vec<A> y = tanh(z);
        return grad * (1 - y * y);
    }
    return grad;
}

// The same by the activation's output y; the slope is 0 or more.
template <class A, Activation act>
GANKERN_INLINE Vec<A> activation_grad_by_output(Vec<A> y, Vec<A> grad, A slope) {
    if constexpr (act == Activation::kTanh) return grad * (1 - y * y);
    return activation_grad<A, act>(y, grad, slope);
}

}  // namespace GANKERN_ISA
}  // namespace gankern
