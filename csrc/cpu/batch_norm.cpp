// Each pass adds up a few products over every channel, makes them the channel's numbers, and writes results that are
// these numbers times the same values: two passes over memory. In channels_last a vector holds as many channels, and
// threads take rows; else a thread makes both passes over one channel before it takes the next, so that the second
// reads from cache.
#include "gankern/batch_norm.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "gankern/parallel.h"
#include "kernels.h"
#include "norm_rows.h"
#include "vec.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

constexpr int64_t kParts = 32;        // a channel's sums are cut into at most so many
constexpr int64_t kMinChannels = 16;  // from here on, channels alone keep the threads busy
constexpr int64_t kAtOnce = 1 << 15;  // fewer values are done before a second thread has begun
constexpr int64_t kPastCacheBytes = 8 << 20;
#if defined(__AVX512F__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

template <class A>
GANKERN_INLINE Vec<A> first_lanes(Vec<A> v, int n) {
    for (int i = n; i < kLanes<A>; ++i) v[i] = 0;
    return v;
}

// Large results do not fit the caches until they are read: past those they cost less traffic.
template <bool past_cache, class S>
GANKERN_INLINE void store_result(S* p, int lanes, Vec<Acc<S>> v) {
    if constexpr (past_cache)
        store_past_cache(p, v);
    else
        store(p, lanes, v);
}

template <class S>
bool is_aligned(const S* p) {
    return reinterpret_cast<uintptr_t>(p) % (kLanes<Acc<S>> * sizeof(S)) == 0;
}

// Calls f with whether results of so many bytes go past the caches, where they may.
template <class F>
GANKERN_INLINE void with_place(int64_t bytes, bool may, const F& f) {
    may&& bytes >= kPastCacheBytes ? f(std::true_type{}) : f(std::false_type{});
}

template <class S>
int64_t size_of(const BatchNormShape& s) {
    return s.samples * s.channels * s.inner * static_cast<int64_t>(sizeof(S));
}

template <class S>
double at(const void* weight, int64_t c, double otherwise) {
    return weight ? static_cast<double>(to_acc(static_cast<const S*>(weight)[c])) : otherwise;
}

template <class S>
void put(double value, void* out, int64_t c) {
    from_acc(static_cast<Acc<S>>(value), static_cast<S*>(out) + c);
}

// A pass: add() is given values at a place and adds to the sums of their channels, finish() makes a channel's sums its
// numbers, the first of which is the center that x is taken relative to, and apply() writes the results at a place.

template <class S>
struct Forward {
    using A = Acc<S>;
    static constexpr int kSums = 2, kNumbers = 3;
    static constexpr bool kHasMean = false;
    const BatchNormForward& a;
    const S* x = static_cast<const S*>(a.input);
    S* y = static_cast<S*>(a.output);
    bool aligned() const { return is_aligned(y); }

    GANKERN_INLINE void add(int64_t i, int lanes, Vec<A> center, Vec<A> (&sums)[kSums]) const {
        Vec<A> d = first_lanes<A>(load(x + i, lanes, A(0)) - center, lanes);
        sums[0] += d;
        sums[1] += d * d;
    }
    void finish(int64_t c, double count, const double (&sums)[kSums], double (&numbers)[kNumbers]) const {
        double offset = sums[0] / count, var = sums[1] / count - offset * offset;
        var = var < 0 ? 0 : var;
        a.mean[c] = numbers[0] + offset;
        a.rstd[c] = 1 / std::sqrt(var + a.eps);
        a.var[c] = var * (count / (count - 1));
        numbers[0] = a.mean[c];
        numbers[1] = a.rstd[c] * at<S>(a.weight, c, 1);
        numbers[2] = at<S>(a.bias, c, 0);
    }
    template <bool past_cache>
    GANKERN_INLINE void apply(int64_t i, int lanes, const Vec<A> (&numbers)[kNumbers]) const {
        store_result<past_cache>(y + i, lanes, (load(x + i, lanes, A(0)) - numbers[0]) * numbers[1] + numbers[2]);
    }
};

