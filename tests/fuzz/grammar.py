"""The ingredients of networks, and how programs are drawn of them."""

from __future__ import annotations

from fuzz.program import INGREDIENTS, USUAL, WEIGHTS, Draw, Program, Step, Unfit, Writer, draw_step, ingredient, write

Inner = tuple[Step, ...]


def _dims(w: Writer, *allowed: int) -> int:
    """How many dimensions a sample has beside the channels."""
    dims = len(w.shape) - 1
    if dims not in (allowed or (1, 2, 3)):
        raise Unfit(f"{dims} dimensions")
    return dims


def _numbers(d: Draw, dims: int, *options: int) -> str:
    if d.chance(0.15):
        return str(tuple(d.one(*options) for _ in range(dims))) if dims > 1 else f"({d.one(*options)},)"
    return str(d.one(*options))


def _conv(w: Writer, d: Draw, transposed: bool = False) -> str:
    dims, channels = _dims(w), w.shape[0]
    groups = d.one(1, 1, 1, channels)
    wide = channels * d.one(1, 2) if groups > 1 else d.one(4, 3, 2, 1, 6)
    kernel, stride, padding = d.one("3", "1", "2", _numbers(d, dims, 3, 1)), _numbers(d, dims, 1, 1, 2), "1"
    options = []
    if transposed:
        options.append(_numbers(d, dims, 1, 0))
        if stride == "2" and d.chance(0.3):
            options.append("output_padding=1")
    else:
        padding = d.one("1", "0", _numbers(d, dims, 1, 2), "'same'" if stride == "1" else "1")
        options.append(padding)
        if d.chance(0.1):
            options.append("dilation=2")
        if d.chance(0.1) and padding == "1":
            options.append(f"padding_mode={d.one('reflect', 'circular', 'replicate')!r}")
    if groups > 1:
        options.append(f"groups={groups}")
    if d.chance(0.25):
        options.append("bias=False")
    kind = "ConvTranspose" if transposed else "Conv"
    return f"nn.{kind}{dims}d({channels}, {wide}, {kernel}, {stride}, {', '.join(options)})"


def _conv_transpose(w: Writer, d: Draw) -> str:
    return _conv(w, d, transposed=True)


def _linear(w: Writer, d: Draw) -> str:
    return f"nn.Linear({w.shape[-1]}, {d.one(4, 3, 1, 6)}{d.one('', '', ', bias=False')})"


def _batch_norm(w: Writer, d: Draw) -> str:
    if len(w.shape) > 4:
        raise Unfit
    options = [str(w.shape[0])]
    if d.chance(0.25):
        options.append("momentum=" + d.one("None", "0.3", "1.0", "0.0", "1.5", "torch.tensor(0.2)"))
    if d.chance(0.15):
        options.append("affine=False")
    if d.chance(0.15):
        options.append("track_running_stats=False")
    if d.chance(0.1):
        options.append("eps=0.01")
    return f"nn.BatchNorm{max(1, len(w.shape) - 1)}d({', '.join(options)})"


def _norm(w: Writer, d: Draw) -> str:
    kinds = ["layer", "group", "instance"] if len(w.shape) > 1 else ["layer", "group"]
    kind = d.one(*kinds)
    if kind == "layer":
        affine = d.one("", "", ", elementwise_affine=False", ", bias=False")
        return f"nn.LayerNorm({list(w.shape) if d.chance(0.6) else w.shape[-1]}{affine})"
    channels = w.shape[0]
    if kind == "group":
        groups = d.one(*[g for g in (1, 2, 3, channels) if channels % g == 0])
        return f"nn.GroupNorm({groups}, {channels}{d.one('', '', ', affine=False')})"
    affine, track = d.one("", ", affine=True"), d.one("", "", ", track_running_stats=True")
    return f"nn.InstanceNorm{_dims(w)}d({channels}{affine}{track})"


_ACTIVATIONS = (
    *("ReLU()", "LeakyReLU(0.2)", "Tanh()", "ReLU(True)", "LeakyReLU(0.2, True)", "ReLU()", "LeakyReLU(0.1)"),
    *("ReLU(True)", "LeakyReLU(0.2, inplace=True)", "LeakyReLU(-0.3)", "LeakyReLU(0.0)", "LeakyReLU(1.5)", "ELU()"),
    *("ELU(0.7, True)", "CELU()", "SELU(True)", "GELU()", "GELU('tanh')", "SiLU()", "SiLU(True)", "Mish()"),
    *("Softplus()", "Sigmoid()", "Hardtanh(-0.5, 0.5)", "ReLU6(True)", "Hardswish()", "Softsign()", "PReLU()"),
    *("RReLU()", "Threshold(0.1, -0.2)", "Hardshrink()", "Tanhshrink()", "LogSigmoid()", "Softmax(1)", "Identity()"),
    "GLU(1)",
)
_FUNCTIONS = (
    *("F.relu(h)", "F.leaky_relu(h, 0.2)", "h.relu()", "torch.relu(h)", "F.relu(h, True)", "F.relu_(h)", "F.tanh(h)"),
    *("torch.relu_(h)", "h.relu_()", "F.leaky_relu_(h, 0.1)", "F.leaky_relu(h, negative_slope=0.3, inplace=True)"),
    *("torch.tanh(h)", "h.tanh_()", "h.sigmoid_()", "F.elu_(h)", "F.leaky_relu(h, torch.tensor(0.2))", "F.silu(h)"),
    *("h.clamp(min=0)", "h.clamp_(min=0)", "torch.maximum(h, 0.1 * h)", "h * (h > 0)", "F.softplus(h)", "F.gelu(h)"),
    *("torch.where(h > 0, h, 0.2 * h)", "h.abs()", "h.square()", "h.sin()", "F.normalize(h, dim=1)"),
    *(
        "F.rrelu(h, training=True)",
        "F.threshold_(h, 0.1, 0.0)",
        "h * torch.sigmoid(h)",
        "F.leaky_relu(h, 0.2) * 2**0.5",
    ),
    *("F.hardtanh_(h)", "F.relu(h) + F.relu(-h)", "F.leaky_relu(input=h, negative_slope=0.3)", "F.relu(input=h)"),
)


