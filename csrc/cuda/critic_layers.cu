// Average pooling and what follows a convolution. Bound by bytes: each value is read and written once.
// Compiled with -DSTORAGE=<type>. A block is `across` threads wide and walks along a row each.
#include "device.h"

using T = STORAGE;
using A = Acc<T>;

constexpr int kPack = 16 / sizeof(T);

struct Row {
    index_t number, x, step;
    __device__ explicit Row(index_t across)
        : number(blockIdx.x * (blockDim.x / across) + threadIdx.x / across), x(threadIdx.x % across), step(across) {}
};

// Means over windows that tile the planes; what the last whole window leaves over counts for nothing.
extern "C" __global__ void avg_pool(const T* in, T* out, index_t planes, index_t height, index_t width,
                                    index_t window_height, index_t window_width, index_t across) {
    index_t rows = height / window_height, windows = width / window_width;
    Row row(across);
    if (row.number >= planes * rows) return;
    in += (row.number / rows * height + row.number % rows * window_height) * width;
    for (index_t j = row.x; j < windows; j += row.step) {
        A sum = 0;  // in torch's order
        for (index_t y = 0; y < window_height; ++y)
            for (index_t x = 0; x < window_width; ++x) sum += get(in + y * width + j * window_width + x);
        put(out + row.number * windows + j, sum / static_cast<A>(window_height * window_width));
    }
}

// The windows' gradients, spread over the planes.
extern "C" __global__ void avg_pool_backward(const T* grad, T* out, index_t planes, index_t height, index_t width,
                                             index_t window_height, index_t window_width, index_t across) {
    index_t rows = height / window_height, windows = width / window_width;
    Row row(across);
    if (row.number >= planes * height) return;
    index_t y = row.number % height / window_height;
    grad += (row.number / height * rows + y) * windows;
    for (index_t x = row.x; x < width; x += row.step) {
        index_t j = static_cast<unsigned>(x) / static_cast<unsigned>(window_width);
        bool inside = y < rows && j < windows;
        put(out + row.number * width + x, inside ? get(grad + j) / static_cast<A>(window_height * window_width) : A(0));
    }
}

// Rounded as where the sum is stored before the activation reads it again.
__device__ inline A rounded(A value) {
    T stored;
    put(&stored, value);
    return get(&stored);
}

template <int N>
__device__ inline void bias_act_row(T* values, const T* bias, index_t width, index_t channels, bool last, A slope,
                                    const Row& row) {
    A shift = last ? A(0) : get(bias + row.number % channels);
    for (index_t i = row.x * N; i < width; i += row.step * N) {
        Lanes<T, N> v(values + row.number * width + i);
        for (int k = 0; k < N; ++k) {
            A z = rounded(v.at[k] + (last ? get(bias + i + k) : shift));
            // ReLU as well: a NaN stays, and infinity is not multiplied by zero.
            v.at[k] = slope == 0 ? (z < 0 ? A(0) : z) : (z > 0 ? z : z * slope);
        }
        v.store(values + row.number * width + i);
    }
}

// In place: ReLU or LeakyReLU of values + bias; rows are the planes [samples, channels] or, with the channels last, the
// pixels.
extern "C" __global__ void bias_act(T* values, const T* bias, index_t rows, index_t width, index_t channels,
                                    index_t last, double slope, index_t packed, index_t across) {
    Row row(across);
    if (row.number >= rows) return;
    auto negative = static_cast<A>(slope);
    packed ? bias_act_row<kPack>(values, bias, width, channels, last != 0, negative, row)
           : bias_act_row<1>(values, bias, width, channels, last != 0, negative, row);
}
