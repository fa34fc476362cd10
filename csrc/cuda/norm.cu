// Layer, group and instance norm: see gankern/ops/critic_layers/norms.py for the passes and gankern/layer_norm.h for
// the formulas. Bound by bytes: each input is read twice, the second time as far as it may from the L2 cache, and each
// result written once.
// Compiled with -DSTORAGE=<type>, -DORDER=0|1|2 (forward, backward, double backward) and -DPASS=0|1|2|3 for one of the
// entry points: sums, finish, apply, add_parts.
#include "device.h"

using T = STORAGE;
using A = Acc<T>;

constexpr int kSums = ORDER == 2 ? 5 : 2;
constexpr int kParams = ORDER == 1 ? 2 : 1;
constexpr int kPack = 16 / sizeof(T);
constexpr int kThreads = 256;  // of a block at most, as in gankern/ops/critic_layers/cuda_norms.py

struct Inputs {
    const T *x, *grad, *tangent, *weight;
    const A *mean, *rstd;
};

struct Shape {
    index_t samples, channels, inner, groups;
    __device__ index_t group(index_t c) const { return groups == 1 ? 0 : c / (channels / groups); }
};

// A thread's channels and values in the tile of its block, which has `across` threads along what is dense in memory:
// LAST along the channels, of which a thread has N side by side, else along the values.
template <bool LAST, int N>
struct Place {
    static constexpr int kChannels = LAST ? N : 1;
    index_t sample, tile;  // or part of the samples
    index_t c, c_end, c_step, l, l_end, l_step;
    int peers, position, stride;  // the threads that have the same channels

    __device__ Place(const Shape& s, index_t channel_tiles, index_t tiles, index_t tile_channels, index_t tile_inner,
                     index_t across) {
        index_t x = threadIdx.x % across, y = threadIdx.x / across, down = blockDim.x / across;
        tile = blockIdx.x % tiles;
        sample = blockIdx.x / tiles / channel_tiles;
        index_t first = blockIdx.x / tiles % channel_tiles * tile_channels;
        c = first + (LAST ? x * N : y);
        c_step = LAST ? across * N : down;
        c_end = first + tile_channels < s.channels ? first + tile_channels : s.channels;
        l = tile * tile_inner + (LAST ? y : x * N);
        l_step = LAST ? down : across * N;
        l_end = (tile + 1) * tile_inner < s.inner ? (tile + 1) * tile_inner : s.inner;
        peers = static_cast<int>(LAST ? down : across);
        position = static_cast<int>(LAST ? y : x);
        stride = static_cast<int>(LAST ? across : 1);
    }
    __device__ index_t at(const Shape& s, index_t n, index_t channel, index_t value) const {
        return n * s.channels * s.inner + (LAST ? value * s.channels + channel : channel * s.inner + value);
    }
};

// Adds up the values of so many threads, a power of two, that stand `stride` apart: the first of them gets the sums.
template <int V>
__device__ inline void add_up(A (&values)[V], A* shared, int peers, int position, int stride) {
    A* own = shared + threadIdx.x;
    for (int v = 0; v < V; ++v) own[v * blockDim.x] = values[v];
    for (int half = peers / 2; half > 0; half /= 2) {
        __syncthreads();
        if (position >= half) continue;
        for (int v = 0; v < V; ++v) own[v * blockDim.x] += own[v * blockDim.x + half * stride];
    }
    if (position == 0)
        for (int v = 0; v < V; ++v) values[v] = own[v * blockDim.x];
}

// Calls a function for how the memory lies and for packs or single values.
#define GANKERN_DISPATCH(last, packed, function, ...)                                 \
    if (last)                                                                         \
        packed ? function<true, kPack>(__VA_ARGS__) : function<true, 1>(__VA_ARGS__); \
    else                                                                              \
        packed ? function<false, kPack>(__VA_ARGS__) : function<false, 1>(__VA_ARGS__);

