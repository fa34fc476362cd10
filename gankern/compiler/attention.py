"""Attention in derivations by blocks of queries: scores are held for one block, where stock holds all of them.

    A = scale Q K^T + mask,   P = softmax(A),   O = P V        (Vaswani et al. 2017, equation 1)

A block is rows of P, made anew in each pass (Rabe and Staats 2021). With dO, and with gQ, gK, gV in the second pass:

    dP = dO V^T,   R = dP - rowsum(P * dP),   dA = P * R
    dQ = scale dA K,   dK = scale dA^T Q,   dV = P^T dO
    T = scale (gQ K^T + Q gK^T),   U = T - rowsum(P * T),   Z = gQ . dQ + gK . dK + gV . dV
    dZ/ddO = (P * U) V + P gV,   dZ/dA = softmax'(U * R + dO gV^T), to which what a row has in common adds nothing
    dZ/dQ = scale (dZ/dA K + dA gK),   dZ/dK = scale (dZ/dA^T Q + dA^T gQ),   dZ/dV = (P * U)^T dO
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern import _library
from gankern.compiler.choice import attention_pays
from gankern.compiler.refusal import Refused

# Scores of a block: on a processor what its caches hold for each thread, on a GPU as many as fill it.
_SCORES, _SCORES_ON_GPU = 1 << 18, 1 << 23
# Probabilities of heads with so few scores each are kept: no pass makes them anew, and stock holds more beside them.
_KEPT = 1 << 16


class _Block(NamedTuple):
    """Queries of some heads, and the keys that they see, as places in (heads, positions, features)."""

    heads: slice
    rows: slice
    keys: slice

    @property
    def of_queries(self) -> tuple[slice, slice]:
        return self.heads, self.rows

    @property
    def of_keys(self) -> tuple[slice, slice]:
        return self.heads, self.keys


def _blocks(q: Tensor, k: Tensor, causal: bool) -> Iterator[_Block]:
    heads, queries, keys = q.size(0), q.size(1), k.size(1)
    scores = _SCORES_ON_GPU if q.is_cuda else _SCORES * torch.get_num_threads()
    some = max(1, scores // (queries * keys))
    rows = queries if _is_kept(queries, keys) else min(queries, max(1, scores // keys))
    for head in range(0, heads, some):
        for start in range(0, queries, rows):
            stop = min(start + rows, queries)
            seen = min(stop, keys) if causal else keys
            yield _Block(slice(head, head + some), slice(start, stop), slice(0, seen))


def _is_kept(queries: int, keys: int) -> bool:
    return queries * keys <= _KEPT


def _flat(*tensors: Tensor) -> list[Tensor]:
    """As (heads, positions, features)."""
    return [t.reshape(-1, *t.shape[-2:]) for t in tensors]


class _Mask:
    """What is added to scores, or where they count, without a copy for each head."""

    def __init__(self, mask: Tensor, lead: torch.Size) -> None:
        mask = mask.reshape(*[1] * (len(lead) + 2 - mask.dim()), *mask.shape)
        self._flat = mask.flatten(0, -3) if lead else mask[None]
        places = torch.arange(self._flat.size(0), device=mask.device).view(mask.shape[:-2])
        self._places = places.expand(lead).reshape(-1)

    def apply(self, scores: Tensor, block: _Block) -> None:
        mask = self._flat if self._flat.size(1) == 1 else self._flat[:, block.rows]
        mask = mask if mask.size(0) == 1 else mask[self._places[block.heads]]
        scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores.add_(mask)


def _probabilities(q: Tensor, k: Tensor, mask: _Mask | None, causal: bool, block: _Block) -> Tensor:
    """P of a block, of queries that are scaled already."""
    scores = torch.bmm(q[block.of_queries], k[block.of_keys].transpose(1, 2))
    if causal:
        ahead = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(block.rows.start + 1)
        scores.masked_fill_(ahead, -torch.inf)
    if mask is None:
        return torch.softmax(scores, -1)
    mask.apply(scores, block)
    # Zeros, as stock has it, for a query that sees nothing.
    return torch._safe_softmax(scores, -1)


def _softmax_backward(grad: Tensor, probabilities: Tensor) -> Tensor:
    return torch._softmax_backward_data(grad, probabilities, -1, grad.dtype)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    output, kept = _fake(q, k, v, mask, causal, scale)
    masked = None if mask is None else _Mask(mask, q.shape[:-2])
    q, k, v, of_heads = _flat(q, k, v, output)
    q = q * scale
    for block in _blocks(q, k, causal):
        p = _probabilities(q, k, masked, causal, block)
        torch.bmm(p, v[block.of_keys], out=of_heads[block.of_queries])
        if kept.numel():
            kept[block.heads] = p
    return output, kept


def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    kept: Tensor,
    causal: bool,
    scale: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    masked, shapes = None if mask is None else _Mask(mask, q.shape[:-2]), (q.shape, k.shape, v.shape)
    grad, q, k, v = _flat(grad, q, k, v)
    q = q * scale
    dq, dk, dv = (torch.zeros_like(t) if want else t.new_empty(0) for t, want in zip((q, k, v), wanted, strict=True))
    for block in _blocks(q, k, causal):
        p = kept[block.heads] if kept.numel() else _probabilities(q, k, masked, causal, block)
        g = grad[block.of_queries]
        if wanted[2]:
            dv[block.of_keys].baddbmm_(p.transpose(1, 2), g)
        if not (wanted[0] or wanted[1]):
            continue
        d_scores = _softmax_backward(torch.bmm(g, v[block.of_keys].transpose(1, 2)), p)
        if wanted[0]:
            torch.bmm(d_scores, k[block.of_keys], out=dq[block.of_queries])
        if wanted[1]:
            dk[block.of_keys].baddbmm_(d_scores.transpose(1, 2), q[block.of_queries])
    return _shaped((dq.mul_(scale), dk, dv), shapes)


def _shaped(tensors: Any, shapes: Any) -> Any:
    return tuple(t.view(shape) if t.numel() else t for t, shape in zip(tensors, shapes, strict=True))


def _centred(values: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Values less their mean of each row's probabilities, in place, and that times the probabilities."""
    product = p * values
    mean = product.sum(-1, keepdim=True)
    return values.sub_(mean), product.addcmul_(p, mean, value=-1)


