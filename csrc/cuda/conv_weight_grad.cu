// Weight gradient of convolutions, transposed or not, as matrix products of channels by pixels by taps and channels.
// The matrix units bound it where both sides have many channels, else the bytes of the images.
// Compiled with -DSTORAGE=<type> -DTF32=0|1.
#include "matrix_tile.h"

using Left = Tile<kRows, false>;
using Right = Tile<kColumns, false>;

// Block (tile, part) sums up a part's pixels: into the weight's gradient, or where there are parts, into one of them.
extern "C" __global__ void __launch_bounds__(kThreads)
    conv_weight_grad(const T* narrow, const T* wide, T* grad_weight, A* parts, index_t share, index_t packed_narrow,
                     index_t packed_wide, index_t images, index_t narrow_h, index_t narrow_w, index_t narrow_channels,
                     index_t wide_h, index_t wide_w, index_t wide_channels, index_t kernel_h, index_t kernel_w,
                     index_t stride_h, index_t stride_w, index_t padding_h, index_t padding_w, index_t dilation_h,
                     index_t dilation_w) {
    int narrow_c = int(narrow_channels), wide_c = int(wide_channels), kernel = int(kernel_w);
    int height = int(narrow_h), width = int(narrow_w), columns = int(kernel_h) * kernel * wide_c;
    int blocks = (columns + kColumns - 1) / kColumns, m0 = blockIdx.x / blocks * kRows;
    int m = m0 + Left::first(), n0 = blockIdx.x % blocks * kColumns, n = n0 + Right::first();
    int pixels = int(images) * height * width, begin = blockIdx.y * int(share);
    int end = begin + int(share) < pixels ? begin + int(share) : pixels;

    int pixel = begin;  // the first of those that are loaded
    auto sees = [&](int y, int x, int column) {
        int down = column / wide_c / kernel * int(dilation_h) - int(padding_h);
        int right = column / wide_c % kernel * int(dilation_w) - int(padding_w);
        return column < columns && static_cast<unsigned>(y + down) < static_cast<unsigned>(wide_h) &&
               static_cast<unsigned>(x + right) < static_cast<unsigned>(wide_w);
    };
    auto offset = [&](int column) {
        int down = column / wide_c / kernel * int(dilation_h) - int(padding_h);
        int right = column / wide_c % kernel * int(dilation_w) - int(padding_w);
        return (static_cast<index_t>(down) * wide_w + right) * wide_c + column % wide_c;
    };
    auto load = [&](Vector(&left)[Left::kPerThread], Vector(&right)[Right::kPerThread]) {
#pragma unroll
        for (int i = 0; i < Left::kPerThread; ++i) {
            int at = pixel + Left::line(i);
            const T* from = narrow + static_cast<index_t>(at) * narrow_c + m;
            if (packed_narrow) {
                left[i] = read(from, at < end && m < narrow_c);
                continue;
            }
            left[i] = Vector{};
#pragma unroll
            for (int e = 0; e < kPack; ++e)
                if (at < end && m + e < narrow_c) left[i].values[e] = from[e];
        }
#pragma unroll
        for (int i = 0; i < Right::kPerThread; ++i) {
            int at = pixel + Right::line(i), line = at / width;
            int y = line % height * int(stride_h), x = at % width * int(stride_w);
            const T* from = wide + ((line / height * wide_h + y) * wide_w + x) * wide_c;
            if (packed_wide) {
                right[i] = read(from + offset(n), at < end && sees(y, x, n));
                continue;
            }
            right[i] = Vector{};
#pragma unroll
            for (int e = 0; e < kPack; ++e)
                if (at < end && sees(y, x, n + e)) right[i].values[e] = from[offset(n + e)];
        }
        pixel += kDepth;
    };
    Sums<kUnits> sums;
    GANKERN_SHARED(Vector, memory, 2 * (Left::kVectors + Right::kVectors));
    multiply_tiles<Left, Right>(sums, memory, (end - begin + kDepth - 1) / kDepth, load);

    index_t part = static_cast<index_t>(blockIdx.y) * narrow_c * columns;
#pragma unroll
    for (int i = 0; i < Sums<kUnits>::kThreadRows; ++i) {
        int row = m0 + sums.row(i);
        if (row >= narrow_c) continue;
#pragma unroll
        for (int j = 0; j < Sums<kUnits>::kThreadColumns; ++j) {
            int column = n0 + sums.column(j);
            if (column >= columns) continue;
            index_t to = static_cast<index_t>(row) * columns + column;
            if (parts)
                parts[part + to] = sums.at(i, j);
            else
                put(grad_weight + to, sums.at(i, j));
        }
    }
}

extern "C" __global__ void sum_parts(const A* parts, T* grad_weight, index_t count, index_t size) {
    index_t i = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= size) return;
    A total = 0;
    for (index_t part = 0; part < count; ++part) total += parts[part * size + i];
    put(grad_weight + i, total);
}
