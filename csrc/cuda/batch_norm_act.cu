// Batch norm + activation over [n, c, hw], hw > 1 ("planes"), or over rows [n, c] (channels_last, or one pixel an
// image). Bound by bytes: forward reads x twice and writes y, backward reads x and dy twice and writes dx; a pass's
// sums cost the next pass a look at at most a quarter as many bytes, mostly in L2.
//
// A block takes one part of n * hw of a few channels: of one in planes, of `columns` threads' in rows. Each pass that
// sums up leaves a partial result a part and channel in `sums`, which the blocks of the next pass add up in fixed
// order.
//
// Compiled with -DSTORAGE=<type> -DPASS=<0..3, finish: 4> and but for that one -DROWS=0|1 -DVALUES=<values at once>: 16
// bytes' where pointers, and c or hw, are multiples of it, else 1.
#include "device.h"

using T = STORAGE;
using A = Acc<T>;

#ifndef ROWS
#define ROWS 1
#define VALUES 1
#endif

constexpr int kValues = VALUES;
constexpr int kChannels = ROWS ? kValues : 1;  // of a thread
constexpr int kMaxWarps = 16;                  // of a block
constexpr int kMaxSums = 64;                   // columns * sums of a thread
constexpr int kAhead = 4;                      // packs that a thread reads before it looks at the first

// As in gankern/_native.py.
enum Activation { kNone, kRelu, kLeakyRelu, kTanh };

template <int act>
__device__ inline A activate(A z, A slope) {
    if constexpr (act == kRelu) return z < 0 ? A(0) : z;  // a NaN stays
    if constexpr (act == kLeakyRelu) return z > 0 ? z : z * slope;
    if constexpr (act == kTanh) return tanh(z);
    return z;
}

// The gradient of an activation's input z.
template <int act>
__device__ inline A activation_grad(A z, A grad, A slope) {
    if constexpr (act == kRelu) return z > 0 ? grad : A(0);
    if constexpr (act == kLeakyRelu) return z > 0 ? grad : grad * slope;
    if constexpr (act == kTanh) {
        A y = tanh(z);
        return grad * (1 - y * y);
    }
    return grad;
}

template <int act>
struct Kind {
    static constexpr int value = act;
};

// Calls body(Kind<activation>()): one loop for each instead of a choice in it.
template <class Body>
__device__ inline void with_activation(index_t act, const Body& body) {
    if (act == kRelu) return body(Kind<kRelu>());
    if (act == kLeakyRelu) return body(Kind<kLeakyRelu>());
    if (act == kTanh) return body(Kind<kTanh>());
    body(Kind<kNone>());
}

// Sizes of the tensor and how it is cut: parts of `units` packs (planes) or rows, by `across` blocks beside each other
// of `columns` threads beside each other.
struct Shape {
    index_t n, c, hw, units, across, columns;
};

// Where the sums of a part and channel lie: the first ones, and the second ones `kind` further.
struct Strides {
    index_t part, kind, channel;
};

using Raw = Pack<T, kValues>;

struct Values {
    A lanes[kValues];
    __device__ explicit Values(const Raw& raw) {
        for (int k = 0; k < kValues; ++k) lanes[k] = get(&raw.values[k]);
    }
    __device__ void store(T* p) const {
        Raw raw;
        for (int k = 0; k < kValues; ++k) put(&raw.values[k], lanes[k]);
        store_pack(p, raw);
    }
};

// What of the tensor a thread takes.
struct Place {
    Shape shape;
    unsigned columns, part, parts;
    index_t first_channel, channel;
    bool inside;  // the channel exists

    __device__ explicit Place(const Shape& s, bool backwards = false)
        : shape(s), columns(static_cast<unsigned>(s.columns)) {
        unsigned across = static_cast<unsigned>(s.across);
        parts = gridDim.x / across;
        part = blockIdx.x / across;
        first_channel = static_cast<index_t>(blockIdx.x - part * across) * (ROWS ? columns * kChannels : 1);
        if (backwards) part = parts - 1 - part;  // what the pass before read last is still in L2
        channel = first_channel + (ROWS ? threadIdx.x % columns * kChannels : 0);
        inside = channel < s.c;
    }

