"""Triton's interpreter, mended where it errs or is slow."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
from triton import language as tl
from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor
_create_dot = interpreter.InterpreterBuilder.create_dot


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


def mend() -> None:
    interpreter._patch_lang_tensor = _patch_with_index
    interpreter.InterpreterBuilder.create_dot = _dot_of_bfloat16
    # Triton patches its language at each call of a helper, which takes most of the time: once is enough.
    interpreter._patch_lang(triton.language.zeros.fn)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
