// Convolutions, transposed ones and their input gradients as matrix products of a phase's pixels by taps and channels.
// The matrix units bound them where both sides have many channels, else the bytes of the images.
// Compiled with -DSTORAGE=<type> -DTF32=0|1 -DWIDENS=0|1.
#include "conv_problem.h"
#include "matrix_tile.h"

using Left = Tile<kRows, true>;
using Right = Tile<kColumns, !WIDENS>;

// A thread writes one pack of channels of every kGroups-th row.
constexpr int kPacks = kColumns / kPack, kGroups = kThreads / kPacks;
constexpr int kStaged = kRows / 2, kStride = kColumns + 4;
constexpr int kShared = 2 * (Left::kVectors + Right::kVectors);
static_assert(kStaged * kStride * sizeof(A) <= kShared * sizeof(Vector));
static_assert(2 * kGroups * kColumns * sizeof(A) <= kShared * sizeof(Vector));

// A place in the sum over taps and channels.
struct Walk {
    int c, i, j;
    __device__ Walk(int k, int channels, int taps_w) : c(k), i(0), j(0) { step(0, channels, taps_w); }
    __device__ void step(int by, int channels, int taps_w) {
        c += by;
        while (c >= channels) {
            c -= channels;
            if (++j == taps_w) {
                j = 0;
                ++i;
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    conv(const T* source, const T* weight, T* result, const A* scale, const A* shift, const T* activated,
         double* sums_out, double slope, index_t activation, index_t packed_source, index_t packed_result,
         GANKERN_PROBLEM) {
    const Problem p = GANKERN_THE_PROBLEM;
    // Neighbours share the images: channels vary fastest, then phases.
    int blocks = (p.result_c + kColumns - 1) / kColumns, phases = p.h.result_step * p.w.result_step;
    int tile = blockIdx.x / blocks, n0 = blockIdx.x % blocks * kColumns;
    const Phase h(p.h, tile % phases / p.w.result_step), w(p.w, tile % phases % p.w.result_step);
    int m0 = tile / phases * kRows;

    GANKERN_SHARED(index_t, places, kRows);
    if (threadIdx.x < kRows) {
        Pixel pixel(p, h, w, m0 + threadIdx.x);
        places[threadIdx.x] = pixel.inside ? pixel.to : -1;
    }
    index_t from[Left::kPerThread];
    int y[Left::kPerThread], x[Left::kPerThread];
#pragma unroll
    for (int i = 0; i < Left::kPerThread; ++i) {
        Pixel pixel(p, h, w, m0 + Left::line(i));
        from[i] = pixel.from;
        y[i] = pixel.inside ? pixel.y : -(1 << 30);  // of no image
        x[i] = pixel.x;
    }

    auto sees = [&](int i, const Walk& at) {
        return at.i < h.taps && static_cast<unsigned>(y[i] + at.i * p.h.reach) < static_cast<unsigned>(p.h.source) &&
               static_cast<unsigned>(x[i] + at.j * p.w.reach) < static_cast<unsigned>(p.w.source);
    };
    auto seen = [&](int i, const Walk& at) {
        return source + from[i] +
               (static_cast<index_t>(at.i) * p.h.reach * p.w.source + at.j * p.w.reach) * p.source_c + at.c;
    };
    auto factor = [&](int n, const Walk& at) {
        int tap = (h.first + at.i * p.h.tap_step) * p.w.kernel + w.first + at.j * p.w.tap_step;
        int taps = p.h.kernel * p.w.kernel;
        return weight + (WIDENS ? (at.c * taps + tap) * p.result_c + n : (n * taps + tap) * p.source_c + at.c);
    };

    int steps = w.taps == 0 ? 0 : (h.taps * w.taps * p.source_c + kDepth - 1) / kDepth;
    Walk left_walk(steps ? Left::first() : 0, p.source_c, w.taps);
    Walk right_walks[] = {Walk(steps && WIDENS ? Right::line(0) : 0, p.source_c, w.taps),
                          Walk(steps && WIDENS ? Right::line(1) : 0, p.source_c, w.taps)};
    static_assert(Right::kPerThread == 2);
    auto load = [&](Vector(&left)[Left::kPerThread], Vector(&right)[Right::kPerThread]) {
#pragma unroll
        for (int i = 0; i < Left::kPerThread; ++i) {
            if (packed_source) {
                left[i] = read(seen(i, left_walk), sees(i, left_walk));
                continue;
            }
            left[i] = Vector{};
            Walk at = left_walk;
#pragma unroll
            for (int e = 0; e < kPack; ++e, at.step(1, p.source_c, w.taps))
                if (sees(i, at)) left[i].values[e] = *seen(i, at);
        }
#pragma unroll
        for (int i = 0; i < Right::kPerThread; ++i) {
            int n = n0 + (WIDENS ? Right::first() : Right::line(i));
            Walk at = WIDENS ? right_walks[i] : left_walk;
            if (WIDENS ? packed_result : packed_source) {
                right[i] = read(factor(n, at), at.i < h.taps && n < p.result_c);
            } else {
                right[i] = Vector{};
#pragma unroll
                for (int e = 0; e < kPack; ++e) {
                    if (at.i < h.taps && n < p.result_c) right[i].values[e] = *factor(n, at);
                    if (WIDENS)
                        ++n;
                    else
                        at.step(1, p.source_c, w.taps);
                }
            }
            if (WIDENS) right_walks[i].step(kDepth, p.source_c, w.taps);
        }
        left_walk.step(kDepth, p.source_c, w.taps);
    };
    GANKERN_SHARED(Vector, memory, kShared);
    Sums<kUnits> sums;
    multiply_tiles<Left, Right>(sums, memory, steps, load);

    // Half of the rows at a time go through shared memory, so that packs of neighbours go to memory.
    A* staged = reinterpret_cast<A*>(memory);
    // Sums of squares are of the difference to the tile's first row: they lose no digits to a large mean.
    GANKERN_SHARED(A, base, kColumns);
    int n = threadIdx.x % kPacks * kPack, left = p.result_c - n0 - n;  // channels from the thread's first one on
    A below = static_cast<A>(slope), total[kPack] = {}, squares[kPack] = {};
    for (int first = 0; first < kRows; first += kStaged) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < Sums<kUnits>::kThreadRows; ++i) {
            int row = sums.row(i) - first;
            if (row < 0 || row >= kStaged) continue;
#pragma unroll
            for (int j = 0; j < Sums<kUnits>::kThreadColumns; ++j) {
                staged[row * kStride + sums.column(j)] = sums.at(i, j);
                if (first + row == 0) base[sums.column(j)] = sums.at(i, j);
            }
        }
        __syncthreads();
#pragma unroll 1
        for (int row = threadIdx.x / kPacks; row < kStaged; row += kGroups) {
            index_t to = places[first + row] + n0 + n;
            if (places[first + row] < 0) continue;
            Vector out;
#pragma unroll
            for (int e = 0; e < kPack; ++e) {
                if (e >= left) continue;
                A z = staged[row * kStride + n + e];
                A off = z - base[n + e];
                total[e] += off;
                squares[e] += off * off;
                if (scale) z *= scale[n0 + n + e];
                if (shift) z += shift[n0 + n + e];
                z = activated ? activate_backward(z, get(activated + to + e), int(activation), below)
                              : activate(z, int(activation), below);
                put(&out.values[e], z);
                if (!packed_result) result[to + e] = out.values[e];
            }
            if (packed_result && left > 0) *reinterpret_cast<Vector*>(result + to) = out;
        }
    }
    if (!sums_out) return;
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
        staged[threadIdx.x / kPacks * kColumns + n + e] = total[e];
        staged[(kGroups + threadIdx.x / kPacks) * kColumns + n + e] = squares[e];
    }
    __syncthreads();
    int column = threadIdx.x, channel = n0 + column;
    if (column >= kColumns || channel >= p.result_c) return;
    double first = 0, second = 0;
    for (int group = 0; group < kGroups; ++group) {
        first += staged[group * kColumns + column];
        second += staged[(kGroups + group) * kColumns + column];
    }
    int rows = p.images * h.grid * w.grid - m0;
    double count = rows < 0 ? 0 : rows < kRows ? rows : kRows;
    double from_zero = static_cast<double>(base[column]) + (shift ? shift[channel] : A(0));
    double* out = sums_out + static_cast<index_t>(tile) * 2 * p.result_c + channel;
    out[0] = first + count * from_zero;
    out[p.result_c] = second + from_zero * (2 * first + count * from_zero);
}