def _activation(w: Writer, d: Draw) -> str:
    return "nn." + d.one(*_ACTIVATIONS)


def _pool(w: Writer, d: Draw) -> str:
    n = _dims(w)
    return d.one(
        f"nn.AvgPool{n}d(2)",
        f"nn.AvgPool{n}d(3, 1, 1)",
        f"nn.AvgPool{n}d(2, 1, ceil_mode=True)",
        f"nn.AvgPool{n}d(3, 2, 1, count_include_pad=False)",
        f"nn.AdaptiveAvgPool{n}d(2)",
        f"nn.AdaptiveAvgPool{n}d(1)",
        f"nn.AdaptiveAvgPool{n}d(3)",
        f"nn.MaxPool{n}d(2)",
        f"nn.AdaptiveMaxPool{n}d(2)",
        f"nn.LPPool{n}d(2, 2)",
    )


def _resize(w: Writer, d: Draw) -> str:
    n = _dims(w)
    smooth = {1: "linear", 2: "bilinear", 3: "trilinear"}[n]
    return d.one(
        "nn.Upsample(scale_factor=2)",
        f"nn.Upsample(size={(4,) * n}, mode={smooth!r}, align_corners=False)",
        f"nn.Upsample(scale_factor=1.5, mode={smooth!r})",
        "nn.PixelShuffle(2)" if n == 2 else "nn.Flatten()",
        "nn.PixelUnshuffle(2)" if n == 2 else "nn.Flatten(2)",
        "nn.ChannelShuffle(2)",
    )


def _pad(w: Writer, d: Draw) -> str:
    n = _dims(w)
    kind = d.one("ZeroPad", "ReflectionPad", "ReplicationPad", "CircularPad", "ConstantPad")
    return f"nn.{kind}{n}d({d.one(1, (1, 0) * n)}{', 0.3' if kind == 'ConstantPad' else ''})"


def _dropout(w: Writer, d: Draw) -> str:
    n = _dims(w) if len(w.shape) > 1 and d.chance(0.5) else ""
    return (
        f"nn.{'Dropout' if n else d.one('Dropout', 'AlphaDropout')}{f'{n}d' if n else ''}({d.one('0.3', '0.5, True')})"
    )


_LAYERS = {
    **{"conv": _conv, "conv_transpose": _conv_transpose, "linear": _linear, "batch_norm": _batch_norm, "norm": _norm},
    **{"activation": _activation, "pool": _pool, "resize": _resize, "pad": _pad, "dropout": _dropout},
}


def _layer(name: str, w: Writer, d: Draw) -> tuple[str, tuple[int, ...]]:
    expression = _LAYERS[name](w, d)
    return expression, w.probe(expression, module=True)


def _add_layer(name: str, w: Writer, d: Draw) -> None:
    expression, shape = _layer(name, w, d)
    if "True)" in expression and name in ("activation", "dropout"):
        w.own()
    w.call(w.module(expression))
    w.shape = shape


@ingredient(10, usual=True)
def conv(w: Writer, d: Draw, inner: Inner) -> None:
    _add_layer("conv", w, d)


@ingredient(3, usual=True)
def conv_transpose(w: Writer, d: Draw, inner: Inner) -> None:
    _add_layer("conv_transpose", w, d)


@ingredient(4, usual=True)
def linear(w: Writer, d: Draw, inner: Inner) -> None:
    _add_layer("linear", w, d)


@ingredient(5, usual=True)
def batch_norm(w: Writer, d: Draw, inner: Inner) -> None:
    _add_layer("batch_norm", w, d)


@ingredient(4, usual=True)
def norm(w: Writer, d: Draw, inner: Inner) -> None:
    _add_layer("norm", w, d)


@ingredient(5, usual=True)
def activation(w: Writer, d: Draw, inner: Inner) -> None:
    _add_layer("activation", w, d)


@ingredient(7, usual=True)
def function(w: Writer, d: Draw, inner: Inner) -> None:
    expression = d.one(*_FUNCTIONS)
    if "_(" in expression or "True)" in expression:
        w.own()
    w.shape = w.probe(expression)
    w.line(f"h = {expression}")
    w.is_input = False


@ingredient(2, usual=True)
def pool(w: Writer, d: Draw, inner: Inner) -> None:
    _add_layer("pool", w, d)


@ingredient(2, usual=True)
def resize(w: Writer, d: Draw, inner: Inner) -> None:
    _add_layer("resize", w, d)


@ingredient(1, usual=True)
def pad(w: Writer, d: Draw, inner: Inner) -> None:
    _add_layer("pad", w, d)


@ingredient(1.5, usual=True)
def dropout(w: Writer, d: Draw, inner: Inner) -> None:
    _add_layer("dropout", w, d)


@ingredient(12, usual=True)
def sequential(w: Writer, d: Draw, inner: Inner) -> None:
    """A chain, most often as people write them; of other layers now and then."""
    before, expressions = w.shape, []
    usual = ["conv", "batch_norm", "activation"] * d.one(1, 2, 3)
    names = [n for n in usual if not d.chance(0.2)]
    names = [
        d.one("conv_transpose", "norm", "pool", "pad", "linear", "dropout") if d.chance(0.15) else n for n in names
    ]
    for name in names:
        if name == "conv" and d.chance(0.3):
            name = "conv_transpose"
        try:
            expression, w.shape = _layer(name, w, d)
        except Unfit:
            continue
        expressions.append(expression)
        if name == "conv" and w.shape[0] == before[0] and d.chance(0.15):
            expressions.append("<again>")
    after, w.shape = w.shape, before
    if not expressions:
        raise Unfit
    if any("True)" in e for e in expressions[:1]):
        w.own()
    if "<again>" in expressions:
        place = expressions.index("<again>")
        shared = w.module(expressions[place - 1])
        expressions[place - 1 : place + 1] = [f"self.{shared}", *[f"self.{shared}"] * d.one(1, 2)]
        expressions = [e for e in expressions if e != "<again>"]
    name = w.module(f"nn.Sequential({', '.join(expressions)})", "s")
    w.shape = after
    w.call(name)


