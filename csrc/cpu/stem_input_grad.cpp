#include "gankern/stem_input_grad.h"

#include <algorithm>
#include <vector>

#include "gankern/parallel.h"
#include "kernels.h"
#include "vec.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

// A tile of pixels by vectors whose sums stay in registers: 24 of 32 with AVX-512, 12 of 16 with AVX2.
constexpr int kVectors = 3;
constexpr int kPixels = GANKERN_VECTOR_BYTES == 64 ? 8 : 4;

// sums[pixel][tap] = sum over k of grad[pixel][k] * weight[k][tap], for the taps of V vectors.
template <int V, class A>
GANKERN_INLINE void multiply(const A* const (&grad)[kPixels], const A* weight, int64_t row, int64_t out_channels,
                             A* sums) {
    Vec<A> total[kPixels][V] = {};
    for (int64_t k = 0; k < out_channels; ++k) {
        Vec<A> w[V];
        for (int v = 0; v < V; ++v) w[v] = load(weight + k * row + v * kLanes<A>);
        for (int p = 0; p < kPixels; ++p) {
            Vec<A> g = splat(grad[p][k]);
            for (int v = 0; v < V; ++v) total[p][v] += g * w[v];
        }
    }
    for (int p = 0; p < kPixels; ++p)
        for (int v = 0; v < V; ++v) store(sums + p * row + v * kLanes<A>, kLanes<A>, total[p][v]);
}

// Adds the taps of one output pixel to the input pixels that they came from.
template <class A>
void scatter(const StemInputGrad& a, const A* taps, int64_t oy, int64_t ox, A* image) {
    int64_t c = a.channels, x0 = ox * a.stride[1] - a.padding[1];
    for (int64_t i = 0; i < a.kernel[0]; ++i) {
        int64_t y = oy * a.stride[0] - a.padding[0] + i * a.dilation[0];
        if (y < 0 || y >= a.height) continue;
        A* line = image + y * a.width * c;
        const A* from = taps + i * a.kernel[1] * c;
        if (a.dilation[1] == 1) {
            // Taps of a row lie side by side in the input as they do in the weight.
            int64_t first = std::max<int64_t>(0, -x0), last = std::min(a.kernel[1], a.width - x0);
            for (int64_t e = first * c; e < last * c; ++e) line[x0 * c + e] += from[e];
            continue;
        }
        for (int64_t j = 0; j < a.kernel[1]; ++j) {
            int64_t x = x0 + j * a.dilation[1];
            if (x < 0 || x >= a.width) continue;
            for (int64_t e = 0; e < c; ++e) line[x * c + e] += from[j * c + e];
        }
    }
}

template <class A>
void stem_input_grad(const StemInputGrad& a) {
    int64_t taps = a.kernel[0] * a.kernel[1] * a.channels, row = stem_input_grad_row(taps);
    auto* weight = static_cast<const A*>(a.weight);
    auto* padded = static_cast<A*>(a.scratch);
    for (int64_t k = 0; k < a.out_channels; ++k) {
        std::copy(weight + k * taps, weight + (k + 1) * taps, padded + k * row);
        std::fill(padded + k * row + taps, padded + (k + 1) * row, A(0));
    }
    // An image belongs to one thread, so that its sums have one order.
    parallel_for(a.n, a.threads, [&](int64_t begin, int64_t end) {
        std::vector<A> sums(kPixels * row);
        for (int64_t n = begin; n < end; ++n) {
            auto* grad = static_cast<const A*>(a.grad_output) + n * a.out_height * a.out_width * a.out_channels;
            auto* image = static_cast<A*>(a.grad_input) + n * a.height * a.width * a.channels;
            std::fill(image, image + a.height * a.width * a.channels, A(0));
            int64_t pixels = a.out_height * a.out_width;
            for (int64_t first = 0; first < pixels; first += kPixels) {
                const A* rows[kPixels];
                // Past the end the last pixel is computed again and not used.
                for (int p = 0; p < kPixels; ++p) rows[p] = grad + std::min(first + p, pixels - 1) * a.out_channels;
                for (int64_t tap = 0; tap < taps; tap += kVectors * kLanes<A>) {
                    const A* from = padded + tap;
                    int64_t left = (taps - tap + kLanes<A> - 1) / kLanes<A>;
                    if (left == 1)
                        multiply<1>(rows, from, row, a.out_channels, sums.data() + tap);
                    else if (left == 2)
                        multiply<2>(rows, from, row, a.out_channels, sums.data() + tap);
                    else
                        multiply<kVectors>(rows, from, row, a.out_channels, sums.data() + tap);
                }
                for (int64_t p = first; p < std::min(first + kPixels, pixels); ++p)
                    scatter(a, sums.data() + (p - first) * row, p / a.out_width, p % a.out_width, image);
            }
        }
    });
}

}  // namespace

void stem_input_grad(const StemInputGrad& a) {
    a.dtype == Dtype::kFloat64 ? stem_input_grad<double>(a) : stem_input_grad<float>(a);
}

}  // namespace GANKERN_ISA
}  // namespace gankern
