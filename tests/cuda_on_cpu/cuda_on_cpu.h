// CUDA's built-ins for one processor: a block's threads are coroutines, run from barrier to barrier in an order drawn
// anew each time, by thread in a warp and by warp, so that a kernel which counts on an order or lacks a barrier
// computes something else. Shared memory starts as NaN, with poisoned bytes around each array for AddressSanitizer.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define GANKERN_ON_CPU
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

namespace cuda_on_cpu {

struct Index {
    unsigned x, y, z;
};

struct Thread {
    ucontext_t context;
    char* stack;
    Index index;
    enum { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone } state = kReady;
    unsigned warp_mask = 0;
    unsigned shuffles = 0;  // parity tells the buffer
    void* fake_stack = nullptr;
};

constexpr unsigned kWarpSize = 32;
constexpr size_t kStack = 128 << 10, kRedZone = 64;

struct Block {
    std::vector<Thread> threads;
    // Two buffers of one value a lane for each warp: a lane may be one shuffle ahead of those that still read.
    std::vector<std::array<std::array<unsigned long long, kWarpSize>, 2>> lanes;
    std::vector<std::array<std::array<std::array<unsigned, 6>, kWarpSize>, 2>> words;  // the same for factors
    std::map<std::pair<const void*, int>, std::unique_ptr<char[]>> shared;
    std::vector<char> dynamic;
};

inline Block* block;
inline Thread* current;
inline ucontext_t scheduler;
inline Index grid_size, block_size, block_index;
inline void (*entry)(void*);
inline void* entry_arguments;
inline std::mt19937 order;
inline std::vector<std::unique_ptr<char[]>> stacks;  // of the threads, from block to block
#if defined(__SANITIZE_ADDRESS__)
inline void* scheduler_fake_stack;
inline const void* scheduler_bottom;
inline size_t scheduler_size;
#endif

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "cuda_on_cpu: %s\n", what);
    std::abort();
}

inline void yield() {
    Thread* self = current;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(self->state == Thread::kDone ? nullptr : &self->fake_stack, scheduler_bottom,
                                   scheduler_size);
#endif
    swapcontext(&self->context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(self->fake_stack, &scheduler_bottom, &scheduler_size);
#endif
}

inline void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
    entry(entry_arguments);
    current->state = Thread::kDone;
    yield();
}

inline void resume(Thread& thread) {
    current = &thread;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, thread.stack, kStack);
#endif
    swapcontext(&scheduler, &thread.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

// Lets a warp's threads go on that wait for one another and have all arrived.
inline void release_warp(size_t first) {
    auto& threads = block->threads;
    size_t last = std::min(first + kWarpSize, threads.size());
    for (size_t t = first; t < last; ++t) {
        if (threads[t].state != Thread::kAtWarpBarrier) continue;
        unsigned mask = threads[t].warp_mask, arrived = 0;
        for (size_t other = first; other < last; ++other)
            if (threads[other].state == Thread::kAtWarpBarrier && threads[other].warp_mask == mask)
                arrived |= 1u << (other - first);
        unsigned present = last - first == kWarpSize ? mask : mask & ((1u << (last - first)) - 1);
        if ((arrived & mask) != present) continue;
        for (size_t other = first; other < last; ++other)
            if ((mask >> (other - first)) & 1u) threads[other].state = Thread::kReady;
    }
}

inline void run_block(size_t dynamic_shared) {
    Block here;
    block = &here;
    unsigned count = block_size.x * block_size.y * block_size.z;
    here.threads.resize(count);
    here.lanes.resize((count + kWarpSize - 1) / kWarpSize);
    here.words.resize(here.lanes.size());
    while (stacks.size() < count) stacks.emplace_back(new char[kStack]);
    here.dynamic.assign(dynamic_shared, static_cast<char>(0xff));
    for (unsigned t = 0; t < count; ++t) {
        Thread& thread = here.threads[t];
        thread.index = {t % block_size.x, t / block_size.x % block_size.y, t / (block_size.x * block_size.y)};
        thread.stack = stacks[t].get();
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack;
        thread.context.uc_stack.ss_size = kStack;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, run_thread, 0);
    }
    auto in = [&](auto state) { return [state](const Thread& thread) { return thread.state == state; }; };
    auto& threads = here.threads;
    std::vector<size_t> warps, ready;
    unsigned favourite = order();
    for (;;) {
        warps.clear();
        for (size_t first = 0; first < count; first += kWarpSize) {
            auto begin = threads.begin() + first, end = threads.begin() + std::min<size_t>(first + kWarpSize, count);
            if (std::any_of(begin, end, in(Thread::kReady))) warps.push_back(first);
        }
        if (warps.empty()) {
            if (std::all_of(threads.begin(), threads.end(), in(Thread::kDone))) return;
            if (!std::all_of(threads.begin(), threads.end(), in(Thread::kAtBlockBarrier)))
                fail("some threads wait at a barrier that others never reach");
            for (auto& thread : threads) thread.state = Thread::kReady;
            continue;
        }
        // One warp for a while, so that it gets far ahead of another.
        if (order() % 16 == 0) favourite = order();
        size_t first = warps[favourite % warps.size()];
        ready.clear();
        for (size_t t = first; t < std::min<size_t>(first + kWarpSize, count); ++t)
            if (threads[t].state == Thread::kReady) ready.push_back(t);
        std::shuffle(ready.begin(), ready.end(), order);
        for (size_t t : ready) resume(threads[t]);
        release_warp(first);
    }
}

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