@ingredient(3, usual=True)
def keep(w: Writer, d: Draw, inner: Inner) -> None:
    name = w.name("r")
    w.line(f"{name} = h")
    w.kept.append((name, w.shape))


def _merge(w: Writer, d: Draw, name: str, shape: tuple[int, ...]) -> None:
    if shape == w.shape:
        sums = ("h = h + {0}", "h = {0} + h", "h += {0}", "h = torch.add(h, {0}, alpha=0.5)", "h = h.add({0})")
        others = ("h = h * {0}", "h = torch.cat([h, {0}], 1)", "h = (h + {0}) / 2**0.5", "h = h - 0.3 * {0}")
        line = d.one(*sums, *others)
        if "cat" in line:
            w.shape = (2 * shape[0], *shape[1:])
        elif line == "h += {0}":
            w.own()
        w.line(line.format(name))
    else:
        w.line(f"h = h + {name}.flatten(1).mean(1).view(-1, {', '.join('1' * len(w.shape))})")
    w.is_input = False


@ingredient(4, usual=True)
def join(w: Writer, d: Draw, inner: Inner) -> None:
    """Adds an activation of before."""
    if not w.kept:
        raise Unfit
    _merge(w, d, *d.one(*reversed(w.kept)))


@ingredient(6, inner=3, usual=True)
def residual(w: Writer, d: Draw, inner: Inner) -> None:
    name, shape = w.name("r"), w.shape
    w.line(f"{name} = h")
    write(inner, w)
    _merge(w, d, name, shape)


@ingredient(3, inner=3, usual=True)
def block(w: Writer, d: Draw, inner: Inner) -> None:
    """A module with a forward of its own."""
    number = w.shared.blocks
    w.shared.blocks += 1
    name = w.name("b")
    part = Writer(w.shape, (), f"{w.path}.{name}", w.shared)
    part.body = ["x = h"]
    write(inner, part)
    part.body.append("return h")
    w.top(f"Block{number}", part.text(f"Block{number}", "h"))
    w.init.append(f"self.{name} = Block{number}()")
    w.modules.append((name, w.shape, f"Block{number}()"))
    w.shape = part.shape
    how = d.one("plain", "plain", "checkpoint", "reentrant", "keyword")
    calls = {
        "plain": f"self.{name}(h)",
        "checkpoint": f"checkpoint(self.{name}, h, use_reentrant=False)",
        "reentrant": f"checkpoint(self.{name}, h, use_reentrant=True)",
        "keyword": f"self.{name}(h=h)",
    }
    w.line(f"h = {calls[how]}")
    w.is_input = w.is_input and part.is_input


@ingredient(3)
def again(w: Writer, d: Draw, inner: Inner) -> None:
    """A module a second time, or one with its weights."""
    fitting = [(name, expression) for name, shape, expression in w.modules if shape[:1] == w.shape[:1]]
    if not fitting:
        raise Unfit
    name, expression = d.one(*fitting)
    if "Block" not in expression and "self." not in expression:
        w.shape = w.probe(expression, module=True)
    elif dict((m, s) for m, s, _ in w.modules)[name] != w.shape:
        raise Unfit
    tied = expression.startswith(("nn.Conv", "nn.Linear"))
    if tied and d.chance(0.5):
        twin = w.module(expression)
        w.init.append(f"self.{twin}.weight = self.{name}.weight")
        name = twin
    w.own()
    w.call(name)


@ingredient(1.5)
def loop(w: Writer, d: Draw, inner: Inner) -> None:
    expression = (
        f"nn.Conv{_dims(w)}d({w.shape[0]}, {w.shape[0]}, 3, 1, 1)"
        if 1 < len(w.shape) < 5
        else f"nn.Linear({w.shape[-1]}, {w.shape[-1]})"
    )
    name = w.module(expression)
    w.line(f"for _ in range({d.one(2, 3)}):", f"    h = {d.one('F.leaky_relu', 'torch.tanh', '')}(self.{name}(h))")
    w.is_input = False


_IN_PLACE = (
    *("h *= 1.5", "h += 0.1", "h.mul_(0.7)", "h[:, :1] = 0.5", "h[:, 0] *= 2", "F.relu_(h[:, :1])", "h -= 0.2"),
    *("h.flatten(1).mul_(1.3)", "h.view(-1)[::2].relu_()", "h.data.add_(0.1)", "h.data *= 1.2", "h.div_(2)"),
    *("h.data = h.data + 0.1", "h.detach().mul_(1.1)", "h.clamp_(-1, 1)", "h.masked_fill_(h < 0, 0.1)", "h.neg_()"),
    *("h[h > 0] *= 0.5", "h.select(1, 0).zero_()", "h.sub_(h.mean())", "torch.Tensor.mul_(h, 2)", "h.abs_()"),
    *("h[0] = h[0] * 2", "F.leaky_relu_(h[:, 0], 0.1)", "h.view_as(h).add_(0.3)", "h.detach_()", "h.tanh_()"),
    *("h.narrow(1, 0, 1).sigmoid_()", "h *= h.sigmoid()", "h.add_(h.detach())", "F.dropout(h, 0.3, inplace=True)"),
    *(
        "h.unbind(1)[0].mul_(2)",
        "h.chunk(2, 1)[0].mul_(2)",
        "h[..., 0] = 0",
        "h.index_fill_(1, torch.tensor([0]), 0.3)",
    ),
    *("h.copy_(h.tanh())", "h.requires_grad_()", "h.addcmul_(h, h)", "h.flatten(1)[:, ::2] *= 2"),
)


