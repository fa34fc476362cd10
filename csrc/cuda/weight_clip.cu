// One launch for a whole list of tensors: each block walks one chunk of one of them.
// Compiled with -DSTORAGE=<type> and, for rmsprop_clip, -DCENTERED=0|1 -DMOMENTUM=0|1.
#include "device.h"

using T = STORAGE;
using A = Acc<T>;

constexpr int kChunk = 4096;  // elements that one block walks
constexpr int kMost = 72;     // tensors of a launch: a kernel's arguments are 4 KB at most

// The tensors of up to five lists, alike in size. By value, so that a captured graph keeps what it was launched with.
struct Lists {
    T* at[5][kMost];
    index_t sizes[kMost];
    int first[kMost];  // block of each tensor
    int count;
};

struct Chunk {
    int tensor;
    index_t begin;
};

__device__ inline Chunk chunk_of(const Lists& lists) {
    int block = static_cast<int>(blockIdx.x), low = 0, high = lists.count;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        (lists.first[middle] <= block ? low : high) = middle;
    }
    return {low, static_cast<index_t>(block - lists.first[low]) * kChunk};
}

constexpr int kPack = 16 / sizeof(T);

__device__ inline A clamp(A x, A bound) {
    x = x < -bound ? -bound : x;  // a NaN stays
    return x > bound ? bound : x;
}

// Calls body(i, n) for n elements from i on, over the block's chunk: packs where all arrays are aligned to one.
template <class Body>
__device__ inline void for_each_pack(index_t begin, index_t size, bool aligned, const Body& body) {
    index_t end = begin + kChunk < size ? begin + kChunk : size;
    index_t whole = aligned ? begin + (end - begin) / kPack * kPack : begin;
    for (index_t i = begin + threadIdx.x * kPack; i < whole; i += blockDim.x * kPack) body(i, true);
    for (index_t i = whole + threadIdx.x; i < end; i += blockDim.x) body(i, false);
}

template <class S>
__device__ inline bool is_aligned(const S* p) {
    return reinterpret_cast<unsigned long long>(p) % 16 == 0;
}

// kPack values or one, in registers.
struct Values {
    A lanes[kPack];
    __device__ Values(const T* p, bool pack) {
        if (pack) {
            auto packed = *reinterpret_cast<const Pack<T, kPack>*>(p);
            for (int k = 0; k < kPack; ++k) lanes[k] = get(&packed.values[k]);
        } else {
            lanes[0] = get(p);
        }
    }
    __device__ void store(T* p, bool pack) const {
        if (pack) {
            Pack<T, kPack> packed;
            for (int k = 0; k < kPack; ++k) put(&packed.values[k], lanes[k]);
            store_pack(p, packed);
        } else {
            put(p, lanes[0]);
        }
    }
};

extern "C" __global__ void clip_weights(const __grid_constant__ Lists lists, double c) {
    Chunk chunk = chunk_of(lists);
    T* param = lists.at[0][chunk.tensor];
    A bound = static_cast<A>(c);
    for_each_pack(chunk.begin, lists.sizes[chunk.tensor], is_aligned(param), [&](index_t i, bool pack) {
        Values p(param + i, pack);
        for (int k = 0; k < (pack ? kPack : 1); ++k) p.lanes[k] = clamp(p.lanes[k], bound);
        p.store(param + i, pack);
    });
}

#ifdef CENTERED
// The lists: params, grads, square_avgs, then grad_avgs if centered and momentum_buffers with momentum. An lr or c on
// the device goes before the number.
extern "C" __global__ void rmsprop_clip(const __grid_constant__ Lists lists, double lr_value, const double* lr_device,
                                        double alpha_value, double eps_value, double weight_decay,
                                        double momentum_value, index_t maximize, double c_value,
                                        const double* c_device) {
    Chunk chunk = chunk_of(lists);
    T* param = lists.at[0][chunk.tensor];
    T* grad = lists.at[1][chunk.tensor];
    T* square_avg = lists.at[2][chunk.tensor];
    T* grad_avg = CENTERED ? lists.at[3][chunk.tensor] : nullptr;
    T* buffer = MOMENTUM ? lists.at[3 + CENTERED][chunk.tensor] : nullptr;
    A lr = static_cast<A>(lr_device ? *lr_device : lr_value), c = static_cast<A>(c_device ? *c_device : c_value);
    A alpha = static_cast<A>(alpha_value), rest = static_cast<A>(1 - alpha_value), eps = static_cast<A>(eps_value);
    A decay = static_cast<A>(weight_decay), momentum = static_cast<A>(momentum_value);
    bool aligned = is_aligned(param) && is_aligned(grad) && is_aligned(square_avg) &&
                   (!CENTERED || is_aligned(grad_avg)) && (!MOMENTUM || is_aligned(buffer));
    for_each_pack(chunk.begin, lists.sizes[chunk.tensor], aligned, [&](index_t i, bool pack) {
        Values p(param + i, pack), g(grad + i, pack), v(square_avg + i, pack);
        Values mean(CENTERED ? grad_avg + i : param + i, pack), b(MOMENTUM ? buffer + i : param + i, pack);
        for (int k = 0; k < (pack ? kPack : 1); ++k) {
            A d = maximize ? -g.lanes[k] : g.lanes[k];
            if (decay != 0) d += p.lanes[k] * decay;
            v.lanes[k] = v.lanes[k] * alpha + d * d * rest;
            A variance = v.lanes[k];
            if (CENTERED) {
                mean.lanes[k] = mean.lanes[k] * alpha + d * rest;
                variance -= mean.lanes[k] * mean.lanes[k];
            }
            A update = d / (sqrt(variance) + eps);
            if (MOMENTUM) update = b.lanes[k] = b.lanes[k] * momentum + update;
            p.lanes[k] = clamp(p.lanes[k] - update * lr, c);
        }
        v.store(square_avg + i, pack);
        if (CENTERED) mean.store(grad_avg + i, pack);
        if (MOMENTUM) b.store(buffer + i, pack);
        p.store(param + i, pack);
    });
}
#endif
