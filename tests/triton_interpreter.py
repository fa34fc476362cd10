"""Triton's interpreter, mended where it errs or is slow."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
from triton import language as tl
from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor
_create_dot = interpreter.InterpreterBuilder.create_dot
_np_dtype = interpreter._get_np_dtype
_block_type = tl.block_type.__init__
_tensor = tl.tensor.__init__
_tuple = tl.tuple.__init__
_of_tuple = tl.tuple.__getattr__

# What a name stands for: the interpreter makes each anew, at each operation.
_np_dtypes: dict[str, np.dtype] = {}
_block_types: dict[tuple[Any, ...], dict[str, Any]] = {}
_tensors: dict[str, dict[str, Any]] = {}


def _patch_with_index(tensor: Any, *scope: Any) -> None:
    """A kernel's argument as the end of a range: Triton's own way is an error with numpy 2.4."""
    _patch_lang_tensor(tensor, *scope)
    # Triton 3.4, which torch 2.8 brings, has no scope.
    set_attribute = scope[0].set_attr if scope else setattr
    set_attribute(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _dot_of_bfloat16(self: Any, a: Any, b: Any, *args: Any) -> Any:
    """Triton's own multiplies the bits, as integers."""
    if str(a.dtype) == "bf16":
        wide = [(x.data.astype(np.uint32) << 16).view(np.float32) for x in (a, b)]
        a, b = (interpreter.TensorHandle(x, tl.float32) for x in wide)
    return _create_dot(self, a, b, *args)


def _cached_np_dtype(dtype: Any) -> np.dtype:
    name = dtype.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _np_dtype(dtype)
    return _np_dtypes[name]


def _cached_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    key = (element_ty.name, *[size.value if isinstance(size, tl.constexpr) else size for size in shape])
    if key not in _block_types:
        _block_type(self, element_ty, shape)
        _block_types[key] = dict(vars(self))
    vars(self).update(_block_types[key])


def _cached_tensor(self: Any, handle: Any, type: Any) -> None:
    if type.name not in _tensors:
        _tensor(self, handle, type)
        _tensors[type.name] = dict(vars(self))
    vars(self).update(_tensors[type.name], handle=handle, type=type)


def _lazy_tuple(self: Any, args: Any, type: Any = None) -> None:
    """Its type is made where it is asked for, seldom: each comparison of shapes makes a tuple."""
    if type is None:
        self.values = list(args)
    else:
        _tuple(self, args, type)


def _of_lazy_tuple(self: Any, name: str) -> Any:
    if name != "type":
        return _of_tuple(self, name)
    _tuple(self, self.values)
    return self.type


def mend() -> None:
    interpreter._patch_lang_tensor = _patch_with_index
    interpreter.InterpreterBuilder.create_dot = _dot_of_bfloat16
    # Triton patches its language at each call of a helper, which takes most of the time: once is enough.
    interpreter._patch_lang(triton.language.zeros.fn)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
    interpreter._get_np_dtype = _cached_np_dtype
    tl.block_type.__init__, tl.tensor.__init__ = _cached_block_type, _cached_tensor
    tl.tuple.__init__, tl.tuple.__getattr__ = _lazy_tuple, _of_lazy_tuple
