// Forward: statistics, then normalise + activate. Backward: the two channel sums with the activation's derivative
// recomputed from the input, then the input gradient. Where a channel's values lie together (NCHW) a thread makes both
// passes over one channel before it takes the next, so that the second pass reads from cache.
#include "gankern/batch_norm_act.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "activation.h"
#include "gankern/parallel.h"
#include "kernels.h"
#include "vec.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

constexpr int64_t kMinChannels = 16;  // from here on, channels alone keep the threads busy
constexpr int64_t kPastCacheBytes = 8 << 20;
constexpr int64_t kBlock = 32;  // vectors added up in the storage type's arithmetic before double takes over

// The affine map of one channel, or of a vector of channels: z = (x - mean) * scale + bias.
template <class V>
struct Affine {
    V mean, scale, bias;
    GANKERN_INLINE V operator()(V x) const { return (x - mean) * scale + bias; }
};

template <class S>
struct Channels {
    using A = Acc<S>;
    const A *weight, *bias, *mean, *invstd;

    Affine<Vec<A>> at(int64_t c) const {
        A scale = weight ? weight[c] * invstd[c] : invstd[c];
        return {splat(mean[c]), splat(scale), splat(bias ? bias[c] : A(0))};
    }
    GANKERN_INLINE Affine<Vec<A>> row(int64_t c, int n) const {
        Vec<A> scale = load(invstd + c, n, A(0));
        if (weight) scale *= load(weight + c, n, A(0));
        return {load(mean + c, n, A(0)), scale, bias ? load(bias + c, n, A(0)) : Vec<A>{}};
    }
};

struct Sums {
    double first = 0, second = 0;
    void operator+=(const Sums& o) {
        first += o.first;
        second += o.second;
    }
};

// Where a result goes. Large ones do not fit the caches until they are read: past those they cost a third less traffic.
template <class S>
class Output {
 public:
    Output(void* data, const BatchNormActShape& s)
        : data_(static_cast<S*>(data)),
          past_cache_(s.n * s.c * s.hw * static_cast<int64_t>(sizeof(S)) >= kPastCacheBytes &&
                      reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 &&
                      (s.channels_last ? s.c : s.hw) % kLanes<Acc<S>> == 0) {}
    ~Output() {
        if (past_cache_) finish_stores_past_cache();
    }
    GANKERN_INLINE void put(int64_t i, int lanes, Vec<Acc<S>> v) const {
        if (past_cache_)
            store_past_cache(data_ + i, v);
        else
            store(data_ + i, lanes, v);
    }
    // The line that put writes in the next image, on its way into cache.
    GANKERN_INLINE void ahead(int64_t i) const {
        if (!past_cache_) __builtin_prefetch(data_ + i, 1);
    }

 private:
    static constexpr int64_t kVectorBytes = kLanes<Acc<S>> * sizeof(S);
    S* data_;
    bool past_cache_;
};

// How [n, c, hw] is cut: parts of whole images (NCHW) or of rows (channels_last).
struct Parts {
    int64_t units, count;
    explicit Parts(const BatchNormActShape& s) {
        bool by_channel = !s.channels_last && s.c >= kMinChannels;
        units = s.channels_last ? s.n * s.hw : s.n;
        count = by_channel ? 1 : (units < kBatchNormActParts ? (units > 0 ? units : 1) : kBatchNormActParts);
    }
    int64_t begin(int64_t k) const { return units * k / count; }
};

template <class A>
void write_statistics(const BatchNormActForward& a, int64_t c, double shift, Sums s) {
    double count = static_cast<double>(a.shape.n * a.shape.hw);
    double offset = s.first / count;
    double var = s.second / count - offset * offset;
    if (var < 0) var = 0;
    static_cast<A*>(a.mean)[c] = static_cast<A>(shift + offset);
    static_cast<A*>(a.var)[c] = static_cast<A>(var);
    static_cast<A*>(a.invstd)[c] = static_cast<A>(1 / std::sqrt(var + a.eps));
}

// ---- NCHW: a plane of hw values per image and channel

template <class S>
struct Planes {
    using A = Acc<S>;
    const BatchNormActShape& s;
    int64_t offset(int64_t n, int64_t c) const { return (n * s.c + c) * s.hw; }
    // The same pixel of the channel in the next image on its way into cache: the processor's own prefetch does not
    // follow from plane to plane.
    GANKERN_INLINE void ahead(const S* p) const { __builtin_prefetch(p + s.c * s.hw); }
    GANKERN_INLINE void ahead(const Output<S>& out, int64_t i) const { out.ahead(i + s.c * s.hw); }