@ingredient(6)
def in_place(w: Writer, d: Draw, inner: Inner) -> None:
    """A change in place; of the input now and then."""
    if not d.chance(0.03):
        w.own()
    line = d.one(*_IN_PLACE)
    if d.chance(0.08):
        w.line("with torch.no_grad():", f"    {line}")
    else:
        w.line(line)


@ingredient(2.5, inner=2)
def late_change(w: Writer, d: Draw, inner: Inner) -> None:
    """A change of what a layer has used already."""
    w.own()
    view = w.name("v")
    w.line(f"{view} = {d.one('h', 'h.view_as(h)', 'h[:, :1]', 'h.detach()', 'h.data', 'h.flatten(1)')}")
    write(inner, w)
    w.line(f"{view}.{d.one('mul_(1.3)', 'add_(0.2)', 'relu_()', 'zero_()', 'detach_()')}")


_VIEWS = (
    *("h.flatten(1)", "h.transpose(1, 2)", "h.flip(1)", "h.roll(1, -1)", "torch.cat([h, h], 1)", "h[:, :2]"),
    *("torch.cat([h, -h.detach()], 1)", "torch.cat(h.chunk(2, 1)[::-1], 1)", "h[:, ::2]", "h[..., 1:]", "h[:, [0]]"),
    *("h.unsqueeze(1)", "h.squeeze(1)", "h.narrow(1, 0, 1)", "h.repeat(1, *([2] + [1] * (h.dim() - 2)))", "h.mT @ h"),
    *("h.reshape(h.size(0), -1)", "h.view(h.size(0), -1)", "h.movedim(1, -1)", "h.movedim(-1, 1)", "h.mean(-1)"),
    *("h.sum(1, keepdim=True)", "h + h.var(0, correction=0)", "h.sort(1)[0]", "h.topk(1, 1)[0]", "h.cumsum(1)"),
    *("h.softmax(-1)", "F.unfold(h, 2)", "h.contiguous()", "F.pixel_shuffle(h, 2)", "h - h.mean(0)", "h.clone()"),
    *("h / (1 + h.norm())", "torch.stack(h.unbind(1), -1)", "torch.stack([h, 2 * h], 1).sum(1)", "h.mean(1)"),
    *("sum(h.split(1, 1))", "h.max(1)[0]", "h.permute(0, *range(h.dim() - 1, 0, -1))", "F.pad(h, (1, -1))"),
    *("h.contiguous(memory_format=torch.channels_last)", "torch.einsum('n...->n...', h)", "h.expand_as(h)"),
    *("h.unflatten(1, (1, -1))", "torch.stack([h, h]).mean(0)", "torch.cat(torch.split(h, 1)[::-1])", "h.double()"),
    *(
        "torch.fft.fft(h).real",
        "h.as_strided(h.shape, h.stride())",
        "h.gather(1, h.argsort(1))",
        "h[torch.arange(h.size(0))]",
    ),
    *("F.interpolate(h, scale_factor=2)", "F.avg_pool2d(h, 2)", "F.adaptive_avg_pool2d(h, 1)", "F.max_pool2d(h, 2)"),
    *("torch.vmap(torch.sin)(h)", "torch.logsumexp(h, 1, keepdim=True)", "h.index_select(1, torch.tensor([0]))"),
    *("F.scaled_dot_product_attention(h, h, h)", "torch.nan_to_num(h)", "torch.func.vmap(lambda t: t * t.mean())(h)"),
)


@ingredient(7, usual=True)
def view(w: Writer, d: Draw, inner: Inner) -> None:
    expression = d.one(*_VIEWS)
    w.shape = w.probe(expression)
    w.line(f"h = {expression}")
    if not any(
        e in expression for e in ("view", "flatten", "[", "transpose", "movedim", "expand", "squeeze", "contig")
    ):
        w.is_input = False


def _sources(w: Writer, d: Draw) -> str:
    """One number that may depend on the image."""
    # The plainest depends on nothing, so that a program made plain fails of what it failed of.
    own = [
        "0.7",
        "h.mean()",
        "x.mean()",
        "h.std()",
        "h.amax()",
        "h.detach().mean()",
        "h.sum().tanh()",
        w.parameter() + ".tanh()",
    ]
    if "z" in w.extras:
        own.append("z.mean()")
    return d.one(*own)


def _vector(w: Writer, d: Draw, size: int) -> str:
    """As many numbers that may depend on the image."""
    source = d.one("h", "x") if w.path == "net" and "z" not in w.extras else "h"
    channels = w.shape[0]
    made = w.module(f"nn.Linear({channels}, {size})", "l")
    choices = [
        f"{w.parameter(size)}",
        f"self.{made}(h.flatten(2).mean((0, 2)))" if len(w.shape) > 1 else f"self.{made}(h.mean(0))",
        f"{w.parameter(size)} * {source}.mean()",
        f"{w.parameter(size)} * {w.parameter(size)}",
    ]
    if "z" in w.extras:
        extra = w.module(f"nn.Linear(3, {size})", "l")
        choices.append(f"self.{extra}(z).mean(0)")
    return d.one(*choices)


