// A block's threads are coroutines, run from barrier to barrier in an order drawn anew each time, by thread in a warp
// and by warp, so that a kernel which counts on an order or lacks a barrier computes something else. Shared memory
// starts as NaN, with poisoned bytes around each array for AddressSanitizer.
#include "runtime.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {

Index grid_size, block_size, block_index, thread_index;

namespace {

struct Thread {
    ucontext_t context;
    char* stack;
    Index index;
    enum State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone } state = kReady;
    unsigned warp_mask = 0;
    unsigned shuffles = 0;  // parity tells the buffer
    void* fake_stack = nullptr;
};

constexpr size_t kStack = 128 << 10, kRedZone = 64;

struct Block {
    std::vector<Thread> threads;
    // Two buffers of one value a lane for each warp: a lane may be one shuffle ahead of those that still read.
    std::vector<std::array<std::array<unsigned long long, kWarpSize>, 2>> lanes;
    std::vector<std::array<Words, 2>> words;  // the same for factors
    std::map<std::pair<const void*, int>, std::unique_ptr<char[]>> shared;
    std::vector<char> dynamic;
};

Block* block;
Thread* current;
ucontext_t scheduler;
void (*entry)(void*);
void* entry_arguments;
std::mt19937 order;
std::vector<std::unique_ptr<char[]>> stacks;  // of the threads, from block to block
#if defined(__SANITIZE_ADDRESS__)
void* scheduler_fake_stack;
const void* scheduler_bottom;
size_t scheduler_size;
#endif

void yield() {
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

void wait(Thread::State state, unsigned mask = 0) {
    current->state = state;
    current->warp_mask = mask;
    yield();
}

void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
    entry(entry_arguments);
    wait(Thread::kDone);
}

void resume(Thread& thread) {
    current = &thread;
    thread_index = thread.index;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, thread.stack, kStack);
#endif
    swapcontext(&scheduler, &thread.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

// Lets a warp's threads go on that wait for one another and have all arrived.
void release_warp(size_t first) {
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

void run_block(size_t dynamic_shared) {
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

}  // namespace

void fail(const char* what) {
    std::fprintf(stderr, "cuda_on_cpu: %s\n", what);
    std::abort();
}

unsigned thread_number() { return thread_index.x + block_size.x * (thread_index.y + block_size.y * thread_index.z); }

void block_barrier() { wait(Thread::kAtBlockBarrier); }

void warp_barrier(unsigned mask) { wait(Thread::kAtWarpBarrier, mask); }

void* shared_array(const void* declaration, int line, size_t size) {
    auto& bytes = block->shared[{declaration, line}];
    if (!bytes) {
        bytes.reset(new char[size + 2 * kRedZone]);
        std::memset(bytes.get(), 0xff, size + 2 * kRedZone);
#if defined(__SANITIZE_ADDRESS__)
        __asan_poison_memory_region(bytes.get(), kRedZone);
        __asan_poison_memory_region(bytes.get() + kRedZone + (size + 7) / 8 * 8, kRedZone - 8);
#endif
    }
    return bytes.get() + kRedZone;
}

void* dynamic_shared() { return block->dynamic.data(); }

unsigned long long shuffle(unsigned mask, unsigned long long value, Source source, unsigned operand) {
    unsigned number = thread_number(), lane = number % kWarpSize;
    if (!((mask >> lane) & 1u)) fail("a thread shuffles that is not in the mask");
    auto& buffer = block->lanes[number / kWarpSize][current->shuffles++ % 2];
    buffer[lane] = value;
    warp_barrier(mask);
    unsigned from = source(lane, operand);
    return from < kWarpSize && ((mask >> from) & 1u) ? buffer[from] : value;
}

const Words& exchange(const unsigned (&left)[4], const unsigned (&right)[2]) {
    unsigned number = thread_number(), lane = number % kWarpSize;
    Words& words = block->words[number / kWarpSize][current->shuffles++ % 2];
    std::copy(left, left + 4, words[lane].begin());
    std::copy(right, right + 2, words[lane].begin() + 4);
    warp_barrier(0xffffffffu);
    return words;
}

void run(void (*function)(void*), void* arguments, const unsigned* sizes, size_t dynamic_shared, unsigned seed) {
    entry = function;
    entry_arguments = arguments;
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
}

}  // namespace cuda_on_cpu
