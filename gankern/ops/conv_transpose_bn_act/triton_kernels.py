"""Triton kernels of batch norm + activation, over the planes or rows of :class:`~.passes.Shape`.

Bound by bytes: forward reads x twice and writes y, backward reads x and dy twice and writes dx; a pass's sums cost the
next pass a look at at most a quarter as many bytes, mostly in L2. A program takes one part of a few channels, in tiles
of R packs of one channel (planes) or R rows of W channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Arguments that a kernel is not specialised by.
INTEGERS = ["n", "plane", "units", "of_part", "of_kind", "of_channel", "parts", "flags", "act", "eps", "slope"]
_SAMPLES = tl.constexpr(8)
# Values of the sums that a program adds up at a time.
_FOLD = tl.constexpr(512)
#: Channels of a program that walks no tensor.
COLUMNS = tl.constexpr(32)
#: Which arguments there are, in `flags`.
WEIGHT, BIAS, SHIFT, SUMS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4), tl.constexpr(8)


@triton.jit
def _tanh(z):
    # Near zero by a rational function (Moshier, Cephes Math Library), which keeps all digits.
    s = z * z
    top = (-9.64399179425052238628e-1 * s - 9.92877231001918586564e1) * s - 1.61468768441708447952e3
    bottom = ((s + 1.12811678491632931402e2) * s + 2.23548839060100448583e3) * s + 4.84406305325125486048e3
    size = tl.abs(z)
    large = 1 - 2 / (tl.exp(2 * size) + 1)
    return tl.where(size < 0.625, z + z * s * (top / bottom), tl.where(z < 0, -large, large))


@triton.jit
def _activate(z, slope, act):
    if act == 1:
        z = tl.where(z < 0, 0, z)  # a NaN stays
    elif act == 2:
        z = tl.where(z > 0, z, z * slope)
    elif act == 3:
        z = _tanh(z)
    return z


@triton.jit
def _activation_grad(z, grad, slope, act):
    """The gradient of an activation's input z."""
    if act == 1:
        grad = tl.where(z > 0, grad, 0)
    elif act == 2:
        grad = tl.where(z > 0, grad, grad * slope)
    elif act == 3:
        y = _tanh(z)
        grad = grad * (1 - y * y)
    return grad


@triton.jit
def _place(c, BACKWARDS: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr):
    """The program's part and channels."""
    channels: tl.constexpr = W if ROWS else 1
    across = tl.cdiv(c, channels)
    part = tl.program_id(0) // across
    if BACKWARDS:  # what the pass before read last is still in L2
        part = tl.num_programs(0) // across - 1 - part
    return part, tl.program_id(0) % across * channels + tl.arange(0, channels)


