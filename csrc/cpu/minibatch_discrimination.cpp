// Samples are packed into panels of one vector: panel[c][lane], so that one load serves a vector of samples j and the
// values of a row i are broadcast from memory.
//
// Minibatch discrimination goes over the upper triangle of sample pairs in tiles of kRows rows i by some vectors of
// j. The first phase of a tile adds up distances and keeps the signs of the differences, few enough for L1; the second
// adds weight times sign to the gradients of both sides.
#include "gankern/minibatch_discrimination.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "gankern/parallel.h"
#include "kernels.h"
#include "transpose.h"
#include "vec.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

constexpr int kRows = PairPlan::kRows, kPanels = PairPlan::kPanels;
constexpr int64_t kLineBytes = 64;

// Cuts scratch into arrays of whole lines.
struct Lines {
    char* at;
    template <class T>
    T* take(int64_t lines) {
        auto* taken = reinterpret_cast<T*>(at);
        at += lines * kLineBytes;
        return taken;
    }
};

// -1, 0 or 1, also 0 for a NaN: the distance carries it on.
template <class A>
GANKERN_INLINE Vec<A> sign(Vec<A> d) {
#ifdef __AVX512F__
    // A nibble for each class of d from the lowest (two of NaN, 0, 1, -inf, inf, below 0, above 0): 8 gives 0, 9 -1,
    // a 1.
    constexpr int kClasses = static_cast<int>(0xa9a9a888u);
    if constexpr (std::is_same_v<A, float>)
        return bits_as<Vec<A>>(
            _mm512_fixupimm_ps(bits_as<__m512>(d), bits_as<__m512>(d), _mm512_set1_epi32(kClasses), 0));
    else
        return bits_as<Vec<A>>(
            _mm512_fixupimm_pd(bits_as<__m512d>(d), bits_as<__m512d>(d), _mm512_set1_epi64(kClasses), 0));
#else
    using I = typename Simd<A>::I;
    I above = (d > 0) & bits_as<I>(splat(A(1))), below = (d < 0) & bits_as<I>(splat(A(-1)));
    return bits_as<Vec<A>>(above | below);
#endif
}

// exp(-x) for x >= 0, in half the operations of exp, which it follows: 0 from 86.6 on, so that one exponent suffices.
GANKERN_INLINE Vec<float> exp_minus(Vec<float> x) {
    using F = Simd<float>;
    const F::V last = splat(86.6f);
    F::V c = (x > last) ? last : x;
    F::V shifted = c * -1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    F::V k = shifted - 12582912.0f;
    F::V r = k * -0.693359375f - c;
    r = r + k * 2.12194440e-4f;
    F::V p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    F::U exponent = (bits_as<F::U>(shifted) << 23) + (127u << 23);
    p = p * bits_as<F::V>(exponent);
    return (x > last) ? F::V{} : p;
}

GANKERN_INLINE Vec<double> exp_minus(Vec<double> x) { return exp(-x); }

// Keeps a loaded vector in its register: two uses would otherwise become two loads.
template <class V>
GANKERN_INLINE void in_register([[maybe_unused]] V& v) {
#ifdef __AVX512F__
    asm("" : "+v"(v));
#endif
}

template <class A>
GANKERN_INLINE typename Simd<A>::I lane_index() {
    typename Simd<A>::I index;
    for (int i = 0; i < kLanes<A>; ++i) index[i] = i;
    return index;
}

// Panels [begin, end) of rows src[i * stride + c], i < n; zeros behind the last row.
template <class S, class A>
void pack(const S* src, int64_t stride, int64_t n, int64_t c, int64_t begin, int64_t end, A* panels) {
    constexpr int64_t L = kLanes<A>;
    for (int64_t p = begin; p < end; ++p) {
        A* panel = panels + p * c * L;
        const S* rows = src + p * L * stride;
        int64_t inside = n - p * L < L ? n - p * L : L;
        for (int64_t first = 0; first < c; first += L) {
            int count = static_cast<int>(c - first < L ? c - first : L);
            Vec<A> block[L]{};
            for (int64_t lane = 0; lane < inside; ++lane) {
                const S* values = rows + lane * stride + first;
                __builtin_prefetch(values + c);
                block[lane] = load(values, count, A(0));
            }
            transpose(block);
            for (int k = 0; k < count; ++k) store(panel + (first + k) * L, block[k]);
        }
    }
}