template <class S>
struct Backward {
    using A = Acc<S>;
    static constexpr int kSums = 2, kNumbers = 4;
    static constexpr bool kHasMean = true;
    const BatchNormBackward& a;
    const S* x = static_cast<const S*>(a.input);
    const S* g = static_cast<const S*>(a.grad_output);
    S* dx = static_cast<S*>(a.grad_input);
    bool aligned() const { return is_aligned(dx); }

    GANKERN_INLINE void add(int64_t i, int lanes, Vec<A> center, Vec<A> (&sums)[kSums]) const {
        Vec<A> grad = load(g + i, lanes, A(0));
        sums[0] += grad;
        sums[1] += grad * (load(x + i, lanes, A(0)) - center);
    }
    void finish(int64_t c, double count, const double (&sums)[kSums], double (&numbers)[kNumbers]) const {
        double rstd = a.rstd[c];
        if (a.grad_weight) {
            put<S>(sums[1] * rstd, a.grad_weight, c);
            put<S>(sums[0], a.grad_bias, c);
        }
        numbers[1] = sums[0] / count;
        numbers[2] = sums[1] / count * rstd * rstd;
        numbers[3] = rstd * at<S>(a.weight, c, 1);
    }
    template <bool past_cache>
    GANKERN_INLINE void apply(int64_t i, int lanes, const Vec<A> (&numbers)[kNumbers]) const {
        Vec<A> d = load(x + i, lanes, A(0)) - numbers[0];
        store_result<past_cache>(dx + i, lanes, numbers[3] * (load(g + i, lanes, A(0)) - numbers[1] - d * numbers[2]));
    }
};

template <class S>
struct DoubleBackward {
    using A = Acc<S>;
    enum { kV, kVd, kG, kGd, kVg, kSums };
    enum { kCenter, kMeanV, kSlopeV, kMeanG, kSlopeG, kScale, kOfD, kOfV, kOfG, kNumbers };
    static constexpr bool kHasMean = true;
    const BatchNormDoubleBackward& a;
    const S* x = static_cast<const S*>(a.input);
    const S* g = static_cast<const S*>(a.grad_output);
    const S* v = static_cast<const S*>(a.tangent);
    S* dg = static_cast<S*>(a.grad_grad_output);
    S* dx = static_cast<S*>(a.grad_input);
    bool aligned() const { return is_aligned(dg) && is_aligned(dx); }

    GANKERN_INLINE void add(int64_t i, int lanes, Vec<A> center, Vec<A> (&sums)[kSums]) const {
        Vec<A> grad = load(g + i, lanes, A(0)), t = load(v + i, lanes, A(0));
        Vec<A> d = load(x + i, lanes, A(0)) - center;
        sums[kV] += t;
        sums[kVd] += t * d;
        sums[kG] += grad;
        sums[kGd] += grad * d;
        sums[kVg] += t * grad;
    }
    void finish(int64_t c, double count, const double (&sums)[kSums], double (&numbers)[kNumbers]) const {
        double rstd = a.rstd[c], w = at<S>(a.weight, c, 1);
        double v_mean = sums[kV] / count, v_normalized = sums[kVd] / count * rstd;
        double g_mean = sums[kG] / count, g_normalized = sums[kGd] / count * rstd;
        double curvature = sums[kVg] / count - v_mean * g_mean - v_normalized * g_normalized;
        // The sum of the gradient times the projected tangent.
        if (a.grad_weight) put<S>(curvature * count * rstd, a.grad_weight, c);
        numbers[kMeanV] = v_mean;
        numbers[kSlopeV] = v_normalized * rstd;
        numbers[kMeanG] = g_mean;
        numbers[kSlopeG] = g_normalized * rstd;
        numbers[kScale] = rstd * w;
        numbers[kOfD] = -rstd * rstd * w * curvature * rstd;
        numbers[kOfV] = -rstd * rstd * w * g_normalized;
        numbers[kOfG] = -rstd * rstd * w * v_normalized;
    }
    template <bool past_cache>
    GANKERN_INLINE void apply(int64_t i, int lanes, const Vec<A> (&numbers)[kNumbers]) const {
        Vec<A> d = load(x + i, lanes, A(0)) - numbers[kCenter];
        Vec<A> pv = load(v + i, lanes, A(0)) - numbers[kMeanV] - d * numbers[kSlopeV];
        Vec<A> pg = load(g + i, lanes, A(0)) - numbers[kMeanG] - d * numbers[kSlopeG];
        store_result<past_cache>(dg + i, lanes, numbers[kScale] * pv);
        store_result<past_cache>(dx + i, lanes, numbers[kOfD] * d + numbers[kOfV] * pv + numbers[kOfG] * pg);
    }
};

