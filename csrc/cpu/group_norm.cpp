// Sums are taken channel by channel, where the weight is one number and comes in once; the same sums are the shares of
// a sample in the gradients of weight and bias. In channels_last a vector holds as many channels, and a thread takes
// whole samples.
#include "gankern/group_norm.h"

#include <vector>

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

// The sums [K, channels] over the pixels of a sample of what f(place, channel, lanes, sums) adds to its sums.
template <class A, int K, class F>
void channel_sums(const GroupNormShape& s, std::vector<double>& out, const F& f) {
    const int64_t channels = s.groups * s.channels;
    out.assign(K * channels, 0);
    for (int64_t block = 0; block < s.inner; block += kBlock) {
        const int64_t end = s.inner - block < kBlock ? s.inner : block + kBlock;
        for_each_vec<A>(channels, [&](int64_t c, int lanes) {
            Vec<A> sums[K] = {};
            for (int64_t pixel = block; pixel < end; ++pixel) f(pixel * channels + c, c, lanes, sums);
            for (int k = 0; k < K; ++k) {
                A values[kLanes<A>];
                store(values, sums[k]);
                for (int i = 0; i < lanes; ++i) out[k * channels + c + i] += values[i];
            }
        });
    }
}

// K numbers for each channel, as the vectors that multiply a pixel's.
template <class A, int K>
struct PerChannel {
    int64_t channels;
    std::vector<A> values;

    explicit PerChannel(const GroupNormShape& s) : channels(s.groups * s.channels), values(K * channels) {}
    GANKERN_INLINE A& at(int k, int64_t c) { return values[k * channels + c]; }
    GANKERN_INLINE Vec<A> get(int k, int64_t c, int lanes) const {
        return load(values.data() + k * channels + c, lanes, A(0));
    }
};

// The mean over each group of the channels' sums, with their weights from the sum number `weighted` on:
// body(group, means).
template <class S, int K, class F>
void group_means(const GroupNormShape& s, const void* weight, const std::vector<double>& sums, int weighted,
                 const F& body) {
    for (int64_t group = 0; group < s.groups; ++group) {
        double means[K] = {};
        for (int64_t c = group * s.channels; c < (group + 1) * s.channels; ++c)
            for (int k = 0; k < K; ++k)
                means[k] += (k < weighted ? 1 : at<S>(weight, c, 1)) * sums[k * s.groups * s.channels + c];
        for (double& mean : means) mean /= static_cast<double>(s.channels * s.inner);
        body(group, means);
    }
}

template <class S>
void forward_last(const GroupNormForward& a) {
    using A = Acc<S>;
    const GroupNormShape& s = a.shape;
    const int64_t channels = s.groups * s.channels;
    enum { kCenter, kScale, kShift, kNumbers };
    parallel_for(s.samples, s.threads, [&](int64_t begin, int64_t end) {
        std::vector<double> sums;
        PerChannel<A, kNumbers> numbers(s);
        for (int64_t n = begin; n < end; ++n) {
            auto* x = static_cast<const S*>(a.input) + n * channels * s.inner;
            auto* y = static_cast<S*>(a.output) + n * channels * s.inner;
            auto center_on = [&](int64_t group, double mean) {
                for (int64_t c = group * s.channels; c < (group + 1) * s.channels; ++c)
                    numbers.at(kCenter, c) = static_cast<A>(mean);
            };
            channel_sums<A, 1>(
                s, sums, [&](int64_t i, int64_t, int lanes, Vec<A>(&out)[1]) { out[0] += load(x + i, lanes, A(0)); });
            group_means<S, 1>(s, nullptr, sums, 1,
                              [&](int64_t group, double (&mean)[1]) { center_on(group, mean[0]); });
            channel_sums<A, 2>(s, sums, [&](int64_t i, int64_t c, int lanes, Vec<A>(&out)[2]) {
                Vec<A> d = load(x + i, lanes, A(0)) - numbers.get(kCenter, c, lanes);
                out[0] += d;
                out[1] += d * d;
            });
            group_means<S, 2>(s, nullptr, sums, 2, [&](int64_t group, double (&m)[2]) {
                double var = m[1] - m[0] * m[0];
                double mean = numbers.at(kCenter, group * s.channels) + m[0];
                double rstd = 1 / std::sqrt((var < 0 ? 0 : var) + a.eps);
                a.mean[n * s.groups + group] = mean;
                a.rstd[n * s.groups + group] = rstd;
                center_on(group, mean);
                for (int64_t c = group * s.channels; c < (group + 1) * s.channels; ++c) {
                    numbers.at(kScale, c) = static_cast<A>(rstd) * at<S>(a.weight, c, 1);
                    numbers.at(kShift, c) = at<S>(a.bias, c, 0);
                }
            });
            for (int64_t pixel = 0; pixel < s.inner; ++pixel, x += channels, y += channels)
                for_each_vec<A>(channels, [&](int64_t c, int lanes) {
                    Vec<A> centered = load(x + c, lanes, A(0)) - numbers.get(kCenter, c, lanes);
                    store(y + c, lanes, centered * numbers.get(kScale, c, lanes) + numbers.get(kShift, c, lanes));
                });
        }
    });
}