// ---- minibatch discrimination

enum class Pass { kForward, kBackward, kDoubleBackward };

// One feature of all samples.
template <class A>
struct Feature {
    int64_t n, c, panels, width;
    A *x, *v, *g;  // m and the cotangent in panels; grad_output

    Feature(const MinibatchShape& s, const PairPlan& plan, Lines& lines)
        : n(s.n),
          c(s.c),
          panels(plan.panels),
          width(plan.width),
          x(lines.take<A>(plan.values())),
          v(lines.take<A>(plan.values())),
          g(lines.take<A>(plan.panels)) {}

    // Where the values of sample i begin in panels; they are kLanes apart.
    int64_t row(int64_t i) const { return i / kLanes<A> * c * kLanes<A> + i % kLanes<A>; }
};

// What one part of the pairs adds up.
template <class A>
struct PairSums {
    double* sums;            // per sample
    A *grad, *rows, *signs;  // grad in panels; those of the tile's rows, lanes not yet added up; signs of the tile

    PairSums(const PairPlan& plan, Lines& lines)
        : sums(lines.take<double>(2 * plan.panels)),
          grad(lines.take<A>(plan.values())),
          rows(lines.take<A>(kRows * plan.c)),
          signs(lines.take<A>(plan.width * kRows * plan.c)) {}
};

// Distances of kRows samples from i0 on to the samples of one panel; beside them their change along the cotangent.
template <class A, Pass pass>
GANKERN_INLINE void distances(const Feature<A>& f, int64_t i0, int64_t panel, A* signs, Vec<A>* distance,
                              Vec<A>* change) {
    constexpr int64_t L = kLanes<A>;
    const int64_t at = f.row(i0);
    const A *xi = f.x + at, *xj = f.x + panel * f.c * L, *vi = f.v + at, *vj = f.v + panel * f.c * L;
    for (int r = 0; r < kRows; ++r) distance[r] = change[r] = Vec<A>{};
    for (int64_t k = 0, c = f.c; k < c; ++k, xi += L, xj += L, vi += L, vj += L, signs += kRows * L) {
        Vec<A> x = load(xj);
        for (int r = 0; r < kRows; ++r) {
            Vec<A> d = x - xi[r];
            if constexpr (pass == Pass::kForward) {
                distance[r] += abs<A>(d);
            } else {
                Vec<A> s = sign<A>(d);
                store(signs + r * L, s);
                distance[r] += s * d;
                if constexpr (pass == Pass::kDoubleBackward) change[r] += s * (load(vj) - vi[r]);
            }
        }
    }
}

// Adds v to the double accumulators of one panel.
template <class A>
GANKERN_INLINE void add_wide(double* sums, Vec<A> v) {
    typename Simd<A>::Wide wide;
    std::memcpy(&wide, sums, sizeof wide);
    wide += __builtin_convertvector(v, typename Simd<A>::Wide);
    std::memcpy(sums, &wide, sizeof wide);
}

// weight * sign of count panels, to the rows and, negated, to the columns.
template <class A>
GANKERN_INLINE void scatter(const Feature<A>& f, const PairSums<A>& out, int64_t panel, int64_t count,
                            const Vec<A> (&weight)[kPanels][kRows]) {
    constexpr int64_t L = kLanes<A>;
    const int64_t c = f.c;
    A *rows = out.rows, *columns = out.grad + panel * c * L;
    const A* signs = out.signs;
    for (int64_t k = 0; k < c; ++k, rows += kRows * L, columns += L, signs += kRows * L) {
        Vec<A> row[kRows];
        for (int r = 0; r < kRows; ++r) row[r] = load(rows + r * L);
        for (int64_t q = 0; q < count; ++q) {
            Vec<A> column = load(columns + q * c * L);
            for (int r = 0; r < kRows; ++r) {
                Vec<A> s = load(signs + (q * c * kRows + r) * L);
                in_register(s);
                row[r] += s * weight[q][r];
                column -= s * weight[q][r];
            }
            store(columns + q * c * L, column);
        }
        for (int r = 0; r < kRows; ++r) store(rows + r * L, row[r]);
    }
}

