// Sums are taken channel by channel, where the weight is one number and comes in once; the same sums are the shares of
// a sample in the gradients of weight and bias.
#include "gankern/group_norm.h"

#include "gankern/parallel.h"
#include "kernels.h"
#include "norm_rows.h"
#include "vec.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

template <class S>
GANKERN_INLINE Acc<S> at(const void* weight, int64_t i, Acc<S> otherwise) {
    return weight ? to_acc(static_cast<const S*>(weight)[i]) : otherwise;
}

// Calls body(row, first) for every sample's groups; first is the number of the group's first channel.
template <class F>
void for_each_group(const GroupNormShape& s, const F& body) {
    parallel_for(s.samples * s.groups, s.threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) body(row, row % s.groups * s.channels);
    });
}

// Adds up the samples' shares [samples, groups * channels] in their order.
template <class S>
void sum_samples(const GroupNormShape& s, const double* shares, void* out) {
    const int64_t channels = s.groups * s.channels;
    parallel_for(channels, s.threads, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
            double sum = 0;
            for (int64_t n = 0; n < s.samples; ++n) sum += shares[n * channels + c];
            from_acc(static_cast<Acc<S>>(sum), static_cast<S*>(out) + c);
        }
    });
}

template <class S>
void forward(const GroupNormForward& a) {
    using A = Acc<S>;
    const int64_t inner = a.shape.inner, size = a.shape.channels * inner;
    for_each_group(a.shape, [&](int64_t row, int64_t first) {
        auto* x = static_cast<const S*>(a.input) + row * size;
        auto* y = static_cast<S*>(a.output) + row * size;
        row_moments(x, size, a.eps, a.mean[row], a.rstd[row]);
        Vec<A> center = splat(static_cast<A>(a.mean[row])), rstd = splat(static_cast<A>(a.rstd[row]));
        for (int64_t c = 0; c < a.shape.channels; ++c, x += inner, y += inner) {
            Vec<A> scale = rstd * at<S>(a.weight, first + c, 1), shift = splat(at<S>(a.bias, first + c, 0));
            for_each_vec<A>(inner, [&](int64_t i, int lanes) {
                store(y + i, lanes, (load(x + i, lanes, A(0)) - center) * scale + shift);
            });
        }
    });
}

template <class S>
void backward(const GroupNormBackward& a) {
    using A = Acc<S>;
    const int64_t channels = a.shape.channels, inner = a.shape.inner, size = channels * inner;
    double* bias_shares = a.scratch + a.shape.samples * a.shape.groups * channels;
    for_each_group(a.shape, [&](int64_t row, int64_t first) {
        auto* x = static_cast<const S*>(a.input) + row * size;
        auto* g = static_cast<const S*>(a.grad_output) + row * size;
        auto* dx = static_cast<S*>(a.grad_input) + row * size;
        Vec<A> center = splat(static_cast<A>(a.mean[row])), rstd = splat(static_cast<A>(a.rstd[row]));
        double mean = 0, mean_normalized = 0;
        for (int64_t c = 0; c < channels; ++c) {
            double sums[2];
            run_sums<A>(inner, sums, [&](int64_t i, int lanes, Vec<A>(&s)[2]) {
                Vec<A> grad = load(g + c * inner + i, lanes, A(0));
                s[0] += grad;
                s[1] += grad * ((load(x + c * inner + i, lanes, A(0)) - center) * rstd);
            });
            double w = at<S>(a.weight, first + c, 1);
            mean += w * sums[0];
            mean_normalized += w * sums[1];
            if (a.grad_weight) {
                a.scratch[row * channels + c] = sums[1];
                bias_shares[row * channels + c] = sums[0];
            }
        }
        mean /= static_cast<double>(size);
        mean_normalized /= static_cast<double>(size);
        for (int64_t c = 0; c < channels; ++c, x += inner, g += inner, dx += inner) {
            Vec<A> w = splat(at<S>(a.weight, first + c, 1));
            for_each_vec<A>(inner, [&](int64_t i, int lanes) {
                Vec<A> normalized = (load(x + i, lanes, A(0)) - center) * rstd;
                store(dx + i, lanes,
                      rstd * project<A>(load(g + i, lanes, A(0)) * w, normalized, mean, mean_normalized));
            });
        }
    });
    if (a.grad_weight) {
        sum_samples<S>(a.shape, a.scratch, a.grad_weight);
        sum_samples<S>(a.shape, bias_shares, a.grad_bias);
    }
}

