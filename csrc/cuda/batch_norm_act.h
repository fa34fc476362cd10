// How the kernels of batch norm + activation see a tensor: as [n, c, hw], hw > 1 ("planes"), or as rows [n, c]
// (channels_last, or one pixel an image).
//
// A block takes one part of n * hw of a few channels: of one in planes, of `columns` threads' in rows. Each pass that
// sums up leaves a partial result a part and channel in `sums`, which the blocks of the next pass add up in fixed
// order.
#pragma once

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

// Adds up the sums of all parts, floats or doubles, and calls body(place in block, channel, first, second), by one
// thread for each of the block's channels.
template <class S, class Body>
__device__ inline void with_sums(const Place& at, const S* sums, index_t parts, const Strides& strides,
                                 const Body& body) {
    double mine[2 * kChannels] = {};
    if (at.inside)
        for (index_t p = threadIdx.x / at.columns; p < parts; p += blockDim.x / at.columns)
            for (int k = 0; k < kChannels; ++k) {
                const S* there = sums + p * strides.part + (at.channel + k) * strides.channel;
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
