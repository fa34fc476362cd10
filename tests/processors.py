"""Marks of tests that need a processor's instruction set."""

from __future__ import annotations

import pytest

from gankern import _native

avx512 = pytest.mark.skipif(
    _native.kernels is None or _native.kernels.cpu_isa() != "avx512",
    reason="without AVX-512, convolutions are stock's",
)
