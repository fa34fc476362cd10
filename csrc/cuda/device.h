// What the kernels share: storage types, reductions and shared memory. No header is included, so that NVRTC needs none;
// tests put a header of their own in front, which defines the device's built-ins for the CPU (GANKERN_ON_CPU).
#pragma once

#ifndef GANKERN_ON_CPU
// A static array in shared memory.
#define GANKERN_SHARED(type, name, size) __shared__ type name[size]

__device__ inline float half_to_float(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ inline unsigned short float_to_half(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

using index_t = long long;

struct bf16 {
    unsigned short bits;
};
struct half {
    unsigned short bits;
};

// The type that arithmetic on a storage type is done in.
template <class S>
struct AccOf {
    using type = float;
};
template <>
struct AccOf<double> {
    using type = double;
};
template <class S>
using Acc = typename AccOf<S>::type;

__device__ inline float get(const float* p) { return *p; }
__device__ inline double get(const double* p) { return *p; }
__device__ inline float get(const bf16* p) { return __uint_as_float(static_cast<unsigned>(p->bits) << 16); }
__device__ inline float get(const half* p) { return half_to_float(p->bits); }

__device__ inline void put(float* p, float value) { *p = value; }
__device__ inline void put(double* p, double value) { *p = value; }
__device__ inline void put(bf16* p, float value) {
    unsigned bits = __float_as_uint(value);
    // Round to nearest even; a NaN keeps its sign and becomes quiet.
    p->bits = static_cast<unsigned short>(value != value ? (bits >> 16) | 0x40u
                                                         : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
__device__ inline void put(half* p, float value) { p->bits = float_to_half(value); }

// N values that are read and written at once: 16 bytes of a dense array.
template <class S, int N>
struct alignas(sizeof(S) * N) Pack {
    S values[N];
};

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class A>
__device__ inline A warp_sum(A value) {
    for (int lane = kWarp / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(kAllLanes, value, lane);
    return value;
}

// Sum over the block's threads, whose number is a multiple of a warp's; every thread gets it. Deterministic.
template <class A>
__device__ inline A block_sum(A value) {
    GANKERN_SHARED(A, sums, kWarp);
    value = warp_sum(value);
    __syncthreads();  // an earlier call's sums have been read
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
    __syncthreads();
    A lane = threadIdx.x % kWarp < blockDim.x / kWarp ? sums[threadIdx.x % kWarp] : A(0);
    return warp_sum(lane);
}

// Products and sums that the compiler does not contract: they have the bits of one operation after the other.
__device__ inline float mul_rn(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double mul_rn(double a, double b) { return __dmul_rn(a, b); }
__device__ inline float add_rn(float a, float b) { return __fadd_rn(a, b); }
__device__ inline double add_rn(double a, double b) { return __dadd_rn(a, b); }

// One access for a whole pack of 16 bytes.
template <int N, class S>
__device__ inline Pack<S, N> load_pack(const S* p) {
    return *reinterpret_cast<const Pack<S, N>*>(p);
}
template <int N, class S>
__device__ inline void store_pack(S* p, const Pack<S, N>& pack) {
#ifndef GANKERN_ON_CPU
    if constexpr (sizeof pack == 16) {
        // The compiler splits a struct's store into those of its members.
        unsigned raw[4];
        memcpy(raw, &pack, 16);
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(raw[0]), "r"(raw[1]), "r"(raw[2]),
                     "r"(raw[3])
                     : "memory");
        return;
    }
#endif
    *reinterpret_cast<Pack<S, N>*>(p) = pack;
}

// N neighbours in registers, read and written at once: where N is not 1 they are aligned to their size.
template <class S, int N>
struct Lanes {
    Acc<S> at[N];
    __device__ Lanes() {}
    __device__ explicit Lanes(const S* p) {
        auto packed = load_pack<N>(p);
        for (int k = 0; k < N; ++k) at[k] = get(&packed.values[k]);
    }
    __device__ void store(S* p) const {
        Pack<S, N> packed;
        for (int k = 0; k < N; ++k) put(&packed.values[k], at[k]);
        store_pack(p, packed);
    }
};

// d += a * b on a warp's matrix units, 16 rows by 8 columns. With g = lane / 4 and t = lane % 4, a lane holds of d the
// rows g (d[0], d[1]) and g + 8 (d[2], d[3]) of the columns 2t and 2t + 1; of a the rows g (a[0], a[2]) and g + 8
// (a[1], a[3]); of b the column g. Of the reduction, words a[0], a[1] and b[0] hold 2t and 2t + 1 of 16, the others 8
// more; with 32 bits a value, t of 8, and 4 more.
#ifndef GANKERN_ON_CPU
#define GANKERN_MATRIX_MULTIPLY(shape)                                                                   \
    asm("mma.sync.aligned." shape ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                 \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
__device__ inline void matrix_multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], bf16) {
    GANKERN_MATRIX_MULTIPLY("m16n8k16.row.col.f32.bf16.bf16");
}
__device__ inline void matrix_multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], half) {
    GANKERN_MATRIX_MULTIPLY("m16n8k16.row.col.f32.f16.f16");
}
// tf32: values as round_to_tf32 makes them.
__device__ inline void matrix_multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], float) {
    GANKERN_MATRIX_MULTIPLY("m16n8k8.row.col.f32.tf32.tf32");
}
__device__ inline unsigned round_to_tf32(float value) {
    unsigned bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return bits;
}
#else
__device__ inline void matrix_multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], bf16) {
    cuda_on_cpu::matrix_multiply<2>(d, a, b, [](unsigned bits) { return __uint_as_float(bits << 16); });
}
__device__ inline void matrix_multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], half) {
    cuda_on_cpu::matrix_multiply<2>(d, a, b, [](unsigned bits) { return half_to_float(bits & 0xffffu); });
}
__device__ inline void matrix_multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], float) {
    cuda_on_cpu::matrix_multiply<1>(d, a, b, [](unsigned bits) { return __uint_as_float(bits); });
}
__device__ inline unsigned round_to_tf32(float value) { return (__float_as_uint(value) + 0x1000u) & ~0x1fffu; }
#endif
