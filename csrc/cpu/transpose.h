// Blocks of a matrix turned in registers.
#pragma once

#include <utility>

#include "vec.h"

namespace gankern {
namespace GANKERN_ISA {

template <int First, class V, int... I>
GANKERN_INLINE V interleave(V a, V b, std::integer_sequence<int, I...>) {
    constexpr int n = sizeof...(I);
    return __builtin_shufflevector(a, b, (I % 2 ? n + First + I / 2 : First + I / 2)...);
}

// Row i of a square block becomes column i: as often as halves fit into a row, rows i and i + n / 2 are interleaved.
template <class V, int n>
GANKERN_INLINE void transpose(V (&rows)[n]) {
    static_assert(sizeof(V) == n * sizeof(rows[0][0]));
    using Lanes = std::make_integer_sequence<int, n>;
    for (int round = 1; round < n; round *= 2) {
        V mixed[n];
        for (int i = 0; i < n / 2; ++i) {
            mixed[2 * i] = interleave<0>(rows[i], rows[i + n / 2], Lanes{});
            mixed[2 * i + 1] = interleave<n / 2>(rows[i], rows[i + n / 2], Lanes{});
        }
        for (int i = 0; i < n; ++i) rows[i] = mixed[i];
    }
}

// Calls put(column, vector of the rows' values) for the columns of up to n rows; further lanes are 0. Behind `end`
// nothing is read.
template <class Put>
GANKERN_INLINE void for_each_column(const float* from, int64_t stride, int rows, int64_t columns, const float* end,
                                    const Put& put) {
    constexpr int n = kLanes<float>;
    for (int64_t c = 0; c < columns; c += n) {
        Vec<float> block[n];
        for (int r = 0; r < n; ++r) {
            const float* row = from + r * stride + c;
            if (r >= rows)
                block[r] = Vec<float>{};
            else if (end - row >= n)
                block[r] = load(row);
            else
                block[r] = load_part(row, static_cast<int>(columns - c < n ? columns - c : n), 0.0f);
        }
        transpose(block);
        for (int i = 0; i < n && c + i < columns; ++i) put(c + i, block[i]);
    }
}

}  // namespace GANKERN_ISA
}  // namespace gankern
