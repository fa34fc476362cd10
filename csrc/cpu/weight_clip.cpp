// One pass over memory, which is what bounds it: all tensors of a list are one range of elements, cut into chunks, so
// that threads get equal shares whatever the tensors' sizes.
#include "gankern/weight_clip.h"

#include <algorithm>
#include <vector>

#include "gankern/parallel.h"
#include "kernels.h"
#include "vec.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

constexpr int64_t kChunk = 16384;  // elements; a multiple of kAlign
constexpr int64_t kAlign = 64;     // tensors start at multiples of it in the range, so that no cut splits a vector
constexpr int64_t kAhead = 4096;   // bytes: into the next page, where the processor's own prefetch does not go

// A vector at p, with what lies kAhead behind it on its way into cache.
template <class S>
GANKERN_INLINE Vec<Acc<S>> stream(const S* p, int lanes, Acc<S> fill) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead);
    return load(p, lanes, fill);
}

// Calls body(tensor, begin, end) for pieces of the tensors that together cover each once.
template <class Body>
void for_each_piece(const TensorList& list, const Body& body) {
    std::vector<int64_t> start(list.count + 1, 0);
    for (int64_t t = 0; t < list.count; ++t) start[t + 1] = start[t] + (list.sizes[t] + kAlign - 1) / kAlign * kAlign;
    int64_t total = start[list.count];
    parallel_for((total + kChunk - 1) / kChunk, list.threads, [&](int64_t from, int64_t to) {
        int64_t begin = from * kChunk, end = std::min(to * kChunk, total);
        int64_t t = std::upper_bound(start.begin(), start.end(), begin) - start.begin() - 1;
        for (; t < list.count && start[t] < end; ++t)
            body(t, std::max(begin - start[t], int64_t{0}), std::min(end - start[t], list.sizes[t]));
    });
}

template <class A>
GANKERN_INLINE Vec<A> clamp(Vec<A> x, A bound) {
    x = (x < -bound) ? splat(-bound) : x;  // a NaN stays
    return (x > bound) ? splat(bound) : x;
}

template <class S>
void clip(const ClipWeights& a) {
    using A = Acc<S>;
    A bound = static_cast<A>(a.bound);
    for_each_piece(a.list, [&](int64_t t, int64_t begin, int64_t end) {
        auto* param = static_cast<S*>(a.params[t]) + begin;
        for_each_vec<A>(end - begin, [&](int64_t i, int lanes) {
            store(param + i, lanes, clamp<A>(stream(param + i, lanes, A(0)), bound));
        });
    });
}

template <class S, bool kCentered, bool kMomentum>
void step(const RmspropClip& a) {
    using A = Acc<S>;
    A lr = static_cast<A>(a.lr), alpha = static_cast<A>(a.alpha), eps = static_cast<A>(a.eps);
    A rest = static_cast<A>(1 - a.alpha), sign = a.maximize ? A(-1) : A(1);
    A decay = static_cast<A>(a.weight_decay), momentum = static_cast<A>(a.momentum), bound = static_cast<A>(a.bound);
    for_each_piece(a.list, [&](int64_t t, int64_t begin, int64_t end) {
        auto* param = static_cast<S*>(a.params[t]) + begin;
        auto* grad = static_cast<const S*>(a.grads[t]) + begin;
        auto* square_avg = static_cast<S*>(a.square_avgs[t]) + begin;
        auto* grad_avg = kCentered ? static_cast<S*>(a.grad_avgs[t]) + begin : nullptr;
        auto* buffer = kMomentum ? static_cast<S*>(a.momentum_buffers[t]) + begin : nullptr;
        for_each_vec<A>(end - begin, [&](int64_t i, int lanes) {
            Vec<A> p = stream(param + i, lanes, A(0)), g = stream(grad + i, lanes, A(0)) * sign;
            if (decay != 0) g += p * decay;
            Vec<A> v = stream(square_avg + i, lanes, A(1)) * alpha + g * g * rest;
            store(square_avg + i, lanes, v);
            if constexpr (kCentered) {
                Vec<A> mean = stream(grad_avg + i, lanes, A(0)) * alpha + g * rest;
                store(grad_avg + i, lanes, mean);
                v -= mean * mean;
            }
            Vec<A> update = g / (sqrt<A>(v) + eps);
            if constexpr (kMomentum) {
                update += stream(buffer + i, lanes, A(0)) * momentum;
                store(buffer + i, lanes, update);
            }
            store(param + i, lanes, clamp<A>(p - update * lr, bound));
        });
    });
}

template <class S>
void step(const RmspropClip& a) {
    if (a.grad_avgs)
        a.momentum_buffers ? step<S, true, true>(a) : step<S, true, false>(a);
    else
        a.momentum_buffers ? step<S, false, true>(a) : step<S, false, false>(a);
}

}  // namespace

void clip_weights(const ClipWeights& a) {
    with_dtype(a.list.dtype, [&](auto s) { clip<decltype(s)>(a); });
}

void rmsprop_clip(const RmspropClip& a) {
    with_dtype(a.list.dtype, [&](auto s) { step<decltype(s)>(a); });
}

}  // namespace GANKERN_ISA
}  // namespace gankern