// Adds the lanes of the tile's rows up, into grad.
template <class A>
GANKERN_INLINE void reduce_rows(const Feature<A>& f, const PairSums<A>& out, int64_t i0) {
    constexpr int64_t L = kLanes<A>;
    typedef A Quad __attribute__((vector_size(4 * sizeof(A))));
    A* grad = out.grad + f.row(i0);
    for (int64_t k = 0; k < f.c; ++k) {
        for (int r = 0; r < kRows; ++r) {
            const A* row = out.rows + (k * kRows + r) * L;
            Quad sum{};
            for (int64_t lane = 0; lane < L; lane += 4) {
                Quad part;
                std::memcpy(&part, row + lane, sizeof part);
                sum += part;
            }
            grad[k * L + r] += (sum[0] + sum[1]) + (sum[2] + sum[3]);
        }
    }
}

// The pairs i < j of every parts-th tile of rows. With d the distance and t its change along the cotangent:
// forward adds exp(-d) to both samples' sums, backward weighs signs by (g_i + g_j) exp(-d), double backward adds
// -exp(-d) t to the sums and weighs by -(g_i + g_j) exp(-d) t. A sign is that of x_j - x_i.
template <class A, Pass pass>
void add_pairs(const Feature<A>& f, const PairSums<A>& out, int64_t part, int64_t parts) {
    constexpr int64_t L = kLanes<A>;
    const auto lane = lane_index<A>();
    if constexpr (pass != Pass::kBackward) std::memset(out.sums, 0, sizeof(double) * f.panels * L);
    if constexpr (pass != Pass::kForward) std::memset(out.grad, 0, sizeof(A) * f.panels * L * f.c);
    for (int64_t i0 = part * kRows; i0 + 1 < f.n; i0 += parts * kRows) {
        if constexpr (pass != Pass::kForward) std::memset(out.rows, 0, sizeof(A) * kRows * L * f.c);
        WideSum<A> row_sums[kRows];
        for (int64_t first = i0 / L; first < f.panels; first += f.width) {
            int64_t count = f.panels - first < f.width ? f.panels - first : f.width;
            Vec<A> weight[kPanels][kRows];
            for (int64_t q = 0; q < count; ++q) {
                int64_t panel = first + q, j0 = panel * L;
                Vec<A> distance[kRows], change[kRows], term[kRows];
                distances<A, pass>(f, i0, panel, out.signs + q * f.c * kRows * L, distance, change);
                bool whole = j0 >= i0 + kRows && j0 + L <= f.n;
                for (int r = 0; r < kRows; ++r) {
                    term[r] = exp_minus(distance[r]);
                    if constexpr (pass == Pass::kDoubleBackward) term[r] *= -change[r];
                    if (!whole) {
                        auto kept = (lane > static_cast<int>(i0 + r - j0)) & (lane < static_cast<int>(f.n - j0));
                        term[r] = kept ? term[r] : Vec<A>{};
                    }
                }
                if constexpr (pass != Pass::kBackward) {
                    for (int r = 0; r < kRows; ++r) row_sums[r].add(term[r]);
                    Vec<A> column{};
                    for (int r = 0; r < kRows; ++r) column += term[r];
                    add_wide<A>(out.sums + j0, column);
                }
                if constexpr (pass != Pass::kForward) {
                    Vec<A> g = load(f.g + j0);
                    for (int r = 0; r < kRows; ++r) weight[q][r] = term[r] * (g + f.g[i0 + r]);
                }
            }
            if constexpr (pass != Pass::kForward) scatter(f, out, first, count, weight);
        }
        if constexpr (pass != Pass::kBackward) {
            for (int r = 0; r < kRows; ++r) out.sums[i0 + r] += row_sums[r].total();
        }
        if constexpr (pass != Pass::kForward) reduce_rows(f, out, i0);
    }
}