// What x is taken relative to while its moments are summed up: the mean of some of the values, so that the shifted sum
// of squares loses few digits. Nothing of one that is not finite, since differences to it would all be NaN.
double center_of(double mean) { return std::isfinite(mean) ? mean : 0; }

template <class A>
GANKERN_INLINE void add_wide(double* sums, Vec<A> values) {
    typename Simd<A>::Wide total;
    std::memcpy(&total, sums, sizeof total);
    total += __builtin_convertvector(values, typename Simd<A>::Wide);
    std::memcpy(sums, &total, sizeof total);
}

// Values as rows of whole vectors: a row holds the channels once, or as often as makes them so many.
template <class A>
struct Rows {
    int64_t channels, repeat, width, full, rest;

    explicit Rows(const BatchNormShape& s)
        : channels(s.channels),
          repeat(kLanes<A> / std::gcd(s.channels, int64_t{kLanes<A>})),
          width(repeat * channels),
          full(s.samples * s.inner / repeat),
          rest(s.samples * s.inner % repeat * channels) {}

    // Adds up over rows [begin, end), and over the values of the last, which is shorter, what f(place, column, lanes,
    // sums) adds to its sums: out[K, width].
    template <int K, class F>
    GANKERN_INLINE void sums(int64_t begin, int64_t end, bool last, double* out, const F& f) const {
        std::fill_n(out, K * width, 0.0);
        for (int64_t block = begin; block < end; block += kBlock) {
            const int64_t stop = end - block < kBlock ? end : block + kBlock;
            // As many vectors of a row as their sums have registers.
            constexpr int kMost = 4 * K + 8 <= kRegisters ? 4 : 2 * K + 6 <= kRegisters ? 2 : 1;
            int64_t c = 0;
            for (; c + kMost * kLanes<A> <= width; c += kMost * kLanes<A>) columns<kMost, K>(block, stop, c, out, f);
            for (; c < width; c += kLanes<A>) columns<1, K>(block, stop, c, out, f);
        }
        if (!last) return;
        for_each_vec<A>(rest, [&](int64_t c, int lanes) {
            Vec<A> sums[K] = {};
            f(full * width + c, c, lanes, sums);
            for (int k = 0; k < K; ++k) add_wide<A>(out + k * width + c, sums[k]);
        });
    }

    template <int N, int K, class F>
    GANKERN_INLINE void columns(int64_t begin, int64_t end, int64_t c, double* out, const F& f) const {
        Vec<A> sums[N][K] = {};
        for (int64_t row = begin; row < end; ++row)
            for (int n = 0; n < N; ++n) f(row * width + c + n * kLanes<A>, c + n * kLanes<A>, kLanes<A>, sums[n]);
        for (int n = 0; n < N; ++n)
            for (int k = 0; k < K; ++k) add_wide<A>(out + k * width + c + n * kLanes<A>, sums[n][k]);
    }

    // A channel's share of sums [width].
    double total(const double* sums, int64_t c) const {
        double sum = 0;
        for (int64_t i = c; i < width; i += channels) sum += sums[i];
        return sum;
    }

    void spread(double value, int64_t c, A* out) const {
        for (int64_t i = c; i < width; i += channels) out[i] = static_cast<A>(value);
    }
};