#if PASS == 0
template <bool LAST, int N>
__device__ inline void sums_of(const Inputs& in, const Shape& s, const Place<LAST, N>& p, double* entries,
                               index_t tiles, A* shared) {
    constexpr int kChannels = Place<LAST, N>::kChannels;
    A sums[kChannels * kSums] = {};
    for (index_t c = p.c; c < p.c_end; c += p.c_step) {
        A center[kChannels], scale[kChannels];
        for (int j = 0; j < kChannels; ++j) {
            index_t own = s.group(c + j), group = p.sample * s.groups + own;
            if (ORDER == 0) {
                // A value of the group's own keeps the sum of squares near the variance.
                center[j] = get(in.x + p.at(s, p.sample, own * (s.channels / s.groups), 0));
            } else {
                center[j] = in.mean[group];
                scale[j] = in.rstd[group];
            }
        }
        for (index_t l = p.l; l < p.l_end; l += p.l_step) {
            index_t i = p.at(s, p.sample, c, l);
            Lanes<T, N> x(in.x + i), g(ORDER > 0 ? in.grad + i : in.x + i), v(ORDER > 1 ? in.tangent + i : in.x + i);
            for (int k = 0; k < N; ++k) {
                int j = LAST ? k : 0;
                A* sum = sums + j * kSums;
                A h = x.at[k] - center[j];
                if (ORDER == 0) {
                    sum[0] += h;
                    sum[1] += h * h;
                    continue;
                }
                h *= scale[j];
                A u = in.weight ? g.at[k] * get(in.weight + c + j) : g.at[k];
                if (ORDER == 2) {
                    sum[0] += v.at[k];
                    sum[1] += v.at[k] * h;
                    sum[kSums - 1] += v.at[k] * u;
                }
                sum[ORDER == 2 ? 2 : 0] += u;
                sum[ORDER == 2 ? 3 : 1] += u * h;
            }
        }
    }
    if (s.groups == 1) {
        A all[kSums] = {};
        for (int i = 0; i < kChannels * kSums; ++i) all[i % kSums] += sums[i];
        add_up(all, shared, blockDim.x, threadIdx.x, 1);
        if (threadIdx.x == 0)
            for (int k = 0; k < kSums; ++k) entries[blockIdx.x * index_t(kSums) + k] = all[k];
        return;
    }
    add_up(sums, shared, p.peers, p.position, p.stride);
    if (p.position != 0) return;
    for (int j = 0; j < kChannels && p.c + j < p.c_end; ++j)
        for (int k = 0; k < kSums; ++k)
            entries[((p.sample * s.channels + p.c + j) * tiles + p.tile) * kSums + k] = sums[j * kSums + k];
}

