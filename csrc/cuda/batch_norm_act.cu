// Batch norm + activation. Bound by bytes: forward reads x twice and writes y, backward reads x and dy twice and writes
// dx; a pass's sums cost the next pass a look at at most a quarter as many bytes, mostly in L2.
//
// Compiled with -DSTORAGE=<type> -DPASS=<0..3, finish: 4, update: 5>, for finish -DSUMS=<type>, for 0..3 -DROWS=0|1
// -DVALUES=<values at once>: 16 bytes' where pointers, and c or hw, are multiples of it, else 1.
#include "batch_norm_act.h"

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
            Statistics found(first, second, shift[channel], static_cast<double>(n) * hw, eps);
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

#elif PASS == 5
// Lets the statistics of a batch into the running ones; `unbiased` makes the variance an estimate of the population's.
extern "C" __global__ void batch_norm_update(A* running_mean, A* running_var, const A* mean, const A* var,
                                             double momentum, double unbiased, index_t c) {
    index_t channel = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (channel >= c) return;
    A kept = static_cast<A>(1 - momentum), taken = static_cast<A>(momentum);
    running_mean[channel] = running_mean[channel] * kept + taken * mean[channel];
    running_var[channel] = running_var[channel] * kept + taken * (var[channel] * static_cast<A>(unbiased));
}

#else
// Sums of many parts, [parts, 2, c], by themselves: to the statistics, or with their invstd to the gradients of weight
// and bias.
extern "C" __global__ void batch_norm_finish(const SUMS* sums, const A* shift, index_t parts, A* mean, A* invstd,
                                             A* var, A* grad_weight, A* grad_bias, double count, double eps,
                                             index_t c) {
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
