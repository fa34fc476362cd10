// Vectors in the compiler's own extension: one source for SSE2, AVX2 and AVX-512, by the flags of the translation unit.
// Never wider than the processor's, since compilers take selections over wider ones apart into scalars. Everything
// lives in a namespace named after the instruction set, so that the linker can never merge a function compiled for
// AVX-512 into the baseline build.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "gankern/types.h"

#define GANKERN_INLINE inline __attribute__((always_inline))

namespace gankern {
namespace GANKERN_ISA {

#if defined(__AVX512F__)
#define GANKERN_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define GANKERN_VECTOR_BYTES 32
#else
#define GANKERN_VECTOR_BYTES 16
#endif

template <class A>
struct Simd;

template <>
struct Simd<float> {
    static constexpr int kLanes = GANKERN_VECTOR_BYTES / 4;
    typedef float V __attribute__((vector_size(GANKERN_VECTOR_BYTES)));
    typedef int32_t I __attribute__((vector_size(GANKERN_VECTOR_BYTES)));
    typedef uint32_t U __attribute__((vector_size(GANKERN_VECTOR_BYTES)));
    typedef double Wide __attribute__((vector_size(2 * GANKERN_VECTOR_BYTES)));
};

template <>
struct Simd<double> {
    // At least four, which the tiles of minibatch discrimination count on.
    static constexpr int kBytes = GANKERN_VECTOR_BYTES < 32 ? 32 : GANKERN_VECTOR_BYTES;
    static constexpr int kLanes = kBytes / 8;
    typedef double V __attribute__((vector_size(kBytes)));
    typedef int64_t I __attribute__((vector_size(kBytes)));
    typedef uint64_t U __attribute__((vector_size(kBytes)));
    typedef double Wide __attribute__((vector_size(kBytes)));
};

// The type that arithmetic on a storage type S is done in.
template <class S>
using Acc = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class A>
using Vec = typename Simd<A>::V;

template <class A>
constexpr int kLanes = Simd<A>::kLanes;

template <class To, class From>
GANKERN_INLINE To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To out;
    std::memcpy(&out, &x, sizeof out);
    return out;
}

GANKERN_INLINE float to_acc(float x) { return x; }
GANKERN_INLINE double to_acc(double x) { return x; }
GANKERN_INLINE float to_acc(BFloat16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }

GANKERN_INLINE void from_acc(float x, float* out) { *out = x; }
GANKERN_INLINE void from_acc(double x, double* out) { *out = x; }
GANKERN_INLINE void from_acc(float x, BFloat16* out) {
    auto bits = bits_as<uint32_t>(x);
    // Round to nearest even; a NaN keeps its sign and becomes quiet.
    out->bits = x != x ? static_cast<uint16_t>((bits >> 16) | 0x40u)
                       : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <class A>
GANKERN_INLINE Vec<A> splat(A x) {
    // Not 0 + x, which is another number than x where x is -0, so that compilers keep the addition.
    return x - Vec<A>{};
}

template <class S>
GANKERN_INLINE Vec<Acc<S>> load(const S* p) {
    using A = Acc<S>;
    if constexpr (std::is_same_v<S, BFloat16>) {
        typedef uint16_t H __attribute__((vector_size(GANKERN_VECTOR_BYTES / 2)));
        H half;
        std::memcpy(&half, p, sizeof half);
        auto wide = __builtin_convertvector(half, Simd<float>::U) << 16;
        return bits_as<Vec<A>>(wide);
    } else {
        Vec<A> v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
}

// A vector in the storage type.
template <class S>
GANKERN_INLINE auto narrowed(Vec<Acc<S>> v) {
    if constexpr (std::is_same_v<S, BFloat16>) {
        typedef uint16_t H __attribute__((vector_size(GANKERN_VECTOR_BYTES / 2)));
        auto bits = bits_as<Simd<float>::U>(v);
        Simd<float>::U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        Simd<float>::U quiet = (bits >> 16) | 0x40u;
        Simd<float>::U chosen = (v != v) ? quiet : rounded;
        return __builtin_convertvector(chosen, H);
    } else {
        return v;
    }
}

template <class S>
GANKERN_INLINE void store(S* p, Vec<Acc<S>> v) {
    auto stored = narrowed<S>(v);
    std::memcpy(p, &stored, sizeof stored);
}

// Past the caches, where the processor can: the line is not read before it is written. p is aligned to the vector.
template <class S>
GANKERN_INLINE void store_past_cache(S* p, Vec<Acc<S>> v) {
    auto stored = narrowed<S>(v);
#if defined(__AVX512F__)
    if constexpr (sizeof stored == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)stored);
#endif
#if defined(__AVX2__)
    if constexpr (sizeof stored == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)stored);
#endif
#if defined(__SSE2__)
    if constexpr (sizeof stored == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)stored);
#endif
    std::memcpy(p, &stored, sizeof stored);
}