template <bool LAST, int N>
__device__ inline void run_sums(const Inputs& in, const Shape& s, index_t channel_tiles, index_t tiles,
                                index_t tile_channels, index_t tile_inner, index_t across, double* entries, A* shared) {
    Place<LAST, N> place(s, channel_tiles, tiles, tile_channels, tile_inner, across);
    sums_of(in, s, place, entries, tiles, shared);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    norm_sums(const T* x, const T* grad, const T* tangent, const T* weight, const A* mean, const A* rstd,
              double* entries, index_t samples, index_t channels, index_t inner, index_t groups, index_t last,
              index_t channel_tiles, index_t tiles, index_t tile_channels, index_t tile_inner, index_t across,
              index_t packed) {
    GANKERN_SHARED(A, shared, kPack * kSums * kThreads);
    Inputs in{x, grad, tangent, weight, mean, rstd};
    Shape s{samples, channels, inner, groups};
    GANKERN_DISPATCH(last, packed, run_sums, in, s, channel_tiles, tiles, tile_channels, tile_inner, across, entries,
                     shared)
}
#elif PASS == 1
// The numbers [kSums, rows] of every group, by a warp each.
extern "C" __global__ void norm_finish(const double* entries, const T* x, A* numbers, index_t rows, index_t count,
                                       index_t channels, index_t inner, index_t groups, index_t last, double eps) {
    index_t row = blockIdx.x * index_t(blockDim.x / kWarp) + threadIdx.x / kWarp;
    if (row >= rows) return;
    double means[kSums] = {};
    for (index_t e = threadIdx.x % kWarp; e < count; e += kWarp)
        for (int k = 0; k < kSums; ++k) means[k] += entries[(row * count + e) * kSums + k];
    for (double& mean : means) mean = warp_sum(mean) / static_cast<double>(channels / groups * inner);
    if (threadIdx.x % kWarp != 0) return;
    if (ORDER == 0) {
        index_t first = row % groups * (channels / groups);
        double var = means[1] - means[0] * means[0];
        means[0] += get(x + row / groups * channels * inner + (last ? first : first * inner));
        means[1] = 1 / sqrt((var < 0 ? 0 : var) + eps);  // a NaN stays
    }
    if (ORDER == 2) means[kSums - 1] -= means[0] * means[2 % kSums] + means[1] * means[3 % kSums];
    for (int k = 0; k < kSums; ++k) numbers[k * rows + row] = static_cast<A>(means[k]);
}
#elif PASS == 2
struct Outputs {
    T *first, *second;
    A* parts;
};

template <bool LAST, int N>
__device__ inline void run_apply(const Inputs& in, const Shape& s, index_t channel_tiles, index_t tiles,
                                 index_t tile_channels, index_t tile_inner, index_t across, const T* bias,
                                 const A* numbers, const Outputs& out, index_t each, A* shared) {
    constexpr int kChannels = LAST ? N : 1;
    Place<LAST, N> p(s, channel_tiles, tiles, tile_channels, tile_inner, across);
    A weight[kChannels], shift[kChannels] = {}, shares[kChannels * kParams] = {};
    bool inside = p.c < p.c_end;
    index_t own[kChannels];
    for (int j = 0; j < kChannels; ++j) {
        own[j] = s.group(p.c + j);
        weight[j] = in.weight && inside ? get(in.weight + p.c + j) : A(1);
        if (ORDER == 0 && bias && inside) shift[j] = get(bias + p.c + j);
    }
    const index_t rows = s.samples * s.groups;
    index_t end = (p.sample + 1) * each < s.samples ? (p.sample + 1) * each : s.samples;
    for (index_t n = p.sample * each; inside && n < end; ++n) {
        A center[kChannels], scale[kChannels], mean[kChannels][kSums];
        for (int j = 0; j < kChannels; ++j) {
            index_t group = n * s.groups + own[j];
            center[j] = in.mean[group];
            scale[j] = in.rstd[group];
            if (ORDER > 0)
                for (int k = 0; k < kSums; ++k) mean[j][k] = numbers[k * rows + group];
        }
        for (index_t l = p.l; l < p.l_end; l += p.l_step) {
            index_t i = p.at(s, n, p.c, l);
            Lanes<T, N> x(in.x + i), g(ORDER > 0 ? in.grad + i : in.x + i), v(ORDER > 1 ? in.tangent + i : in.x + i);
            for (int k = 0; k < N; ++k) {
                int j = LAST ? k : 0;
                const A* m = mean[j];
                A h = (x.at[k] - center[j]) * scale[j];
                if (ORDER == 0) {
                    x.at[k] = h * weight[j] + shift[j];
                    continue;
                }
                A* share = shares + j * kParams;
                A u = g.at[k] * weight[j];
                if (ORDER == 1) {
                    share[0] += g.at[k] * h;
                    share[kParams - 1] += g.at[k];
                    x.at[k] = scale[j] * (u - m[0] - h * m[1]);
                    continue;
                }
                A pv = v.at[k] - m[0] - h * m[1], pu = u - m[2 % kSums] - h * m[3 % kSums];
                share[0] += g.at[k] * (scale[j] * pv);
                x.at[k] = scale[j] * pv * weight[j];
                g.at[k] = -(scale[j] * scale[j]) * (m[kSums - 1] * h + m[3 % kSums] * pv + m[1] * pu);
            }
            x.store(out.first + i);
            if (ORDER == 2) g.store(out.second + i);
        }
    }
    if (!out.parts) return;
    add_up(shares, shared, p.peers, p.position, p.stride);
    if (p.position != 0 || !inside) return;
    index_t parts = (s.samples + each - 1) / each * tiles;
    for (int j = 0; j < kChannels; ++j)
        for (int k = 0; k < kParams; ++k)
            out.parts[(k * parts + p.sample * tiles + p.tile) * s.channels + p.c + j] = shares[j * kParams + k];
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    norm_apply(const T* x, const T* grad, const T* tangent, const T* weight, const T* bias, const A* mean,
               const A* rstd, const A* numbers, T* first, T* second, A* parts, index_t samples, index_t channels,
               index_t inner, index_t groups, index_t last, index_t channel_tiles, index_t tiles, index_t tile_channels,
               index_t tile_inner, index_t across, index_t packed, index_t each) {
    GANKERN_SHARED(A, shared, kPack * kParams * kThreads);
    Inputs in{x, grad, tangent, weight, mean, rstd};
    Shape s{samples, channels, inner, groups};
    Outputs out{first, second, parts};
    GANKERN_DISPATCH(last, packed, run_apply, in, s, channel_tiles, tiles, tile_channels, tile_inner, across, bias,
                     numbers, out, each, shared)
}
#else
// Adds the parts [kParams, count, channels] of the gradients of weight and bias up, 32 channels a block.
extern "C" __global__ void norm_add_parts(const A* parts, T* weight, T* bias, index_t count, index_t channels) {
    GANKERN_SHARED(A, shared, 1024 * kParams);
    index_t c = blockIdx.x * index_t(kWarp) + threadIdx.x % kWarp;
    int down = blockDim.x / kWarp, y = threadIdx.x / kWarp;
    A sums[kParams] = {};
    for (index_t p = y; c < channels && p < count; p += down)
        for (int k = 0; k < kParams; ++k) sums[k] += parts[(k * count + p) * channels + c];
    add_up(sums, shared, down, y, kWarp);
    if (y != 0 || c >= channels) return;
    put(weight + c, sums[0]);
    if (kParams == 2) put(bias + c, sums[kParams - 1]);
}
#endif
