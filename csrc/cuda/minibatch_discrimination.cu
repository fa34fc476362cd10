// Features of minibatch discrimination and their derivatives. Bound by operations: n * n * b pairs of c elements, each
// pair from both of its sides, so that a block owns its outputs and needs no atomics. An element takes 2 operations
// forward, 7 backward and 9 in the double backward (a comparison counts 2), a pair one exponential: 3.4e9, 12e9 and
// 15e9 for n = 1024, b = 100, c = 16.
//
// A block has one feature of kBlockRows samples i, one lane each (kRows times over), values in registers. All samples j
// pass by in shared memory, shared out to the warps, whose sums are added up at the end in their order.
//
// Compiled with -DSTORAGE=<type> -DPASS=0|1|2 (forward, backward, double backward) -DDIMS=<kernel dims in registers>
// -DROWS=<samples i of a thread> -DWHOLE=0|1: whether the dims in registers are all of c. If not, distances are summed
// over chunks of c, and each block of a backward has one chunk of the gradient for its own.
#include "device.h"

using T = STORAGE;
using A = Acc<T>;

constexpr bool kSums = PASS != 1, kGrads = PASS != 0, kTangents = PASS == 2;
constexpr int kDims = DIMS, kWarps = 4, kThreads = kWarps * kWarp;
// Blocks of a multiprocessor: more would have too few registers.
constexpr int kResident = sizeof(A) == 4 && WHOLE ? (kGrads ? 4 : 6) : 2;
constexpr int kRows = ROWS;
constexpr int kBlockRows = kRows * kWarp;
// Samples j of which a warp sums distances side by side.
constexpr int kGroup = WHOLE ? 1 : (kTangents ? 16 : 32) / sizeof(A);
constexpr int kTile = WHOLE ? 64 : kGroup * kWarps;  // samples j in shared memory
constexpr int kPack = 16 / sizeof(A);
constexpr int kStride = kDims <= 8 ? 8 : 16;  // of a sample in shared memory

static_assert(kDims <= kStride && kThreads % kStride == 0);

constexpr int kTileValues = kTile * kStride * (kTangents ? 2 : 1) + kTile;
constexpr int kSumValues = kWarps * kDims * (kWarp + 1);
constexpr int kShared = ((kTileValues > kSumValues ? kTileValues : kSumValues) + kPack - 1) / kPack;

using Values = Pack<A, kPack>;

struct Problem {
    index_t n, b, c, parts, part_size;  // part_size samples j to a part
    const T *m, *cotangent, *grad_output;
};

// -1, 0 or 1, also 0 for a NaN: the distance carries it on.
__device__ inline A sign(A d) { return copysign(d < 0 || d > 0 ? A(1) : A(0), d); }

// What one block has to do: rows from i0 on against samples [begin, end), of one feature.
struct Task {
    index_t i0, b, chunk, part, begin, end;

    __device__ explicit Task(const Problem& p) {
        // As many blocks as an unsigned counts: 64-bit divisions cost registers.
        auto tiles = static_cast<unsigned>((p.n + kBlockRows - 1) / kBlockRows), features = static_cast<unsigned>(p.b);
        auto parts = static_cast<unsigned>(p.parts);
        unsigned block = blockIdx.x;
        i0 = static_cast<index_t>(block % tiles) * kBlockRows;
        block /= tiles;
        b = block % features;
        block /= features;
        part = block % parts;
        chunk = block / parts;
        begin = part * p.part_size;
        end = begin + p.part_size < p.n ? begin + p.part_size : p.n;
    }
};

// Zero beyond the last sample and dim.
__device__ inline A value(const Problem& p, const T* tensor, index_t b, index_t i, index_t c) {
    return i < p.n && c < p.c ? get(tensor + (i * p.b + b) * p.c + c) : A(0);
}

// This thread's rows.
struct Rows {
    A values[kRows][kDims];
    __device__ void load(const Problem& p, const T* tensor, const Task& task, index_t c0) {
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int c = 0; c < kDims; ++c)
                values[r][c] = value(p, tensor, task.b, task.i0 + r * kWarp + threadIdx.x % kWarp, c0 + c);
    }
};

