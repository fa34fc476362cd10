// The only file that knows Python. Tensors arrive as addresses: shapes, dtypes and layouts were checked in gankern.ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "gankern/parallel.h"
#include "gankern/workspace.h"
#include "kernels.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

using namespace gankern;

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }
float* floats(uintptr_t address) { return static_cast<float*>(pointer(address)); }
BFloat16* halves(uintptr_t address) { return static_cast<BFloat16*>(pointer(address)); }

void bind_avg_pool(py::module_& m) {
    auto bind = [&m](const char* name, void (*KernelTable::*kernel)(const AvgPool&)) {
        m.def(
            name,
            [kernel](int dtype, int64_t planes, int64_t height, int64_t width, int64_t kernel_height,
                     int64_t kernel_width, uintptr_t from, uintptr_t to, int threads) {
                py::gil_scoped_release release;
                (kernels().*kernel)({static_cast<Dtype>(dtype), planes, height, width, kernel_height, kernel_width,
                                     pointer(from), pointer(to), threads});
            },
            "dtype"_a, "planes"_a, "height"_a, "width"_a, "kernel_height"_a, "kernel_width"_a, "from"_a, "to"_a,
            "threads"_a);
    };
    bind("avg_pool_forward", &KernelTable::avg_pool_forward);
    bind("avg_pool_backward", &KernelTable::avg_pool_backward);
}

void bind_batch_norm(py::module_& m) {
    py::class_<BatchNormShape>(m, "BatchNormShape")
        .def(py::init([](int dtype, int64_t samples, int64_t channels, int64_t inner, bool channels_last, int threads) {
                 return BatchNormShape{static_cast<Dtype>(dtype), samples, channels, inner, channels_last, threads};
             }),
             "dtype"_a, "samples"_a, "channels"_a, "inner"_a, "channels_last"_a, "threads"_a);
    m.def(
        "batch_norm_forward",
        [](const BatchNormShape& shape, uintptr_t input, uintptr_t weight, uintptr_t bias, uintptr_t output,
           uintptr_t mean, uintptr_t rstd, uintptr_t var, double eps) {
            py::gil_scoped_release release;
            kernels().batch_norm_forward({shape, pointer(input), pointer(weight), pointer(bias), pointer(output),
                                          static_cast<double*>(pointer(mean)), static_cast<double*>(pointer(rstd)),
                                          static_cast<double*>(pointer(var)), eps});
        },
        "shape"_a, "input"_a, "weight"_a, "bias"_a, "output"_a, "mean"_a, "rstd"_a, "var"_a, "eps"_a);
    m.def(
        "batch_norm_backward",
        [](const BatchNormShape& shape, uintptr_t grad_output, uintptr_t input, uintptr_t weight, uintptr_t mean,
           uintptr_t rstd, uintptr_t grad_input, uintptr_t grad_weight, uintptr_t grad_bias) {
            py::gil_scoped_release release;
            kernels().batch_norm_backward({shape, pointer(grad_output), pointer(input), pointer(weight),
                                           static_cast<double*>(pointer(mean)), static_cast<double*>(pointer(rstd)),
                                           pointer(grad_input), pointer(grad_weight), pointer(grad_bias)});
        },
        "shape"_a, "grad_output"_a, "input"_a, "weight"_a, "mean"_a, "rstd"_a, "grad_input"_a, "grad_weight"_a,
        "grad_bias"_a);
    m.def(
        "batch_norm_double_backward",
        [](const BatchNormShape& shape, uintptr_t tangent, uintptr_t grad_output, uintptr_t input, uintptr_t weight,
           uintptr_t mean, uintptr_t rstd, uintptr_t grad_grad_output, uintptr_t grad_input, uintptr_t grad_weight) {
            py::gil_scoped_release release;
            kernels().batch_norm_double_backward({shape, pointer(tangent), pointer(grad_output), pointer(input),
                                                  pointer(weight), static_cast<double*>(pointer(mean)),
                                                  static_cast<double*>(pointer(rstd)), pointer(grad_grad_output),
                                                  pointer(grad_input), pointer(grad_weight)});
        },
        "shape"_a, "tangent"_a, "grad_output"_a, "input"_a, "weight"_a, "mean"_a, "rstd"_a, "grad_grad_output"_a,
        "grad_input"_a, "grad_weight"_a);
}