// The tensors of one of the three passes; those that it does not have are null.
template <class S>
struct PairTensors {
    const MinibatchShape& s;
    const S *m, *cotangent, *grad_output;
    S *sums, *grad_m;
    double self;
};

template <class S, Pass pass>
void pack_feature(const PairTensors<S>& t, const Feature<Acc<S>>& f, int64_t b, int64_t begin, int64_t end) {
    constexpr int64_t L = kLanes<Acc<S>>;
    int64_t stride = t.s.b * t.s.c;
    pack(t.m + b * t.s.c, stride, t.s.n, t.s.c, begin, end, f.x);
    if constexpr (pass == Pass::kDoubleBackward) pack(t.cotangent + b * t.s.c, stride, t.s.n, t.s.c, begin, end, f.v);
    if constexpr (pass != Pass::kForward) {
        for (int64_t i = begin * L; i < end * L; ++i) f.g[i] = i < t.s.n ? to_acc(t.grad_output[i * t.s.b + b]) : 0;
    }
}

// Writes samples [begin, end) of one feature from the parts' sums; part k lies k * stride bytes behind the first.
template <class S, Pass pass>
void write_feature(const PairTensors<S>& t, const Feature<Acc<S>>& f, const PairSums<Acc<S>>& first, int64_t parts,
                   int64_t stride, int64_t b, int64_t begin, int64_t end) {
    using A = Acc<S>;
    constexpr int64_t L = kLanes<A>;
    auto in_part = [&](auto* p, int64_t k) {
        return reinterpret_cast<decltype(p)>(reinterpret_cast<char*>(p) + k * stride);
    };
    for (int64_t i = begin; i < end && pass != Pass::kBackward; ++i) {
        double sum = t.self;
        for (int64_t k = 0; k < parts; ++k) sum += in_part(first.sums, k)[i];
        from_acc(static_cast<A>(sum), t.sums + i * t.s.b + b);
    }
    for (int64_t panel = begin / L; panel * L < end && pass != Pass::kForward; ++panel) {
        for (int64_t c = 0; c < f.c; c += L) {
            int count = static_cast<int>(f.c - c < L ? f.c - c : L);
            Vec<A> block[L]{};
            for (int c_in = 0; c_in < count; ++c_in) {
                A* sums = first.grad + (panel * f.c + c + c_in) * L;
                block[c_in] = load(sums);
                for (int64_t k = 1; k < parts; ++k) block[c_in] += load(in_part(sums, k));
            }
            transpose(block);
            for (int64_t i = begin > panel * L ? begin : panel * L; i < end && i < (panel + 1) * L; ++i)
                store(t.grad_m + (i * t.s.b + b) * f.c + c, count, block[i - panel * L]);
        }
    }
}

// One feature and the first of its parts in a slot of scratch.
template <class A>
struct Slot {
    Lines lines;
    Feature<A> feature;
    char* parts;
    PairSums<A> first;
    Slot(const MinibatchShape& s, const PairPlan& plan, void* scratch, int64_t slot)
        : lines{static_cast<char*>(scratch) + slot * plan.slot() * kLineBytes},
          feature(s, plan, lines),
          parts(lines.at),
          first(plan, lines) {}
};

template <class S, Pass pass>
void run_pairs(const PairTensors<S>& t, void* scratch) {
    using A = Acc<S>;
    const PairPlan plan(t.s);
    const int threads = plan.threads;
    if (plan.parts == 1) {
        parallel_for(threads, threads, [&](int64_t from, int64_t to) {
            for (int64_t thread = from; thread < to; ++thread) {
                Slot<A> slot(t.s, plan, scratch, thread);
                for (int64_t b = t.s.b * thread / threads; b < t.s.b * (thread + 1) / threads; ++b) {
                    if (t.s.n > 1) pack_feature<S, pass>(t, slot.feature, b, 0, plan.panels);
                    add_pairs<A, pass>(slot.feature, slot.first, 0, 1);
                    write_feature<S, pass>(t, slot.feature, slot.first, 1, 0, b, 0, t.s.n);
                }
            }
        });
        return;
    }
    const int64_t stride = plan.part() * kLineBytes;
    parallel_for(t.s.b * plan.panels, threads, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
            int64_t b = k / plan.panels, panel = k % plan.panels;
            pack_feature<S, pass>(t, Slot<A>(t.s, plan, scratch, b).feature, b, panel, panel + 1);
        }
    });
    parallel_for(t.s.b * plan.parts, threads, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
            Slot<A> slot(t.s, plan, scratch, k / plan.parts);
            Lines part{slot.parts + k % plan.parts * stride};
            add_pairs<A, pass>(slot.feature, PairSums<A>(plan, part), k % plan.parts, plan.parts);
        }
    });
    parallel_for(t.s.n, threads, [&](int64_t begin, int64_t end) {
        for (int64_t b = 0; b < t.s.b; ++b) {
            Slot<A> slot(t.s, plan, scratch, b);
            write_feature<S, pass>(t, slot.feature, slot.first, plan.parts, stride, b, begin, end);
        }
    });
}