template <class S>
void double_backward(const GroupNormDoubleBackward& a) {
    using A = Acc<S>;
    const int64_t channels = a.shape.channels, inner = a.shape.inner, size = channels * inner;
    for_each_group(a.shape, [&](int64_t row, int64_t first) {
        auto* x = static_cast<const S*>(a.input) + row * size;
        auto* g = static_cast<const S*>(a.grad_output) + row * size;
        auto* v = static_cast<const S*>(a.tangent) + row * size;
        auto* dg = static_cast<S*>(a.grad_grad_output) + row * size;
        auto* dx = static_cast<S*>(a.grad_input) + row * size;
        Vec<A> center = splat(static_cast<A>(a.mean[row])), rstd = splat(static_cast<A>(a.rstd[row]));
        enum { kV, kVx, kA, kAx, kVa, kMeans };
        double m[kMeans] = {};
        for (int64_t c = 0; c < channels; ++c) {
            double sums[kMeans];
            run_sums<A>(inner, sums, [&](int64_t i, int lanes, Vec<A>(&s)[kMeans]) {
                Vec<A> grad = load(g + c * inner + i, lanes, A(0)), t = load(v + c * inner + i, lanes, A(0));
                Vec<A> normalized = (load(x + c * inner + i, lanes, A(0)) - center) * rstd;
                s[kV] += t;
                s[kVx] += t * normalized;
                s[kA] += grad;
                s[kAx] += grad * normalized;
                s[kVa] += t * grad;
            });
            double w = at<S>(a.weight, first + c, 1);
            for (int k = 0; k < kMeans; ++k) m[k] += (k < kA ? 1 : w) * sums[k];
        }
        for (double& mean : m) mean /= static_cast<double>(size);
        Vec<A> curvature = splat(static_cast<A>(m[kVa] - m[kV] * m[kA] - m[kVx] * m[kAx]));
        Vec<A> p = splat(static_cast<A>(m[kVx])), q = splat(static_cast<A>(m[kAx]));
        for (int64_t c = 0; c < channels; ++c, x += inner, g += inner, v += inner, dg += inner, dx += inner) {
            Vec<A> w = splat(at<S>(a.weight, first + c, 1));
            double share[1];
            run_sums<A>(inner, share, [&](int64_t i, int lanes, Vec<A>(&s)[1]) {
                Vec<A> grad = load(g + i, lanes, A(0)), normalized = (load(x + i, lanes, A(0)) - center) * rstd;
                Vec<A> pv = project<A>(load(v + i, lanes, A(0)), normalized, m[kV], m[kVx]);
                Vec<A> pa = project<A>(grad * w, normalized, m[kA], m[kAx]);
                store(dx + i, lanes, -(rstd * rstd) * (curvature * normalized + q * pv + p * pa));
                store(dg + i, lanes, rstd * pv * w);
                s[0] += grad * pv;  // beyond the last lane the gradient is 0
            });
            if (a.grad_weight) a.scratch[row * channels + c] = a.rstd[row] * share[0];
        }
    });
    if (a.grad_weight) sum_samples<S>(a.shape, a.scratch, a.grad_weight);
}

}  // namespace

void group_norm_forward(const GroupNormForward& a) {
    with_dtype(a.shape.dtype, [&](auto s) { forward<decltype(s)>(a); });
}

void group_norm_backward(const GroupNormBackward& a) {
    with_dtype(a.shape.dtype, [&](auto s) { backward<decltype(s)>(a); });
}

void group_norm_double_backward(const GroupNormDoubleBackward& a) {
    with_dtype(a.shape.dtype, [&](auto s) { double_backward<decltype(s)>(a); });
}

}  // namespace GANKERN_ISA
}  // namespace gankern