    // Adds up f(offset, lanes) -> {first, second} over the planes of one channel in images [begin, end).
    template <class F>
    GANKERN_INLINE Sums reduce(int64_t c, int64_t begin, int64_t end, const F& f) const {
        constexpr int64_t values = kBlock * kLanes<A>;
        WideSum<A> first_total, second_total;
        for (int64_t n = begin; n < end; ++n) {
            for (int64_t block = 0; block < s.hw; block += values) {
                int64_t size = s.hw - block < values ? s.hw - block : values;
                int64_t base = offset(n, c) + block;
                Vec<A> first{}, second{};
                for_each_vec<A>(size, [&](int64_t i, int lanes) { f(base + i, lanes, first, second); });
                first_total.add(first);
                second_total.add(second);
            }
        }
        return {first_total.total(), second_total.total()};
    }

    // Mean of the channel in the first image: close enough to the channel's mean that the shifted sum of squares loses
    // at most a factor n, whatever the data. Nothing of one that is not finite: differences to it would all be NaN.
    A shift(const S* x, int64_t c) const {
        Sums sum =
            reduce(c, 0, 1, [&](int64_t i, int lanes, Vec<A>& first, Vec<A>&) { first += load(x + i, lanes, A(0)); });
        double mean = sum.first / static_cast<double>(s.hw);
        return std::isfinite(mean) ? static_cast<A>(mean) : A(0);
    }
};

template <class S>
Sums plane_statistics(const Planes<S>& planes, const S* x, int64_t c, int64_t begin, int64_t end, Acc<S> shift) {
    using A = Acc<S>;
    Vec<A> center = splat(shift);
    return planes.reduce(c, begin, end, [&](int64_t i, int lanes, Vec<A>& first, Vec<A>& second) {
        planes.ahead(x + i);
        Vec<A> d = load(x + i, lanes, shift) - center;
        first += d;
        second += d * d;
    });
}

template <class S, Activation act>
void plane_activate(const Planes<S>& planes, const BatchNormActForward& a, const Channels<S>& channels, int64_t c,
                    int64_t begin, int64_t end) {
    using A = Acc<S>;
    auto* x = static_cast<const S*>(a.input);
    Output<S> y(a.output, a.shape);
    auto map = channels.at(c);
    A slope = static_cast<A>(a.shape.negative_slope);
    for (int64_t n = begin; n < end; ++n) {
        int64_t base = planes.offset(n, c);
        for_each_vec<A>(a.shape.hw, [&](int64_t i, int lanes) {
            planes.ahead(y, base + i);
            y.put(base + i, lanes, activate<A, act>(map(load(x + base + i, lanes, A(0))), slope));
        });
    }
}

template <class S, Activation act>
void forward_planes(const BatchNormActForward& a) {
    using A = Acc<S>;
    const auto& s = a.shape;
    auto* x = static_cast<const S*>(a.input);
    Planes<S> planes{s};
    Channels<S> channels{static_cast<const A*>(a.weight), static_cast<const A*>(a.bias), static_cast<const A*>(a.mean),
                         static_cast<const A*>(a.invstd)};
    Parts parts(s);
    if (parts.count == 1) {
        parallel_for(s.c, s.threads, [&](int64_t begin, int64_t end) {
            for (int64_t c = begin; c < end; ++c) {
                if (a.training) {
                    A shift = planes.shift(x, c);
                    write_statistics<A>(a, c, shift, plane_statistics(planes, x, c, 0, s.n, shift));
                }
                plane_activate<S, act>(planes, a, channels, c, 0, s.n);
            }
        });
        return;
    }
    int64_t items = s.c * parts.count;
    auto* sums = reinterpret_cast<Sums*>(a.scratch);
    if (a.training) {
        parallel_for(items, s.threads, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                int64_t c = i / parts.count, k = i % parts.count;
                sums[i] = plane_statistics(planes, x, c, parts.begin(k), parts.begin(k + 1), planes.shift(x, c));
            }
        });
        for (int64_t c = 0; c < s.c; ++c) {
            Sums total;
            for (int64_t k = 0; k < parts.count; ++k) total += sums[c * parts.count + k];
            write_statistics<A>(a, c, planes.shift(x, c), total);
        }
    }
    parallel_for(items, s.threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            int64_t c = i / parts.count, k = i % parts.count;
            plane_activate<S, act>(planes, a, channels, c, parts.begin(k), parts.begin(k + 1));
        }
    });
}

