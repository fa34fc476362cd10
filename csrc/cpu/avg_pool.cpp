// Bound by memory: rows pass through a buffer that stays in cache. The means have the bits of stock's.
#include "gankern/avg_pool.h"

#include <algorithm>
#include <vector>

#include "gankern/parallel.h"
#include "kernels.h"
#include "vec.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

// Adds one row of each window to its sum, in stock's order. A width of two known to the compiler becomes vector code.
template <class A>
GANKERN_INLINE void add_columns(const A* row, int64_t windows, int64_t width, A* sums) {
    for (int64_t j = 0; j < windows; ++j) {
        A sum = sums[j];
        for (int64_t k = 0; k < width; ++k) sum += row[j * width + k];
        sums[j] = sum;
    }
}

template <class A>
GANKERN_INLINE void spread_columns(const A* in, int64_t windows, int64_t width, A scale, A* row) {
    for (int64_t j = 0; j < windows; ++j)
        for (int64_t k = 0; k < width; ++k) row[j * width + k] = in[j] * scale;
}

template <class S>
void forward(const AvgPool& a) {
    using A = Acc<S>;
    const int64_t rows = a.height / a.kernel_height, windows = a.width / a.kernel_width, kw = a.kernel_width;
    const A count = static_cast<A>(a.kernel_height * kw);
    parallel_for(a.planes * rows, a.threads, [&](int64_t begin, int64_t end) {
        std::vector<A> values(a.width), sums(windows);
        for (int64_t row = begin; row < end; ++row) {
            auto* x = static_cast<const S*>(a.from) + (row / rows * a.height + row % rows * a.kernel_height) * a.width;
            auto* y = static_cast<S*>(a.to) + row * windows;
            std::fill(sums.begin(), sums.end(), A(0));
            for (int64_t k = 0; k < a.kernel_height; ++k) {
                for_each_vec<A>(windows * kw, [&](int64_t i, int lanes) {
                    store(values.data() + i, lanes, load(x + k * a.width + i, lanes, A(0)));
                });
                kw == 2 ? add_columns(values.data(), windows, 2, sums.data())
                        : add_columns(values.data(), windows, kw, sums.data());
            }
            for_each_vec<A>(windows, [&](int64_t i, int lanes) {
                store(y + i, lanes, load(sums.data() + i, lanes, A(0)) / splat(count));
            });
        }
    });
}

template <class S>
void backward(const AvgPool& a) {
    using A = Acc<S>;
    const int64_t rows = a.height / a.kernel_height, windows = a.width / a.kernel_width, kw = a.kernel_width;
    const A scale = static_cast<A>(1.0 / static_cast<double>(a.kernel_height * kw));
    parallel_for(a.planes * rows, a.threads, [&](int64_t begin, int64_t end) {
        std::vector<A> grads(windows), spread(a.width, A(0));
        for (int64_t row = begin; row < end; ++row) {
            auto* g = static_cast<const S*>(a.from) + row * windows;
            auto* dx = static_cast<S*>(a.to) + (row / rows * a.height + row % rows * a.kernel_height) * a.width;
            for_each_vec<A>(windows,
                            [&](int64_t i, int lanes) { store(grads.data() + i, lanes, load(g + i, lanes, A(0))); });
            kw == 2 ? spread_columns(grads.data(), windows, 2, scale, spread.data())
                    : spread_columns(grads.data(), windows, kw, scale, spread.data());
            for_each_vec<A>(a.width, [&](int64_t i, int lanes) {
                Vec<A> value = load(spread.data() + i, lanes, A(0));
                for (int64_t k = 0; k < a.kernel_height; ++k) store(dx + k * a.width + i, lanes, value);
            });
            // The rows left over belong to the plane's last row of windows.
            int64_t rest = row % rows == rows - 1 ? a.height % a.kernel_height : 0;
            for (int64_t k = 0; k < rest; ++k)
                for_each_vec<A>(a.width, [&](int64_t i, int lanes) {
                    store(dx + (a.kernel_height + k) * a.width + i, lanes, Vec<A>{});
                });
        }
    });
}

}  // namespace

void avg_pool_forward(const AvgPool& a) {
    with_dtype(a.dtype, [&](auto s) { forward<decltype(s)>(a); });
}

void avg_pool_backward(const AvgPool& a) {
    with_dtype(a.dtype, [&](auto s) { backward<decltype(s)>(a); });
}

}  // namespace GANKERN_ISA
}  // namespace gankern