// ---- L1 distance

// Samples and features as one axis: panel vectors run over q = j * b + feature, and row i of m repeats along q.
template <class A>
struct DistanceSlot {
    A *rows, *other, *block;
    DistanceSlot(const DistancePlan& plan, void* scratch, int64_t slot) {
        Lines lines{static_cast<char*>(scratch) + (2 * plan.values() + slot * plan.slot()) * kLineBytes};
        rows = lines.take<A>(DistancePlan::kRows * plan.row());
        other = lines.take<A>(DistancePlan::kRows * plan.row());
        block = lines.take<A>(DistancePlan::kRows * plan.block());
    }
};

// A vector's place in the repeated rows, kept while q goes on.
struct Phase {
    int64_t period, at;
    Phase(int64_t p, int64_t q) : period(p), at(q % p) {}
    void advance(int64_t by) {
        at += by;
        while (at >= period) at -= period;
    }
};

// Row i of src as repeated[c][k] = src[i][k % b][c].
template <class S, class A>
void repeat_row(const DistancePlan& plan, const S* src, int64_t i, A* repeated) {
    int64_t length = plan.row() / (plan.c ? plan.c : 1) * kLanes<A>;
    for (int64_t k = 0; k < length; ++k) {
        const S* values = src + (i * plan.b + k % plan.b) * plan.c;
        for (int64_t c = 0; c < plan.c; ++c) repeated[c * length + k] = to_acc(values[c]);
    }
}

template <class S, class F>
void for_each_row_tile(const DistancePlan& plan, void* scratch, const F& f) {
    const int64_t tiles = ceil_div(plan.n, DistancePlan::kRows), half = ceil_div(tiles, 2);
    const int threads = plan.threads;
    parallel_for(threads, threads, [&](int64_t from, int64_t to) {
        for (int64_t slot = from; slot < to; ++slot) {
            DistanceSlot<Acc<S>> space(plan, scratch, slot);
            // A short row of the triangle goes with a long one.
            for (int64_t k = half * slot / threads; k < half * (slot + 1) / threads; ++k) {
                f(space, k);
                if (tiles - 1 - k != k) f(space, tiles - 1 - k);
            }
        }
    });
}

template <class S>
Acc<S>* pack_all(const DistancePlan& plan, const S* src, Acc<S>* panels) {
    parallel_for(plan.panels, plan.threads,
                 [&](int64_t begin, int64_t end) { pack(src, plan.c, plan.n * plan.b, plan.c, begin, end, panels); });
    return panels;
}

// Distances of kRows rows from r0 on to columns [q0, q1), or their change along the tangent.
template <class A, bool tangent>
GANKERN_INLINE void distance_block(const DistancePlan& plan, const DistanceSlot<A>& space, int64_t r0, const A* x,
                                   const A* v, int64_t q0, int64_t q1) {
    constexpr int64_t L = kLanes<A>;
    const int64_t row = plan.row() * L, length = plan.c ? row / plan.c : 0, width = plan.block() * L;
    const int64_t begin = q0 / L;
    Phase phase(plan.period, begin * L);
    for (int64_t panel = begin; panel * L < q1; ++panel, phase.advance(L)) {
        Vec<A> sum[kRows] = {};
        for (int64_t c = 0; c < plan.c; ++c) {
            Vec<A> xj = load(x + (panel * plan.c + c) * L);
            for (int r = 0; r < kRows; ++r) {
                int64_t at = (r0 + r) * row + c * length + phase.at;
                Vec<A> d = load(space.rows + at) - xj;
                if constexpr (tangent)
                    sum[r] += sign<A>(d) * (load(space.other + at) - load(v + (panel * plan.c + c) * L));
                else
                    sum[r] += abs<A>(d);
            }
        }
        for (int r = 0; r < kRows; ++r) store(space.block + (r0 + r) * width + (panel - begin) * L, sum[r]);
    }
}

