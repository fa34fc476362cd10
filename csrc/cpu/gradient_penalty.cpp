#include "gankern/gradient_penalty.h"

#include "gankern/parallel.h"
#include "kernels.h"
#include "vec.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

template <class S>
void interpolate(const Interpolate& a) {
    using A = Acc<S>;
    auto* real = static_cast<const S*>(a.real);
    auto* fake = static_cast<const S*>(a.fake);
    auto* alpha = static_cast<const A*>(a.alpha);
    auto* points = static_cast<S*>(a.points);
    parallel_for(a.n, a.threads, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
            int64_t base = n * a.size;
            Vec<A> share = splat(alpha[n]), rest = splat(1 - alpha[n]);
            for_each_vec<A>(a.size, [&](int64_t i, int lanes) {
                Vec<A> r = load(real + base + i, lanes, A(0)), f = load(fake + base + i, lanes, A(0));
                store(points + base + i, lanes, share * r + rest * f);
            });
        }
    });
}

template <class S>
double squared_norm(const S* row, int64_t size) {
    using A = Acc<S>;
    typename Simd<A>::Wide total{};
    for_each_vec<A>(size, [&](int64_t i, int lanes) {
        auto wide = __builtin_convertvector(load(row + i, lanes, A(0)), typename Simd<A>::Wide);
        total += wide * wide;
    });
    return WideSum<A>{total}.total();
}

// A row is read from memory once: scaling it after its norm finds it in cache.
template <class S>
void penalty_tail(const PenaltyTail& a) {
    using A = Acc<S>;
    auto* grad = static_cast<const S*>(a.grad);
    auto* cotangent = static_cast<S*>(a.cotangent);
    double per_sample = a.weight / static_cast<double>(a.n);
    parallel_for(a.n, a.threads, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
            int64_t base = n * a.size;
            double square = squared_norm(grad + base, a.size);
            double norm = std::sqrt(square), excess = norm - a.target;
            if (a.one_sided && excess < 0) excess = 0;
            a.scratch[n] = a.squared ? square : excess * excess;
            double slope = 2 * per_sample * (a.squared ? 1 : norm == 0 ? 0 : excess / norm);
            Vec<A> scale = splat(static_cast<A>(slope));
            for_each_vec<A>(a.size, [&](int64_t i, int lanes) {
                store(cotangent + base + i, lanes, load(grad + base + i, lanes, A(0)) * scale);
            });
        }
    });
    double loss = 0;
    for (int64_t n = 0; n < a.n; ++n) loss += a.scratch[n];
    from_acc(static_cast<A>(loss * per_sample), static_cast<S*>(a.loss));
}

}  // namespace

void interpolate(const Interpolate& a) {
    with_dtype(a.dtype, [&](auto s) { interpolate<decltype(s)>(a); });
}

void penalty_tail(const PenaltyTail& a) {
    with_dtype(a.dtype, [&](auto s) { penalty_tail<decltype(s)>(a); });
}

}  // namespace GANKERN_ISA
}  // namespace gankern