def _attention_double_backward(
    gq: Tensor | None,
    gk: Tensor | None,
    gv: Tensor | None,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    kept: Tensor,
    causal: bool,
    scale: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    masked, shapes = None if mask is None else _Mask(mask, q.shape[:-2]), (grad.shape, q.shape, k.shape, v.shape)
    grad, q, k, v = _flat(grad, q, k, v)
    gq, gk, gv = (None if t is None else _flat(t)[0] for t in (gq, gk, gv))
    q, gq = q * scale, None if gq is None else gq * scale
    results = [torch.zeros_like(t) if want else t.new_empty(0) for t, want in zip((grad, q, k, v), wanted, strict=True)]
    of_grad, of_q, of_k, of_v = results
    # T is one product: of both pairs, side by side.
    sides = [(a, b) for a, b in ((gq, k), (q, gk)) if a is not None and b is not None]
    left, right = (torch.cat([*side], -1) for side in zip(*sides, strict=True)) if sides else (None, None)
    for block in _blocks(q, k, causal):
        rows, keys = block.of_queries, block.of_keys
        p = kept[block.heads] if kept.numel() else _probabilities(q, k, masked, causal, block)
        g = grad[rows]
        of_scores = None if gv is None else torch.bmm(g, gv[keys].transpose(1, 2))
        if wanted[0] and gv is not None:
            of_grad[rows].baddbmm_(p, gv[keys])
        d_scores = None
        if left is not None and right is not None:
            u, product = _centred(torch.bmm(left[rows], right[keys].transpose(1, 2)), p)
            if wanted[0]:
                of_grad[rows].baddbmm_(product, v[keys])
            if wanted[3]:
                of_v[keys].baddbmm_(product.transpose(1, 2), g)
            if wanted[1] or wanted[2]:
                r, d_scores = _centred(torch.bmm(g, v[keys].transpose(1, 2)), p)
                of_scores = u.mul_(r) if of_scores is None else of_scores.addcmul_(u, r)
                del r
            del u, product
        if of_scores is None or not (wanted[1] or wanted[2]):
            continue
        of_scores = _softmax_backward(of_scores, p)
        if wanted[1]:
            of_q[rows].baddbmm_(of_scores, k[keys])
            if d_scores is not None and gk is not None:
                of_q[rows].baddbmm_(d_scores, gk[keys])
        if wanted[2]:
            of_k[keys].baddbmm_(of_scores.transpose(1, 2), q[rows])
            if d_scores is not None and gq is not None:
                of_k[keys].baddbmm_(d_scores.transpose(1, 2), gq[rows])
    of_q.mul_(scale)
    return _shaped(results, shapes)


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    heads, queries, keys = math.prod(q.shape[:-2]), q.size(-2), k.size(-2)
    seen = min(queries, keys) if causal else keys
    kept = q.new_empty(heads, queries, seen) if _is_kept(queries, keys) else q.new_empty(0)
    return q.new_empty(*q.shape[:-1], v.size(-1)), kept


def _fake_gradients(tensors: tuple[Tensor, ...], wanted: list[bool]) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) if want else t.new_empty(0) for t, want in zip(tensors, wanted, strict=True))