@triton.jit
def _tile(start, part, ch, n, c, plane, units, ROWS: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """Offsets of the part's units from start on, and which of them there are."""
    unit = (part * units + start + tl.arange(0, R)).to(tl.int64)
    end = (part + 1) * units
    if ROWS:
        offset = unit[:, None] * c + ch[None, :]
        there = (unit < tl.minimum(end, n))[:, None] & (ch < c)[None, :]
    else:
        row = (unit // plane * c + ch) * plane + unit % plane
        offset = row[:, None] * W + tl.arange(0, W)[None, :]
        there = (unit < tl.minimum(end, n * plane))[:, None]
    return offset, there


@triton.jit
def _affine(weight, bias, ch, there, flags, mean, invstd):
    """Mean, scale and bias of channels: z = (x - mean) * scale + bias."""
    scale = invstd * tl.load(weight + ch, there & (flags & WEIGHT != 0), 1.0)
    return mean[None, :], scale[None, :], tl.load(bias + ch, there & (flags & BIAS != 0), 0.0)[None, :]


@triton.jit
def _leave_sums(sums, part, ch, c, of_part, of_kind, of_channel, first, second, ROWS: tl.constexpr):
    if not ROWS:
        first = tl.sum(first, 1, keep_dims=True)
        second = tl.sum(second, 1, keep_dims=True)
    place = sums + part * of_part + ch * of_channel
    tl.store(place, tl.sum(first, 0), ch < c)
    tl.store(place + of_kind, tl.sum(second, 0), ch < c)


@triton.jit
def _total(sums, ch, c, parts, of_part, of_kind, of_channel):
    """Both sums over all parts, in fixed order."""
    at_once: tl.constexpr = _FOLD // ch.shape[0]
    first = tl.zeros([at_once, ch.shape[0]], tl.float64)
    second = tl.zeros([at_once, ch.shape[0]], tl.float64)
    for start in range(0, parts, at_once):
        p = start + tl.arange(0, at_once)[:, None]
        place = sums + p * of_part + ch[None, :] * of_channel
        there = (p < parts) & (ch < c)[None, :]
        first += tl.load(place, there, 0.0).to(tl.float64)
        second += tl.load(place + of_kind, there, 0.0).to(tl.float64)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def _statistics(first, second, shift, count, eps):
    """Mean, 1 / sqrt(var + eps) and var, of the sums of x - shift and of its square."""
    offset = first / count
    var = second / count - offset * offset
    var = tl.where(var < 0, 0, var)
    return shift.to(tl.float64) + offset, 1 / tl.sqrt(var + eps.to(tl.int64).to(tl.float64, bitcast=True)), var


@triton.jit(do_not_specialize=INTEGERS)
def sum_values(
    x,
    sums,
    shift,
    n: tl.int64,
    c: tl.int64,
    plane: tl.int64,
    units: tl.int64,
    of_part: tl.int64,
    of_kind: tl.int64,
    of_channel: tl.int64,
    A: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    part, ch = _place(c, False, ROWS, W)
    # The mean of a few values all over the channel: the squares then lose hardly a digit, whatever its mean.
    pixels = 1 if ROWS else plane * W
    sample = tl.arange(0, _SAMPLES)[:, None].to(tl.int64)
    row = (sample * n // _SAMPLES * c + ch[None, :]) * pixels
    samples = tl.load(x + row + sample * pixels // _SAMPLES, (ch < c)[None, :], 0.0)
    center = tl.sum(samples.to(A) * (1.0 / _SAMPLES), 0)
    first = tl.zeros([R, W], A)
    second = tl.zeros([R, W], A)
    for start in range(0, units, R):
        offset, there = _tile(start, part, ch, n, c, plane, units, ROWS, R, W)
        d = tl.where(there, tl.load(x + offset, there, 0.0).to(A) - center[None, :], 0)
        first += d
        second += d * d
    if part == 0:
        tl.store(shift + ch, center, ch < c)
    _leave_sums(sums, part, ch, c, of_part, of_kind, of_channel, first, second, ROWS)


@triton.jit(do_not_specialize=INTEGERS)
def forward(
    x,
    y,
    weight,
    bias,
    mean,
    invstd,
    var,
    sums,
    shift,
    parts: tl.int32,
    eps: tl.int64,
    flags: tl.int32,
    slope: tl.int64,
    act: tl.int32,
    n: tl.int64,
    c: tl.int64,
    plane: tl.int64,
    units: tl.int64,
    of_part: tl.int64,
    of_kind: tl.int64,
    of_channel: tl.int64,
    T: tl.constexpr,
    A: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    part, ch = _place(c, True, ROWS, W)
    if flags & SUMS != 0:
        first, second = _total(sums, ch, c, parts, of_part, of_kind, of_channel)
        count = n.to(tl.float64) * (1 if ROWS else plane * W)
        found = _statistics(first, second, tl.load(shift + ch, ch < c, 0.0), count, eps)
        center, inverse = found[0].to(A), found[1].to(A)
        if part == 0:
            tl.store(mean + ch, center, ch < c)
            tl.store(invstd + ch, inverse, ch < c)
            tl.store(var + ch, found[2].to(A), ch < c)
    else:
        center = tl.load(mean + ch, ch < c, 0.0)
        inverse = tl.load(invstd + ch, ch < c, 0.0)
    center, scale, offset_z = _affine(weight, bias, ch, ch < c, flags, center, inverse)
    slope = slope.to(tl.int64).to(tl.float64, bitcast=True).to(A)
    for start in range(0, units, R):
        offset, there = _tile(start, part, ch, n, c, plane, units, ROWS, R, W)
        z = (tl.load(x + offset, there, 0.0).to(A) - center) * scale + offset_z
        tl.store(y + offset, _activate(z, slope, act).to(T), there)


@triton.jit(do_not_specialize=INTEGERS)
def sum_grads(
    dy,
    x,
    dx,
    weight,
    bias,
    mean,
    invstd,
    sums,
    flags: tl.int32,
    slope: tl.int64,
    act: tl.int32,
    n: tl.int64,
    c: tl.int64,
    plane: tl.int64,
    units: tl.int64,
    of_part: tl.int64,
    of_kind: tl.int64,
    of_channel: tl.int64,
    T: tl.constexpr,
    A: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    # Sums of dz and dz * (x - mean), dz being the gradient of the activation's input; without SUMS, for constant
    # statistics, the input's gradient as well.
    part, ch = _place(c, False, ROWS, W)
    center, inverse = tl.load(mean + ch, ch < c, 0.0), tl.load(invstd + ch, ch < c, 0.0)
    center, scale, offset_z = _affine(weight, bias, ch, ch < c, flags, center, inverse)
    slope = slope.to(tl.int64).to(tl.float64, bitcast=True).to(A)
    first = tl.zeros([R, W], A)
    second = tl.zeros([R, W], A)
    for start in range(0, units, R):
        offset, there = _tile(start, part, ch, n, c, plane, units, ROWS, R, W)
        centered = tl.load(x + offset, there, 0.0).to(A) - center
        dz = _activation_grad(centered * scale + offset_z, tl.load(dy + offset, there, 0.0).to(A), slope, act)
        dz = tl.where(there, dz, 0)
        first += dz
        second += tl.where(there, dz * centered, 0)
        if flags & SUMS == 0:
            tl.store(dx + offset, (scale * dz).to(T), there)
    _leave_sums(sums, part, ch, c, of_part, of_kind, of_channel, first, second, ROWS)


@triton.jit(do_not_specialize=INTEGERS)
def input_grad(
    dy,
    x,
    dx,
    weight,
    bias,
    mean,
    invstd,
    sums,
    parts: tl.int32,
    grad_weight,
    grad_bias,
    flags: tl.int32,
    slope: tl.int64,
    act: tl.int32,
    n: tl.int64,
    c: tl.int64,
    plane: tl.int64,
    units: tl.int64,
    of_part: tl.int64,
    of_kind: tl.int64,
    of_channel: tl.int64,
    T: tl.constexpr,
    A: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    # dx = scale * (dz - mean(dz) - xhat * mean(dz * xhat)), and the gradients of weight and bias.
    part, ch = _place(c, True, ROWS, W)
    center, inverse = tl.load(mean + ch, ch < c, 0.0), tl.load(invstd + ch, ch < c, 0.0)
    wide = inverse.to(tl.float64)
    first, second = _total(sums, ch, c, parts, of_part, of_kind, of_channel)
    if part == 0:
        tl.store(grad_weight + ch, (second * wide).to(A), ch < c)
        tl.store(grad_bias + ch, first.to(A), ch < c)
    count = n.to(tl.float64) * (1 if ROWS else plane * W)
    mean_dz = (first / count).to(A)[None, :]
    slope_dz = (second * wide * wide / count).to(A)[None, :]
    center, scale, offset_z = _affine(weight, bias, ch, ch < c, flags, center, inverse)
    slope = slope.to(tl.int64).to(tl.float64, bitcast=True).to(A)
    for start in range(0, units, R):
        offset, there = _tile(start, part, ch, n, c, plane, units, ROWS, R, W)
        centered = tl.load(x + offset, there, 0.0).to(A) - center
        dz = _activation_grad(centered * scale + offset_z, tl.load(dy + offset, there, 0.0).to(A), slope, act)
        tl.store(dx + offset, (scale * (dz - mean_dz - centered * slope_dz)).to(T), there)


@triton.jit(do_not_specialize=INTEGERS)
def finish(
    sums,
    shift,
    parts: tl.int32,
    mean,
    invstd,
    var,
    grad_weight,
    grad_bias,
    n: tl.int64,
    eps: tl.int64,
    flags: tl.int32,
    c: tl.int64,
    A: tl.constexpr,
):
    # Sums of many parts by themselves: to the statistics, or without SUMS to the gradients of weight and bias.
    ch = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first, second = _total(sums, ch, c, parts, 2 * c, c, 1)
    if flags & SUMS != 0:
        offset = tl.load(shift + ch, (ch < c) & (flags & SHIFT != 0), 0.0)
        found = _statistics(first, second, offset, n.to(tl.float64), eps)
        tl.store(mean + ch, found[0].to(A), ch < c)
        tl.store(invstd + ch, found[1].to(A), ch < c)
        tl.store(var + ch, found[2].to(A), ch < c)
    else:
        inverse = tl.load(invstd + ch, ch < c, 0.0).to(tl.float64)
        tl.store(grad_weight + ch, (second * inverse).to(A), ch < c)
        tl.store(grad_bias + ch, first.to(A), ch < c)
