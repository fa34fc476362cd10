// Convolutions to at most four channels, the images of a generator or their gradient: the bytes of the source bound
// them. A few neighbouring threads sum up one pixel. Compiled with -DSTORAGE=<type> -DWIDENS=0|1.
#include "conv_problem.h"

using T = STORAGE;
using A = Acc<T>;

constexpr int kThreads = 128;
constexpr int kFew = 4;
constexpr int kChunk = 512;  // channels whose weights are in shared memory
constexpr int kPack = 16 / sizeof(T);

extern "C" __global__ void __launch_bounds__(kThreads, 5)
    conv_few(const T* source, const T* weight, T* result, const A* scale, const A* shift, const T* activated,
             double slope, index_t activation, index_t packed_source, index_t lanes, GANKERN_PROBLEM) {
    const Problem p = GANKERN_THE_PROBLEM;
    int phases = p.h.result_step * p.w.result_step, phase = blockIdx.x % phases, group = int(lanes);
    const Phase h(p.h, phase / p.w.result_step), w(p.w, phase % p.w.result_step);
    const Pixel pixel(p, h, w, blockIdx.x / phases * (kThreads / group) + threadIdx.x / group);
    int lane = threadIdx.x % group, taps = p.h.kernel * p.w.kernel;

    GANKERN_SHARED(A, factors, kFew * kChunk);
    A acc[kFew] = {};
    auto add = [&](A value, int c) {
#pragma unroll
        for (int r = 0; r < kFew; ++r) acc[r] += value * factors[r * kChunk + c];
    };
    for (int seen = 0; seen < h.taps * w.taps; ++seen) {
        int i = seen / w.taps, j = seen % w.taps;
        int tap = (h.first + i * p.h.tap_step) * p.w.kernel + w.first + j * p.w.tap_step;
        int y = pixel.y + i * p.h.reach, x = pixel.x + j * p.w.reach;
        bool inside = pixel.inside && static_cast<unsigned>(y) < static_cast<unsigned>(p.h.source) &&
                      static_cast<unsigned>(x) < static_cast<unsigned>(p.w.source);
        const T* from =
            source + pixel.from + (static_cast<index_t>(i) * p.h.reach * p.w.source + j * p.w.reach) * p.source_c;
        for (int c0 = 0; c0 < p.source_c; c0 += kChunk) {
            int count = p.source_c - c0 < kChunk ? p.source_c - c0 : kChunk;
            __syncthreads();
            for (int at = threadIdx.x; at < kFew * count; at += kThreads) {
                int r = WIDENS ? at % kFew : at / count, c = WIDENS ? at / kFew : at % count;
                index_t place = WIDENS ? (static_cast<index_t>(c0 + c) * taps + tap) * p.result_c + r
                                       : (static_cast<index_t>(r) * taps + tap) * p.source_c + c0 + c;
                factors[r * kChunk + c] = r < p.result_c ? get(weight + place) : A(0);
            }
            __syncthreads();
            if (!inside) continue;
            if (packed_source) {
                for (int c = lane * kPack; c < count; c += group * kPack) {
                    auto pack = *reinterpret_cast<const Pack<T, kPack>*>(from + c0 + c);
#pragma unroll
                    for (int e = 0; e < kPack; ++e) add(get(&pack.values[e]), c + e);
                }
            } else {
                for (int c = lane; c < count; c += group) add(get(from + c0 + c), c);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < kFew; ++r)
        for (int other = group / 2; other > 0; other /= 2) acc[r] += __shfl_xor_sync(kAllLanes, acc[r], other);
    if (lane > 0 || !pixel.inside) return;
    A below = static_cast<A>(slope);
#pragma unroll
    for (int r = 0; r < kFew; ++r) {
        if (r >= p.result_c) continue;
        A z = scale ? acc[r] * scale[r] : acc[r];
        if (shift) z += shift[r];
        z = activated ? activate_backward(z, get(activated + pixel.to + r), int(activation), below)
                      : activate(z, int(activation), below);
        put(result + pixel.to + r, z);
    }
}