enum { kCenter, kRstd, kWeight, kFirstMean };

// Mean, rstd and weight of every channel of a sample.
template <class S, int K, class Args>
void set_numbers(const Args& a, int64_t n, PerChannel<Acc<S>, K>& numbers) {
    for (int64_t c = 0; c < numbers.channels; ++c) {
        int64_t row = n * a.shape.groups + c / a.shape.channels;
        numbers.at(kCenter, c) = static_cast<Acc<S>>(a.mean[row]);
        numbers.at(kRstd, c) = static_cast<Acc<S>>(a.rstd[row]);
        numbers.at(kWeight, c) = at<S>(a.weight, c, 1);
    }
}

template <class S>
void backward_last(const GroupNormBackward& a) {
    using A = Acc<S>;
    const GroupNormShape& s = a.shape;
    const int64_t channels = s.groups * s.channels;
    parallel_for(s.samples, s.threads, [&](int64_t begin, int64_t end) {
        std::vector<double> sums;
        PerChannel<A, kFirstMean + 2> numbers(s);
        for (int64_t n = begin; n < end; ++n) {
            auto* x = static_cast<const S*>(a.input) + n * channels * s.inner;
            auto* g = static_cast<const S*>(a.grad_output) + n * channels * s.inner;
            auto* dx = static_cast<S*>(a.grad_input) + n * channels * s.inner;
            set_numbers<S>(a, n, numbers);
            auto normalized = [&](int64_t i, int64_t c, int lanes) {
                return (load(x + i, lanes, A(0)) - numbers.get(kCenter, c, lanes)) * numbers.get(kRstd, c, lanes);
            };
            channel_sums<A, 2>(s, sums, [&](int64_t i, int64_t c, int lanes, Vec<A>(&out)[2]) {
                Vec<A> grad = load(g + i, lanes, A(0));
                out[0] += grad;
                out[1] += grad * normalized(i, c, lanes);
            });
            if (a.grad_weight)
                for (int64_t c = 0; c < channels; ++c) {
                    a.scratch[n * channels + c] = sums[channels + c];
                    a.scratch[(s.samples + n) * channels + c] = sums[c];
                }
            group_means<S, 2>(s, a.weight, sums, 0, [&](int64_t group, double (&m)[2]) {
                for (int64_t c = group * s.channels; c < (group + 1) * s.channels; ++c)
                    for (int k = 0; k < 2; ++k) numbers.at(kFirstMean + k, c) = static_cast<A>(m[k]);
            });
            for (int64_t pixel = 0; pixel < s.inner; ++pixel)
                for_each_vec<A>(channels, [&](int64_t c, int lanes) {
                    int64_t i = pixel * channels + c;
                    Vec<A> u = load(g + i, lanes, A(0)) * numbers.get(kWeight, c, lanes);
                    u -= numbers.get(kFirstMean, c, lanes);
                    u -= normalized(i, c, lanes) * numbers.get(kFirstMean + 1, c, lanes);
                    store(dx + i, lanes, numbers.get(kRstd, c, lanes) * u);
                });
        }
    });
    if (a.grad_weight) {
        sum_samples<S>(s, a.scratch, a.grad_weight);
        sum_samples<S>(s, a.scratch + s.samples * channels, a.grad_bias);
    }
}

