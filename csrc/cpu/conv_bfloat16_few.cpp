// The gradient of a convolution's input, or a transposed convolution, of few channels: each source pixel times all taps
// at once, which are then added up where they fall. A row of the kernel falls on values that lie side by side.
#include <algorithm>
#include <vector>

#include "conv_bfloat16_finish.h"
#include "conv_bfloat16_plan.h"
#include "conv_weight.h"
#include "gankern/conv_bfloat16.h"
#include "gankern/parallel.h"
#include "kernels.h"
#include "matrix_units.h"
#include "vec.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

using namespace tiles;

class Few {
 public:
    explicit Few(const ConvBFloat16& args) : a_(args), s_(args.shape), p_(plan_few(args.shape)), finish_(args.finish) {
        if (a_.bias) bias_ = over_row(a_.bias);
        if (!finish_.scale) return;
        scale_ = over_row(finish_.scale), shift_ = over_row(finish_.shift);
        finish_.scale = scale_.data(), finish_.shift = shift_.data();
    }

    void run() {
        auto* weight = reinterpret_cast<BFloat16*>(a_.scratch);
        pack(weight);
        parallel_for_each(s_.n * p_.bands, p_.threads, [&](int thread, int64_t task) {
            float* working = a_.scratch + p_.packed / 2 + thread * p_.working();
            band(task / p_.bands, task % p_.bands, weight, working);
        });
    }

 private:
    // A value for each channel, for each of a row's values.
    std::vector<float> over_row(const float* channels) const {
        std::vector<float> values(static_cast<size_t>(s_.width * s_.channels));
        for (size_t i = 0; i < values.size(); ++i) values[i] = channels[i % static_cast<size_t>(s_.channels)];
        return values;
    }