template <class... Parameters>
int launch(void (*kernel)(Parameters...), const unsigned* sizes, size_t dynamic_shared, void** args, int count,
           unsigned seed) {
    if (count != static_cast<int>(sizeof...(Parameters))) return sizeof...(Parameters);
    Call<Parameters...> what{kernel, args};
    entry = Call<Parameters...>::enter;
    entry_arguments = &what;
    order.seed(seed);
    grid_size = {sizes[0], sizes[1], sizes[2]};
    block_size = {sizes[3], sizes[4], sizes[5]};
    std::vector<Index> blocks;
    for (unsigned z = 0; z < sizes[2]; ++z)
        for (unsigned y = 0; y < sizes[1]; ++y)
            for (unsigned x = 0; x < sizes[0]; ++x) blocks.push_back({x, y, z});
    std::shuffle(blocks.begin(), blocks.end(), order);
    for (Index index : blocks) {
        block_index = index;
        run_block(dynamic_shared);
    }
    return -1;
}

// The array of one declaration in the block that runs: everyone's first meeting with it makes it.
template <class T>
T* shared_array(const void* declaration, int line, size_t size) {
    auto& bytes = block->shared[{declaration, line}];
    size_t length = size * sizeof(T);
    if (!bytes) {
        bytes.reset(new char[length + 2 * kRedZone]);
        std::memset(bytes.get(), 0xff, length + 2 * kRedZone);
#if defined(__SANITIZE_ADDRESS__)
        __asan_poison_memory_region(bytes.get(), kRedZone);
        __asan_poison_memory_region(bytes.get() + kRedZone + (length + 7) / 8 * 8, kRedZone - 8);
#endif
    }
    return reinterpret_cast<T*>(bytes.get() + kRedZone);
}

inline void wait(decltype(Thread::state) state, unsigned mask = 0) {
    current->state = state;
    current->warp_mask = mask;
    yield();
}

inline unsigned thread_number() {
    return current->index.x + block_size.x * (current->index.y + block_size.y * current->index.z);
}

template <class V>
V shuffle(unsigned mask, V value, unsigned (*source)(unsigned lane, unsigned operand), unsigned operand) {
    static_assert(sizeof(V) <= sizeof(unsigned long long));
    unsigned number = thread_number(), lane = number % kWarpSize;
    if (!((mask >> lane) & 1u)) fail("a thread shuffles that is not in the mask");
    auto& buffer = block->lanes[number / kWarpSize][current->shuffles++ % 2];
    std::memcpy(&buffer[lane], &value, sizeof value);
    wait(Thread::kAtWarpBarrier, mask);
    unsigned from = source(lane, operand);
    if (from < kWarpSize && ((mask >> from) & 1u)) std::memcpy(&value, &buffer[from], sizeof value);
    return value;
}

// d += a * b as matrix units do it, by the layout that device.h tells: PER values of the reduction in a word.
template <int PER, class Value>
void matrix_multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Value value) {
    unsigned number = thread_number(), lane = number % kWarpSize;
    auto& words = block->words[number / kWarpSize][current->shuffles++ % 2];
    std::copy(a, a + 4, words[lane].begin());
    std::copy(b, b + 2, words[lane].begin() + 4);
    wait(Thread::kAtWarpBarrier, 0xffffffffu);
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

#define threadIdx (cuda_on_cpu::current->index)
#define blockIdx (cuda_on_cpu::block_index)
#define blockDim (cuda_on_cpu::block_size)
#define gridDim (cuda_on_cpu::grid_size)
#define GANKERN_SHARED(type, name, size)      \
    static const char name##_declaration = 0; \
    auto* name = cuda_on_cpu::shared_array<type>(&name##_declaration, __LINE__, size)
#define GANKERN_DYNAMIC_SHARED(type, name) auto* name = reinterpret_cast<type*>(cuda_on_cpu::block->dynamic.data())

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::Thread::kAtBlockBarrier); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_on_cpu::wait(cuda_on_cpu::Thread::kAtWarpBarrier, mask); }

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