// Other threads see what store_past_cache wrote before what this thread writes from here on.
GANKERN_INLINE void finish_stores_past_cache() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// The first n lanes from memory, the others equal to fill.
template <class S>
GANKERN_INLINE Vec<Acc<S>> load_part(const S* p, int n, Acc<S> fill) {
    using A = Acc<S>;
    A lanes[kLanes<A>];
    for (int i = 0; i < kLanes<A>; ++i) lanes[i] = fill;
    for (int i = 0; i < n; ++i) lanes[i] = to_acc(p[i]);
    return load(lanes);
}

template <class S>
GANKERN_INLINE void store_part(S* p, int n, Vec<Acc<S>> v) {
    for (int i = 0; i < n; ++i) from_acc(static_cast<Acc<S>>(v[i]), p + i);
}

// n is kLanes in the main loop of for_each_vec, where the branch folds away, and less in its tail.
template <class S>
GANKERN_INLINE Vec<Acc<S>> load(const S* p, int n, Acc<S> fill) {
    return n == kLanes<Acc<S>> ? load(p) : load_part(p, n, fill);
}

template <class S>
GANKERN_INLINE void store(S* p, int n, Vec<Acc<S>> v) {
    if (n == kLanes<Acc<S>>)
        store(p, v);
    else
        store_part(p, n, v);
}

// Calls f(offset, lanes) over [0, size) in steps of one vector.
template <class A, class F>
GANKERN_INLINE void for_each_vec(int64_t size, const F& f) {
    constexpr int n = kLanes<A>;
    int64_t i = 0;
    for (; i + n <= size; i += n) f(i, n);
    if (i < size) f(i, static_cast<int>(size - i));
}

// One double a lane: where short sums in A are gathered.
template <class A>
struct WideSum {
    using Wide = typename Simd<A>::Wide;
    Wide lanes{};

    GANKERN_INLINE void add(Vec<A> v) { lanes += __builtin_convertvector(v, Wide); }
    GANKERN_INLINE double total() const {
        double values[kLanes<A>];
        std::memcpy(values, &lanes, sizeof values);
        // In halves: half the values at a time, where one by one would wait for each addition.
        for (int half = kLanes<A> / 2; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) values[i] += values[i + half];
        return values[0];
    }
};

template <class A>
GANKERN_INLINE Vec<A> abs(Vec<A> v) {
    using U = typename Simd<A>::U;
    U bits = bits_as<U>(v) & (~U{} >> 1);
    return bits_as<Vec<A>>(bits);
}

template <class A>
GANKERN_INLINE Vec<A> sqrt(Vec<A> v) {
    A lanes[kLanes<A>];
    std::memcpy(lanes, &v, sizeof v);
    for (int i = 0; i < kLanes<A>; ++i) lanes[i] = std::sqrt(lanes[i]);
    std::memcpy(&v, lanes, sizeof v);
    return v;
}

// exp by 2^k * p(r), |r| <= ln2/2, with Cephes' expf polynomial: within 2 ulp; 0 below -87, inf above 88.7.
GANKERN_INLINE Vec<float> exp(Vec<float> x) {
    using F = Simd<float>;
    F::V lo = splat(-87.33654f), hi = splat(88.72283f);
    F::V c = (x < lo) ? lo : x;
    c = (c > hi) ? hi : c;
    F::V shifted = c * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    F::V k = shifted - 12582912.0f;
    F::V r = c - k * 0.693359375f;
    r = r + k * 2.12194440e-4f;
    F::V p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    // 2^k in two factors: k reaches 128, one above what a float's exponent can hold.
    F::I exponent = __builtin_convertvector(k, F::I);
    F::I half = exponent >> 1;
    F::I first = (half + 127) << 23, second = (exponent - half + 127) << 23;
    p = p * bits_as<F::V>(first) * bits_as<F::V>(second);
    p = (x < lo) ? F::V{} : p;
    p = (x > hi) ? splat(INFINITY) : p;
    return (x != x) ? x : p;
}

GANKERN_INLINE Vec<double> exp(Vec<double> x) {
    Vec<double> out{};
    for (int i = 0; i < kLanes<double>; ++i) out[i] = std::exp(x[i]);
    return out;
}

// tanh by Cephes' tanhf: an odd polynomial below 0.625, 1 - 2 / (exp(2|x|) + 1) above.
GANKERN_INLINE Vec<float> tanh(Vec<float> x) {
    using F = Simd<float>;
    F::V a = abs<float>(x), z = x * x;
    F::V p = splat(-5.70498872745e-3f);
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    p = p * z * x + x;
    F::V big = 1.0f - 2.0f / (exp(a + a) + 1.0f);
    big = (x < 0.0f) ? -big : big;
    F::V out = (a < 0.625f) ? p : big;
    return (x != x) ? x : out;
}

GANKERN_INLINE Vec<double> tanh(Vec<double> x) {
    Vec<double> out{};
    for (int i = 0; i < kLanes<double>; ++i) out[i] = std::tanh(x[i]);
    return out;
}

}  // namespace GANKERN_ISA
}  // namespace gankern