// One sample of the tile.
struct Column {
    A values[kStride];
    __device__ explicit Column(const A* shared) {
#pragma unroll
        for (int c = 0; c < kStride; c += kPack) {
            auto pack = *reinterpret_cast<const Pack<A, kPack>*>(shared + c);
#pragma unroll
            for (int k = 0; k < kPack; ++k) values[c + k] = pack.values[k];
        }
    }
};

// Samples from j0 on, to shared memory; one feature's values are adjacent. A thread has one dim of several samples.
__device__ inline void stage(const Problem& p, const T* tensor, index_t b, index_t j0, index_t c0, A* tile) {
    const int c = threadIdx.x % kStride, first = threadIdx.x / kStride;
    const bool has = c < kDims && c0 + c < p.c;
    const index_t step = p.b * p.c;
    const T* from = tensor + (j0 + first) * step + b * p.c + c0 + c;
    for (int j = first; j < kTile; j += kThreads / kStride, from += kThreads / kStride * step)
        tile[j * kStride + c] = has && j0 + j < p.n ? get(from) : A(0);
}

// Adds the warps' values up. write(row, c, value) is called for kBlockRows rows of count values.
template <int count, class Write>
__device__ inline void add_warps(A* shared, const A (&values)[kRows][count], const Write& write) {
    int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        __syncthreads();
#pragma unroll
        for (int c = 0; c < count; ++c) shared[(warp * count + c) * (kWarp + 1) + lane] = values[r][c];
        __syncthreads();
        for (int k = threadIdx.x; k < kWarp * count; k += blockDim.x) {
            A sum = 0;
            for (int w = 0; w < kWarps; ++w) sum += shared[(w * count + k % count) * (kWarp + 1) + k / count];
            write(r * kWarp + k / count, k % count, sum);
        }
    }
}

// Where results go: into the parts' own sums if there are several.
struct Output {
    T* tensor;
    A* parts;
    __device__ void write(index_t part, index_t size, index_t at, A value) const {
        if (parts)
            parts[part * size + at] = value;
        else
            put(tensor + at, value);
    }
};

