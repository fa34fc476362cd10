#include "gankern/parallel.h"

#include <dlfcn.h>

namespace gankern {
namespace {

// libgomp's entry points, also exported by LLVM's and Intel's OpenMP. Linking libgomp instead would bring a
// second pool of spinning threads beside torch's, which carries its own copy of the library.
struct OpenMp {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
    int (*thread_num)();
    int (*num_threads)();

    OpenMp()
        : parallel(reinterpret_cast<decltype(parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"))),
          thread_num(reinterpret_cast<decltype(thread_num)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"))),
          num_threads(reinterpret_cast<decltype(num_threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"))) {}

    bool usable() const { return parallel && thread_num && num_threads; }
};

const OpenMp& openmp() {
    static const OpenMp runtime;
    return runtime;
}

}  // namespace

void run_on_threads(void (*task)(void*, int, int), void* data, int threads) {
    if (threads <= 1 || !openmp().usable()) {
        for (int i = 0; i < threads; ++i) task(data, i, threads);
        return;
    }
    struct Context {
        void (*task)(void*, int, int);
        void* data;
        int shares;
    } context{task, data, threads};
    openmp().parallel(
        [](void* raw) {
            auto& c = *static_cast<Context*>(raw);
            // The runtime may grant fewer threads than asked for (nested regions, limits).
            for (int i = openmp().thread_num(); i < c.shares; i += openmp().num_threads()) c.task(c.data, i, c.shares);
        },
        &context, static_cast<unsigned>(threads), 0);
}

const char* threading_runtime() { return openmp().usable() ? "openmp" : "serial"; }

}  // namespace gankern