template <class S, class P>
void run_rows(const BatchNormShape& s, int threads, const P& pass, const double* mean) {
    using A = Acc<S>;
    constexpr int kSums = P::kSums, kNumbers = P::kNumbers;
    const Rows<A> rows(s);
    const int64_t width = rows.width, most = rows.full / kBlock;
    const int64_t parts = most < 1 ? 1 : most < kParts ? most : kParts;
    std::unique_ptr<double[]> sums(new double[parts * kSums * width]);
    std::vector<A> numbers(kNumbers * width);
    if constexpr (P::kHasMean) {
        for (int64_t c = 0; c < s.channels; ++c) rows.spread(mean[c], c, numbers.data());
    } else {
        const int64_t some = rows.full < kBlock ? rows.full : kBlock;
        const bool all = some == rows.full;
        rows.template sums<1>(0, some, all, sums.get(), [&](int64_t i, int64_t, int lanes, Vec<A>(&out)[1]) {
            out[0] += load(pass.x + i, lanes, A(0));
        });
        const double count = static_cast<double>(some * rows.repeat + (all ? rows.rest / s.channels : 0));
        for (int64_t c = 0; c < s.channels; ++c)
            rows.spread(center_of(rows.total(sums.get(), c) / count), c, numbers.data());
    }
    parallel_for(parts, threads, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part)
            rows.template sums<kSums>(rows.full * part / parts, rows.full * (part + 1) / parts, part + 1 == parts,
                                      sums.get() + part * kSums * width,
                                      [&](int64_t i, int64_t c, int lanes, Vec<A>(&out)[kSums]) {
                                          pass.add(i, lanes, load(numbers.data() + c), out);
                                      });
    });
    for (int64_t part = 1; part < parts; ++part)
        for (int64_t i = 0; i < kSums * width; ++i) sums[i] += sums[part * kSums * width + i];
    for (int64_t c = 0; c < s.channels; ++c) {
        double totals[kSums], results[kNumbers] = {P::kHasMean ? mean[c] : static_cast<double>(numbers[c])};
        for (int k = 0; k < kSums; ++k) totals[k] = rows.total(sums.get() + k * width, c);
        pass.finish(c, static_cast<double>(s.samples * s.inner), totals, results);
        for (int k = 0; k < kNumbers; ++k) rows.spread(results[k], c, numbers.data() + k * width);
    }
    auto apply = [&](auto past_cache, int64_t row, int64_t c, int lanes) {
        Vec<A> held[kNumbers];
        for (int k = 0; k < kNumbers; ++k) held[k] = load(numbers.data() + k * width + c);
        pass.template apply<decltype(past_cache)::value>(row * width + c, lanes, held);
    };
    with_place(size_of<S>(s), rows.repeat == 1 && pass.aligned(), [&](auto past_cache) {
        parallel_for(rows.full, threads, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row)
                for (int64_t c = 0; c < width; c += kLanes<A>) apply(past_cache, row, c, kLanes<A>);
            if (decltype(past_cache)::value) finish_stores_past_cache();
        });
    });
    for_each_vec<A>(rows.rest, [&](int64_t c, int lanes) { apply(std::false_type{}, rows.full, c, lanes); });
}

// Adds up over a channel's values in samples [begin, end) what f(place, lanes, sums) adds to its sums.
template <class A, int K, class F>
GANKERN_INLINE void plane_sums(const BatchNormShape& s, int64_t c, int64_t begin, int64_t end, double (&out)[K],
                               const F& f) {
    constexpr int64_t values = kBlock * kLanes<A>;
    WideSum<A> totals[K];
    for (int64_t n = begin; n < end; ++n) {
        const int64_t plane = (n * s.channels + c) * s.inner;
        for (int64_t block = 0; block < s.inner; block += values) {
            const int64_t count = s.inner - block < values ? s.inner - block : values;
            Vec<A> sums[K] = {};
            for_each_vec<A>(count, [&](int64_t i, int lanes) { f(plane + block + i, lanes, sums); });
            for (int k = 0; k < K; ++k) totals[k].add(sums[k]);
        }
    }
    for (int k = 0; k < K; ++k) out[k] = totals[k].total();
}

