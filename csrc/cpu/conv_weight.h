// A convolution's weight, read as vectors of channels of the result whatever its strides.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "gankern/parallel.h"
#include "transpose.h"
#include "vec.h"

namespace gankern {
namespace GANKERN_ISA {

struct WeightChannels {
    int64_t result, source;                // numbers of channels
    int64_t result_stride, source_stride;  // in elements
};

// A place in the weight of two channels, and where its values go.
template <class Target>
struct WeightTap {
    int64_t offset;
    Target target;
};

template <class Target>
class WeightColumns {
 public:
    WeightColumns(const WeightChannels& channels, const float* weight, std::vector<WeightTap<Target>> taps)
        : c_(channels), weight_(weight), taps_(std::move(taps)) {
        std::sort(taps_.begin(), taps_.end(), [](const auto& a, const auto& b) { return a.offset < b.offset; });
        for (size_t t = 0; t < taps_.size(); ++t)
            side_by_side_ = side_by_side_ && taps_[t].offset == taps_[0].offset + static_cast<int64_t>(t);
        int64_t last = taps_.empty() ? 0 : taps_.back().offset;
        end_ = weight + (c_.result - 1) * c_.result_stride + (c_.source - 1) * c_.source_stride + last + 1;
    }

    // Calls put(target, first channel of the result, channel of the source, values); lanes behind the last are 0.
    template <class Put>
    void run(int threads, const Put& put) const {
        constexpr int64_t n = kLanes<float>;
        int64_t blocks = (c_.result + n - 1) / n, shares = (c_.source + n - 1) / n;
        parallel_for(taps_.empty() ? 0 : blocks * shares, threads, [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; ++item) read(item / shares * n, item % shares * n, put);
        });
    }

 private:
    template <class Put>
    void read(int64_t first, int64_t channel, const Put& put) const {
        constexpr int64_t n = kLanes<float>;
        int64_t channels = std::min(n, c_.source - channel);
        int part = static_cast<int>(std::min(n, c_.result - first));
        const float* from = weight_ + first * c_.result_stride + channel * c_.source_stride;
        auto columns = [&](const float* at, int64_t count, const auto& each) {
            for_each_column(at, c_.result_stride, part, count, end_, each);
        };
        // Along whatever lies side by side in the weight.
        if (c_.result_stride == 1)
            for (const auto& t : taps_)
                for (int64_t c = 0; c < channels; ++c)
                    put(t.target, first, channel + c, load(from + c * c_.source_stride + t.offset, part, 0.0f));
        else if (side_by_side_ && taps_.size() > 1)
            for (int64_t c = 0; c < channels; ++c)
                columns(from + c * c_.source_stride + taps_[0].offset, static_cast<int64_t>(taps_.size()),
                        [&](int64_t t, Vec<float> values) { put(taps_[t].target, first, channel + c, values); });
        else if (c_.source_stride == 1)
            for (const auto& t : taps_)
                columns(from + t.offset, channels,
                        [&](int64_t c, Vec<float> values) { put(t.target, first, channel + c, values); });
        else
            for (const auto& t : taps_)
                for (int64_t c = 0; c < channels; ++c)
                    columns(from + c * c_.source_stride + t.offset, 1,
                            [&](int64_t, Vec<float> values) { put(t.target, first, channel + c, values); });
    }

    WeightChannels c_;
    const float* weight_;
    std::vector<WeightTap<Target>> taps_;
    bool side_by_side_ = true;
    const float* end_;
};

}  // namespace GANKERN_ISA
}  // namespace gankern