void bind_batch_norm_act(py::module_& m) {
    py::class_<BatchNormActShape>(m, "BatchNormActShape")
        .def(py::init([](int dtype, int64_t n, int64_t c, int64_t hw, bool channels_last, int activation,
                         double negative_slope, int threads) {
                 return BatchNormActShape{static_cast<Dtype>(dtype),
                                          n,
                                          c,
                                          hw,
                                          channels_last,
                                          static_cast<Activation>(activation),
                                          negative_slope,
                                          threads};
             }),
             "dtype"_a, "n"_a, "c"_a, "hw"_a, "channels_last"_a, "activation"_a, "negative_slope"_a, "threads"_a);
    m.def("batch_norm_act_scratch", &batch_norm_act_scratch, "channels"_a);
    m.def(
        "batch_norm_act_forward",
        [](const BatchNormActShape& shape, uintptr_t input, uintptr_t weight, uintptr_t bias, uintptr_t output,
           uintptr_t mean, uintptr_t invstd, uintptr_t var, uintptr_t scratch, bool training, double eps) {
            py::gil_scoped_release release;
            kernels().batch_norm_act_forward({shape, pointer(input), pointer(weight), pointer(bias), pointer(output),
                                              pointer(mean), pointer(invstd), pointer(var),
                                              static_cast<double*>(pointer(scratch)), training, eps});
        },
        "shape"_a, "input"_a, "weight"_a, "bias"_a, "output"_a, "mean"_a, "invstd"_a, "var"_a, "scratch"_a,
        "training"_a, "eps"_a);
    m.def(
        "batch_norm_act_backward",
        [](const BatchNormActShape& shape, uintptr_t grad_output, uintptr_t input, uintptr_t weight, uintptr_t bias,
           uintptr_t mean, uintptr_t invstd, uintptr_t grad_input, uintptr_t grad_weight, uintptr_t grad_bias,
           uintptr_t scratch, bool training) {
            py::gil_scoped_release release;
            kernels().batch_norm_act_backward({shape, pointer(grad_output), pointer(input), pointer(weight),
                                               pointer(bias), pointer(mean), pointer(invstd), pointer(grad_input),
                                               pointer(grad_weight), pointer(grad_bias),
                                               static_cast<double*>(pointer(scratch)), training});
        },
        "shape"_a, "grad_output"_a, "input"_a, "weight"_a, "bias"_a, "mean"_a, "invstd"_a, "grad_input"_a,
        "grad_weight"_a, "grad_bias"_a, "scratch"_a, "training"_a);
}

void bind_gradient_penalty(py::module_& m) {
    m.def(
        "interpolate",
        [](int dtype, int64_t n, int64_t size, uintptr_t real, uintptr_t fake, uintptr_t alpha, uintptr_t points,
           int threads) {
            py::gil_scoped_release release;
            kernels().interpolate({static_cast<Dtype>(dtype), n, size, pointer(real), pointer(fake), pointer(alpha),
                                   pointer(points), threads});
        },
        "dtype"_a, "n"_a, "size"_a, "real"_a, "fake"_a, "alpha"_a, "points"_a, "threads"_a);
    m.def(
        "penalty_tail",
        [](int dtype, int64_t n, int64_t size, uintptr_t grad, uintptr_t cotangent, uintptr_t loss, uintptr_t scratch,
           double weight, double target, bool one_sided, bool squared, int threads) {
            py::gil_scoped_release release;
            kernels().penalty_tail({static_cast<Dtype>(dtype), n, size, pointer(grad), pointer(cotangent),
                                    pointer(loss), static_cast<double*>(pointer(scratch)), weight, target, one_sided,
                                    squared, threads});
        },
        "dtype"_a, "n"_a, "size"_a, "grad"_a, "cotangent"_a, "loss"_a, "scratch"_a, "weight"_a, "target"_a,
        "one_sided"_a, "squared"_a, "threads"_a);
}