// The channel sums of the backward: grad_bias = sum(dz), grad_weight = sum(dz * (x - mean)) * invstd.
template <class S, Activation act>
Sums plane_grad_sums(const Planes<S>& planes, const BatchNormActBackward& a, const Channels<S>& channels, int64_t c,
                     int64_t begin, int64_t end) {
    using A = Acc<S>;
    auto* x = static_cast<const S*>(a.input);
    auto* dy = static_cast<const S*>(a.grad_output);
    auto map = channels.at(c);
    A slope = static_cast<A>(a.shape.negative_slope), mean = channels.mean[c];
    return planes.reduce(c, begin, end, [&](int64_t i, int lanes, Vec<A>& first, Vec<A>& second) {
        planes.ahead(x + i);
        planes.ahead(dy + i);
        Vec<A> v = load(x + i, lanes, mean);
        Vec<A> dz = activation_grad<A, act>(map(v), load(dy + i, lanes, A(0)), slope);
        first += dz;
        second += dz * (v - map.mean);
    });
}

template <class A>
void write_grads(const BatchNormActBackward& a, int64_t c, Sums s) {
    static_cast<A*>(a.grad_bias)[c] = static_cast<A>(s.first);
    static_cast<A*>(a.grad_weight)[c] =
        static_cast<A>(s.second * static_cast<double>(static_cast<const A*>(a.invstd)[c]));
}

// grad_input = scale * (dz - mean(dz) - xhat * mean(dz * xhat)) when training. Else scale * dz: an infinite value has
// no part in other pixels' gradients.
template <class S>
struct InputGrad {
    using A = Acc<S>;
    const BatchNormActBackward& a;
    const Channels<S>& channels;
    double per_count;
    InputGrad(const BatchNormActBackward& args, const Channels<S>& ch)
        : a(args), channels(ch), per_count(1.0 / static_cast<double>(args.shape.n * args.shape.hw)) {}
    A mean_dz(int64_t c) const { return static_cast<A>(static_cast<const A*>(a.grad_bias)[c] * per_count); }
    A slope_dz(int64_t c) const {
        return static_cast<A>(static_cast<const A*>(a.grad_weight)[c] * per_count * channels.invstd[c]);
    }
};

template <class S, Activation act>
void plane_input_grad(const Planes<S>& planes, const BatchNormActBackward& a, const Channels<S>& channels, int64_t c,
                      int64_t begin, int64_t end) {
    using A = Acc<S>;
    auto* x = static_cast<const S*>(a.input);
    auto* dy = static_cast<const S*>(a.grad_output);
    Output<S> dx(a.grad_input, a.shape);
    auto map = channels.at(c);
    A slope = static_cast<A>(a.shape.negative_slope);
    InputGrad<S> grad(a, channels);
    Vec<A> mean_dz = splat(grad.mean_dz(c)), slope_dz = splat(grad.slope_dz(c));
    bool training = a.training;
    for (int64_t n = begin; n < end; ++n) {
        int64_t base = planes.offset(n, c);
        for_each_vec<A>(a.shape.hw, [&](int64_t i, int lanes) {
            Vec<A> v = load(x + base + i, lanes, A(0));
            Vec<A> dz = activation_grad<A, act>(map(v), load(dy + base + i, lanes, A(0)), slope);
            planes.ahead(dx, base + i);
            if (training) dz = dz - mean_dz - (v - map.mean) * slope_dz;
            dx.put(base + i, lanes, map.scale * dz);
        });
    }
}

template <class S, Activation act>
void backward_planes(const BatchNormActBackward& a) {
    using A = Acc<S>;
    const auto& s = a.shape;
    Planes<S> planes{s};
    Channels<S> channels{static_cast<const A*>(a.weight), static_cast<const A*>(a.bias), static_cast<const A*>(a.mean),
                         static_cast<const A*>(a.invstd)};
    Parts parts(s);
    if (parts.count == 1) {
        parallel_for(s.c, s.threads, [&](int64_t begin, int64_t end) {
            for (int64_t c = begin; c < end; ++c) {
                write_grads<A>(a, c, plane_grad_sums<S, act>(planes, a, channels, c, 0, s.n));
                plane_input_grad<S, act>(planes, a, channels, c, 0, s.n);
            }
        });
        return;
    }
    int64_t items = s.c * parts.count;
    auto* sums = reinterpret_cast<Sums*>(a.scratch);
    parallel_for(items, s.threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            int64_t c = i / parts.count, k = i % parts.count;
            sums[i] = plane_grad_sums<S, act>(planes, a, channels, c, parts.begin(k), parts.begin(k + 1));
        }
    });
    for (int64_t c = 0; c < s.c; ++c) {
        Sums total;
        for (int64_t k = 0; k < parts.count; ++k) total += sums[c * parts.count + k];
        write_grads<A>(a, c, total);
    }
    parallel_for(items, s.threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            int64_t c = i / parts.count, k = i % parts.count;
            plane_input_grad<S, act>(planes, a, channels, c, parts.begin(k), parts.begin(k + 1));
        }
    });
}