_REST = "Tensor q, Tensor k, Tensor v, Tensor? mask, "
_HOW = "bool causal, float scale"
_forward = _library.define(f"attention({_REST}{_HOW}) -> (Tensor, Tensor)", _attention, _fake)
_backward = _library.define(
    f"attention_backward(Tensor grad, {_REST}Tensor kept, {_HOW}, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    _attention_backward,
    lambda grad, q, k, v, mask, kept, causal, scale, wanted: _fake_gradients((q, k, v), wanted),
)
_double_backward = _library.define(
    "attention_double_backward(Tensor? gq, Tensor? gk, Tensor? gv, Tensor grad, "
    f"{_REST}Tensor kept, {_HOW}, bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    _attention_double_backward,
    lambda gq, gk, gv, grad, q, k, v, mask, kept, causal, scale, wanted: _fake_gradients((grad, q, k, v), wanted),
)
#: Operators whose last argument says which of their results are wanted.
MASKED: tuple[Any, ...] = (_backward, _double_backward)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
        output: Tensor
        output, kept = _forward(q, k, v, mask, causal, scale)
        ctx.save_for_backward(q, k, v, mask, kept)
        ctx.how = causal, scale
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = (None,) * 3 if grad is None else _AttentionBackward.apply(grad, *ctx.saved_tensors, *ctx.how)
        return *grads, None, None, None


class _AttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        kept: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(grad, q, k, v, mask, kept)
        ctx.how = causal, scale
        ctx.set_materialize_grads(False)
        # Which of them anybody reads is seen in the graph.
        grads: tuple[Tensor, Tensor, Tensor] = _backward(grad, q, k, v, mask, kept, causal, scale, [True] * 3)
        return grads

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = (None,) * 4
        if all(t is None for t in tangents):
            return None, None, None, None, *rest
        if torch.is_grad_enabled():
            raise Refused("a third derivative of attention")
        return *_double_backward(*tangents, *ctx.saved_tensors, *ctx.how, [True] * 4), *rest


def _may_fuse() -> bool:
    """Whether torch's fused kernels may run, which are faster where no second derivative is asked for."""
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled()


def _takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> bool:
    lead = q.shape[:-2]
    if not attention_pays(math.prod(lead) * q.size(-2) * k.size(-2)):
        return False
    fits = (
        min(q.dim(), k.dim(), v.dim()) >= 2
        and k.shape[:-2] == v.shape[:-2] == lead
        and q.size(-1) == k.size(-1)
        and k.size(-2) == v.size(-2)
        and min(t.numel() for t in (q, k, v)) > 0
    )
    dtypes = q.dtype == k.dtype == v.dtype and q.dtype in (torch.float32, torch.float64)
    if not (fits and dtypes) or _may_fuse() or torch.is_autocast_enabled(q.device.type):
        return False
    if mask is None:
        return True
    scores = (*lead, q.size(-2), k.size(-2))
    broadcasts = mask.dim() <= len(scores) and all(
        m in (1, n) for m, n in zip(reversed(mask.shape), reversed(scores), strict=False)
    )
    return broadcasts and not causal and not mask.requires_grad and mask.dtype in (torch.bool, q.dtype)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """:func:`torch.nn.functional.scaled_dot_product_attention`, by blocks where the plain products would run."""
    if dropout_p or enable_gqa or not _takes(query, key, value, attn_mask, is_causal):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    scale = query.size(-1) ** -0.5 if scale is None else scale
    output: Tensor = _Attention.apply(query, key, value, attn_mask, is_causal, scale)
    return output


def _by_blocks(function: types.FunctionType) -> Callable[..., Any]:
    """A function of torch's that finds the attention above where it looks for torch's own."""
    scope, name = function.__globals__, "scaled_dot_product_attention"
    if scope.get(name) is not torch._C._nn.scaled_dot_product_attention:
        return function
    scope = scope | {name: scaled_dot_product_attention}
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    # Modes are handed the function, and call it.
    scope[function.__name__] = copy
    return copy


_multi_head: Any = F.multi_head_attention_forward


def multi_head_attention_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """:func:`torch.nn.functional.multi_head_attention_forward`, by blocks.

    Weights are asked for by default and seldom read: they come from a run beside, of which nothing is left then.
    """
    if _may_fuse():
        return _multi_head(*args, **kwargs)
    call = inspect.signature(_multi_head).bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    masked = given["attn_mask"] is not None or given["key_padding_mask"] is not None
    if not given["need_weights"] or masked or (given["training"] and given["dropout_p"]):
        return _by_blocks(_multi_head)(*args, **kwargs)
    _, weights = _multi_head(*args, **kwargs)
    given["need_weights"] = False
    return _by_blocks(_multi_head)(*call.args, **call.kwargs)[0], weights


#: What a derivation puts in the place of torch's functions.
SUBSTITUTES: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.multi_head_attention_forward: multi_head_attention_forward,
}