@ingredient(5)
def hyper(w: Writer, d: Draw, inner: Inner) -> None:
    """A layer whose weight or bias is computed."""
    channels, wide = w.shape[0], d.one(3, 2, 4)
    kinds = ["linear", "layer_norm", "group_norm"]
    if 1 < len(w.shape) < 5:
        kinds = ["conv", "conv", "instance_norm", "modulated", "conv_transpose", "batch_norm", *kinds]
    kind, dims = d.one(*kinds), len(w.shape) - 1
    ones = ", ".join(["None"] * dims)
    if kind in ("conv", "conv_transpose"):
        sizes = (wide, channels) if kind == "conv" else (channels, wide)
        weight = w.parameter(*sizes, *[3] * dims)
        weight = d.one(
            weight,
            f"{weight} * {_sources(w, d)}",
            f"{weight}.tanh()",
            f"{weight} * {_vector(w, d, sizes[0])}[:, None, {ones}]",
            f"({weight} - {weight}.mean())",
        )
        bias = d.one("None", _vector(w, d, wide))
        line = f"h = F.{kind}{dims}d(h, {weight}, {bias}, padding=1)"
        w.shape = (wide, *w.shape[1:])
    elif kind == "modulated":
        weight, style = w.parameter(wide, channels, *[3] * dims), w.module(f"nn.Linear({channels}, {channels})", "l")
        w.line(f"k = {weight} * self.{style}(h.flatten(2).mean(2))[:, None, :, {ones}]")
        if d.chance(0.5):
            w.line(f"k = k * k.square().flatten(2).sum(2).add(1e-3).rsqrt().view(-1, {wide}, 1{', 1' * dims})")
        shape = ", ".join(map(str, w.shape[1:]))
        convolved = f"F.conv{dims}d(h.reshape(1, -1, {shape}), k.flatten(0, 1), padding=1, groups=h.size(0))"
        line = f"h = {convolved}.view(-1, {wide}, {shape})"
        w.shape = (wide, *w.shape[1:])
    elif kind == "linear":
        weight = f"{w.parameter(wide, w.shape[-1])} * {_sources(w, d)}"
        bias = d.one("None", f"{w.parameter(wide)} * {_sources(w, d)}")
        line = f"h = {d.one('F.linear(h, {}, {})', 'h @ ({}).t()').format(weight, bias)}"
        w.shape = (*w.shape[:-1], wide)
    else:
        weight, bias = _vector(w, d, channels), d.one("None", _vector(w, d, channels))
        line = {
            "instance_norm": f"h = F.instance_norm(h, weight={weight}, bias={bias})",
            "batch_norm": f"h = F.batch_norm(h, None, None, {weight}, {bias}, True)",
            "group_norm": f"h = F.group_norm(h, 1, {weight}, {bias})",
            "layer_norm": f"h = F.layer_norm(h, h.shape[1:], {w.parameter(*w.shape)} * {_sources(w, d)})",
        }[kind]
    if d.chance(0.25):
        line = line.replace("h = ", "h = F.leaky_relu(", 1) + ", 0.2)"
    w.line(line)
    w.is_input = False


@ingredient(2.5)
def own_ops(w: Writer, d: Draw, inner: Inner) -> None:
    """The ops of gankern, which stock runs as what they stand for."""
    _dims(w, 2)
    channels, wide = w.shape[0], d.one(3, 2)
    kind = d.one("conv2d_act", "conv2d_bn_act", "conv_transpose2d_bn_act", "batch_norm_act")
    act = d.one("activation='leaky_relu'", "activation='relu'", "activation='tanh'", "activation='none'")
    sizes = (channels, wide) if "transpose" in kind else (wide, channels)
    weight = f"{w.parameter(*sizes, 3, 3)} * {d.one('1', _sources(w, d))}"
    bias = d.one("None", _vector(w, d, wide))
    if kind == "conv2d_act":
        line = f"h = ops.conv2d_act(h, {weight}, {bias}, padding=1, {act})"
    else:
        size = channels if kind == "batch_norm_act" else wide
        norm = f"{_vector(w, d, size)}, {_vector(w, d, size)}, training={d.one(True, 'self.training or True')}, {act}"
        rest = "" if kind == "batch_norm_act" else f"{weight}, {bias}, "
        line = f"h = ops.{kind}(h, {rest}None, None, {norm}{'' if kind == 'batch_norm_act' else ', padding=1'})"
    w.line(line)
    if kind != "batch_norm_act":
        w.shape = (wide, *w.shape[1:])
    w.is_input = False


_HOOKS = (
    *("register_forward_hook(lambda m, a, out: out * 1.5)", "register_forward_hook(lambda m, a, out: None)"),
    *("register_forward_pre_hook(lambda m, a: (a[0] * 0.5,))", "register_forward_pre_hook(lambda m, a: None)"),
    "register_full_backward_hook(lambda m, gi, go: tuple(None if g is None else g * 2 for g in gi))",
    "register_full_backward_hook(lambda m, gi, go: None)",
    "register_full_backward_pre_hook(lambda m, go: tuple(None if g is None else g * 2 for g in go))",
    "register_forward_hook(lambda m, a, out: (out.mul_(1.2), None)[1])",
    "register_forward_hook(lambda m, a, k, out: out + 0.1, with_kwargs=True)",
    "register_forward_hook(lambda m, a, o: (o.requires_grad and o.register_hook(lambda g: None), None)[1])",
    "register_forward_hook(lambda m, a, o: o.register_hook(lambda g: g if g is None else 2 * g) and None)",
)
_OF_PARAMETERS = (
    *(
        "register_hook(lambda g: g if g is None else 3 * g)",
        "register_hook(lambda g: None)",
        "register_hook(lambda g: g if g is None else g.clamp(-0.1, 0.1))",
    ),
    "register_post_accumulate_grad_hook(lambda p: (p.grad.mul_(2), None)[1])",
)


@ingredient(4)
def module_hook(w: Writer, d: Draw, inner: Inner) -> None:
    if not w.modules:
        raise Unfit
    name, _, expression = d.one(*w.modules)
    path = f"{w.path}.{name}"
    if expression.startswith("nn.Sequential") and d.chance(0.7):
        path += f"[{d.one(0, -1, 0)}]"
    w.shared.setup.append(f"{path}.{d.one(*_HOOKS)}")