template <class S>
void double_backward_last(const GroupNormDoubleBackward& a) {
    using A = Acc<S>;
    const GroupNormShape& s = a.shape;
    const int64_t channels = s.groups * s.channels;
    enum { kV, kVx, kA, kAx, kVa, kMeans };
    enum { kCurvature = kVa };
    parallel_for(s.samples, s.threads, [&](int64_t begin, int64_t end) {
        std::vector<double> sums;
        PerChannel<A, kFirstMean + kMeans> numbers(s);
        for (int64_t n = begin; n < end; ++n) {
            auto* x = static_cast<const S*>(a.input) + n * channels * s.inner;
            auto* g = static_cast<const S*>(a.grad_output) + n * channels * s.inner;
            auto* v = static_cast<const S*>(a.tangent) + n * channels * s.inner;
            auto* dg = static_cast<S*>(a.grad_grad_output) + n * channels * s.inner;
            auto* dx = static_cast<S*>(a.grad_input) + n * channels * s.inner;
            set_numbers<S>(a, n, numbers);
            auto normalized = [&](int64_t i, int64_t c, int lanes) {
                return (load(x + i, lanes, A(0)) - numbers.get(kCenter, c, lanes)) * numbers.get(kRstd, c, lanes);
            };
            channel_sums<A, kMeans>(s, sums, [&](int64_t i, int64_t c, int lanes, Vec<A>(&out)[kMeans]) {
                Vec<A> grad = load(g + i, lanes, A(0)), t = load(v + i, lanes, A(0)), h = normalized(i, c, lanes);
                out[kV] += t;
                out[kVx] += t * h;
                out[kA] += grad;
                out[kAx] += grad * h;
                out[kVa] += t * grad;
            });
            group_means<S, kMeans>(s, a.weight, sums, kA, [&](int64_t group, double (&m)[kMeans]) {
                m[kCurvature] = m[kVa] - m[kV] * m[kA] - m[kVx] * m[kAx];
                for (int64_t c = group * s.channels; c < (group + 1) * s.channels; ++c)
                    for (int k = 0; k < kMeans; ++k) numbers.at(kFirstMean + k, c) = static_cast<A>(m[k]);
            });
            channel_sums<A, 1>(s, sums, [&](int64_t i, int64_t c, int lanes, Vec<A>(&out)[1]) {
                auto mean = [&](int k) { return numbers.get(kFirstMean + k, c, lanes); };
                Vec<A> grad = load(g + i, lanes, A(0)), h = normalized(i, c, lanes);
                Vec<A> w = numbers.get(kWeight, c, lanes), rstd = numbers.get(kRstd, c, lanes);
                Vec<A> pv = load(v + i, lanes, A(0)) - mean(kV) - h * mean(kVx);
                Vec<A> pa = grad * w - mean(kA) - h * mean(kAx);
                store(dx + i, lanes, -(rstd * rstd) * (mean(kCurvature) * h + mean(kAx) * pv + mean(kVx) * pa));
                store(dg + i, lanes, rstd * pv * w);
                out[0] += grad * rstd * pv;
            });
            if (a.grad_weight)
                for (int64_t c = 0; c < channels; ++c) a.scratch[n * channels + c] = sums[c];
        }
    });
    if (a.grad_weight) sum_samples<S>(s, a.scratch, a.grad_weight);
}

}  // namespace

void group_norm_forward(const GroupNormForward& a) {
    with_dtype(a.shape.dtype,
               [&](auto s) { a.shape.channels_last ? forward_last<decltype(s)>(a) : forward<decltype(s)>(a); });
}

void group_norm_backward(const GroupNormBackward& a) {
    with_dtype(a.shape.dtype,
               [&](auto s) { a.shape.channels_last ? backward_last<decltype(s)>(a) : backward<decltype(s)>(a); });
}

void group_norm_double_backward(const GroupNormDoubleBackward& a) {
    with_dtype(a.shape.dtype, [&](auto s) {
        a.shape.channels_last ? double_backward_last<decltype(s)>(a) : double_backward<decltype(s)>(a);
    });
}

}  // namespace GANKERN_ISA
}  // namespace gankern
