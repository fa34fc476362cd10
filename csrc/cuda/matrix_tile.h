// Products of two tiles in shared memory by a block of 128 threads: of bfloat16, half and, with -DTF32=1, float on the
// matrix units, else by multiply-adds. Compiled with -DSTORAGE=<type> -DTF32=0|1.
#pragma once

#include "device.h"

using T = STORAGE;
using A = Acc<T>;

constexpr int kThreads = 128;
constexpr int kPack = 16 / sizeof(T);
constexpr int kDepth = 4 * kPack;  // of the reduction at a time
constexpr int kRows = sizeof(T) == 8 ? 64 : 128;
constexpr int kColumns = 64;
constexpr bool kUnits = sizeof(T) == 2 || TF32;

using Vector = Pack<T, kPack>;

// R rows of kDepth values: either these lie side by side (DEEP), or the rows' values of one place in the reduction do.
// What is between keeps a warp's reads of a product in different banks.
template <int R, bool DEEP>
struct Tile {
    static constexpr int kStride = DEEP ? kDepth + kPack : R + 8;
    static constexpr int kVectors = (DEEP ? R : kDepth) * kStride / kPack;
    static constexpr int kPerLine = (DEEP ? kDepth : R) / kPack;  // packs
    static constexpr int kPerThread = R * kDepth / kPack / kThreads;
    Vector* vectors;

    // Place of the thread's packs: line and first value, which is the same for all.
    static __device__ int line(int i) { return (threadIdx.x + i * kThreads) / kPerLine; }
    static __device__ int first() { return threadIdx.x % kPerLine * kPack; }
    __device__ void store(const Vector (&packs)[kPerThread]) const {
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) vectors[(line(i) * kStride + first()) / kPack] = packs[i];
    }

    __device__ const T* at(int row, int k) const {
        return reinterpret_cast<const T*>(vectors) + (DEEP ? row * kStride + k : k * kStride + row);
    }
    // What matrix units take: one value, or two neighbours in the reduction.
    __device__ unsigned word(int row, int k, const bf16*) const { return pair(row, k); }
    __device__ unsigned word(int row, int k, const half*) const { return pair(row, k); }
    __device__ unsigned word(int row, int k, const float*) const { return round_to_tf32(get(at(row, k))); }
    __device__ unsigned pair(int row, int k) const {
        if (DEEP) return *reinterpret_cast<const unsigned*>(at(row, k));
        return at(row, k)->bits | static_cast<unsigned>(at(row, k + 1)->bits) << 16;
    }
};

// A thread's part of the product: kThreadRows x kThreadColumns values.
template <bool UNITS>
struct Sums;

// Warps are 2 x 2, of 64 x 32 values each.
template <>
struct Sums<true> {
    static constexpr int kThreadRows = 8, kThreadColumns = 8;
    float d[4][4][4];

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < 64; ++i) d[i / 16][i / 4 % 4][i % 4] = 0;
    }
    __device__ static int warp_row() { return threadIdx.x / 64 * 64 + threadIdx.x % 32 / 4; }
    __device__ static int warp_column() { return threadIdx.x / 32 % 2 * 32; }
    __device__ static int row(int i) { return warp_row() + 8 * i; }
    __device__ static int column(int j) { return warp_column() + j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2; }
    __device__ float at(int i, int j) const { return d[i / 2][j / 2][i % 2 * 2 + j % 2]; }

    template <class Left, class Right>
    __device__ void multiply(const Left& left, const Right& right) {
        constexpr int kWord = 4 / sizeof(T);
        const T* kind = nullptr;
#pragma unroll
        for (int k0 = 0; k0 < kDepth; k0 += 8 * kWord) {
            int k = k0 + threadIdx.x % 4 * kWord;
            unsigned b[4][2];
#pragma unroll
            for (int j = 0; j < 8; ++j)
                b[j / 2][j % 2] =
                    right.word(warp_column() + j / 2 * 8 + threadIdx.x % 32 / 4, k + j % 2 * 4 * kWord, kind);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                unsigned a[4];
#pragma unroll
                for (int r = 0; r < 4; ++r)
                    a[r] = left.word(warp_row() + 16 * i + r % 2 * 8, k + r / 2 * 4 * kWord, kind);
#pragma unroll
                for (int j = 0; j < 4; ++j) matrix_multiply(d[i][j], a, b[j], T());
            }
        }
    }
};

template <>
struct Sums<false> {
    static constexpr int kThreadRows = kRows / 16, kThreadColumns = 8;
    A d[kThreadRows][kThreadColumns];

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < kThreadRows * kThreadColumns; ++i) d[i / kThreadColumns][i % kThreadColumns] = 0;
    }
    __device__ static int row(int i) { return threadIdx.x / 8 + 16 * i; }
    __device__ static int column(int j) { return threadIdx.x % 8 + 8 * j; }
    __device__ A at(int i, int j) const { return d[i][j]; }

    template <class Left, class Right>
    __device__ void multiply(const Left& left, const Right& right) {
#pragma unroll 4
        for (int k = 0; k < kDepth; ++k) {
            A a[kThreadRows], b[kThreadColumns];
#pragma unroll
            for (int i = 0; i < kThreadRows; ++i) a[i] = get(left.at(row(i), k));
#pragma unroll
            for (int j = 0; j < kThreadColumns; ++j) b[j] = get(right.at(column(j), k));
#pragma unroll
            for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
                for (int j = 0; j < kThreadColumns; ++j) d[i][j] += a[i] * b[j];
        }
    }
};

// Sum over `steps` pieces of the reduction, of which load(i) reads the next ones into the two arrays of packs: those
// are on their way while the tiles before are multiplied. Of shared memory it takes 2 * (Left + Right)::kVectors.
template <class Left, class Right, class Load>
__device__ inline void multiply_tiles(Sums<kUnits>& sums, Vector* memory, int steps, const Load& load) {
    Vector *left = memory, *right = memory + 2 * Left::kVectors;
    Vector next_left[Left::kPerThread], next_right[Right::kPerThread];
    sums.clear();
    for (int step = 0; step <= steps; ++step) {
        if (step < steps) load(next_left, next_right);
        int last = (step + 1) % 2, now = step % 2;
        if (step > 0) sums.multiply(Left{left + last * Left::kVectors}, Right{right + last * Right::kVectors});
        if (step < steps) {
            Left{left + now * Left::kVectors}.store(next_left);
            Right{right + now * Right::kVectors}.store(next_right);
        }
        __syncthreads();
    }
}

// A pack's values, or zeros where there are none.
__device__ inline Vector read(const T* from, bool inside) {
    return inside ? *reinterpret_cast<const Vector*>(from) : Vector{};
}
