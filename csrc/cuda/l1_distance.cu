// L1 distances of all pairs of samples, their change along a tangent, and the backward. Lanes go along the features,
// which are adjacent in [n, n, b]; shared memory has them adjacent for each of the c kernel dims.
//
// Forward and tangent: bound by the n * n * b values that are written, up to c of some 20; a pair is computed once and
// written to both its places, so that the result is exactly symmetric. Backward: each sample sums over all others,
// 5 operations for each of n * n * b * c elements (a comparison counts 2), and reads the incoming gradient twice, as
// g[i, j] and as g[j, i]: bound by bytes below c of 6 or so, by operations above.
//
// Compiled with -DSTORAGE=<type> -DPASS=0|1|2 (forward, tangent, backward).
#include "device.h"

using T = STORAGE;
using A = Acc<T>;

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kFeatures = 16, kSamples = kWarp / kFeatures;  // of a warp's lanes

struct Problem {
    index_t n, b, c;
};

// -1, 0 or 1, also 0 for a NaN, as torch.abs has it.
__device__ inline A sign(A d) { return copysign(d < 0 || d > 0 ? A(1) : A(0), d); }

#if PASS < 2
constexpr bool kTangent = PASS == 1;
constexpr int kRows = 8, kColumns = 4;                         // of a thread
constexpr int kTileRows = 16, kTileColumns = 32;               // of a block
constexpr int kDims = (kTangent ? 16 : 32) / sizeof(A);        // kernel dims in shared memory
constexpr int kLine = (kTileRows + kTileColumns) * kFeatures;  // values of one of them
constexpr int kPadded = kLine + 4;                             // no bank conflicts while they are written

static_assert(kTileRows / kRows * (kTileColumns / (kColumns * kSamples)) == kWarps);

static_assert(kThreads % (kDims * kFeatures) == 0);

// Samples from i0 on, kDims dims from c0 on. A thread has one feature and dim of several samples.
template <int samples>
__device__ inline void stage(const Problem& p, const T* tensor, index_t i0, index_t b0, index_t c0, A* shared) {
    constexpr int kAtOnce = kThreads / (kDims * kFeatures);
    const int c = threadIdx.x % kDims, feature = threadIdx.x / kDims % kFeatures;
    const bool has = b0 + feature < p.b && c0 + c < p.c;
    const index_t step = p.b * p.c;
    const int first = threadIdx.x / (kDims * kFeatures);
    const T* from = tensor + (i0 + first) * step + (b0 + feature) * p.c + c0 + c;
    for (int i = first; i < samples; i += kAtOnce, from += kAtOnce * step)
        shared[c * kPadded + i * kFeatures + feature] = has && i0 + i < p.n ? get(from) : A(0);
}

__device__ inline void run(const Problem& p, const T* tangent, const T* m, T* output) {
    GANKERN_SHARED(A, values, kDims * kPadded * (kTangent ? 2 : 1));
    A* tangents = values + (kTangent ? kDims * kPadded : 0);
    // As many blocks as an unsigned counts: 64-bit divisions cost registers.
    const auto rows = static_cast<unsigned>((p.n + kTileRows - 1) / kTileRows);
    const auto columns = static_cast<unsigned>((p.n + kTileColumns - 1) / kTileColumns);
    const index_t j0 = static_cast<index_t>(blockIdx.x % columns) * kTileColumns;
    const index_t i0 = static_cast<index_t>(blockIdx.x / columns % rows) * kTileRows;
    const index_t b0 = static_cast<index_t>(blockIdx.x / columns / rows) * kFeatures;
    if (j0 + kTileColumns <= i0) return;  // written by the mirrored tile

    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int row = warp % (kTileRows / kRows) * kRows;
    const int column = warp / (kTileRows / kRows) * (kColumns * kSamples);
    const int x_at = row * kFeatures + lane % kFeatures, y_at = (kTileRows + column) * kFeatures + lane;
    A sum[kRows][kColumns] = {};
    for (index_t c0 = 0; c0 < p.c; c0 += kDims) {
        __syncthreads();
        stage<kTileRows>(p, m, i0, b0, c0, values);
        stage<kTileColumns>(p, m, j0, b0, c0, values + kTileRows * kFeatures);
        if (kTangent) {
            stage<kTileRows>(p, tangent, i0, b0, c0, tangents);
            stage<kTileColumns>(p, tangent, j0, b0, c0, tangents + kTileRows * kFeatures);
        }
        __syncthreads();
        const int count = p.c - c0 < kDims ? static_cast<int>(p.c - c0) : kDims;
        for (int c = 0; c < count; ++c) {
            const A *values_c = values + c * kPadded, *tangents_c = tangents + c * kPadded;
            A x[kRows], y[kColumns], v[kRows], u[kColumns];
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                x[r] = values_c[x_at + r * kFeatures];
                if (kTangent) v[r] = tangents_c[x_at + r * kFeatures];
            }
#pragma unroll
            for (int q = 0; q < kColumns; ++q) {
                y[q] = values_c[y_at + q * kWarp];
                if (kTangent) u[q] = tangents_c[y_at + q * kWarp];
            }
#pragma unroll
            for (int r = 0; r < kRows; ++r)
#pragma unroll
                for (int q = 0; q < kColumns; ++q)
                    sum[r][q] += kTangent ? sign(x[r] - y[q]) * (v[r] - u[q]) : fabs(x[r] - y[q]);
        }
    }

    const index_t b = b0 + lane % kFeatures;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int q = 0; q < kColumns; ++q) {
            index_t i = i0 + row + r, j = j0 + column + q * kSamples + lane / kFeatures;
            if (b >= p.b || i > j || j >= p.n) continue;
            put(output + (i * p.n + j) * p.b + b, sum[r][q]);
            if (i < j) put(output + (j * p.n + i) * p.b + b, sum[r][q]);
        }
    }
}
#else
constexpr int kRows = 4;               // of a thread
constexpr int kDims = 32 / sizeof(A);  // kernel dims of a thread
constexpr int kStep = 32 / sizeof(A);  // samples j in shared memory
constexpr int kWarpRows = kRows * kSamples;
constexpr int kPadded = kFeatures + 1;  // no bank conflicts while values are written
constexpr int kMaxGroups = 4;