template <class S, class P>
void run_planes(const BatchNormShape& s, int threads, const P& pass, const double* mean) {
    using A = Acc<S>;
    constexpr int kSums = P::kSums, kNumbers = P::kNumbers;
    auto center = [&](int64_t c) {
        if constexpr (P::kHasMean) return mean[c];
        double sum[1];
        plane_sums<A>(s, c, 0, 1, sum,
                      [&](int64_t i, int lanes, Vec<A>(&out)[1]) { out[0] += load(pass.x + i, lanes, A(0)); });
        // As the vectors have it.
        return static_cast<double>(static_cast<A>(center_of(sum[0] / static_cast<double>(s.inner))));
    };
    auto add = [&](int64_t c, int64_t begin, int64_t end, double (&sums)[kSums]) {
        const Vec<A> at = splat(static_cast<A>(center(c)));
        plane_sums<A>(s, c, begin, end, sums,
                      [&](int64_t i, int lanes, Vec<A>(&out)[kSums]) { pass.add(i, lanes, at, out); });
    };
    auto finish = [&](int64_t c, const double (&sums)[kSums], double (&numbers)[kNumbers]) {
        numbers[0] = center(c);
        pass.finish(c, static_cast<double>(s.samples * s.inner), sums, numbers);
    };
    auto apply = [&](int64_t c, int64_t begin, int64_t end, const double (&numbers)[kNumbers]) {
        Vec<A> held[kNumbers];
        for (int k = 0; k < kNumbers; ++k) held[k] = splat(static_cast<A>(numbers[k]));
        with_place(size_of<S>(s), s.inner % kLanes<A> == 0 && pass.aligned(), [&](auto past_cache) {
            for (int64_t n = begin; n < end; ++n)
                for_each_vec<A>(s.inner, [&](int64_t i, int lanes) {
                    pass.template apply<decltype(past_cache)::value>((n * s.channels + c) * s.inner + i, lanes, held);
                });
            if (decltype(past_cache)::value) finish_stores_past_cache();
        });
    };
    if (s.channels >= kMinChannels) {
        parallel_for(s.channels, threads, [&](int64_t begin, int64_t end) {
            for (int64_t c = begin; c < end; ++c) {
                double sums[kSums], numbers[kNumbers];
                add(c, 0, s.samples, sums);
                finish(c, sums, numbers);
                apply(c, 0, s.samples, numbers);
            }
        });
        return;
    }
    struct Channel {
        double sums[kParts][kSums], numbers[kNumbers];
    };
    std::vector<Channel> all(s.channels);
    const int64_t parts = s.samples < kParts ? s.samples : kParts;
    auto for_each_part = [&](const auto& body) {
        parallel_for(s.channels * parts, threads, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t part = i % parts;
                body(i / parts, part, s.samples * part / parts, s.samples * (part + 1) / parts);
            }
        });
    };
    for_each_part([&](int64_t c, int64_t part, int64_t begin, int64_t end) { add(c, begin, end, all[c].sums[part]); });
    for (int64_t c = 0; c < s.channels; ++c) {
        for (int64_t part = 1; part < parts; ++part)
            for (int k = 0; k < kSums; ++k) all[c].sums[0][k] += all[c].sums[part][k];
        finish(c, all[c].sums[0], all[c].numbers);
    }
    for_each_part([&](int64_t c, int64_t, int64_t begin, int64_t end) { apply(c, begin, end, all[c].numbers); });
}

template <class S, class P>
void run(const BatchNormShape& s, const P& pass, const double* mean) {
    const int64_t size = s.samples * s.channels * s.inner;
    const int threads = size < kAtOnce ? 1 : s.threads;
    // One channel, or one value of each: rows as well as planes.
    if (s.channels_last || s.channels == 1 || s.inner == 1)
        run_rows<S>(s, threads, pass, mean);
    else
        run_planes<S>(s, threads, pass, mean);
}

}  // namespace

void batch_norm_forward(const BatchNormForward& a) {
    with_dtype(a.shape.dtype, [&](auto s) { run<decltype(s)>(a.shape, Forward<decltype(s)>{a}, a.mean); });
}

void batch_norm_backward(const BatchNormBackward& a) {
    with_dtype(a.shape.dtype, [&](auto s) { run<decltype(s)>(a.shape, Backward<decltype(s)>{a}, a.mean); });
}

void batch_norm_double_backward(const BatchNormDoubleBackward& a) {
    with_dtype(a.shape.dtype, [&](auto s) { run<decltype(s)>(a.shape, DoubleBackward<decltype(s)>{a}, a.mean); });
}

}  // namespace GANKERN_ISA
}  // namespace gankern
