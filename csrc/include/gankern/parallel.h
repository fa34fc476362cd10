// Fork-join over the OpenMP runtime that torch has loaded: one pool of threads in the process, torch's.
#pragma once

#include <atomic>
#include <cstdint>

namespace gankern {

// Runs task(data, i, threads) for i in [0, threads) at once; serially where no OpenMP runtime is loaded.
void run_on_threads(void (*task)(void* data, int index, int threads), void* data, int threads);

// Name of the runtime that run_on_threads uses: "openmp" or "serial".
const char* threading_runtime();

// Calls body(begin, end) on contiguous shares of [0, items). What body computes for an item must not depend
// on its share, so that results have the same bits for every thread count.
template <class Body>
void parallel_for(int64_t items, int threads, const Body& body) {
    if (items < threads) threads = static_cast<int>(items);
    if (threads <= 1) {
        if (items > 0) body(int64_t{0}, items);
        return;
    }
    struct Context {
        const Body& body;
        int64_t items;
    } context{body, items};
    run_on_threads(
        [](void* data, int index, int count) {
            auto& c = *static_cast<Context*>(data);
            c.body(c.items * index / count, c.items * (index + 1) / count);
        },
        &context, threads);
}

// Calls body(thread, item) for every item once, each by the first thread that is free: where a core is slower or taken
// for a while, the others do its share. At most `threads` values of thread.
template <class Body>
void parallel_for_each(int64_t items, int threads, const Body& body) {
    struct Context {
        const Body& body;
        int64_t items;
        std::atomic<int64_t> next;
    } context{body, items, {0}};
    run_on_threads(
        [](void* data, int index, int) {
            auto& c = *static_cast<Context*>(data);
            for (int64_t item; (item = c.next.fetch_add(1, std::memory_order_relaxed)) < c.items;) c.body(index, item);
        },
        &context, items < threads ? static_cast<int>(items) : threads);
}

}  // namespace gankern