template <class S, bool tangent>
void distance(const MinibatchShape& s, const S* m, const S* v, S* output, void* scratch) {
    using A = Acc<S>;
    const DistancePlan plan(s);
    constexpr int64_t L = kLanes<A>, rows = DistancePlan::kRows;
    const int64_t b = s.b, n = s.n, width = plan.block() * L;
    const A* x = pack_all(plan, m, static_cast<A*>(scratch));
    const A* tangents = tangent ? pack_all(plan, v, static_cast<A*>(scratch) + plan.values() * L) : nullptr;
    for_each_row_tile<S>(plan, scratch, [&](const DistanceSlot<A>& space, int64_t tile) {
        const int64_t i0 = tile * rows, height = n - i0 < rows ? n - i0 : rows;
        for (int64_t r = 0; r < ceil_div(height, kRows) * kRows; ++r) {
            int64_t i = i0 + (r < height ? r : 0);
            repeat_row(plan, m, i, space.rows + r * plan.row() * L);
            if (tangent) repeat_row(plan, v, i, space.other + r * plan.row() * L);
        }
        for (int64_t j0 = i0; j0 < n; j0 += plan.columns) {
            int64_t j1 = j0 + plan.columns < n ? j0 + plan.columns : n;
            for (int64_t r = 0; r < height; r += kRows)
                distance_block<A, tangent>(plan, space, r, x, tangents, j0 * b, j1 * b);
            const A* block = space.block + j0 * b % L;
            for (int64_t r = 0; r < height; ++r) {
                S* out = output + ((i0 + r) * n + j0) * b;
                for (int64_t q = 0; q < (j1 - j0) * b; ++q) from_acc(block[r * width + q], out + q);
            }
            for (int64_t j = j0 > i0 + rows ? j0 : i0 + rows; j < j1; ++j) {
                for (int64_t r = 0; r < height; ++r) {
                    S* out = output + (j * n + i0 + r) * b;
                    for (int64_t k = 0; k < b; ++k) from_acc(block[r * width + (j - j0) * b + k], out + k);
                }
            }
        }
    });
}