// ---- channels_last: rows of c values, one per image and pixel

template <class A>
GANKERN_INLINE void add_wide(double* sums, int lanes, Vec<A> values) {
    using Wide = typename Simd<A>::Wide;
    Wide more = __builtin_convertvector(values, Wide);
    if (lanes == kLanes<A>) {
        Wide total;
        std::memcpy(&total, sums, sizeof total);
        total += more;
        std::memcpy(sums, &total, sizeof total);
    } else {
        for (int i = 0; i < lanes; ++i) sums[i] += more[i];
    }
}

// Adds up f(c, lanes, first row, last row, first, second) over rows [begin, end) into sums[0, c) and sums[c, 2 * c),
// which are overwritten.
template <class A, class F>
GANKERN_INLINE void reduce_rows(const BatchNormActShape& s, int64_t begin, int64_t end, double* sums, const F& f) {
    std::fill_n(sums, 2 * s.c, 0.0);
    for (int64_t block = begin; block < end; block += kBlock) {
        int64_t stop = block + kBlock < end ? block + kBlock : end;
        for_each_vec<A>(s.c, [&](int64_t c, int lanes) {
            Vec<A> first{}, second{};
            f(c, lanes, block, stop, first, second);
            add_wide<A>(sums + c, lanes, first);
            add_wide<A>(sums + s.c + c, lanes, second);
        });
    }
}

// Sums the parts' results of reduce_rows in order.
inline Sums sum_parts(const double* sums, const Parts& parts, int64_t channels, int64_t c) {
    Sums total;
    for (int64_t k = 0; k < parts.count; ++k) {
        const double* at = sums + 2 * k * channels + c;
        total += Sums{at[0], at[channels]};
    }
    return total;
}

template <class S>
void row_statistics(const BatchNormActForward& a, const Parts& parts) {
    using A = Acc<S>;
    const auto& s = a.shape;
    auto* x = static_cast<const S*>(a.input);
    // Sums of the first image give the shift, as for planes; kept in mean until write_statistics replaces them.
    auto* shift = static_cast<A*>(a.mean);
    int64_t channel_vecs = (s.c + kLanes<A> - 1) / kLanes<A>;
    parallel_for(channel_vecs, s.threads, [&](int64_t begin, int64_t end) {
        for (int64_t v = begin; v < end; ++v) {
            int64_t c = v * kLanes<A>;
            int lanes = static_cast<int>(s.c - c < kLanes<A> ? s.c - c : kLanes<A>);
            Vec<A> sum{};
            for (int64_t row = 0; row < s.hw; ++row) sum += load(x + row * s.c + c, lanes, A(0));
            Vec<A> mean = sum / static_cast<A>(s.hw);
            store(shift + c, lanes, (mean - mean == 0) ? mean : Vec<A>{});
        }
    });
    parallel_for(parts.count, s.threads, [&](int64_t from, int64_t to) {
        for (int64_t k = from; k < to; ++k) {
            reduce_rows<A>(s, parts.begin(k), parts.begin(k + 1), a.scratch + 2 * k * s.c,
                           [&](int64_t c, int lanes, int64_t begin, int64_t end, Vec<A>& first, Vec<A>& second) {
                               Vec<A> center = load(shift + c, lanes, A(0));
                               for (int64_t row = begin; row < end; ++row) {
                                   Vec<A> d = load(x + row * s.c + c, lanes, A(0)) - center;
                                   first += d;
                                   second += d * d;
                               }
                           });
        }
    });
    for (int64_t c = 0; c < s.c; ++c) write_statistics<A>(a, c, shift[c], sum_parts(a.scratch, parts, s.c, c));
}

