// Every kernel on odd shapes, in buffers of exactly the size it may touch, against the formula written plainly. Meant
// for AddressSanitizer and UBSan: `make sanitize`.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels.h"

using namespace gankern;

namespace {

constexpr int kThreads = 2;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
std::mt19937 generator(0);
int failures = 0;

template <class S>
constexpr Dtype kDtype = std::is_same_v<S, double>  ? Dtype::kFloat64
                         : std::is_same_v<S, float> ? Dtype::kFloat32
                                                    : Dtype::kBFloat16;

double value(double x) { return x; }
double value(float x) { return x; }
double value(BFloat16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

void assign(double& to, double x) { to = x; }
void assign(float& to, double x) { to = static_cast<float>(x); }
void assign(BFloat16& to, double x) {
    float f = static_cast<float>(x);
    uint32_t bits;
    std::memcpy(&bits, &f, sizeof bits);
    to.bits = static_cast<uint16_t>(bits >> 16);
}

// A heap block of just n values: one element beyond it is an error that the sanitizer sees.
template <class S>
struct Buffer {
    std::unique_ptr<S[]> data;
    int64_t size;

    Buffer(int64_t n, double fill) : data(new S[static_cast<size_t>(n)]), size(n) {
        for (int64_t i = 0; i < n; ++i) assign(data[i], fill);
    }
    static Buffer random(int64_t n) {
        Buffer b(n, 0);
        std::normal_distribution<double> normal;
        for (int64_t i = 0; i < n; ++i) assign(b.data[i], normal(generator));
        return b;
    }
    double operator[](int64_t i) const { return value(data[i]); }
    S* get() { return data.get(); }
};

// Values that end where memory ends, or begin where it begins: tiles are loaded and stored past the sanitizer's eyes.
template <class S>
struct Fenced {
    Fenced(int64_t n, bool at_end) : values(n) {
        size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), bytes = static_cast<size_t>(n) * sizeof(S);
        size_t inner = (bytes + page - 1) / page * page;
        size = inner + 2 * page;
        base = static_cast<char*>(mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (inner && mprotect(base + page, inner, PROT_READ | PROT_WRITE) != 0) std::abort();
        data = reinterpret_cast<S*>(base + page + (at_end ? inner - bytes : 0));
        for (int64_t i = 0; i < n; ++i) assign(data[i], kNan);
    }
    ~Fenced() { munmap(base, size); }
    Fenced(const Fenced&) = delete;
    Fenced& operator=(const Fenced&) = delete;

    void copy(Buffer<S>& from) { std::memcpy(data, from.get(), static_cast<size_t>(values) * sizeof(S)); }
    double operator[](int64_t i) const { return value(data[i]); }

    int64_t values;
    size_t size;
    char* base;
    S* data;
};

template <class S>
double tolerance() {
    return std::is_same_v<S, double> ? 1e-10 : std::is_same_v<S, float> ? 2e-4 : 6e-2;
}

template <class S>
void expect_near(const std::string& what, double got, double want) {
    if (std::abs(got - want) <= tolerance<S>() * (1 + std::abs(want))) return;
    if (++failures <= 20) std::printf("FAILED %s: got %g, want %g\n", what.c_str(), got, want);
}

template <class S>
using AccOf = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class S>
void test_batch_norm_act(int64_t n, int64_t c, int64_t hw, bool channels_last, Activation activation) {
    using A = AccOf<S>;
    const double slope = 0.3, eps = 0.01;
    int64_t size = n * c * hw;
    BatchNormActShape shape{kDtype<S>, n, c, hw, channels_last, activation, slope, kThreads};
    auto x = Buffer<S>::random(size), dy = Buffer<S>::random(size);
    auto weight = Buffer<A>::random(c), bias = Buffer<A>::random(c);
    Buffer<S> y(size, kNan), dx(size, kNan);
    Buffer<A> mean(c, kNan), invstd(c, kNan), var(c, kNan), dweight(c, kNan), dbias(c, kNan);
    Buffer<double> scratch(batch_norm_act_scratch(c), kNan);
    kernels().batch_norm_act_forward({shape, x.get(), weight.get(), bias.get(), y.get(), mean.get(), invstd.get(),
                                      var.get(), scratch.get(), true, eps});
    kernels().batch_norm_act_backward({shape, dy.get(), x.get(), weight.get(), bias.get(), mean.get(), invstd.get(),
                                       dx.get(), dweight.get(), dbias.get(), scratch.get(), true});
    for (int64_t k = 0; k < c; ++k) {
        auto at = [&](int64_t i) { return channels_last ? i * c + k : (i / hw * c + k) * hw + i % hw; };
        double count = static_cast<double>(n * hw), m = 0, v = 0, db = 0, dw = 0;
        for (int64_t i = 0; i < n * hw; ++i) m += x[at(i)] / count;
        for (int64_t i = 0; i < n * hw; ++i) v += (x[at(i)] - m) * (x[at(i)] - m) / count;
        double r = 1 / std::sqrt(v + eps);
        std::vector<double> dz(static_cast<size_t>(n * hw)), normalized(dz.size());
        for (int64_t i = 0; i < n * hw; ++i) {
            double h = (x[at(i)] - m) * r, z = h * weight[k] + bias[k], out = z, d = 1;
            if (activation == Activation::kRelu) out = z > 0 ? z : 0, d = z > 0;
            if (activation == Activation::kLeakyRelu) out = z > 0 ? z : slope * z, d = z > 0 ? 1 : slope;
            if (activation == Activation::kTanh) out = std::tanh(z), d = 1 - out * out;
            expect_near<S>("batch_norm_act output", y[at(i)], out);
            // A kink that rounding may cross decides nothing here.
            if (std::abs(z) < 1e-6) d = kNan;
            normalized[static_cast<size_t>(i)] = h;
            dz[static_cast<size_t>(i)] = dy[at(i)] * d;
            db += dz[static_cast<size_t>(i)];
            dw += dz[static_cast<size_t>(i)] * h;
        }
        expect_near<S>("batch_norm_act var", var[k], v);
        expect_near<S>("batch_norm_act grad_bias", dbias[k] / count, db / count);
        expect_near<S>("batch_norm_act grad_weight", dweight[k] / count, dw / count);
        for (int64_t i = 0; i < n * hw; ++i) {
            size_t j = static_cast<size_t>(i);
            double want = weight[k] * r * (dz[j] - db / count - normalized[j] * dw / count);
            expect_near<S>("batch_norm_act grad_input", dx[at(i)], want);
        }
    }
}

template <class S>
void test_layer_norm(int64_t rows, int64_t size) {
    using A = AccOf<S>;
    const double eps = 0.1;
    LayerNormShape shape{kDtype<S>, rows, size, kThreads};
    auto x = Buffer<S>::random(rows * size), g = Buffer<S>::random(rows * size), v = Buffer<S>::random(rows * size);
    auto w = Buffer<S>::random(size), b = Buffer<S>::random(size);
    Buffer<S> y(rows * size, kNan), dx(rows * size, kNan), dw(size, kNan), db(size, kNan);
    Buffer<S> dg2(rows * size, kNan), dx2(rows * size, kNan), dw2(size, kNan);
    Buffer<double> mean(rows, kNan), rstd(rows, kNan);
    Buffer<A> scratch(2 * layer_norm_parts(rows) * size, kNan), scratch2(layer_norm_parts(rows) * size, kNan);
    kernels().layer_norm_forward({shape, x.get(), w.get(), b.get(), y.get(), mean.get(), rstd.get(), eps});
    kernels().layer_norm_backward(
        {shape, g.get(), x.get(), w.get(), mean.get(), rstd.get(), dx.get(), dw.get(), db.get(), scratch.get()});
    kernels().layer_norm_double_backward({shape, v.get(), g.get(), x.get(), w.get(), mean.get(), rstd.get(), dg2.get(),
                                          dx2.get(), dw2.get(), scratch2.get()});
    // The input gradient as a function of input and incoming gradient, for differences in float64.
    auto input_grad = [&](const std::vector<double>& xs, const std::vector<double>& gs) {
        double d = static_cast<double>(size), m = 0, s = 0, a = 0, ah = 0;
        for (double e : xs) m += e / d;
        for (double e : xs) s += (e - m) * (e - m) / d;
        double r = 1 / std::sqrt(s + eps);
        std::vector<double> out(xs.size());
        for (size_t i = 0; i < xs.size(); ++i) a += gs[i] * w[i] / d, ah += gs[i] * w[i] * (xs[i] - m) * r / d;
        for (size_t i = 0; i < xs.size(); ++i) out[i] = r * (gs[i] * w[i] - a - (xs[i] - m) * r * ah);
        return out;
    };
    for (int64_t row = 0; row < rows; ++row) {
        std::vector<double> xs, gs, vs;
        for (int64_t i = 0; i < size; ++i) {
            xs.push_back(x[row * size + i]), gs.push_back(g[row * size + i]), vs.push_back(v[row * size + i]);
        }
        auto along = [&] {
            auto grad = input_grad(xs, gs);
            double sum = 0;
            for (size_t i = 0; i < grad.size(); ++i) sum += grad[i] * vs[i];
            return sum;
        };
        auto want = input_grad(xs, gs);
        auto slope = [&](double& at) {
            const double h = 1e-5, kept = at;
            at = kept + h;
            double up = along();
            at = kept - h;
            double down = along();
            at = kept;
            return (up - down) / (2 * h);
        };
        for (int64_t i = 0; i < size; ++i) {
            size_t j = static_cast<size_t>(i);
            expect_near<S>("layer_norm output", y[row * size + i], (xs[j] - mean[row]) * rstd[row] * w[i] + b[i]);
            expect_near<S>("layer_norm grad_input", dx[row * size + i], want[j]);
            expect_near<float>("layer_norm d2 grad_output", dg2[row * size + i] / 10, slope(gs[j]) / 10);
            expect_near<float>("layer_norm d2 input", dx2[row * size + i] / 10, slope(xs[j]) / 10);
        }
    }
    for (int64_t i = 0; i < size; ++i) {
        double sum = 0;
        for (int64_t row = 0; row < rows; ++row) sum += g[row * size + i];
        expect_near<S>("layer_norm grad_bias", db[i], sum);
    }
}

// Against layer norm's kernel, which test_layer_norm holds to the formula, on rows with the weights spread over them.
template <class S>
void test_group_norm(int64_t n, int64_t groups, int64_t channels, int64_t inner, bool channels_last) {
    using A = AccOf<S>;
    const double eps = 0.1;
    const int64_t all = groups * channels, size = n * all * inner, row = channels * inner;
    GroupNormShape shape{kDtype<S>, n, groups, channels, inner, channels_last, kThreads};
    auto x = Buffer<S>::random(size), g = Buffer<S>::random(size), v = Buffer<S>::random(size);
    auto w = Buffer<S>::random(all), b = Buffer<S>::random(all);
    Buffer<S> y(size, kNan), dx(size, kNan), dw(all, kNan), db(all, kNan), dg2(size, kNan), dx2(size, kNan);
    Buffer<S> dw2(all, kNan);
    Buffer<double> mean(n * groups, kNan), rstd(n * groups, kNan), scratch(2 * n * all, kNan), scratch2(n * all, kNan);
    kernels().group_norm_forward({shape, x.get(), w.get(), b.get(), y.get(), mean.get(), rstd.get(), eps});
    kernels().group_norm_backward(
        {shape, g.get(), x.get(), w.get(), mean.get(), rstd.get(), dx.get(), dw.get(), db.get(), scratch.get()});
    kernels().group_norm_double_backward({shape, v.get(), g.get(), x.get(), w.get(), mean.get(), rstd.get(), dg2.get(),
                                          dx2.get(), dw2.get(), scratch2.get()});
    std::vector<double> sum_w(static_cast<size_t>(all)), sum_b(sum_w), sum_w2(sum_w);
    for (int64_t r = 0; r < n * groups; ++r) {
        auto place = [&](int64_t i) {
            int64_t c = r % groups * channels + i / inner;
            return channels_last ? (r / groups * inner + i % inner) * all + c : r * row + i;
        };
        Buffer<S> rx(row, 0), rg(row, 0), rv(row, 0), rw(row, 0), rb(row, 0), ry(row, 0), rdx(row, 0), rdw(row, 0);
        Buffer<S> rdb(row, 0), rdg2(row, 0), rdx2(row, 0), rdw2(row, 0);
        Buffer<double> rmean(1, 0), rrstd(1, 0);
        Buffer<A> rscratch(2 * row, 0);
        for (int64_t i = 0; i < row; ++i) {
            int64_t c = r % groups * channels + i / inner;
            assign(rx.data[i], x[place(i)]), assign(rg.data[i], g[place(i)]), assign(rv.data[i], v[place(i)]);
            assign(rw.data[i], w[c]), assign(rb.data[i], b[c]);
        }
        LayerNormShape rows{kDtype<S>, 1, row, 1};
        kernels().layer_norm_forward({rows, rx.get(), rw.get(), rb.get(), ry.get(), rmean.get(), rrstd.get(), eps});
        kernels().layer_norm_backward({rows, rg.get(), rx.get(), rw.get(), rmean.get(), rrstd.get(), rdx.get(),
                                       rdw.get(), rdb.get(), rscratch.get()});
        kernels().layer_norm_double_backward({rows, rv.get(), rg.get(), rx.get(), rw.get(), rmean.get(), rrstd.get(),
                                              rdg2.get(), rdx2.get(), rdw2.get(), rscratch.get()});
        for (int64_t i = 0; i < row; ++i) {
            size_t c = static_cast<size_t>(r % groups * channels + i / inner);
            expect_near<S>("group_norm output", y[place(i)], ry[i]);
            expect_near<S>("group_norm grad_input", dx[place(i)], rdx[i]);
            expect_near<S>("group_norm d2 grad_output", dg2[place(i)], rdg2[i]);
            expect_near<S>("group_norm d2 input", dx2[place(i)] / 4, rdx2[i] / 4);
            sum_w[c] += rdw[i], sum_b[c] += rdb[i], sum_w2[c] += rdw2[i];
        }
    }
    double count = static_cast<double>(n * inner);
    for (int64_t c = 0; c < all; ++c) {
        size_t k = static_cast<size_t>(c);
        expect_near<S>("group_norm grad_weight", dw[c] / count, sum_w[k] / count);
        expect_near<S>("group_norm grad_bias", db[c] / count, sum_b[k] / count);
        expect_near<S>("group_norm d2 weight", dw2[c] / count, sum_w2[k] / count);
    }
}

// Against group norm's kernel, on one sample whose groups are the channels of the batch.
template <class S>
void test_batch_norm(int64_t n, int64_t channels, int64_t inner, bool channels_last) {
    const double eps = 0.1, count = static_cast<double>(n * inner);
    const int64_t row = n * inner, size = channels * row;
    BatchNormShape shape{kDtype<S>, n, channels, inner, channels_last, kThreads};
    auto x = Buffer<S>::random(size), g = Buffer<S>::random(size), v = Buffer<S>::random(size);
    auto w = Buffer<S>::random(channels), b = Buffer<S>::random(channels);
    Buffer<S> y(size, kNan), dx(size, kNan), dw(channels, kNan), db(channels, kNan), dg2(size, kNan), dx2(size, kNan);
    Buffer<S> dw2(channels, kNan);
    Buffer<double> mean(channels, kNan), rstd(channels, kNan), var(channels, kNan);
    kernels().batch_norm_forward({shape, x.get(), w.get(), b.get(), y.get(), mean.get(), rstd.get(), var.get(), eps});
    kernels().batch_norm_backward(
        {shape, g.get(), x.get(), w.get(), mean.get(), rstd.get(), dx.get(), dw.get(), db.get()});
    kernels().batch_norm_double_backward(
        {shape, v.get(), g.get(), x.get(), w.get(), mean.get(), rstd.get(), dg2.get(), dx2.get(), dw2.get()});
    auto place = [&](int64_t i) {
        const int64_t c = i / row, sample = i % row / inner, value = i % inner;
        return channels_last ? (sample * inner + value) * channels + c : (sample * channels + c) * inner + value;
    };
    Buffer<S> rx(size, 0), rg(size, 0), rv(size, 0), ry(size, 0), rdx(size, 0), rdw(channels, 0), rdb(channels, 0);
    Buffer<S> rdg2(size, 0), rdx2(size, 0), rdw2(channels, 0);
    Buffer<double> rmean(channels, 0), rrstd(channels, 0), scratch(2 * channels, 0);
    for (int64_t i = 0; i < size; ++i)
        assign(rx.data[i], x[place(i)]), assign(rg.data[i], g[place(i)]), assign(rv.data[i], v[place(i)]);
    GroupNormShape rows{kDtype<S>, 1, channels, 1, row, false, 1};
    kernels().group_norm_forward({rows, rx.get(), w.get(), b.get(), ry.get(), rmean.get(), rrstd.get(), eps});
    kernels().group_norm_backward(
        {rows, rg.get(), rx.get(), w.get(), rmean.get(), rrstd.get(), rdx.get(), rdw.get(), rdb.get(), scratch.get()});
    kernels().group_norm_double_backward({rows, rv.get(), rg.get(), rx.get(), w.get(), rmean.get(), rrstd.get(),
                                          rdg2.get(), rdx2.get(), rdw2.get(), scratch.get()});
    for (int64_t i = 0; i < size; ++i) {
        expect_near<S>("batch_norm output", y[place(i)], ry[i]);
        expect_near<S>("batch_norm grad_input", dx[place(i)], rdx[i]);
        expect_near<S>("batch_norm d2 grad_output", dg2[place(i)], rdg2[i]);
        expect_near<S>("batch_norm d2 input", dx2[place(i)] / 4, rdx2[i] / 4);
    }
    for (int64_t c = 0; c < channels; ++c) {
        expect_near<S>("batch_norm mean", mean[c], rmean[c]);
        expect_near<S>("batch_norm rstd", rstd[c], rrstd[c]);
        expect_near<S>("batch_norm var", var[c], (1 / (rrstd[c] * rrstd[c]) - eps) * count / (count - 1));
        expect_near<S>("batch_norm grad_weight", dw[c] / count, rdw[c] / count);
        expect_near<S>("batch_norm grad_bias", db[c] / count, rdb[c] / count);
        expect_near<S>("batch_norm d2 weight", dw2[c] / count, rdw2[c] / count);
    }
}

template <class S>
void test_avg_pool(int64_t planes, int64_t height, int64_t width, int64_t kh, int64_t kw) {
    int64_t rows = height / kh, columns = width / kw;
    auto x = Buffer<S>::random(planes * height * width), g = Buffer<S>::random(planes * rows * columns);
    Buffer<S> y(planes * rows * columns, kNan), dx(planes * height * width, kNan);
    kernels().avg_pool_forward({kDtype<S>, planes, height, width, kh, kw, x.get(), y.get(), kThreads});
    kernels().avg_pool_backward({kDtype<S>, planes, height, width, kh, kw, g.get(), dx.get(), kThreads});
    std::vector<double> means(static_cast<size_t>(planes * rows * columns));
    for (int64_t i = 0; i < planes * height * width; ++i) {
        int64_t row = i / width % height / kh, column = i % width / kw;
        bool inside = row < rows && column < columns;
        int64_t at = (i / (width * height) * rows + row) * columns + column;
        double part = 1 / static_cast<double>(kh * kw);
        if (inside) means[static_cast<size_t>(at)] += x[i] * part;
        expect_near<S>("avg_pool grad_input", dx[i], inside ? g[at] * part : 0);
    }
    for (size_t i = 0; i < means.size(); ++i) expect_near<S>("avg_pool", y[static_cast<int64_t>(i)], means[i]);
}

template <class S>
void test_penalty(int64_t n, int64_t size) {
    using A = AccOf<S>;
    auto real = Buffer<S>::random(n * size), fake = Buffer<S>::random(n * size);
    Buffer<A> alpha(n, 0.25);
    Buffer<S> points(n * size, kNan), cotangent(n * size, kNan), loss(1, kNan);
    Buffer<double> scratch(n, kNan);
    kernels().interpolate({kDtype<S>, n, size, real.get(), fake.get(), alpha.get(), points.get(), kThreads});
    kernels().penalty_tail(
        {kDtype<S>, n, size, real.get(), cotangent.get(), loss.get(), scratch.get(), 10, 1, false, false, kThreads});
    double total = 0;
    for (int64_t i = 0; i < n; ++i) {
        double square = 0;
        for (int64_t j = i * size; j < (i + 1) * size; ++j) square += real[j] * real[j];
        double norm = std::sqrt(square);
        total += 10 * (norm - 1) * (norm - 1) / static_cast<double>(n);
        for (int64_t j = i * size; j < (i + 1) * size; ++j) {
            expect_near<S>("interpolate", points[j], 0.25 * real[j] + 0.75 * fake[j]);
            expect_near<S>("penalty_tail cotangent", cotangent[j],
                           20 * (norm - 1) / norm * real[j] / static_cast<double>(n));
        }
    }
    expect_near<S>("penalty_tail loss", loss[0], total);
}

template <class S>
void test_lists(const std::vector<int64_t>& sizes) {
    const double bound = 0.5, lr = 0.1, alpha = 0.9, eps = 0.1;
    std::vector<Buffer<S>> clipped, params, grads, averages;
    std::vector<void*> clipped_at, params_at, averages_at;
    std::vector<const void*> grads_at;
    for (int64_t size : sizes) {
        clipped.push_back(Buffer<S>::random(size));
        params.push_back(Buffer<S>::random(size));
        grads.push_back(Buffer<S>::random(size));
        averages.push_back(Buffer<S>(size, 0.5));
    }
    std::vector<std::vector<double>> before(sizes.size()), clip_before(sizes.size());
    for (size_t t = 0; t < sizes.size(); ++t) {
        for (int64_t i = 0; i < sizes[t]; ++i) {
            before[t].push_back(params[t][i]);
            clip_before[t].push_back(clipped[t][i]);
        }
        clipped_at.push_back(clipped[t].get());
        params_at.push_back(params[t].get());
        grads_at.push_back(grads[t].get());
        averages_at.push_back(averages[t].get());
    }
    TensorList list{kDtype<S>, static_cast<int64_t>(sizes.size()), sizes.data(), kThreads};
    kernels().clip_weights({list, clipped_at.data(), bound});
    kernels().rmsprop_clip({list, params_at.data(), grads_at.data(), averages_at.data(), nullptr, nullptr, lr, alpha,
                            eps, 0, 0, false, bound});
    auto clamp = [&](double x) { return std::fmin(std::fmax(x, -bound), bound); };
    for (size_t t = 0; t < sizes.size(); ++t)
        for (int64_t i = 0; i < sizes[t]; ++i) {
            double g = grads[t][i], average = alpha * 0.5 + (1 - alpha) * g * g;
            size_t j = static_cast<size_t>(i);
            expect_near<S>("clip_weights", clipped[t][i], clamp(clip_before[t][j]));
            expect_near<S>("rmsprop square_avg", averages[t][i], average);
            expect_near<S>("rmsprop param", params[t][i], clamp(before[t][j] - lr * g / (std::sqrt(average) + eps)));
        }
}

// Scratch comes as 64-byte lines.
struct Lines {
    void* at;
    explicit Lines(int64_t lines) : at(std::aligned_alloc(64, static_cast<size_t>(lines > 0 ? lines : 1) * 64)) {}
    ~Lines() { std::free(at); }
    Lines(const Lines&) = delete;
    Lines& operator=(const Lines&) = delete;
};

template <class S>
void test_minibatch(int64_t n, int64_t b, int64_t c) {
    MinibatchShape shape{kDtype<S>, n, b, c, kThreads, kernels().vector_lanes(kDtype<S>)};
    auto m = Buffer<S>::random(n * b * c), g = Buffer<S>::random(n * b), v = Buffer<S>::random(n * b * c);
    auto gd = Buffer<S>::random(n * n * b);
    Buffer<S> out(n * b, kNan), dm(n * b * c, kNan), dg2(n * b, kNan), dm2(n * b * c, kNan);
    Buffer<S> distances(n * n * b, kNan), dmd(n * b * c, kNan), tangent(n * n * b, kNan);
    {
        Lines scratch(minibatch_discrimination_scratch(shape));
        kernels().minibatch_discrimination_forward({shape, m.get(), out.get(), scratch.at, false});
        kernels().minibatch_discrimination_backward({shape, g.get(), m.get(), dm.get(), scratch.at});
        kernels().minibatch_discrimination_double_backward(
            {shape, v.get(), g.get(), m.get(), dg2.get(), dm2.get(), scratch.at});
    }
    {
        Lines scratch(l1_distance_scratch(shape));
        kernels().l1_distance_forward({shape, m.get(), distances.get(), scratch.at});
        kernels().l1_distance_backward({shape, gd.get(), m.get(), dmd.get(), scratch.at});
        kernels().l1_distance_tangent({shape, v.get(), m.get(), tangent.get(), scratch.at});
    }
    for (int64_t k = 0; k < b; ++k)
        for (int64_t i = 0; i < n; ++i) {
            double o = 0, dg = 0;
            std::vector<double> first(static_cast<size_t>(c)), second(first.size()), third(first.size());
            for (int64_t j = 0; j < n; ++j) {
                double distance = 0, t = 0;
                auto at = [&](int64_t s, int64_t l) { return (s * b + k) * c + l; };
                auto sign = [&](int64_t l) {
                    double d = m[at(i, l)] - m[at(j, l)];
                    return d > 0 ? 1.0 : d < 0 ? -1.0 : 0.0;
                };
                for (int64_t l = 0; l < c; ++l) {
                    distance += std::abs(m[at(i, l)] - m[at(j, l)]);
                    t += (v[at(i, l)] - v[at(j, l)]) * sign(l);
                }
                expect_near<S>("l1_distance", distances[(i * n + j) * b + k], distance);
                expect_near<S>("l1_distance tangent", tangent[(i * n + j) * b + k] / 4, t / 4);
                double e = i == j ? 0 : std::exp(-distance), w = g[i * b + k] + g[j * b + k];
                o += e;
                dg -= e * t;
                for (int64_t l = 0; l < c; ++l) {
                    size_t s = static_cast<size_t>(l);
                    first[s] -= w * e * sign(l);
                    second[s] += w * e * t * sign(l);
                    third[s] += (gd[(i * n + j) * b + k] + gd[(j * n + i) * b + k]) * sign(l);
                }
            }
            expect_near<S>("minibatch_discrimination", out[i * b + k], o);
            expect_near<S>("minibatch_discrimination d2 grad_output", dg2[i * b + k], dg);
            for (int64_t l = 0; l < c; ++l) {
                size_t s = static_cast<size_t>(l);
                int64_t at = (i * b + k) * c + l;
                expect_near<S>("minibatch_discrimination grad_m", dm[at], first[s]);
                expect_near<S>("minibatch_discrimination d2 m", dm2[at], second[s]);
                expect_near<S>("l1_distance grad_m", dmd[at] / 8, third[s] / 8);
            }
        }
}

// Calls f(output pixel, input pixel, tap) for all that a convolution multiplies; pixels count over all images.
template <class F>
void for_each_product(const ConvShape& s, const F& f) {
    for (int64_t n = 0; n < s.n; ++n)
        for (int64_t oy = 0; oy < s.out_height; ++oy)
            for (int64_t ox = 0; ox < s.out_width; ++ox)
                for (int64_t i = 0; i < s.kernel[0]; ++i)
                    for (int64_t j = 0; j < s.kernel[1]; ++j) {
                        int64_t y = oy * s.stride[0] - s.padding[0] + i * s.dilation[0];
                        int64_t x = ox * s.stride[1] - s.padding[1] + j * s.dilation[1];
                        if (y >= 0 && y < s.height && x >= 0 && x < s.width)
                            f((n * s.out_height + oy) * s.out_width + ox, (n * s.height + y) * s.width + x,
                              i * s.kernel[1] + j);
                    }
}

struct ConvCase {
    int64_t n, height, width, channels, out_channels, kernel[2], stride[2], padding[2], dilation[2];

    ConvShape shape(bool channels_last, int64_t sum_block) const {
        int64_t out[2];
        for (int d = 0; d < 2; ++d)
            out[d] = ((d ? width : height) + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) / stride[d] + 1;
        int64_t taps = kernel[0] * kernel[1], c = channels;
        ConvShape s{n,
                    height,
                    width,
                    channels,
                    out[0],
                    out[1],
                    out_channels,
                    {kernel[0], kernel[1]},
                    {stride[0], stride[1]},
                    {padding[0], padding[1]},
                    {dilation[0], dilation[1]},
                    {taps * c, channels_last ? 1 : taps, kernel[1] * (channels_last ? c : 1), channels_last ? c : 1},
                    sum_block,
                    kThreads};
        return s;
    }
};

// An activation's value at z, or with the output y given the product of z with its derivative there.
double finished(const ConvFinish& finish, double z, const double* y) {
    if (finish.activation == Activation::kNone) return z;
    if (finish.activation == Activation::kTanh) return y ? z * (1 - *y * *y) : std::tanh(z);
    double slope = finish.activation == Activation::kLeakyRelu ? finish.negative_slope : 0.0;
    return (y ? *y : z) > 0 ? z : z * slope;
}

void test_conv(const ConvCase& given, bool channels_last, int64_t sum_block, Activation activation) {
    ConvShape s = given.shape(channels_last, sum_block);
    int64_t pixels = s.n * s.height * s.width, out_pixels = s.n * s.out_height * s.out_width;
    int64_t taps = s.kernel[0] * s.kernel[1], c = s.channels, k = s.out_channels;
    auto x = Buffer<float>::random(pixels * c), w = Buffer<float>::random(k * c * taps);
    auto bias = Buffer<float>::random(k), dy = Buffer<float>::random(out_pixels * k);
    Buffer<float> y(out_pixels * k, kNan), dx(pixels * c, kNan), dw(k * c * taps, kNan);
    Buffer<float> scratch(conv_forward_scratch(s), kNan), scratch2(conv_input_grad_scratch(s), kNan);
    Buffer<float> scratch3(conv_weight_grad_scratch(s), kNan);
    auto scale = Buffer<float>::random(k), shift = Buffer<float>::random(k), offset = Buffer<float>::random(c);
    ConvFinish finish{activation, 0.25f, nullptr, scale.get(), shift.get()};
    ConvFinish derivative{activation, 0.25f, x.get(), nullptr, nullptr};
    kernels().conv_forward({s, finish, x.get(), w.get(), bias.get(), y.get(), scratch.get()});
    kernels().conv_input_grad({s, derivative, dy.get(), w.get(), offset.get(), dx.get(), scratch2.get()});
    kernels().conv_weight_grad({s, dy.get(), x.get(), dw.get(), scratch3.get()});
    std::vector<double> want_y(static_cast<size_t>(y.size)), want_dx(static_cast<size_t>(dx.size));
    std::vector<double> want_dw(static_cast<size_t>(dw.size));
    auto at = [&](int64_t out, int64_t in, int64_t tap) {
        return static_cast<size_t>(out * s.weight_strides[0] + in * s.weight_strides[1] +
                                   tap / s.kernel[1] * s.weight_strides[2] + tap % s.kernel[1] * s.weight_strides[3]);
    };
    for (int64_t i = 0; i < y.size; ++i) want_y[static_cast<size_t>(i)] = bias[i % k];
    for_each_product(s, [&](int64_t out, int64_t in, int64_t tap) {
        for (int64_t o = 0; o < k; ++o)
            for (int64_t i = 0; i < c; ++i) {
                size_t weight = at(o, i, tap);
                want_y[static_cast<size_t>(out * k + o)] += x[in * c + i] * w[static_cast<int64_t>(weight)];
                want_dx[static_cast<size_t>(in * c + i)] += dy[out * k + o] * w[static_cast<int64_t>(weight)];
                want_dw[weight] += dy[out * k + o] * x[in * c + i];
            }
    });
    for (int64_t i = 0; i < y.size; ++i) {
        double z = want_y[static_cast<size_t>(i)] * scale[i % k] + shift[i % k];
        expect_near<float>("conv output", y[i], finished(finish, z, nullptr));
    }
    for (int64_t i = 0; i < dx.size; ++i) {
        double activated = x[i];
        double sum = want_dx[static_cast<size_t>(i)] + offset[i % c];
        expect_near<float>("conv input", dx[i], finished(derivative, sum, &activated));
    }
    for (int64_t i = 0; i < dw.size; ++i) expect_near<float>("conv weight", dw[i], want_dw[static_cast<size_t>(i)]);
}

void test_conv_bfloat16(const ConvCase& given, bool channels_last, Activation activation) {
    ConvShape s = given.shape(channels_last, 0);
    int64_t pixels = s.n * s.height * s.width, out_pixels = s.n * s.out_height * s.out_width;
    int64_t taps = s.kernel[0] * s.kernel[1], c = s.channels, k = s.out_channels;
    auto x = Buffer<BFloat16>::random(pixels * c), dy = Buffer<BFloat16>::random(out_pixels * k);
    auto rounded = Buffer<BFloat16>::random(k * c * taps);
    auto bias = Buffer<float>::random(k), offset = Buffer<float>::random(c);
    auto scale = Buffer<float>::random(k), shift = Buffer<float>::random(k);
    std::vector<double> want_y(static_cast<size_t>(dy.size)), want_dx(static_cast<size_t>(x.size));
    std::vector<double> want_dw(static_cast<size_t>(rounded.size));
    for_each_product(s, [&](int64_t out, int64_t in, int64_t tap) {
        int64_t at = tap / s.kernel[1] * s.weight_strides[2] + tap % s.kernel[1] * s.weight_strides[3];
        for (int64_t o = 0; o < k; ++o)
            for (int64_t i = 0; i < c; ++i) {
                int64_t weight = at + o * s.weight_strides[0] + i * s.weight_strides[1];
                want_y[static_cast<size_t>(out * k + o)] += x[in * c + i] * rounded[weight];
                want_dx[static_cast<size_t>(in * c + i)] += dy[out * k + o] * rounded[weight];
                want_dw[static_cast<size_t>(weight)] += dy[out * k + o] * x[in * c + i];
            }
    });
    for (bool at_end : {false, true}) {
        Fenced<BFloat16> fx(x.size, at_end), fdy(dy.size, at_end), y(dy.size, at_end), dx(x.size, at_end);
        Fenced<float> w(rounded.size, at_end), dw(rounded.size, at_end);
        fx.copy(x), fdy.copy(dy);
        for (int64_t i = 0; i < w.values; ++i) w.data[i] = static_cast<float>(rounded[i]);
        Fenced<float> scratch(conv_bfloat16_forward_scratch(s), at_end);
        Fenced<float> scratch2(conv_bfloat16_input_grad_scratch(s), at_end);
        Fenced<float> scratch3(conv_bfloat16_weight_grad_scratch(s), at_end);
        ConvBFloat16Finish finish{activation, 0.25f, nullptr, scale.get(), shift.get()};
        ConvBFloat16Finish derivative{activation, 0.25f, fx.data, nullptr, nullptr};
        const MatrixKernels& run = *matrix_kernels();
        run.conv_bfloat16_forward({s, finish, fx.data, w.data, bias.get(), y.data, scratch.data});
        run.conv_bfloat16_input_grad({s, derivative, fdy.data, w.data, offset.get(), dx.data, scratch2.data});
        run.conv_bfloat16_weight_grad({s, fdy.data, fx.data, dw.data, scratch3.data});
        ConvFinish plain{activation, 0.25f, nullptr, nullptr, nullptr};
        for (int64_t i = 0; i < dy.size; ++i) {
            double z = (want_y[static_cast<size_t>(i)] + bias[i % k]) * scale[i % k] + shift[i % k];
            expect_near<BFloat16>("bfloat16 conv output", y[i], finished(plain, z, nullptr));
        }
        for (int64_t i = 0; i < x.size; ++i) {
            double activated = x[i], sum = want_dx[static_cast<size_t>(i)] + offset[i % c];
            expect_near<BFloat16>("bfloat16 conv input", dx[i], finished(plain, sum, &activated));
        }
        for (int64_t i = 0; i < w.values; ++i)
            expect_near<float>("bfloat16 conv weight", dw[i], want_dw[static_cast<size_t>(i)]);
    }
}

template <class S>
void test_stem_input_grad(const ConvCase& given) {
    ConvShape s = given.shape(true, 0);
    int64_t pixels = s.n * s.height * s.width, out_pixels = s.n * s.out_height * s.out_width;
    int64_t taps = s.kernel[0] * s.kernel[1], c = s.channels, k = s.out_channels;
    auto w = Buffer<S>::random(k * c * taps), dy = Buffer<S>::random(out_pixels * k);
    Buffer<S> dx(pixels * c, kNan), scratch(stem_input_grad_scratch(taps * c, k), kNan);
    kernels().stem_input_grad({kDtype<S>,
                               s.n,
                               s.height,
                               s.width,
                               c,
                               s.out_height,
                               s.out_width,
                               k,
                               {s.kernel[0], s.kernel[1]},
                               {s.stride[0], s.stride[1]},
                               {s.padding[0], s.padding[1]},
                               {s.dilation[0], s.dilation[1]},
                               dy.get(),
                               w.get(),
                               dx.get(),
                               scratch.get(),
                               kThreads});
    std::vector<double> want(static_cast<size_t>(dx.size));
    for_each_product(s, [&](int64_t out, int64_t in, int64_t tap) {
        for (int64_t o = 0; o < k; ++o)
            for (int64_t i = 0; i < c; ++i)
                want[static_cast<size_t>(in * c + i)] += dy[out * k + o] * w[(o * taps + tap) * c + i];
    });
    for (int64_t i = 0; i < dx.size; ++i) expect_near<S>("stem input", dx[i], want[static_cast<size_t>(i)]);
}

template <class S>
void test_stems() {
    if constexpr (!std::is_same_v<S, BFloat16>) {
        test_stem_input_grad<S>({2, 9, 8, 3, 5, {4, 4}, {2, 2}, {1, 1}, {1, 1}});
        test_stem_input_grad<S>({3, 7, 9, 1, 16, {5, 3}, {2, 1}, {2, 0}, {2, 3}});
        test_stem_input_grad<S>({1, 3, 3, 2, 7, {3, 3}, {1, 1}, {4, 4}, {1, 1}});
    }
}

void test_convs() {
    const ConvCase cases[] = {
        {2, 9, 8, 3, 5, {4, 4}, {2, 2}, {1, 1}, {1, 1}},     {3, 7, 9, 1, 16, {5, 3}, {2, 1}, {2, 0}, {2, 3}},
        {1, 5, 6, 4, 1, {1, 1}, {3, 2}, {0, 0}, {1, 1}},     {9, 8, 8, 20, 70, {4, 4}, {2, 2}, {1, 1}, {1, 1}},
        {2, 40, 11, 33, 20, {3, 3}, {1, 1}, {1, 1}, {1, 1}}, {3, 5, 5, 67, 17, {3, 2}, {3, 2}, {0, 1}, {1, 2}},
        {2, 3, 3, 9, 7, {3, 3}, {1, 1}, {4, 4}, {1, 1}},     {2, 8, 8, 6, 50, {2, 2}, {3, 3}, {0, 0}, {1, 1}},
        {17, 2, 2, 16, 65, {3, 3}, {1, 1}, {1, 1}, {1, 1}},  {4, 4, 4, 80, 1, {4, 4}, {1, 1}, {0, 0}, {1, 1}},
        {5, 30, 28, 32, 48, {4, 4}, {2, 2}, {1, 1}, {1, 1}}, {4, 33, 35, 48, 32, {4, 4}, {2, 2}, {0, 3}, {1, 1}},
        {6, 15, 14, 32, 48, {3, 3}, {1, 1}, {1, 0}, {1, 1}}, {3, 19, 19, 48, 80, {3, 3}, {1, 1}, {1, 2}, {1, 1}},
    };
    const Activation activations[] = {Activation::kNone, Activation::kRelu, Activation::kLeakyRelu, Activation::kTanh};
    int next = 0;
    for (const ConvCase& c : cases)
        for (bool channels_last : {false, true})
            for (int64_t sum_block : {0, 16}) test_conv(c, channels_last, sum_block, activations[next++ % 4]);
    if (!matrix_kernels()) {
        std::printf("skipped: bfloat16 convolutions, which need matrix units (AMX) beside AVX-512\n");
        return;
    }
    const ConvCase more[] = {
        {33, 6, 6, 64, 34, {4, 4}, {2, 2}, {1, 1}, {1, 1}},  {32, 4, 5, 32, 40, {3, 3}, {1, 1}, {1, 1}, {1, 1}},
        {1, 9, 34, 32, 40, {3, 3}, {1, 1}, {1, 1}, {1, 1}},  {1, 3, 4, 544, 33, {2, 2}, {1, 1}, {0, 1}, {1, 1}},
        {19, 12, 16, 3, 48, {4, 4}, {2, 2}, {1, 1}, {1, 1}}, {0, 4, 4, 32, 32, {4, 4}, {2, 2}, {1, 1}, {1, 1}},
    };
    for (bool channels_last : {false, true}) {
        for (const ConvCase& c : cases) test_conv_bfloat16(c, channels_last, activations[next++ % 4]);
        for (const ConvCase& c : more) test_conv_bfloat16(c, channels_last, activations[next++ % 4]);
    }
}

template <class S>
void test_all() {
    for (auto activation : {Activation::kNone, Activation::kRelu, Activation::kLeakyRelu, Activation::kTanh})
        for (bool channels_last : {false, true}) {
            // The formula's kinks are not bfloat16's.
            if (std::is_same_v<S, BFloat16> && activation != Activation::kNone) continue;
            test_batch_norm_act<S>(3, 5, 7, channels_last, activation);
            test_batch_norm_act<S>(2, 17, 33, channels_last, activation);
            test_batch_norm_act<S>(41, 3, 1, channels_last, activation);
        }
    if (!std::is_same_v<S, BFloat16>) {
        test_layer_norm<S>(1, 9);
        test_layer_norm<S>(19, 37);
    }
    for (bool channels_last : {false, true}) {
        test_group_norm<S>(1, 1, 1, 2, channels_last);
        test_group_norm<S>(3, 2, 3, 37, channels_last);
        test_group_norm<S>(2, 19, 1, 5, channels_last);
        test_batch_norm<S>(2, 1, 1, channels_last);
        test_batch_norm<S>(3, 5, 37, channels_last);
        test_batch_norm<S>(41, 17, 5, channels_last);
        test_batch_norm<S>(9, 64, 33, channels_last);
    }
    test_avg_pool<S>(1, 1, 1, 1, 1);
    test_avg_pool<S>(3, 5, 37, 2, 2);
    test_avg_pool<S>(2, 4, 19, 4, 3);
    test_penalty<S>(1, 1);
    test_penalty<S>(5, 67);
    test_stems<S>();
    test_lists<S>({0, 1, 15, 16, 17, 40000});
    test_minibatch<S>(1, 1, 1);
    test_minibatch<S>(7, 3, 5);
    test_minibatch<S>(37, 2, 3);
    test_minibatch<S>(20, 19, 1);
}

}  // namespace

int main() {
    try {
        cpu_isa();
    } catch (const std::runtime_error& error) {
        std::printf("skipped: %s\n", error.what());
        return 77;
    }
    test_convs();
    test_all<float>();
    test_all<double>();
    test_all<BFloat16>();
    std::printf("%s: %d failures\n", cpu_isa(), failures);
    return failures != 0;
}
