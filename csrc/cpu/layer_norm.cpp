// Each row is read from memory once and stays in cache for the passes that follow its sums.
#include "gankern/layer_norm.h"

#include "gankern/parallel.h"
#include "kernels.h"
#include "norm_rows.h"
#include "vec.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

template <class S>
GANKERN_INLINE Vec<Acc<S>> load_weight(const S* weight, int64_t i, int lanes) {
    return weight ? load(weight + i, lanes, Acc<S>(0)) : splat(Acc<S>(1));
}

template <class S>
void forward(const LayerNormForward& a) {
    using A = Acc<S>;
    const int64_t size = a.shape.size;
    auto* weight = static_cast<const S*>(a.weight);
    auto* bias = static_cast<const S*>(a.bias);
    parallel_for(a.shape.rows, a.shape.threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            auto* x = static_cast<const S*>(a.input) + row * size;
            auto* y = static_cast<S*>(a.output) + row * size;
            row_moments(x, size, a.eps, a.mean[row], a.rstd[row]);
            Vec<A> center = splat(static_cast<A>(a.mean[row])), scale = splat(static_cast<A>(a.rstd[row]));
            for_each_vec<A>(size, [&](int64_t i, int lanes) {
                Vec<A> normalized = (load(x + i, lanes, A(0)) - center) * scale;
                Vec<A> shifted = bias ? load(bias + i, lanes, A(0)) : Vec<A>{};
                store(y + i, lanes, normalized * load_weight(weight, i, lanes) + shifted);
            });
        }
    });
}

// One row's values: x, its normalised form and what a derivative multiplies it by.
template <class S>
struct Row {
    using A = Acc<S>;
    const S *x, *grad, *weight;
    Vec<A> mean, rstd;

    template <class Args>
    Row(const Args& a, int64_t row)
        : x(static_cast<const S*>(a.input) + row * a.shape.size),
          grad(static_cast<const S*>(a.grad_output) + row * a.shape.size),
          weight(static_cast<const S*>(a.weight)),
          mean(splat(static_cast<A>(a.mean[row]))),
          rstd(splat(static_cast<A>(a.rstd[row]))) {}

    GANKERN_INLINE Vec<A> normalized(int64_t i, int lanes) const { return (load(x + i, lanes, A(0)) - mean) * rstd; }
    GANKERN_INLINE Vec<A> grad_output(int64_t i, int lanes) const { return load(grad + i, lanes, A(0)); }
    GANKERN_INLINE Vec<A> weighted(int64_t i, int lanes) const {
        return grad_output(i, lanes) * load_weight(weight, i, lanes);
    }
};

// Adds the parts [parts, size] of a parameter's gradient up.
template <class S>
void sum_parts(const LayerNormShape& shape, const Acc<S>* parts, void* out) {
    using A = Acc<S>;
    parallel_for((shape.size + kLanes<A> - 1) / kLanes<A>, shape.threads, [&](int64_t begin, int64_t end) {
        int64_t stop = end * kLanes<A> < shape.size ? end * kLanes<A> : shape.size;
        for_each_vec<A>(stop - begin * kLanes<A>, [&](int64_t offset, int lanes) {
            int64_t i = begin * kLanes<A> + offset;
            Vec<A> total{};
            for (int64_t k = 0; k < layer_norm_parts(shape.rows); ++k)
                total += load(parts + k * shape.size + i, lanes, A(0));
            store(static_cast<S*>(out) + i, lanes, total);
        });
    });
}

// Calls body(part, row) on every row, the rows of one part in order and on one thread.
template <class F>
void for_each_row(const LayerNormShape& shape, const F& body) {
    int64_t parts = layer_norm_parts(shape.rows);
    parallel_for(parts, shape.threads, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part)
            for (int64_t row = shape.rows * part / parts; row < shape.rows * (part + 1) / parts; ++row) body(part, row);
    });
}

template <class A>
GANKERN_INLINE void accumulate(A* at, int lanes, bool first, Vec<A> value) {
    store(at, lanes, first ? value : value + load(at, lanes, A(0)));
}