template <class S, Activation act>
void forward_rows(const BatchNormActForward& a) {
    using A = Acc<S>;
    const auto& s = a.shape;
    auto* x = static_cast<const S*>(a.input);
    Channels<S> channels{static_cast<const A*>(a.weight), static_cast<const A*>(a.bias), static_cast<const A*>(a.mean),
                         static_cast<const A*>(a.invstd)};
    A slope = static_cast<A>(s.negative_slope);
    if (a.training) row_statistics<S>(a, Parts(s));
    parallel_for(s.n * s.hw, s.threads, [&](int64_t begin, int64_t end) {
        Output<S> y(a.output, s);
        for (int64_t row = begin; row < end; ++row) {
            for_each_vec<A>(s.c, [&](int64_t c, int lanes) {
                int64_t i = row * s.c + c;
                y.put(i, lanes, activate<A, act>(channels.row(c, lanes)(load(x + i, lanes, A(0))), slope));
            });
        }
    });
}

template <class S, Activation act>
void backward_rows(const BatchNormActBackward& a) {
    using A = Acc<S>;
    const auto& s = a.shape;
    auto* x = static_cast<const S*>(a.input);
    auto* dy = static_cast<const S*>(a.grad_output);
    Channels<S> channels{static_cast<const A*>(a.weight), static_cast<const A*>(a.bias), static_cast<const A*>(a.mean),
                         static_cast<const A*>(a.invstd)};
    A slope = static_cast<A>(s.negative_slope);
    Parts parts(s);
    parallel_for(parts.count, s.threads, [&](int64_t from, int64_t to) {
        for (int64_t k = from; k < to; ++k) {
            reduce_rows<A>(s, parts.begin(k), parts.begin(k + 1), a.scratch + 2 * k * s.c,
                           [&](int64_t c, int lanes, int64_t begin, int64_t end, Vec<A>& first, Vec<A>& second) {
                               auto map = channels.row(c, lanes);
                               for (int64_t row = begin; row < end; ++row) {
                                   int64_t i = row * s.c + c;
                                   Vec<A> v = load(x + i, lanes, A(0));
                                   Vec<A> dz = activation_grad<A, act>(map(v), load(dy + i, lanes, A(0)), slope);
                                   first += dz;
                                   second += dz * (v - map.mean);
                               }
                           });
        }
    });
    // The two channel means follow the parts' sums in scratch, in the layout that a row is read in.
    auto* mean_dz = reinterpret_cast<A*>(a.scratch + 2 * parts.count * s.c);
    auto* slope_dz = reinterpret_cast<A*>(a.scratch + (2 * parts.count + 1) * s.c);
    InputGrad<S> grad(a, channels);
    for (int64_t c = 0; c < s.c; ++c) {
        write_grads<A>(a, c, sum_parts(a.scratch, parts, s.c, c));
        mean_dz[c] = grad.mean_dz(c);
        slope_dz[c] = grad.slope_dz(c);
    }
    bool training = a.training;
    parallel_for(s.n * s.hw, s.threads, [&](int64_t begin, int64_t end) {
        Output<S> dx(a.grad_input, s);
        for (int64_t row = begin; row < end; ++row) {
            for_each_vec<A>(s.c, [&](int64_t c, int lanes) {
                int64_t i = row * s.c + c;
                auto map = channels.row(c, lanes);
                Vec<A> v = load(x + i, lanes, A(0));
                Vec<A> dz = activation_grad<A, act>(map(v), load(dy + i, lanes, A(0)), slope);
                if (training)
                    dz = dz - load(mean_dz + c, lanes, A(0)) - (v - map.mean) * load(slope_dz + c, lanes, A(0));
                dx.put(i, lanes, map.scale * dz);
            });
        }
    });
}

template <class S>
void forward(const BatchNormActForward& a) {
    with_activation(a.shape.activation, [&](auto act) {
        constexpr Activation kind = decltype(act)::value;
        a.shape.channels_last ? forward_rows<S, kind>(a) : forward_planes<S, kind>(a);
    });
}

template <class S>
void backward(const BatchNormActBackward& a) {
    with_activation(a.shape.activation, [&](auto act) {
        constexpr Activation kind = decltype(act)::value;
        a.shape.channels_last ? backward_rows<S, kind>(a) : backward_planes<S, kind>(a);
    });
}

}  // namespace

void batch_norm_act_forward(const BatchNormActForward& a) {
    with_dtype(a.shape.dtype, [&](auto s) { forward<decltype(s)>(a); });
}

void batch_norm_act_backward(const BatchNormActBackward& a) {
    with_dtype(a.shape.dtype, [&](auto s) { backward<decltype(s)>(a); });
}

}  // namespace GANKERN_ISA
}  // namespace gankern
