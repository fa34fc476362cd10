// The entry points of one instruction set, and the table that the bindings call through.
#pragma once

#include <type_traits>

#include "gankern/avg_pool.h"
#include "gankern/batch_norm.h"
#include "gankern/batch_norm_act.h"
#include "gankern/conv.h"
#include "gankern/conv_bfloat16.h"
#include "gankern/gradient_penalty.h"
#include "gankern/group_norm.h"
#include "gankern/layer_norm.h"
#include "gankern/minibatch_discrimination.h"
#include "gankern/stem_input_grad.h"
#include "gankern/types.h"
#include "gankern/weight_clip.h"

namespace gankern {

#define GANKERN_KERNELS(X)                                                             \
    X(batch_norm_forward, BatchNormForward)                                            \
    X(batch_norm_backward, BatchNormBackward)                                          \
    X(batch_norm_double_backward, BatchNormDoubleBackward)                             \
    X(batch_norm_act_forward, BatchNormActForward)                                     \
    X(batch_norm_act_backward, BatchNormActBackward)                                   \
    X(conv_forward, ConvForward)                                                       \
    X(conv_input_grad, ConvInputGrad)                                                  \
    X(conv_weight_grad, ConvWeightGrad)                                                \
    X(stem_input_grad, StemInputGrad)                                                  \
    X(layer_norm_forward, LayerNormForward)                                            \
    X(layer_norm_backward, LayerNormBackward)                                          \
    X(layer_norm_double_backward, LayerNormDoubleBackward)                             \
    X(avg_pool_backward, AvgPool)                                                      \
    X(avg_pool_forward, AvgPool)                                                       \
    X(group_norm_double_backward, GroupNormDoubleBackward)                             \
    X(group_norm_backward, GroupNormBackward)                                          \
    X(group_norm_forward, GroupNormForward)                                            \
    X(l1_distance_forward, L1DistanceForward)                                          \
    X(l1_distance_backward, L1DistanceBackward)                                        \
    X(l1_distance_tangent, L1DistanceTangent)                                          \
    X(minibatch_discrimination_forward, MinibatchDiscriminationForward)                \
    X(minibatch_discrimination_backward, MinibatchDiscriminationBackward)              \
    X(minibatch_discrimination_double_backward, MinibatchDiscriminationDoubleBackward) \
    X(interpolate, Interpolate)                                                        \
    X(penalty_tail, PenaltyTail)                                                       \
    X(clip_weights, ClipWeights)                                                       \
    X(rmsprop_clip, RmspropClip)

struct KernelTable {
    int (*vector_lanes)(Dtype dtype);  // values that the kernels hold in one vector
#define GANKERN_FIELD(name, Args) void (*name)(const Args&);
    GANKERN_KERNELS(GANKERN_FIELD)
#undef GANKERN_FIELD
};

// The table for the instruction set in use: the best that the processor has, or the one that GANKERN_CPU_ISA names.
const KernelTable& kernels();
const char* cpu_isa();

// Convolutions on the matrix units; null where the processor, the system, the build or GANKERN_CPU_ISA has none.
struct MatrixKernels {
    void (*conv_bfloat16_forward)(const ConvBFloat16&);
    void (*conv_bfloat16_input_grad)(const ConvBFloat16&);
    void (*conv_bfloat16_weight_grad)(const ConvBFloat16WeightGrad&);
};

const MatrixKernels* matrix_kernels();

#ifdef GANKERN_ISA
namespace GANKERN_ISA {

int vector_lanes(Dtype dtype);

#define GANKERN_DECLARE(name, Args) void name(const Args& args);
GANKERN_KERNELS(GANKERN_DECLARE)
#undef GANKERN_DECLARE

template <class F>
void with_dtype(Dtype dtype, const F& f) {
    switch (dtype) {
        case Dtype::kFloat32:
            return f(float{});
        case Dtype::kFloat64:
            return f(double{});
        case Dtype::kBFloat16:
            return f(BFloat16{});
    }
}

template <class F>
void with_activation(Activation activation, const F& f) {
    switch (activation) {
        case Activation::kNone:
            return f(std::integral_constant<Activation, Activation::kNone>{});
        case Activation::kRelu:
            return f(std::integral_constant<Activation, Activation::kRelu>{});
        case Activation::kLeakyRelu:
            return f(std::integral_constant<Activation, Activation::kLeakyRelu>{});
        case Activation::kTanh:
            return f(std::integral_constant<Activation, Activation::kTanh>{});
    }
}

}  // namespace GANKERN_ISA
#endif

}  // namespace gankern