@ingredient(2.5)
def parameter_hook(w: Writer, d: Draw, inner: Inner) -> None:
    having = [
        name for name, _, e in w.modules if e.startswith(("nn.Conv", "nn.Linear", "nn.Batch")) and "False" not in e
    ]
    if not having:
        raise Unfit
    w.shared.setup.append(f"{w.path}.{d.one(*having)}.{d.one('weight', 'bias')}.{d.one(*_OF_PARAMETERS)}")


@ingredient(3)
def tensor_hook(w: Writer, d: Draw, inner: Inner) -> None:
    tensor = d.one("h", *(name for name, _ in w.kept))
    w.own()
    w.line(f"if {tensor}.requires_grad:")
    hook = d.one(
        *("register_hook(lambda g: g if g is None else g * 2)", "register_hook(lambda g: None)", "retain_grad()"),
        *(
            "register_hook(lambda g: g if g is None else g.tanh())",
            "register_hook(lambda g: g if g is None else g.clamp(-0.1, 0.1))",
        ),
        "grad_fn and {0}.grad_fn.register_hook(lambda gi, go: tuple(None if g is None else 2 * g for g in gi))",
        "grad_fn and {0}.grad_fn.register_prehook(lambda go: tuple(None if g is None else 2 * g for g in go))",
    )
    w.line(f"    {tensor}.{hook.format(tensor)}")


_CUSTOM = {
    "Relu": """
class Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = F.relu(x)
        ctx.save_for_backward(y)
        return y
    @staticmethod
    def backward(ctx, g):
        return g * (ctx.saved_tensors[0] > 0)
""",
    "Leaky": """
class Leaky(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.leaky_relu(2 * x, 0.2)
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.where(x > 0, 2 * g, 0.4 * g)
""",
    "Reverse": """
class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)
    @staticmethod
    def backward(ctx, g):
        return -0.5 * g
""",
    "Straight": """
class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()
    @staticmethod
    def backward(ctx, g):
        return g
""",
    "Cube": """
class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3
    @staticmethod
    def backward(ctx, g):
        return g * 3 * ctx.saved_tensors[0] ** 2
""",
    "Double": """
class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)
    @staticmethod
    def backward(ctx, g):
        return 2 * g
""",
    "Once": """
class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.tanh()
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g
""",
    "ReluInPlace": """
class ReluInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = F.relu_(x.clone())
        ctx.save_for_backward(y)
        return y
    @staticmethod
    def backward(ctx, g):
        return g * (ctx.saved_tensors[0] > 0) * 1.5
""",
    "Linear": """
class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return F.linear(x, w)
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.flatten(0, -2).t() @ x.flatten(0, -2)
""",
    "Two": """
class Two(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.relu(x), F.relu(-x)
    @staticmethod
    def backward(ctx, g, k):
        (x,) = ctx.saved_tensors
        return g * (x > 0) - k * (x < 0)
""",
}


@ingredient(3.5)
def custom_function(w: Writer, d: Draw, inner: Inner) -> None:
    name = d.one(*_CUSTOM)
    if name == "Double":
        w.own()
    arguments = f"h, {w.parameter(w.shape[-1], w.shape[-1])}" if name == "Linear" else "h"
    made = w.top(name, _CUSTOM[name].strip() + "\n")
    w.line(
        f"h = {'sum' if name == 'Two' else ''}({made}.apply({arguments}))"
        if name == "Two"
        else f"h = {made}.apply({arguments})"
    )
    w.is_input = False


@ingredient(2.5, inner=2)
def inner_gradient(w: Writer, d: Draw, inner: Inner) -> None:
    """A gradient that the forward takes itself."""
    at, shape = w.name("r"), w.shape
    w.own()
    w.line(f"{at} = h")
    write(inner, w)
    graph = d.one("create_graph=True", "create_graph=True", "retain_graph=True")
    w.line(f"(g,) = torch.autograd.grad(h.{d.one('sum()', 'square().sum()', 'tanh().sum()')}, {at}, {graph})")
    _merge(w, d, "g", shape)


@ingredient(3, inner=2)
def detached(w: Writer, d: Draw, inner: Inner) -> None:
    """A branch of which the gradient knows nothing, or not all."""
    name, shape, start = w.name("r"), w.shape, d.one("h.detach()", "h", "h.data", "h.clone().detach().requires_grad_()")
    w.line(f"{name} = h", f"h = {start}")
    w.is_input = w.is_input and start == "h"
    if d.chance(0.4):
        w.line("with torch.no_grad():")
        w.indent += "    "
        w.line("h = h * 1")
        write(inner, w)
        w.indent = w.indent[4:]
    else:
        write(inner, w)
        if d.chance(0.5):
            w.own()
            w.line(d.one("h.detach_()", "h = h.detach()"))
            write(inner[:1], w)
    _merge(w, d, name, shape)


@ingredient(3)
def parametrized(w: Writer, d: Draw, inner: Inner) -> None:
    expression = _conv(w, d) if 1 < len(w.shape) < 5 and d.chance(0.7) else _linear(w, d)
    shape = w.probe(expression, module=True)
    how = d.one(
        *("parametrizations.spectral_norm({})", "nn.utils.spectral_norm({})", "parametrizations.weight_norm({})"),
        *("nn.utils.weight_norm({})", "parametrizations.orthogonal({})", "parametrized({}, 'weight', Scaled())"),
    )
    if "Scaled" in how:
        w.top("Scaled", "class Scaled(nn.Module):\n    def forward(self, w):\n        return 0.7 * w.tanh()\n")
        how = how.replace("parametrized(", "parametrize.register_parametrization(")
    name = w.module(expression)
    w.modules.pop()
    w.init[-1] = f"self.{name} = {how.format(expression)}"
    w.shape = shape
    w.call(name)