    // Calls body(offset, packs) for each pack of the thread in each of the tensors, several of which are read ahead.
    template <class... Tensor, class Body>
    __device__ void walk(const Body& body, const Tensor*... tensors) const {
        if (!inside) return;
        constexpr int ahead = kAhead / sizeof...(Tensor);
        index_t plane = shape.hw / kValues, total = ROWS ? shape.n : shape.n * plane;
        unsigned step = ROWS ? blockDim.x / columns : blockDim.x;
        index_t unit = part * shape.units, end = unit + shape.units;
        if (end > total) end = total;
        unit += ROWS ? threadIdx.x / columns : threadIdx.x;
        index_t image = 0, i = 0, images = 0, rest = 0;
        if (!ROWS) {
            image = unit / plane;
            i = unit - image * plane;
            images = step / plane;
            rest = step - images * plane;
        }
        auto next = [&] {
            index_t offset = ROWS ? unit * shape.c + channel : (image * shape.c + channel) * shape.hw + i * kValues;
            unit += step;
            if (!ROWS) {
                image += images;
                i += rest;
                if (i >= plane) {
                    i -= plane;
                    ++image;
                }
            }
            return offset;
        };
        while (unit + (ahead - 1) * step < end) {
            index_t offsets[ahead];
            Raw packs[ahead][sizeof...(Tensor)];
#pragma unroll
            for (int a = 0; a < ahead; ++a) {
                offsets[a] = next();
                int t = 0;
                ((packs[a][t++] = load_pack<kValues>(tensors + offsets[a])), ...);
            }
#pragma unroll
            for (int a = 0; a < ahead; ++a) body(offsets[a], packs[a]);
        }
        while (unit < end) {
            index_t offset = next();
            Raw packs[] = {load_pack<kValues>(tensors + offset)...};
            body(offset, packs);
        }
    }
};

// z = (x - mean) * scale + bias for the thread's channels.
struct Affine {
    A mean[kChannels], scale[kChannels], bias[kChannels];
    __device__ void set(int k, A mean_, A invstd, const A* weight, const A* bias_, index_t channel) {
        mean[k] = mean_;
        scale[k] = weight ? invstd * weight[channel] : invstd;
        bias[k] = bias_ ? bias_[channel] : A(0);
    }
    __device__ Affine() {}
    __device__ Affine(const Place& at, const A* weight, const A* bias_, const A* means, const A* invstds) {
        if (!at.inside) return;
        for (int k = 0; k < kChannels; ++k) {
            index_t channel = at.channel + k;
            set(k, means[channel], invstds[channel], weight, bias_, channel);
        }
    }
    __device__ A operator()(A x, int k) const { return (x - mean[k]) * scale[k] + bias[k]; }
};

constexpr __device__ int channel_of(int lane) { return ROWS ? lane : 0; }

// Sums over those threads of the block that are equal modulo `columns`, a power of 2 up to a warp's lanes; values i of
// column k come to place k * N + i of what is returned. Deterministic.
template <class V, int N>
__device__ V* column_sums(V (&values)[N], unsigned columns) {
    GANKERN_SHARED(V, sums, kMaxWarps * kMaxSums);
    unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, width = columns * N;
    for (int k = 0; k < N; ++k)
        for (unsigned other = kWarp / 2; other >= columns; other /= 2)
            values[k] += __shfl_xor_sync(kAllLanes, values[k], other);
    if (lane < columns)
        for (int k = 0; k < N; ++k) sums[warp * width + lane * N + k] = values[k];
    __syncthreads();
    for (unsigned i = threadIdx.x; i < width; i += blockDim.x) {
        V total = sums[i];
        for (unsigned w = 1; w < blockDim.x / kWarp; ++w) total += sums[w * width + i];
        sums[i] = total;
    }
    __syncthreads();
    return sums;
}

// Adds up the thread's sums, `first` and `second` of each lane, over the block and leaves them as those of its part.
__device__ inline void leave_sums(const Place& at, const A (&first)[kValues], const A (&second)[kValues], A* sums,
                                  const Strides& strides) {
    A mine[2 * kChannels] = {};
    for (int k = 0; k < kValues; ++k) {
        mine[channel_of(k)] += first[k];
        mine[kChannels + channel_of(k)] += second[k];
    }
    A* total = column_sums(mine, at.columns) + threadIdx.x * 2 * kChannels;
    if (threadIdx.x >= at.columns || !at.inside) return;
    for (int k = 0; k < kChannels; ++k) {
        A* there = sums + at.part * strides.part + (at.channel + k) * strides.channel;
        there[0] = total[k];
        there[strides.kind] = total[kChannels + k];
    }
}

// Adds up the sums of all parts and calls body(place in block, channel, first, second), by one thread for each of the
// block's channels.
template <class Body>
__device__ inline void with_sums(const Place& at, const A* sums, index_t parts, const Strides& strides,
                                 const Body& body) {
    double mine[2 * kChannels] = {};
    if (at.inside)
        for (index_t p = threadIdx.x / at.columns; p < parts; p += blockDim.x / at.columns)
            for (int k = 0; k < kChannels; ++k) {
                const A* there = sums + p * strides.part + (at.channel + k) * strides.channel;
                mine[k] += there[0];
                mine[kChannels + k] += there[strides.kind];
            }
    double* total = column_sums(mine, at.columns);
    int place = threadIdx.x;
    index_t channel = at.first_channel + place;
    if (place >= static_cast<int>(at.columns) * kChannels || channel >= at.shape.c) return;
    total += place / kChannels * 2 * kChannels + place % kChannels;
    body(place, channel, total[0], total[kChannels]);
}