// Memory of a workspace for as long as Python knows it, as writable bytes.
struct Lease {
    explicit Lease(size_t bytes) : bytes(bytes), block(workspace().take(bytes)) {}
    ~Lease() { workspace().give(block); }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;

    static Workspace& workspace() {
        // Never destroyed: tensors may outlive the interpreter's modules.
        static auto* shared = new Workspace;
        return *shared;
    }

    float* floats() const { return static_cast<float*>(block.data); }

    size_t bytes;
    Workspace::Block block;
};

void bind_workspace(py::module_& m) {
    py::class_<Lease>(m, "Lease", py::buffer_protocol())
        .def(py::init<size_t>(), "bytes"_a)
        .def_buffer([](Lease& lease) {
            return py::buffer_info(static_cast<uint8_t*>(lease.block.data), static_cast<py::ssize_t>(lease.bytes));
        });
    m.def("workspace_limit", [](size_t bytes) { Lease::workspace().set_limit(bytes); }, "bytes"_a);
    m.def("workspace_bytes", [] { return std::pair(Lease::workspace().used(), Lease::workspace().idle()); });
}

using Pair = std::array<int64_t, 2>;

void bind_conv(py::module_& m) {
    py::class_<ConvShape>(m, "ConvShape")
        .def(py::init([](const std::array<int64_t, 4>& input, const std::array<int64_t, 3>& output, Pair kernel,
                         Pair stride, Pair padding, Pair dilation, const std::array<int64_t, 4>& weight_strides,
                         int64_t sum_block, int threads) {
                 auto [n, height, width, channels] = input;
                 auto [out_height, out_width, out_channels] = output;
                 auto [w0, w1, w2, w3] = weight_strides;
                 return ConvShape{n,
                                  height,
                                  width,
                                  channels,
                                  out_height,
                                  out_width,
                                  out_channels,
                                  {kernel[0], kernel[1]},
                                  {stride[0], stride[1]},
                                  {padding[0], padding[1]},
                                  {dilation[0], dilation[1]},
                                  {w0, w1, w2, w3},
                                  sum_block,
                                  threads};
             }),
             "input"_a, "output"_a, "kernel"_a, "stride"_a, "padding"_a, "dilation"_a, "weight_strides"_a,
             "sum_block"_a, "threads"_a);
    m.def(
        "conv_forward",
        [](const ConvShape& shape, uintptr_t input, uintptr_t weight, uintptr_t bias, uintptr_t output,
           uintptr_t activated, int activation, float negative_slope, uintptr_t scale, uintptr_t shift) {
            Lease scratch(conv_forward_scratch(shape) * sizeof(float));
            py::gil_scoped_release release;
            ConvFinish finish{static_cast<Activation>(activation), negative_slope, floats(activated), floats(scale),
                              floats(shift)};
            kernels().conv_forward(
                {shape, finish, floats(input), floats(weight), floats(bias), floats(output), scratch.floats()});
        },
        "shape"_a, "input"_a, "weight"_a, "bias"_a, "output"_a, "activated"_a, "activation"_a, "negative_slope"_a,
        "scale"_a, "shift"_a);
    m.def(
        "conv_input_grad",
        [](const ConvShape& shape, uintptr_t grad_output, uintptr_t weight, uintptr_t bias, uintptr_t grad_input,
           uintptr_t activated, int activation, float negative_slope, uintptr_t scale, uintptr_t shift) {
            Lease scratch(conv_input_grad_scratch(shape) * sizeof(float));
            py::gil_scoped_release release;
            ConvFinish finish{static_cast<Activation>(activation), negative_slope, floats(activated), floats(scale),
                              floats(shift)};
            kernels().conv_input_grad({shape, finish, floats(grad_output), floats(weight), floats(bias),
                                       floats(grad_input), scratch.floats()});
        },
        "shape"_a, "grad_output"_a, "weight"_a, "bias"_a, "grad_input"_a, "activated"_a, "activation"_a,
        "negative_slope"_a, "scale"_a, "shift"_a);
    m.def(
        "conv_weight_grad",
        [](const ConvShape& shape, uintptr_t grad_output, uintptr_t input, uintptr_t grad_weight) {
            Lease scratch(conv_weight_grad_scratch(shape) * sizeof(float));
            py::gil_scoped_release release;
            kernels().conv_weight_grad(
                {shape, floats(grad_output), floats(input), floats(grad_weight), scratch.floats()});
        },
        "shape"_a, "grad_output"_a, "input"_a, "grad_weight"_a);
}