_SUBCLASSES = {
    "Standardized": (
        "conv",
        """
class Standardized(nn.Conv2d):
    def forward(self, h):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(h, w, self.bias)
""",
    ),
    "Doubled": (
        "conv",
        "class Doubled(nn.Conv2d):\n    def forward(self, h):\n        return 2 * super().forward(h)\n",
    ),
    "Plain": ("conv", "class Plain(nn.Conv2d):\n    pass\n"),
    "MyRelu": ("act", "class MyRelu(nn.ReLU):\n    def forward(self, h):\n        return super().forward(h) - 0.1\n"),
    "Equalized": (
        "linear",
        """
class Equalized(nn.Linear):
    def forward(self, h):
        return F.linear(h, self.weight * 0.5, self.bias)
""",
    ),
    "MyNorm": (
        "norm",
        "class MyNorm(nn.BatchNorm2d):\n    def forward(self, h):\n        return super().forward(h) + h\n",
    ),
    "Called": (
        "conv",
        "class Called(nn.Conv2d):\n    def __call__(self, h):\n        return super().__call__(h).tanh()\n",
    ),
    "Patched": (
        "conv",
        """
class Patched(nn.Conv2d):
    def _conv_forward(self, h, weight, bias):
        return super()._conv_forward(h, weight * 0.5, bias)
""",
    ),
}


@ingredient(2.5)
def subclass(w: Writer, d: Draw, inner: Inner) -> None:
    name = d.one(*_SUBCLASSES)
    kind, text = _SUBCLASSES[name]
    c = w.shape[0]
    if kind in ("conv", "norm"):
        _dims(w, 2)
    made = {"conv": f"{name}({c}, {c}, 3, 1, 1)", "act": f"{name}()", "norm": f"{name}({c})"}
    w.top(name, text.strip() + "\n")
    expression = made.get(kind, f"{name}({w.shape[-1]}, {w.shape[-1]})")
    rest = d.one("", "", ", nn.BatchNorm2d({0}), nn.ReLU(True)", ", nn.LeakyReLU(0.2)")
    if "Batch" in rest:
        _dims(w, 2)
    w.call(w.module(f"nn.Sequential({expression}{rest.format(c)})" if rest else expression))


@ingredient(2.5)
def patched(w: Writer, d: Draw, inner: Inner) -> None:
    """A method that was replaced on one module."""
    fitting = [
        (w.path + "." + m, e)
        for m, _, e in w.modules
        if e.startswith(("nn.Conv", "nn.Linear", "nn.LeakyReLU", "nn.ReLU"))
    ]
    for m, _, e in w.modules:
        if e.startswith("nn.Sequential("):
            fitting.append((f"{w.path}.{m}[{d.one(0, -1)}]", e))
    if not fitting:
        raise Unfit
    path, expression = d.one(*fitting)
    patches = [
        "m.forward = lambda h, f=m.forward: f(h) * 1.5",
        "m.forward = types.MethodType(lambda self, h: type(self).forward(self, h) + 0.1, m)",
    ]
    if expression.startswith("nn.Conv") and "Transpose" not in expression:
        patches.append("m._conv_forward = lambda h, w, b, f=m._conv_forward: f(2 * h, w, b)")
    w.shared.setup += [f"m = {path}", d.one(*patches)]


@ingredient(2.5)
def control(w: Writer, d: Draw, inner: Inner) -> None:
    """Python that goes by values."""
    lines = d.one(
        ("if h.mean() > 0:", "    h = h * 2"),
        ("h = h * h.detach().mean().item()",),
        ("h = h * float(h.detach().max())",),
        ("if self.training:", "    h = h + 0.1"),
        ("if h.size(0) > 1:", "    h = h - 0.1"),
        ("h = h + torch.randn_like(h)",),
        ("self.calls = getattr(self, 'calls', 0) + 1", "h = h * self.calls"),
        ("while h.detach().abs().max() > 0.5:", "    h = 0.9 * h.tanh()"),
        ("if torch.is_grad_enabled():", "    h = h * 1.1"),
        ("try:", "    h = h.relu()", "finally:", "    pass"),
        ("with torch.autocast('cpu', enabled=False):", "    h = h * 1.5"),
        ("with parametrize.cached():", "    h = h * 1.5"),
        ("h = h + sum(p.sum() for p in self.parameters())",),
        ("assert not torch.isnan(h).any()",),
        ("with torch.enable_grad():", "    h = h * 0.9"),
    )
    w.line(*lines)
    w.is_input = False


@ingredient(1.5)
def buffer(w: Writer, d: Draw, inner: Inner) -> None:
    name = w.name("u")
    w.init.append(f"self.register_buffer({name!r}, torch.ones({w.shape[0]}))")
    shape = f".view(-1, {', '.join('1' * (len(w.shape) - 1))})" if len(w.shape) > 1 else ""
    mean = "h.detach().transpose(0, 1).flatten(1).mean(1)"
    w.line(
        d.one(
            f"self.{name}.mul_(0.9).add_({mean}, alpha=0.1)",
            f"self.{name} = 0.9 * self.{name} + 0.1 * {mean}",
            f"self.{name}.data = 0.9 * self.{name} + {mean}",
        )
    )
    w.line(f"h = h * self.{name}{d.one('', '.clone()')}{shape}")
    w.is_input = False


