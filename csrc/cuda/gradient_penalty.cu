// The elementwise ends of a gradient penalty. Bound by bytes: interpolation reads two arrays and writes one, the tail
// reads the gradient twice, the second time mostly from the L2 cache, and writes its cotangent.
// Compiled with -DSTORAGE=<type>. A block walks one chunk of one sample.
#include "device.h"

using T = STORAGE;
using A = Acc<T>;

constexpr index_t kChunk = 4096;  // elements, as in gankern/ops/gradient_penalty/cuda.py
constexpr int kPack = 16 / sizeof(T);

struct Chunk {
    index_t sample, begin, end;  // the elements, from the batch's first
    __device__ Chunk(index_t size, index_t chunks) : sample(blockIdx.x / chunks) {
        index_t first = blockIdx.x % chunks * kChunk, left = size - first;
        begin = sample * size + first;
        end = begin + (left < kChunk ? left : kChunk);
    }
    // Calls body(i) for the first of every N neighbours.
    template <int N, class Body>
    __device__ void walk(const Body& body) const {
        for (index_t i = begin + threadIdx.x * N; i < end; i += blockDim.x * N) body(i);
    }
};

template <int N>
__device__ inline void interpolate_chunk(const Chunk& chunk, const T* real, const T* fake, A share, T* points) {
    A rest = 1 - share;
    chunk.walk<N>([&](index_t i) {
        Lanes<T, N> r(real + i), f(fake + i);
        for (int k = 0; k < N; ++k) r.at[k] = add_rn(mul_rn(share, r.at[k]), mul_rn(rest, f.at[k]));
        r.store(points + i);
    });
}

// points = alpha * real + (1 - alpha) * fake; packed: samples start at a pack and are made of whole ones.
extern "C" __global__ void interpolate(const T* real, const T* fake, const A* alpha, T* points, index_t size,
                                       index_t chunks, index_t packed) {
    Chunk chunk(size, chunks);
    A share = alpha[chunk.sample];
    packed ? interpolate_chunk<kPack>(chunk, real, fake, share, points)
           : interpolate_chunk<1>(chunk, real, fake, share, points);
}

template <int N>
__device__ inline double sum_of_squares(const Chunk& chunk, const T* grad) {
    double sum = 0;
    chunk.walk<N>([&](index_t i) {
        Lanes<T, N> g(grad + i);
        for (int k = 0; k < N; ++k) sum += static_cast<double>(g.at[k]) * g.at[k];
    });
    return sum;
}

// squares[sample, chunk] = sum of the chunk's squares.
extern "C" __global__ void penalty_squares(const T* grad, double* squares, index_t size, index_t chunks,
                                           index_t packed) {
    Chunk chunk(size, chunks);
    double sum = block_sum(packed ? sum_of_squares<kPack>(chunk, grad) : sum_of_squares<1>(chunk, grad));
    if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}

struct Penalty {
    double target;
    bool one_sided, squared;
    __device__ double excess(double norm) const {
        double e = norm - target;
        return one_sided && e < 0 ? 0 : e;
    }
    __device__ double value(double square) const {
        double e = excess(sqrt(square));
        return squared ? square : e * e;
    }
    // Half of the derivative by the gradient, over the gradient; the subgradient at norm 0 is 0.
    __device__ double slope(double square) const {
        double norm = sqrt(square);
        return squared ? 1 : norm == 0 ? 0 : excess(norm) / norm;
    }
};

template <int N>
__device__ inline void scale_chunk(const Chunk& chunk, const T* grad, A scale, T* cotangent) {
    chunk.walk<N>([&](index_t i) {
        Lanes<T, N> g(grad + i);
        for (int k = 0; k < N; ++k) g.at[k] *= scale;
        g.store(cotangent + i);
    });
}

// cotangent = d loss / d grad by the norm of each sample; the first block adds the loss up.
extern "C" __global__ void penalty_tail(const T* grad, const double* squares, T* cotangent, T* loss, index_t n,
                                        index_t size, index_t chunks, index_t packed, double per_sample, double target,
                                        index_t one_sided, index_t squared) {
    Chunk chunk(size, chunks);
    Penalty penalty{target, one_sided != 0, squared != 0};
    double square = 0;
    for (index_t k = threadIdx.x; k < chunks; k += blockDim.x) square += squares[chunk.sample * chunks + k];
    auto scale = static_cast<A>(2 * per_sample * penalty.slope(block_sum(square)));
    packed ? scale_chunk<kPack>(chunk, grad, scale, cotangent) : scale_chunk<1>(chunk, grad, scale, cotangent);
    if (blockIdx.x != 0) return;
    double total = 0;
    for (index_t sample = threadIdx.x; sample < n; sample += blockDim.x) {
        square = 0;
        for (index_t k = 0; k < chunks; ++k) square += squares[sample * chunks + k];
        total += penalty.value(square);
    }
    total = block_sum(total);
    if (threadIdx.x == 0) put(loss, static_cast<A>(total * per_sample));
}