void bind_conv_bfloat16(py::module_& m) {
    m.def("has_matrix_units", [] { return matrix_kernels() != nullptr; }, "Whether conv_bfloat16_* run.");
    auto bind = [&m](const char* name, int64_t (*size)(const ConvShape&),
                     void (*MatrixKernels::*kernel)(const ConvBFloat16&)) {
        m.def(
            name,
            [size, kernel](const ConvShape& shape, uintptr_t source, uintptr_t weight, uintptr_t bias, uintptr_t result,
                           uintptr_t activated, int activation, float negative_slope, uintptr_t scale,
                           uintptr_t shift) {
                Lease scratch(size(shape) * sizeof(float));
                py::gil_scoped_release release;
                ConvBFloat16Finish finish{static_cast<Activation>(activation), negative_slope, halves(activated),
                                          floats(scale), floats(shift)};
                (matrix_kernels()->*kernel)(
                    {shape, finish, halves(source), floats(weight), floats(bias), halves(result), scratch.floats()});
            },
            "shape"_a, "source"_a, "weight"_a, "bias"_a, "result"_a, "activated"_a, "activation"_a, "negative_slope"_a,
            "scale"_a, "shift"_a);
    };
    bind("conv_bfloat16_forward", &conv_bfloat16_forward_scratch, &MatrixKernels::conv_bfloat16_forward);
    bind("conv_bfloat16_input_grad", &conv_bfloat16_input_grad_scratch, &MatrixKernels::conv_bfloat16_input_grad);
    m.def(
        "conv_bfloat16_weight_grad",
        [](const ConvShape& shape, uintptr_t grad_output, uintptr_t input, uintptr_t grad_weight) {
            Lease scratch(conv_bfloat16_weight_grad_scratch(shape) * sizeof(float));
            py::gil_scoped_release release;
            matrix_kernels()->conv_bfloat16_weight_grad(
                {shape, halves(grad_output), halves(input), floats(grad_weight), scratch.floats()});
        },
        "shape"_a, "grad_output"_a, "input"_a, "grad_weight"_a);
}

void bind_stem_input_grad(py::module_& m) {
    m.def("stem_input_grad_scratch", &stem_input_grad_scratch, "taps"_a, "out_channels"_a);
    m.def(
        "stem_input_grad",
        [](int dtype, const std::array<int64_t, 4>& input, const std::array<int64_t, 3>& output, Pair kernel,
           Pair stride, Pair padding, Pair dilation, uintptr_t grad_output, uintptr_t weight, uintptr_t grad_input,
           uintptr_t scratch, int threads) {
            py::gil_scoped_release release;
            auto [n, height, width, channels] = input;
            auto [out_height, out_width, out_channels] = output;
            kernels().stem_input_grad({static_cast<Dtype>(dtype),
                                       n,
                                       height,
                                       width,
                                       channels,
                                       out_height,
                                       out_width,
                                       out_channels,
                                       {kernel[0], kernel[1]},
                                       {stride[0], stride[1]},
                                       {padding[0], padding[1]},
                                       {dilation[0], dilation[1]},
                                       pointer(grad_output),
                                       pointer(weight),
                                       pointer(grad_input),
                                       pointer(scratch),
                                       threads});
        },
        "dtype"_a, "input"_a, "output"_a, "kernel"_a, "stride"_a, "padding"_a, "dilation"_a, "grad_output"_a,
        "weight"_a, "grad_input"_a, "scratch"_a, "threads"_a);
}

using Addresses = std::vector<uintptr_t>;

std::vector<void*> pointers(const Addresses& addresses) {
    std::vector<void*> out(addresses.size());
    std::transform(addresses.begin(), addresses.end(), out.begin(), pointer);
    return out;
}