// Sums over j start at self.
__device__ inline void run(const Problem& p, A self, Output sums, Output grads) {
    GANKERN_SHARED(Values, packs, kShared);
    A *shared = packs[0].values, *columns = shared, *tangents = columns + kTile * kStride;
    A* weights = tangents + (kTangents ? kTile * kStride : 0);
    const Task task(p);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const index_t own = task.chunk * kDims;

    Rows x, v;
    A g[kRows], grad[kRows][kDims] = {};
    double sum[kRows] = {};
    if (WHOLE) x.load(p, p.m, task, 0);
    if (WHOLE && kTangents) v.load(p, p.cotangent, task, 0);
    if (kGrads) {
        for (int r = 0; r < kRows; ++r) {
            index_t i = task.i0 + r * kWarp + lane;
            g[r] = i < p.n ? get(p.grad_output + i * p.b + task.b) : A(0);
        }
    }
    auto stage_chunk = [&](index_t j0, index_t c0) {
        __syncthreads();
        stage(p, p.m, task.b, j0, c0, columns);
        if (kTangents) stage(p, p.cotangent, task.b, j0, c0, tangents);
        for (int k = threadIdx.x; kGrads && k < kTile; k += blockDim.x)
            weights[k] = j0 + k < p.n ? get(p.grad_output + (j0 + k) * p.b + task.b) : A(0);
        __syncthreads();
    };
    for (index_t j0 = task.begin; j0 < task.end; j0 += kTile) {
        A tile_sum[kRows] = {};
        const index_t left = task.end - j0;
        if (WHOLE) stage_chunk(j0, 0);
        for (int first = warp; WHOLE ? first < kTile && first < left : first < kWarps; first += kGroup * kWarps) {
            A distance[kGroup][kRows] = {}, change[kGroup][kRows] = {};
            for (index_t c0 = 0; c0 == 0 || (!WHOLE && c0 < p.c); c0 += kDims) {
                if (!WHOLE) stage_chunk(j0, c0);
                if (!WHOLE) x.load(p, p.m, task, c0);
                if (!WHOLE && kTangents) v.load(p, p.cotangent, task, c0);
#pragma unroll
                for (int k = 0; k < kGroup; ++k) {
                    const int j = first + k * kWarps;
                    Column y(columns + j * kStride), u((kTangents ? tangents : columns) + j * kStride);
#pragma unroll
                    for (int r = 0; r < kRows; ++r) {
#pragma unroll
                        for (int c = 0; c < kDims; ++c) {
                            A d = x.values[r][c] - y.values[c];
                            distance[k][r] += fabs(d);
                            if (kTangents) change[k][r] += sign(d) * (v.values[r][c] - u.values[c]);
                        }
                    }
                }
            }
            if (!WHOLE && kGrads) {
                __syncthreads();
                stage(p, p.m, task.b, j0, own, columns);
                __syncthreads();
                x.load(p, p.m, task, own);
            }
#pragma unroll
            for (int k = 0; k < kGroup; ++k) {
                const int j = first + k * kWarps;
                Column y(columns + j * kStride);
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                    // A sample's distance to itself may be inf - inf.
                    bool pair = j < left && j0 + j != task.i0 + r * kWarp + lane;
                    A e = exp(-distance[k][r]);
                    if (kTangents) e *= change[k][r];
                    if (kSums) tile_sum[r] += pair ? e : A(0);
                    if (kGrads) {
                        A weight = pair ? (g[r] + weights[j]) * e : A(0);
#pragma unroll
                        for (int c = 0; c < kDims; ++c) grad[r][c] += weight * sign(x.values[r][c] - y.values[c]);
                    }
                }
            }
        }
        if (kSums)
            for (int r = 0; r < kRows; ++r) sum[r] += tile_sum[r];
    }

    if (kSums && task.chunk == 0) {
        A values[kRows][1];
        for (int r = 0; r < kRows; ++r) values[r][0] = static_cast<A>(sum[r]);
        add_warps(shared, values, [&](int row, int, A value) {
            index_t i = task.i0 + row;
            A total = kTangents ? -value : task.part == 0 ? value + self : value;
            if (i < p.n) sums.write(task.part, p.n * p.b, i * p.b + task.b, total);
        });
    }
    if (kGrads) {
        add_warps(shared, grad, [&](int row, int c, A value) {
            index_t i = task.i0 + row;
            if (i < p.n && own + c < p.c)
                grads.write(task.part, p.n * p.b * p.c, (i * p.b + task.b) * p.c + own + c, kTangents ? value : -value);
        });
    }
}

#if PASS == 0
extern "C" __global__ void __launch_bounds__(kThreads, kResident)
    features(const T* m, T* output, A* parts, index_t n, index_t b, index_t c, index_t part_count, index_t part_size,
             double self) {
    run({n, b, c, part_count, part_size, m, nullptr, nullptr}, static_cast<A>(self), {output, parts},
        {nullptr, nullptr});
}
#elif PASS == 1
extern "C" __global__ void __launch_bounds__(kThreads, kResident)
    features_backward(const T* grad_output, const T* m, T* grad_m, A* parts, index_t n, index_t b, index_t c,
                      index_t part_count, index_t part_size) {
    run({n, b, c, part_count, part_size, m, nullptr, grad_output}, 0, {nullptr, nullptr}, {grad_m, parts});
}
#else
extern "C" __global__ void __launch_bounds__(kThreads, kResident)
    features_double_backward(const T* cotangent, const T* grad_output, const T* m, T* grad_grad_output, A* sum_parts,
                             T* grad_m, A* grad_parts, index_t n, index_t b, index_t c, index_t part_count,
                             index_t part_size) {
    run({n, b, c, part_count, part_size, m, cotangent, grad_output}, 0, {grad_grad_output, sum_parts},
        {grad_m, grad_parts});
}
#endif