// grad_m[i] = sum over j of (g_ij + g_ji) sign(m_i - m_j).
template <class S>
void distance_backward(const MinibatchShape& s, const S* m, const S* g, S* grad_m, void* scratch) {
    using A = Acc<S>;
    const DistancePlan plan(s);
    constexpr int64_t L = kLanes<A>, rows = DistancePlan::kRows;
    const int64_t b = s.b, n = s.n, row = plan.row() * L, width = plan.block() * L;
    const int64_t length = s.c ? row / s.c : 0;
    const A* x = pack_all(plan, m, static_cast<A*>(scratch));
    for_each_row_tile<S>(plan, scratch, [&](const DistanceSlot<A>& space, int64_t tile) {
        const int64_t i0 = tile * rows, height = n - i0 < rows ? n - i0 : rows;
        std::memset(space.other, 0, sizeof(A) * height * row);
        for (int64_t r = 0; r < height; ++r) repeat_row(plan, m, i0 + r, space.rows + r * row);
        for (int64_t j0 = 0; j0 < n; j0 += plan.columns) {
            int64_t j1 = j0 + plan.columns < n ? j0 + plan.columns : n;
            int64_t begin = j0 * b / L, end = ceil_div(j1 * b, L), offset = j0 * b % L;
            for (int64_t r = 0; r < height; ++r) {
                A* weight = space.block + r * width;
                const S* direct = g + ((i0 + r) * n + j0) * b;
                for (int64_t q = 0; q < offset; ++q) weight[q] = 0;
                for (int64_t q = 0; q < (j1 - j0) * b; ++q) weight[offset + q] = to_acc(direct[q]);
                for (int64_t q = offset + (j1 - j0) * b; q < (end - begin) * L; ++q) weight[q] = 0;
            }
            for (int64_t j = j0; j < j1; ++j) {
                for (int64_t r = 0; r < height; ++r) {
                    A* weight = space.block + r * width + offset + (j - j0) * b;
                    const S* mirrored = g + (j * n + i0 + r) * b;
                    for (int64_t k = 0; k < b; ++k) weight[k] += to_acc(mirrored[k]);
                }
            }
            for (int64_t r = 0; r < height; ++r) {
                Phase phase(plan.period, begin * L);
                for (int64_t panel = begin; panel < end; ++panel, phase.advance(L)) {
                    Vec<A> weight = load(space.block + r * width + (panel - begin) * L);
                    for (int64_t c = 0; c < s.c; ++c) {
                        int64_t at = r * row + c * length + phase.at;
                        Vec<A> d = load(space.rows + at) - load(x + (panel * s.c + c) * L);
                        store(space.other + at, load(space.other + at) + sign<A>(d) * weight);
                    }
                }
            }
        }
        for (int64_t r = 0; r < height; ++r) {
            for (int64_t k = 0; k < b; ++k) {
                for (int64_t c = 0; c < s.c; ++c) {
                    const A* repeated = space.other + r * row + c * length;
                    A sum = 0;
                    for (int64_t q = k; q < length; q += b) sum += repeated[q];
                    from_acc(sum, grad_m + ((i0 + r) * b + k) * s.c + c);
                }
            }
        }
    });
}

}  // namespace

void minibatch_discrimination_forward(const MinibatchDiscriminationForward& a) {
    with_dtype(a.shape.dtype, [&](auto s) {
        using S = decltype(s);
        run_pairs<S, Pass::kForward>({a.shape, static_cast<const S*>(a.m), nullptr, nullptr, static_cast<S*>(a.output),
                                      nullptr, a.include_self ? 1.0 : 0.0},
                                     a.scratch);
    });
}

void minibatch_discrimination_backward(const MinibatchDiscriminationBackward& a) {
    with_dtype(a.shape.dtype, [&](auto s) {
        using S = decltype(s);
        run_pairs<S, Pass::kBackward>({a.shape, static_cast<const S*>(a.m), nullptr,
                                       static_cast<const S*>(a.grad_output), nullptr, static_cast<S*>(a.grad_m), 0},
                                      a.scratch);
    });
}

void minibatch_discrimination_double_backward(const MinibatchDiscriminationDoubleBackward& a) {
    with_dtype(a.shape.dtype, [&](auto s) {
        using S = decltype(s);
        run_pairs<S, Pass::kDoubleBackward>(
            {a.shape, static_cast<const S*>(a.m), static_cast<const S*>(a.cotangent),
             static_cast<const S*>(a.grad_output), static_cast<S*>(a.grad_grad_output), static_cast<S*>(a.grad_m), 0},
            a.scratch);
    });
}

void l1_distance_forward(const L1DistanceForward& a) {
    with_dtype(a.shape.dtype, [&](auto s) {
        using S = decltype(s);
        distance<S, false>(a.shape, static_cast<const S*>(a.m), nullptr, static_cast<S*>(a.output), a.scratch);
    });
}

void l1_distance_backward(const L1DistanceBackward& a) {
    with_dtype(a.shape.dtype, [&](auto s) {
        using S = decltype(s);
        distance_backward(a.shape, static_cast<const S*>(a.m), static_cast<const S*>(a.grad_output),
                          static_cast<S*>(a.grad_m), a.scratch);
    });
}

void l1_distance_tangent(const L1DistanceTangent& a) {
    with_dtype(a.shape.dtype, [&](auto s) {
        using S = decltype(s);
        distance<S, true>(a.shape, static_cast<const S*>(a.m), static_cast<const S*>(a.tangent),
                          static_cast<S*>(a.output), a.scratch);
    });
}

}  // namespace GANKERN_ISA
}  // namespace gankern