void** list_or_null(std::vector<void*>& list) { return list.empty() ? nullptr : list.data(); }

void bind_weight_clip(py::module_& m) {
    m.def(
        "clip_weights",
        [](int dtype, const std::vector<int64_t>& sizes, const Addresses& params, double bound, int threads) {
            py::gil_scoped_release release;
            auto p = pointers(params);
            kernels().clip_weights(
                {{static_cast<Dtype>(dtype), static_cast<int64_t>(sizes.size()), sizes.data(), threads},
                 p.data(),
                 bound});
        },
        "dtype"_a, "sizes"_a, "params"_a, "bound"_a, "threads"_a);
    m.def(
        "rmsprop_clip",
        [](int dtype, const std::vector<int64_t>& sizes, const Addresses& params, const Addresses& grads,
           const Addresses& square_avgs, const Addresses& grad_avgs, const Addresses& momentum_buffers, double lr,
           double alpha, double eps, double weight_decay, double momentum, bool maximize, std::optional<double> clip,
           int threads) {
            py::gil_scoped_release release;
            auto p = pointers(params), g = pointers(grads), v = pointers(square_avgs), mean = pointers(grad_avgs),
                 buffer = pointers(momentum_buffers);
            kernels().rmsprop_clip(
                {{static_cast<Dtype>(dtype), static_cast<int64_t>(sizes.size()), sizes.data(), threads},
                 p.data(),
                 g.data(),
                 v.data(),
                 list_or_null(mean),
                 list_or_null(buffer),
                 lr,
                 alpha,
                 eps,
                 weight_decay,
                 momentum,
                 maximize,
                 clip.value_or(std::numeric_limits<double>::infinity())});
        },
        "dtype"_a, "sizes"_a, "params"_a, "grads"_a, "square_avgs"_a, "grad_avgs"_a, "momentum_buffers"_a, "lr"_a,
        "alpha"_a, "eps"_a, "weight_decay"_a, "momentum"_a, "maximize"_a, "clip"_a, "threads"_a);
}

void bind_minibatch_discrimination(py::module_& m) {
    py::class_<MinibatchShape>(m, "MinibatchShape")
        .def(py::init([](int dtype, int64_t n, int64_t b, int64_t c, int threads) {
                 auto kind = static_cast<Dtype>(dtype);
                 return MinibatchShape{kind, n, b, c, threads, kernels().vector_lanes(kind)};
             }),
             "dtype"_a, "n"_a, "b"_a, "c"_a, "threads"_a);
    m.def("minibatch_discrimination_scratch", &minibatch_discrimination_scratch, "shape"_a);
    m.def("l1_distance_scratch", &l1_distance_scratch, "shape"_a);
    m.def(
        "minibatch_discrimination_forward",
        [](const MinibatchShape& shape, uintptr_t x, uintptr_t output, uintptr_t scratch, bool include_self) {
            py::gil_scoped_release release;
            kernels().minibatch_discrimination_forward(
                {shape, pointer(x), pointer(output), pointer(scratch), include_self});
        },
        "shape"_a, "m"_a, "output"_a, "scratch"_a, "include_self"_a);
    m.def(
        "minibatch_discrimination_backward",
        [](const MinibatchShape& shape, uintptr_t grad_output, uintptr_t x, uintptr_t grad_m, uintptr_t scratch) {
            py::gil_scoped_release release;
            kernels().minibatch_discrimination_backward(
                {shape, pointer(grad_output), pointer(x), pointer(grad_m), pointer(scratch)});
        },
        "shape"_a, "grad_output"_a, "m"_a, "grad_m"_a, "scratch"_a);
    m.def(
        "minibatch_discrimination_double_backward",
        [](const MinibatchShape& shape, uintptr_t cotangent, uintptr_t grad_output, uintptr_t x,
           uintptr_t grad_grad_output, uintptr_t grad_m, uintptr_t scratch) {
            py::gil_scoped_release release;
            kernels().minibatch_discrimination_double_backward({shape, pointer(cotangent), pointer(grad_output),
                                                                pointer(x), pointer(grad_grad_output), pointer(grad_m),
                                                                pointer(scratch)});
        },
        "shape"_a, "cotangent"_a, "grad_output"_a, "m"_a, "grad_grad_output"_a, "grad_m"_a, "scratch"_a);
    m.def(
        "l1_distance_forward",
        [](const MinibatchShape& shape, uintptr_t x, uintptr_t output, uintptr_t scratch) {
            py::gil_scoped_release release;
            kernels().l1_distance_forward({shape, pointer(x), pointer(output), pointer(scratch)});
        },
        "shape"_a, "m"_a, "output"_a, "scratch"_a);
    m.def(
        "l1_distance_backward",
        [](const MinibatchShape& shape, uintptr_t grad_output, uintptr_t x, uintptr_t grad_m, uintptr_t scratch) {
            py::gil_scoped_release release;
            kernels().l1_distance_backward(
                {shape, pointer(grad_output), pointer(x), pointer(grad_m), pointer(scratch)});
        },
        "shape"_a, "grad_output"_a, "m"_a, "grad_m"_a, "scratch"_a);
    m.def(
        "l1_distance_tangent",
        [](const MinibatchShape& shape, uintptr_t tangent, uintptr_t x, uintptr_t output, uintptr_t scratch) {
            py::gil_scoped_release release;
            kernels().l1_distance_tangent({shape, pointer(tangent), pointer(x), pointer(output), pointer(scratch)});
        },
        "shape"_a, "tangent"_a, "m"_a, "output"_a, "scratch"_a);
}