__device__ constexpr int shared_values(int groups) {
    return kStep * (kWarps / groups * kWarpRows * kFeatures + groups * kDims * kPadded);
}

static_assert(shared_values(1) >= shared_values(2) && shared_values(1) >= shared_values(kMaxGroups));

// Zero beyond the last sample, feature and dim.
__device__ inline A value(const Problem& p, const T* tensor, index_t i, index_t b, index_t c) {
    return i < p.n && b < p.b && c < p.c ? get(tensor + (i * p.b + b) * p.c + c) : A(0);
}

// Warps are shared out to groups of kDims kernel dims and, in each, to rows. Part k sums over part_size samples.
__device__ inline void run(const Problem& p, const T* g, const T* m, T* grad_m, A* parts, index_t part_size, int groups,
                           unsigned chunks) {
    GANKERN_SHARED(A, weights, shared_values(1));
    const int height = kWarps / groups * kWarpRows, width = groups * kDims;
    A* values = weights + kStep * height * kFeatures;
    const auto tiles = static_cast<unsigned>((p.n + height - 1) / height);
    const auto features = static_cast<unsigned>((p.b + kFeatures - 1) / kFeatures);
    unsigned block = blockIdx.x;
    const index_t own = static_cast<index_t>(block % chunks) * width;
    block /= chunks;
    const index_t b0 = static_cast<index_t>(block % features) * kFeatures;
    block /= features;
    const index_t i0 = static_cast<index_t>(block % tiles) * height, part = block / tiles;
    const index_t begin = part * part_size, end = begin + part_size < p.n ? begin + part_size : p.n;

    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int first_dim = warp % groups * kDims, first_row = warp / groups * kWarpRows;
    const index_t b = b0 + lane % kFeatures, i = i0 + first_row + lane / kFeatures;
    A x[kRows][kDims], grad[kRows][kDims] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int c = 0; c < kDims; ++c) x[r][c] = value(p, m, i + r * kSamples, b, own + first_dim + c);

    for (index_t j0 = begin; j0 < end; j0 += kStep) {
        __syncthreads();
        const index_t feature = b0 + threadIdx.x % kFeatures, n_b = p.n * p.b;
#pragma unroll 1
        for (int row = threadIdx.x / kFeatures; row < height; row += kThreads / kFeatures) {
            const bool inside = i0 + row < p.n && feature < p.b;
            const T *direct = g + (i0 + row) * n_b + j0 * p.b + feature,
                    *mirrored = g + j0 * n_b + (i0 + row) * p.b + feature;
#pragma unroll 4
            for (int j = 0; j < kStep; ++j)
                weights[(j * height + row) * kFeatures + threadIdx.x % kFeatures] =
                    inside && j < end - j0 ? get(direct + j * p.b) + get(mirrored + j * n_b) : A(0);
        }
#pragma unroll 1
        for (int k = threadIdx.x; k < kStep * kFeatures * width; k += kThreads) {
            int c = k % width, feature = k / width % kFeatures, j = k / width / kFeatures;
            values[(j * width + c) * kPadded + feature] = value(p, m, j0 + j, b0 + feature, own + c);
        }
        __syncthreads();
        for (int j = 0; j < kStep && j < end - j0; ++j) {
            const A* weight_j = weights + (j * height + first_row) * kFeatures + lane;
            const A* values_j = values + (j * width + first_dim) * kPadded + lane % kFeatures;
            A weight[kRows];
#pragma unroll
            for (int r = 0; r < kRows; ++r) weight[r] = weight_j[r * kWarp];
#pragma unroll
            for (int c = 0; c < kDims; ++c) {
                A y = values_j[c * kPadded];
#pragma unroll
                for (int r = 0; r < kRows; ++r) grad[r][c] += weight[r] * sign(x[r][c] - y);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < kDims; ++c) {
            index_t row = i + r * kSamples, dim = own + first_dim + c, at = (row * p.b + b) * p.c + dim;
            if (row >= p.n || b >= p.b || dim >= p.c) continue;
            if (parts)
                parts[part * p.n * p.b * p.c + at] = grad[r][c];
            else
                put(grad_m + at, grad[r][c]);
        }
    }
}
#endif

#if PASS == 0
extern "C" __global__ void __launch_bounds__(kThreads)
    distance(const T* m, T* output, index_t n, index_t b, index_t c) {
    run({n, b, c}, nullptr, m, output);
}
#elif PASS == 1
extern "C" __global__ void __launch_bounds__(kThreads)
    distance_tangent(const T* tangent, const T* m, T* output, index_t n, index_t b, index_t c) {
    run({n, b, c}, tangent, m, output);
}
#else
extern "C" __global__ void __launch_bounds__(kThreads, sizeof(A) == 4 ? 2 : 1)
    distance_backward(const T* grad_output, const T* m, T* grad_m, A* parts, index_t n, index_t b, index_t c,
                      index_t part_size, index_t groups, index_t chunks) {
    run({n, b, c}, grad_output, m, grad_m, parts, part_size, static_cast<int>(groups), static_cast<unsigned>(chunks));
}
#endif