struct Statistics {
    A mean, invstd, var;
    // From the sums of x - shift and of its square over count values.
    __device__ Statistics(double first, double second, double shift, double count, double eps) {
        double offset = first / count, variance = second / count - offset * offset;
        if (variance < 0) variance = 0;
        mean = static_cast<A>(shift + offset);
        invstd = static_cast<A>(1 / sqrt(variance + eps));
        var = static_cast<A>(variance);
    }
};

#if PASS == 0
constexpr int kSamples = 8;

// The sums of x - shift and of its square, and the shift: the mean of a few values all over the channel, so that the
// squares lose hardly a digit, whatever the mean.
extern "C" __global__ void batch_norm_statistics(const T* __restrict__ x, A* __restrict__ sums, A* __restrict__ shift,
                                                 index_t n, index_t c, index_t hw, index_t units, index_t across,
                                                 index_t columns, index_t part_stride, index_t kind_stride,
                                                 index_t channel_stride) {
    Place at({n, c, hw, units, across, columns});
    A center[kChannels] = {};
    for (int s = 0; s < kSamples && at.inside; ++s) {
        auto sample = load_pack<kChannels>(x + (s * n / kSamples * c + at.channel) * hw + s * hw / kSamples);
        for (int k = 0; k < kChannels; ++k) center[k] += get(&sample.values[k]) * A(1.0 / kSamples);
    }
    A first[kValues] = {}, second[kValues] = {};
    auto add = [&](index_t, const Raw* packs) {
        Values v(packs[0]);
        for (int k = 0; k < kValues; ++k) {
            A d = v.lanes[k] - center[channel_of(k)];
            first[k] += d;
            second[k] += d * d;
        }
    };
    at.walk(add, x);
    if (at.part == 0 && threadIdx.x < at.columns && at.inside)
        for (int k = 0; k < kChannels; ++k) shift[at.channel + k] = center[k];
    leave_sums(at, first, second, sums, {part_stride, kind_stride, channel_stride});
}

#elif PASS == 1
// Without sums, mean and invstd are given; else they are made of them, and written.
extern "C" __global__ void batch_norm_act_forward(const T* __restrict__ x, T* __restrict__ y, const A* weight,
                                                  const A* bias, A* mean, A* invstd, A* var, const A* sums,
                                                  const A* shift, index_t parts, double eps, double slope, index_t act,
                                                  index_t n, index_t c, index_t hw, index_t units, index_t across,
                                                  index_t columns, index_t part_stride, index_t kind_stride,
                                                  index_t channel_stride) {
    Place at({n, c, hw, units, across, columns}, sums != nullptr);
    Affine map;
    if (sums) {
        GANKERN_SHARED(A, means, kMaxSums);
        GANKERN_SHARED(A, invstds, kMaxSums);
        auto finish = [&](int place, index_t channel, double first, double second) {
            Statistics found(first, second, shift ? shift[channel] : A(0), static_cast<double>(n) * hw, eps);
            means[place] = found.mean;
            invstds[place] = found.invstd;
            if (at.part > 0) return;
            mean[channel] = found.mean;
            invstd[channel] = found.invstd;
            var[channel] = found.var;
        };
        with_sums(at, sums, parts, {part_stride, kind_stride, channel_stride}, finish);
        __syncthreads();
        for (int k = 0; k < kChannels && at.inside; ++k) {
            index_t place = at.channel - at.first_channel + k;
            map.set(k, means[place], invstds[place], weight, bias, at.channel + k);
        }
    } else {
        map = Affine(at, weight, bias, mean, invstd);
    }
    with_activation(act, [&](auto kind) {
        auto write = [&](index_t offset, const Raw* packs) {
            Values v(packs[0]);
            for (int k = 0; k < kValues; ++k)
                v.lanes[k] = activate<decltype(kind)::value>(map(v.lanes[k], channel_of(k)), static_cast<A>(slope));
            v.store(y + offset);
        };
        at.walk(write, x);
    });
}