void bind_group_norm(py::module_& m) {
    py::class_<GroupNormShape>(m, "GroupNormShape")
        .def(py::init([](int dtype, int64_t samples, int64_t groups, int64_t channels, int64_t inner,
                         bool channels_last, int threads) {
                 return GroupNormShape{
                     static_cast<Dtype>(dtype), samples, groups, channels, inner, channels_last, threads};
             }),
             "dtype"_a, "samples"_a, "groups"_a, "channels"_a, "inner"_a, "channels_last"_a, "threads"_a);
    m.def(
        "group_norm_forward",
        [](const GroupNormShape& shape, uintptr_t input, uintptr_t weight, uintptr_t bias, uintptr_t output,
           uintptr_t mean, uintptr_t rstd, double eps) {
            py::gil_scoped_release release;
            kernels().group_norm_forward({shape, pointer(input), pointer(weight), pointer(bias), pointer(output),
                                          static_cast<double*>(pointer(mean)), static_cast<double*>(pointer(rstd)),
                                          eps});
        },
        "shape"_a, "input"_a, "weight"_a, "bias"_a, "output"_a, "mean"_a, "rstd"_a, "eps"_a);
    m.def(
        "group_norm_backward",
        [](const GroupNormShape& shape, uintptr_t grad_output, uintptr_t input, uintptr_t weight, uintptr_t mean,
           uintptr_t rstd, uintptr_t grad_input, uintptr_t grad_weight, uintptr_t grad_bias, uintptr_t scratch) {
            py::gil_scoped_release release;
            kernels().group_norm_backward({shape, pointer(grad_output), pointer(input), pointer(weight),
                                           static_cast<double*>(pointer(mean)), static_cast<double*>(pointer(rstd)),
                                           pointer(grad_input), pointer(grad_weight), pointer(grad_bias),
                                           static_cast<double*>(pointer(scratch))});
        },
        "shape"_a, "grad_output"_a, "input"_a, "weight"_a, "mean"_a, "rstd"_a, "grad_input"_a, "grad_weight"_a,
        "grad_bias"_a, "scratch"_a);
    m.def(
        "group_norm_double_backward",
        [](const GroupNormShape& shape, uintptr_t tangent, uintptr_t grad_output, uintptr_t input, uintptr_t weight,
           uintptr_t mean, uintptr_t rstd, uintptr_t grad_grad_output, uintptr_t grad_input, uintptr_t grad_weight,
           uintptr_t scratch) {
            py::gil_scoped_release release;
            kernels().group_norm_double_backward(
                {shape, pointer(tangent), pointer(grad_output), pointer(input), pointer(weight),
                 static_cast<double*>(pointer(mean)), static_cast<double*>(pointer(rstd)), pointer(grad_grad_output),
                 pointer(grad_input), pointer(grad_weight), static_cast<double*>(pointer(scratch))});
        },
        "shape"_a, "tangent"_a, "grad_output"_a, "input"_a, "weight"_a, "mean"_a, "rstd"_a, "grad_grad_output"_a,
        "grad_input"_a, "grad_weight"_a, "scratch"_a);
}