template <class S>
void backward(const LayerNormBackward& a) {
    using A = Acc<S>;
    const int64_t size = a.shape.size, parts = layer_norm_parts(a.shape.rows);
    auto* weight_parts = static_cast<A*>(a.scratch);
    A* bias_parts = weight_parts + parts * size;
    for_each_row(a.shape, [&](int64_t part, int64_t row) {
        Row<S> r(a, row);
        auto* dx = static_cast<S*>(a.grad_input) + row * size;
        double means[2];
        row_means<A>(size, means, [&](int64_t i, int lanes, Vec<A>(&sums)[2]) {
            Vec<A> u = r.weighted(i, lanes);
            sums[0] += u;
            sums[1] += u * r.normalized(i, lanes);
        });
        bool first = row == a.shape.rows * part / parts;
        for_each_vec<A>(size, [&](int64_t i, int lanes) {
            Vec<A> normalized = r.normalized(i, lanes);
            store(dx + i, lanes, r.rstd * project<A>(r.weighted(i, lanes), normalized, means[0], means[1]));
            if (a.grad_weight) {
                accumulate(weight_parts + part * size + i, lanes, first, r.grad_output(i, lanes) * normalized);
                accumulate(bias_parts + part * size + i, lanes, first, r.grad_output(i, lanes));
            }
        });
    });
    if (a.grad_weight) {
        sum_parts<S>(a.shape, weight_parts, a.grad_weight);
        sum_parts<S>(a.shape, bias_parts, a.grad_bias);
    }
}

template <class S>
void double_backward(const LayerNormDoubleBackward& a) {
    using A = Acc<S>;
    const int64_t size = a.shape.size, parts = layer_norm_parts(a.shape.rows);
    auto* weight_parts = static_cast<A*>(a.scratch);
    for_each_row(a.shape, [&](int64_t part, int64_t row) {
        Row<S> r(a, row);
        auto* v = static_cast<const S*>(a.tangent) + row * size;
        auto* dg = static_cast<S*>(a.grad_grad_output) + row * size;
        auto* dx = static_cast<S*>(a.grad_input) + row * size;
        enum { kV, kA, kVx, kAx, kVa, kMeans };
        double m[kMeans];
        row_means<A>(size, m, [&](int64_t i, int lanes, Vec<A>(&sums)[kMeans]) {
            Vec<A> u = r.weighted(i, lanes), t = load(v + i, lanes, A(0)), normalized = r.normalized(i, lanes);
            sums[kV] += t;
            sums[kA] += u;
            sums[kVx] += t * normalized;
            sums[kAx] += u * normalized;
            sums[kVa] += t * u;
        });
        Vec<A> curvature = splat(static_cast<A>(m[kVa] - m[kV] * m[kA] - m[kVx] * m[kAx]));
        Vec<A> p = splat(static_cast<A>(m[kVx])), q = splat(static_cast<A>(m[kAx]));
        bool first = row == a.shape.rows * part / parts;
        for_each_vec<A>(size, [&](int64_t i, int lanes) {
            Vec<A> normalized = r.normalized(i, lanes);
            Vec<A> pv = project<A>(load(v + i, lanes, A(0)), normalized, m[kV], m[kVx]);
            Vec<A> pa = project<A>(r.weighted(i, lanes), normalized, m[kA], m[kAx]);
            store(dx + i, lanes, -(r.rstd * r.rstd) * (curvature * normalized + q * pv + p * pa));
            store(dg + i, lanes, r.rstd * pv * load_weight(r.weight, i, lanes));
            if (a.grad_weight) {
                accumulate(weight_parts + part * size + i, lanes, first, r.grad_output(i, lanes) * (r.rstd * pv));
            }
        });
    });
    if (a.grad_weight) sum_parts<S>(a.shape, weight_parts, a.grad_weight);
}

}  // namespace

void layer_norm_forward(const LayerNormForward& a) {
    with_dtype(a.shape.dtype, [&](auto s) { forward<decltype(s)>(a); });
}

void layer_norm_backward(const LayerNormBackward& a) {
    with_dtype(a.shape.dtype, [&](auto s) { backward<decltype(s)>(a); });
}

void layer_norm_double_backward(const LayerNormDoubleBackward& a) {
    with_dtype(a.shape.dtype, [&](auto s) { double_backward<decltype(s)>(a); });
}

}  // namespace GANKERN_ISA
}  // namespace gankern
