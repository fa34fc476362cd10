// What the normalisations of rows share.
#pragma once

#include "vec.h"

namespace gankern {
namespace GANKERN_ISA {

constexpr int64_t kBlock = 32;  // vectors added up in the storage type's arithmetic before double takes over

// Adds the K values that f(offset, lanes, sums) adds to its sums, over a run of values.
template <class A, int K, class F>
GANKERN_INLINE void run_sums(int64_t size, double (&out)[K], const F& f) {
    constexpr int64_t values = kBlock * kLanes<A>;
    WideSum<A> totals[K];
    for (int64_t block = 0; block < size; block += values) {
        int64_t count = size - block < values ? size - block : values;
        Vec<A> sums[K] = {};
        for_each_vec<A>(count, [&](int64_t i, int lanes) { f(block + i, lanes, sums); });
        for (int k = 0; k < K; ++k) totals[k].add(sums[k]);
    }
    for (int k = 0; k < K; ++k) out[k] = totals[k].total();
}

// Means over a row of the same.
template <class A, int K, class F>
GANKERN_INLINE void row_means(int64_t size, double (&means)[K], const F& f) {
    run_sums<A>(size, means, f);
    for (int k = 0; k < K; ++k) means[k] /= static_cast<double>(size);
}

// Mean and 1 / sqrt(variance + eps) of a row. It is read from memory once and stays in cache for the second sum.
template <class S>
GANKERN_INLINE void row_moments(const S* x, int64_t size, double eps, double& mean, double& rstd) {
    using A = Acc<S>;
    double first[1], moments[2];
    row_means<A>(size, first, [&](int64_t i, int lanes, Vec<A>(&sums)[1]) { sums[0] += load(x + i, lanes, A(0)); });
    A shift = static_cast<A>(first[0]);
    row_means<A>(size, moments, [&](int64_t i, int lanes, Vec<A>(&sums)[2]) {
        Vec<A> d = load(x + i, lanes, shift) - splat(shift);
        sums[0] += d;
        sums[1] += d * d;
    });
    double var = moments[1] - moments[0] * moments[0];
    mean = shift + moments[0];
    rstd = 1 / std::sqrt((var < 0 ? 0 : var) + eps);
}

// P(u) at one place, given the means of u and of u * normalized.
template <class A>
GANKERN_INLINE Vec<A> project(Vec<A> u, Vec<A> normalized, double mean, double mean_normalized) {
    return u - splat(static_cast<A>(mean)) - normalized * splat(static_cast<A>(mean_normalized));
}

}  // namespace GANKERN_ISA
}  // namespace gankern
