// CUDA's built-ins for one processor: what a kernel needs to be compiled by g++ and run by runtime.cpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "runtime.h"

#define GANKERN_ON_CPU
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __grid_constant__

namespace cuda_on_cpu {

template <class... Parameters>
struct Call {
    void (*kernel)(Parameters...);
    void** args;
    template <size_t... I>
    void run(std::index_sequence<I...>) {
        kernel(*static_cast<std::remove_const_t<Parameters>*>(args[I])...);
    }
    static void enter(void* self) { static_cast<Call*>(self)->run(std::index_sequence_for<Parameters...>{}); }
};

// -1, or the number of arguments that the kernel takes where another number was given.
template <class... Parameters>
int launch(void (*kernel)(Parameters...), const unsigned* sizes, size_t dynamic_shared, void** args, int count,
           unsigned seed) {
    if (count != static_cast<int>(sizeof...(Parameters))) return sizeof...(Parameters);
    Call<Parameters...> what{kernel, args};
    run(what.enter, &what, sizes, dynamic_shared, seed);
    return -1;
}

template <class V>
V shuffle(unsigned mask, V value, Source source, unsigned operand) {
    unsigned long long bits = 0;
    static_assert(sizeof value <= sizeof bits);
    std::memcpy(&bits, &value, sizeof value);
    bits = shuffle(mask, bits, source, operand);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// d += a * b as matrix units do it, by the layout that device.h tells: PER values of the reduction in a word.
template <int PER, class Value>
void matrix_multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Value value) {
    const Words& words = exchange(a, b);
    unsigned lane = thread_number() % kWarpSize;
    for (unsigned i = 0; i < 4; ++i) {
        unsigned row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
        for (unsigned k = 0; k < 8 * PER; ++k) {
            unsigned word = k / PER, shift = k % PER * 16;
            unsigned left = words[row % 8 * 4 + word % 4][row / 8 + word / 4 * 2];
            unsigned right = words[column * 4 + word % 4][4 + word / 4];
            d[i] += value(left >> shift) * value(right >> shift);
        }
    }
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::thread_index)
#define blockIdx (cuda_on_cpu::block_index)
#define blockDim (cuda_on_cpu::block_size)
#define gridDim (cuda_on_cpu::grid_size)
#define GANKERN_SHARED(type, name, size)      \
    static const char name##_declaration = 0; \
    auto* name = static_cast<type*>(cuda_on_cpu::shared_array(&name##_declaration, __LINE__, sizeof(type) * (size)))
#define GANKERN_DYNAMIC_SHARED(type, name) auto* name = static_cast<type*>(cuda_on_cpu::dynamic_shared())

inline void __syncthreads() { cuda_on_cpu::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_on_cpu::warp_barrier(mask); }

template <class V>
V __shfl_xor_sync(unsigned mask, V value, int lanes) {
    return cuda_on_cpu::shuffle(mask, value, [](unsigned lane, unsigned x) { return lane ^ x; }, unsigned(lanes));
}
template <class V>
V __shfl_down_sync(unsigned mask, V value, unsigned lanes) {
    return cuda_on_cpu::shuffle(mask, value, [](unsigned lane, unsigned x) { return lane + x; }, lanes);
}
template <class V>
V __shfl_sync(unsigned mask, V value, int from) {
    return cuda_on_cpu::shuffle(mask, value, [](unsigned, unsigned x) { return x; }, unsigned(from));
}

template <class V>
V atomicAdd(V* p, V value) {
    V before = *p;
    *p = before + value;
    return before;
}

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float half_to_float(unsigned short bits) {
    _Float16 value;
    std::memcpy(&value, &bits, sizeof value);
    return static_cast<float>(value);
}
inline unsigned short float_to_half(float value) {
    auto narrow = static_cast<_Float16>(value);
    unsigned short bits;
    std::memcpy(&bits, &narrow, sizeof bits);
    return bits;
}
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
using std::copysign;
using std::exp;
using std::fabs;
using std::sqrt;
// Compiled with -ffp-contract=off.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
using std::tanh;