@ingredient(1.5)
def other_layers(w: Writer, d: Draw, inner: Inner) -> None:
    size, shape = w.shape[-1], w.shape
    kind = d.one("bilinear", "attention", "lstm", "transformer", "stddev", "embedding_matrix")
    if kind in ("attention", "lstm", "transformer") and len(shape) != 2:
        raise Unfit
    if kind == "bilinear":
        w.line(f"h = self.{w.module(f'nn.Bilinear({size}, {size}, 3)')}(h, h)")
        w.shape = (*shape[:-1], 3)
    elif kind == "attention":
        w.line(
            f"h = self.{w.module(f'nn.MultiheadAttention({size}, 1, batch_first=True)')}(h, h, h, need_weights=True)[0]"
        )
    elif kind == "transformer":
        w.call(w.module(f"nn.TransformerEncoderLayer({size}, 1, 4, 0.0, batch_first=True)"))
    elif kind == "lstm":
        cell = d.one("GRU", "LSTM", "RNN")
        w.line(f"h = self.{w.module(f'nn.{cell}({size}, 3, batch_first=True)')}(h)[0]")
        w.shape = (shape[0], 3)
    elif kind == "stddev":
        _dims(w, 2)
        w.line("h = torch.cat([h, h.var(0, correction=0).add(1e-8).sqrt().mean().expand_as(h[:, :1])], 1)")
        w.shape = (shape[0] + 1, *shape[1:])
    else:
        if "y" not in w.extras:
            raise Unfit
        made = w.module(f"nn.Embedding(4, {size * size})", "e")
        w.modules.pop()
        product = f"torch.bmm(h.reshape(h.size(0), -1, {size}), self.{made}(y).view(-1, {size}, {size}))"
        w.line(f"h = {product}.view(-1, {', '.join(map(str, shape))})")
    w.is_input = False


@ingredient(3)
def extra_input(w: Writer, d: Draw, inner: Inner) -> None:
    """Labels or a vector, that the critic is given beside its points."""
    if not w.extras:
        raise Unfit
    extra, c = d.one(*w.extras), w.shape[0]
    made = w.module(f"nn.Embedding(4, {c})" if extra == "y" else f"nn.Linear(3, {c})", "e")
    w.modules.pop()
    value = f"self.{made}({extra}).view(-1, {c}{', 1' * (len(w.shape) - 1)})"
    w.line(d.one(f"h = h + {value}", f"h = h * {value}", f"h = h * (1 + {value}).tanh()", f"h += {value}"))
    w.is_input = False


@ingredient(1)
def mode(w: Writer, d: Draw, inner: Inner) -> None:
    """A module by itself in the other mode, or frozen."""
    if not w.modules:
        raise Unfit
    path = f"{w.path}.{d.one(*w.modules)[0]}"
    w.shared.setup.append(
        d.one(
            f"{path}.requires_grad_(False)",
            f"{path}.eval()",
            f"next({path}.parameters(), torch.ones(1)).requires_grad_(False)",
        )
    )


def head(w: Writer, d: Draw, inner: Inner) -> None:
    """Scores: one a sample, a map, several, or a pair of them."""
    features = 1
    for size in w.shape:
        features *= size
    kind = d.one("linear", "linear", "linear", "map", "sum", "flat", "mean", "projection", "pair", "scalar")
    if kind == "linear":
        w.line(f"return self.{w.module(f'nn.Linear({features}, {d.one(1, 1, 2)})')}(h.flatten(1))")
    elif kind == "map":
        w.line("return h")
    elif kind == "sum":
        w.line("return h.flatten(1).sum(1)")
    elif kind == "mean":
        w.line("return h.flatten(1).mean(1, keepdim=True)")
    elif kind == "flat":
        w.line(f"return self.{w.module(f'nn.Linear({features}, 1)')}(h.flatten(1)).squeeze(1)")
    elif kind == "scalar":
        w.line("return h.mean()")
    elif kind == "pair":
        w.line(f"return self.{w.module(f'nn.Linear({features}, 1)')}(h.flatten(1)), h")
    else:
        if "y" not in w.extras:
            raise Unfit
        made = w.module(f"nn.Embedding(4, {features})", "e")
        w.line("h = h.flatten(1)", f"return (h * self.{made}(y)).sum(1, keepdim=True) + h.mean(1, keepdim=True)")


INGREDIENTS["head"] = head

#: Those that are nothing but a module's call.
CHAINED = {"conv": 4, "linear": 2, "activation": 5, "norm": 2, "pool": 1, "conv_transpose": 1, "sequential": 1}
SHAPES = ((3, 4, 4), (2, 5, 5), (3, 6, 5), (1, 4, 4), (3, 8, 8), (4, 3, 3), (5,), (3,), (2, 6), (3, 5), (2, 3, 3, 3))


def draw_program(seed: int, checks: dict[str, float]) -> Program:
    draw = Draw(seed)
    usual = draw.chance(0.35)
    weights = {name: weight for name, weight in WEIGHTS.items() if not usual or name in USUAL}
    chained = draw.chance(0.4)
    if chained:
        weights = CHAINED
    options = {
        "check": draw.weighted(checks),
        "shape": draw.one(*SHAPES[:6], *SHAPES),
        "n": draw.one(2, 3, 1, 2, 4),
        "backend": "auto" if draw.chance(0.12) else "cpu",
        "dtype": "float32" if draw.chance(0.15) else "float64",
        "training": draw.chance(0.65),
        "layout": draw.one("contiguous", "contiguous", "contiguous", "channels_last", "sliced", "transposed"),
        "module_layout": draw.one("contiguous", "contiguous", "contiguous", "channels_last"),
        "extras": draw.one((), (), (), ("y",), ("z",), ("y", "z")),
        "wants": draw.one((), (), ("real",), ("fake",), ("real", "fake", "z"), ("z",)),
        "given": draw.one("module", "module", "module", "callable", "some params"),
        "whole": draw.one("", "", "after", "before"),
        "threads": 2 if draw.chance(0.08) else 1,
        "again": draw.chance(0.15),
    }
    if chained:
        options |= {"extras": (), "given": "module"}
    steps = tuple(draw_step(draw, weights) for _ in range(draw.one(1, 2, 3, 4, 5, 6, 8)))
    return Program(seed, steps, Step("head", draw.seed()), options)