#elif PASS == 2
// The sums of dz and of dz * (x - mean), dz being the gradient of the activation's input; and with dx, for constant
// statistics, the input's gradient.
extern "C" __global__ void batch_norm_act_grad_sums(const T* __restrict__ dy, const T* __restrict__ x,
                                                    T* __restrict__ dx, const A* weight, const A* bias, const A* mean,
                                                    const A* invstd, A* __restrict__ sums, double slope, index_t act,
                                                    index_t n, index_t c, index_t hw, index_t units, index_t across,
                                                    index_t columns, index_t part_stride, index_t kind_stride,
                                                    index_t channel_stride) {
    Place at({n, c, hw, units, across, columns});
    Affine map(at, weight, bias, mean, invstd);
    A first[kValues] = {}, second[kValues] = {};
    with_activation(act, [&](auto kind) {
        auto body = [&](index_t offset, const Raw* packs) {
            Values v(packs[0]), grad(packs[1]);
            for (int k = 0; k < kValues; ++k) {
                int channel = channel_of(k);
                A dz = activation_grad<decltype(kind)::value>(map(v.lanes[k], channel), grad.lanes[k],
                                                              static_cast<A>(slope));
                first[k] += dz;
                second[k] += dz * (v.lanes[k] - map.mean[channel]);
                grad.lanes[k] = map.scale[channel] * dz;
            }
            if (dx) grad.store(dx + offset);
        };
        at.walk(body, x, dy);
    });
    leave_sums(at, first, second, sums, {part_stride, kind_stride, channel_stride});
}

#elif PASS == 3
// dx = scale * (dz - mean(dz) - xhat * mean(dz * xhat)), and the gradients of weight and bias.
extern "C" __global__ void batch_norm_act_input_grad(const T* __restrict__ dy, const T* __restrict__ x,
                                                     T* __restrict__ dx, const A* weight, const A* bias, const A* mean,
                                                     const A* invstd, const A* sums, index_t parts, A* grad_weight,
                                                     A* grad_bias, double slope, index_t act, index_t n, index_t c,
                                                     index_t hw, index_t units, index_t across, index_t columns,
                                                     index_t part_stride, index_t kind_stride, index_t channel_stride) {
    Place at({n, c, hw, units, across, columns}, true);
    Affine map(at, weight, bias, mean, invstd);
    GANKERN_SHARED(A, mean_dz, kMaxSums);
    GANKERN_SHARED(A, slope_dz, kMaxSums);
    auto finish = [&](int place, index_t channel, double first, double second) {
        double inverse = invstd[channel], count = static_cast<double>(n) * hw;
        mean_dz[place] = static_cast<A>(first / count);
        slope_dz[place] = static_cast<A>(second * inverse * inverse / count);
        if (at.part > 0) return;
        grad_weight[channel] = static_cast<A>(second * inverse);
        grad_bias[channel] = static_cast<A>(first);
    };
    with_sums(at, sums, parts, {part_stride, kind_stride, channel_stride}, finish);
    __syncthreads();
    A offset_dz[kChannels], factor_dz[kChannels];
    for (int k = 0; k < kChannels && at.inside; ++k) {
        offset_dz[k] = mean_dz[at.channel - at.first_channel + k];
        factor_dz[k] = slope_dz[at.channel - at.first_channel + k];
    }
    with_activation(act, [&](auto kind) {
        auto body = [&](index_t offset, const Raw* packs) {
            Values v(packs[0]), grad(packs[1]);
            for (int k = 0; k < kValues; ++k) {
                int channel = channel_of(k);
                A dz = activation_grad<decltype(kind)::value>(map(v.lanes[k], channel), grad.lanes[k],
                                                              static_cast<A>(slope));
                A centered = v.lanes[k] - map.mean[channel];
                grad.lanes[k] = map.scale[channel] * (dz - offset_dz[channel] - centered * factor_dz[channel]);
            }
            grad.store(dx + offset);
        };
        at.walk(body, x, dy);
    });
}

#else
// Sums of many parts, [parts, 2, c], by themselves: to the statistics, or with their invstd to the gradients of weight
// and bias.
extern "C" __global__ void batch_norm_finish(const A* sums, const A* shift, index_t parts, A* mean, A* invstd, A* var,
                                             A* grad_weight, A* grad_bias, double count, double eps, index_t c) {
    Place at({1, c, 1, 1, gridDim.x, kWarp});
    with_sums(at, sums, parts, {2 * c, c, 1}, [&](int, index_t channel, double first, double second) {
        if (grad_bias) {
            grad_weight[channel] = static_cast<A>(second * invstd[channel]);
            grad_bias[channel] = static_cast<A>(first);
            return;
        }
        Statistics found(first, second, shift ? shift[channel] : A(0), count, eps);
        mean[channel] = found.mean;
        invstd[channel] = found.invstd;
        var[channel] = found.var;
    });
}
#endif