    // [step][tile of columns]; columns are taps by channels.
    void pack(BFloat16* weight) const {
        std::fill_n(weight, p_.packed, BFloat16{0});
        struct Target {
            int64_t column;
        };
        std::vector<WeightTap<Target>> taps;
        for (int64_t i = 0; i < s_.kernel[0]; ++i)
            for (int64_t j = 0; j < s_.kernel[1]; ++j)
                taps.push_back(
                    {i * s_.weight_strides[2] + j * s_.weight_strides[3], {(i * s_.kernel[1] + j) * s_.channels}});
        const WeightChannels channels{s_.channels, s_.out_channels, s_.weight_strides[1], s_.weight_strides[0]};
        WeightColumns<Target> columns(channels, a_.weight, std::move(taps));
        columns.run(1, [&](const Target& target, int64_t first, int64_t k, Vec<float> values) {
            BFloat16 rounded[kSide];
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(rounded), (__m256i)_mm512_cvtneps_pbh((__m512)values));
            for (int64_t c = first; c < std::min(first + kSide, s_.channels); ++c) {
                int64_t column = target.column + c;
                BFloat16* step = weight + (k / kStep * 2 * p_.blocks + column / kSide) * kTile;
                step[k % kStep / 2 * kStep + column % kSide * 2 + k % 2] = rounded[c - first];
            }
        });
    }

    void band(int64_t image, int64_t index, const BFloat16* weight, float* working) const {
        int64_t top = s_.height * index / p_.bands, bottom = s_.height * (index + 1) / p_.bands;
        int64_t reach = (s_.kernel[0] - 1) * s_.dilation[0];
        // Rows of the source that fall into the band.
        int64_t begin = std::max<int64_t>(top + s_.padding[0] - reach, 0);
        begin = (begin + s_.stride[0] - 1) / s_.stride[0];
        int64_t end = std::min(s_.out_height, (bottom - 1 + s_.padding[0]) / s_.stride[0] + 1);
        float *products = working, *row = products + p_.products;
        if (begin < end)
            multiply((image * s_.out_height + begin) * s_.out_width, (end - begin) * s_.out_width, weight, products,
                     row);
        for (int64_t y = top; y < bottom; ++y) {
            std::fill_n(row, p_.row, 0.0f);
            std::copy(bias_.begin(), bias_.end(), row + s_.padding[1] * s_.channels);
            for (int64_t i = 0; i < s_.kernel[0]; ++i) {
                int64_t from = y + s_.padding[0] - i * s_.dilation[0];
                if (from % s_.stride[0] || from < begin * s_.stride[0] || from >= end * s_.stride[0]) continue;
                int64_t pixel = (from / s_.stride[0] - begin) * s_.out_width;
                add(products + pixel * p_.columns() + i * s_.kernel[1] * s_.channels, row);
            }
            finish(row + s_.padding[1] * s_.channels, (image * s_.height + y) * s_.width * s_.channels);
        }
    }

    // Source pixels times taps.
    void multiply(int64_t first, int64_t pixels, const BFloat16* weight, float* products, float* copies) const {
        TileScope scope;
        const BFloat16* source = a_.source + first * s_.out_channels;
        int64_t steps = (s_.out_channels + kStep - 1) / kStep, filled = steps * kStep;
        for (int64_t at = 0; at < pixels; at += kBlock) {
            const BFloat16* rows = source + at * s_.out_channels;
            int64_t stride = s_.out_channels, count = std::min(kBlock, pixels - at);
            if (s_.out_channels % kStep || count % kSide) {
                auto* to = reinterpret_cast<BFloat16*>(copies);
                for (int64_t i = 0; i < kBlock; ++i) {
                    int64_t values = i < count ? s_.out_channels : 0;
                    copy_values(rows + i * s_.out_channels, values, to + i * filled);
                    clear_values(filled - values, to + i * filled + values);
                }
                rows = to, stride = filled;
                finish_writes();
            }
            for (int64_t block = 0; block < p_.blocks; ++block) {
                bool wide = s_.channels * s_.kernel[0] * s_.kernel[1] - block * kBlock > kSide;
                with_tiles(count > kSide ? 2 : 1, wide ? 2 : 1, [&](auto tiles) {
                    tiles.clear();
                    for (int64_t step = 0; step < steps; ++step)
                        tiles.multiply(rows + step * kStep, 2 * stride, rows + kSide * stride + step * kStep,
                                       2 * stride, weight + (step * p_.blocks + block) * 2 * kTile);
                    tiles.store_rows(products + at * p_.columns() + block * kBlock, p_.columns());
                });
            }
        }
    }

    // One row of the kernel, of a row of source pixels.
    void add(const float* products, float* row) const {
        int64_t run = s_.dilation[1] == 1 ? s_.kernel[1] : 1, length = run * s_.channels;
        for (int64_t j = 0; j < s_.kernel[1]; j += run) {
            float* to = row + j * s_.dilation[1] * s_.channels;
            const float* from = products + j * s_.channels;
            for (int64_t v = 0; v < length; v += kSide) {
                auto lanes = static_cast<__mmask16>(first_lanes(std::min(kSide, length - v)));
                // Vectors of neighbours overlap, so that one would wait for the other's store: a few pixels apart.
                int64_t step = s_.stride[1] * s_.channels, apart = (kSide + step - 1) / step;
                for (int64_t start = 0; start < apart; ++start)
                    for (int64_t x = start; x < s_.out_width; x += apart) {
                        float* at = to + x * step + v;
                        __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, at),
                                                   _mm512_maskz_loadu_ps(lanes, from + x * p_.columns() + v));
                        _mm512_mask_storeu_ps(at, lanes, sum);
                    }
            }
        }
    }

    // A row of sums becomes a row of the result.
    void finish(const float* row, int64_t to) const {
        int64_t values = s_.width * s_.channels;
        with_activation(finish_.activation, [&](auto act) {
            for (int64_t i = 0; i < values; i += kSide) {
                auto lanes = static_cast<__mmask16>(first_lanes(std::min(kSide, values - i)));
                auto sums = (Vec<float>)_mm512_maskz_loadu_ps(lanes, row + i);
                Finish<act>(finish_, nullptr, i, lanes).store(sums, a_.result, to + i);
            }
        });
    }

    const ConvBFloat16& a_;
    const ConvShape& s_;
    const FewPlan p_;
    ConvBFloat16Finish finish_;  // with values for each of a row's values
    std::vector<float> bias_, scale_, shift_;
};

}  // namespace

void conv_bfloat16_few(const ConvBFloat16& a) { Few(a).run(); }

}  // namespace GANKERN_ISA
}  // namespace gankern