void bind_layer_norm(py::module_& m) {
    py::class_<LayerNormShape>(m, "LayerNormShape")
        .def(py::init([](int dtype, int64_t rows, int64_t size, int threads) {
                 return LayerNormShape{static_cast<Dtype>(dtype), rows, size, threads};
             }),
             "dtype"_a, "rows"_a, "size"_a, "threads"_a);
    m.def("layer_norm_parts", &layer_norm_parts, "rows"_a);
    m.def(
        "layer_norm_forward",
        [](const LayerNormShape& shape, uintptr_t input, uintptr_t weight, uintptr_t bias, uintptr_t output,
           uintptr_t mean, uintptr_t rstd, double eps) {
            py::gil_scoped_release release;
            kernels().layer_norm_forward({shape, pointer(input), pointer(weight), pointer(bias), pointer(output),
                                          static_cast<double*>(pointer(mean)), static_cast<double*>(pointer(rstd)),
                                          eps});
        },
        "shape"_a, "input"_a, "weight"_a, "bias"_a, "output"_a, "mean"_a, "rstd"_a, "eps"_a);
    m.def(
        "layer_norm_backward",
        [](const LayerNormShape& shape, uintptr_t grad_output, uintptr_t input, uintptr_t weight, uintptr_t mean,
           uintptr_t rstd, uintptr_t grad_input, uintptr_t grad_weight, uintptr_t grad_bias, uintptr_t scratch) {
            py::gil_scoped_release release;
            kernels().layer_norm_backward({shape, pointer(grad_output), pointer(input), pointer(weight),
                                           static_cast<double*>(pointer(mean)), static_cast<double*>(pointer(rstd)),
                                           pointer(grad_input), pointer(grad_weight), pointer(grad_bias),
                                           pointer(scratch)});
        },
        "shape"_a, "grad_output"_a, "input"_a, "weight"_a, "mean"_a, "rstd"_a, "grad_input"_a, "grad_weight"_a,
        "grad_bias"_a, "scratch"_a);
    m.def(
        "layer_norm_double_backward",
        [](const LayerNormShape& shape, uintptr_t tangent, uintptr_t grad_output, uintptr_t input, uintptr_t weight,
           uintptr_t mean, uintptr_t rstd, uintptr_t grad_grad_output, uintptr_t grad_input, uintptr_t grad_weight,
           uintptr_t scratch) {
            py::gil_scoped_release release;
            kernels().layer_norm_double_backward({shape, pointer(tangent), pointer(grad_output), pointer(input),
                                                  pointer(weight), static_cast<double*>(pointer(mean)),
                                                  static_cast<double*>(pointer(rstd)), pointer(grad_grad_output),
                                                  pointer(grad_input), pointer(grad_weight), pointer(scratch)});
        },
        "shape"_a, "tangent"_a, "grad_output"_a, "input"_a, "weight"_a, "mean"_a, "rstd"_a, "grad_grad_output"_a,
        "grad_input"_a, "grad_weight"_a, "scratch"_a);
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    m.def("cpu_isa", &cpu_isa, "Instruction set that the kernels run with.");
    m.def("threading_runtime", &threading_runtime, "Where the kernels' threads come from: openmp or serial.");
    bind_avg_pool(m);
    bind_batch_norm(m);
    bind_batch_norm_act(m);
    bind_workspace(m);
    bind_conv(m);
    bind_conv_bfloat16(m);
    bind_stem_input_grad(m);
    bind_gradient_penalty(m);
    bind_group_norm(m);
    bind_layer_norm(m);
    bind_minibatch_discrimination(m);
    bind_weight_clip(m);
}
