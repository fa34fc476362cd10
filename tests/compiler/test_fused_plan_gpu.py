"""Plans of fused modules on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch

import gankern
from gankern.compiler import choice
from gankern.compiler.fused import plans_of
from tests.compiler.test_fused_plan import NETWORKS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_fused_module_computes_stocks_values_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    stock = make().to("cuda", dtype)
    x = torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True)
    ours = gankern.fuse(copy.deepcopy(stock))
    rtol, atol = (1e-8, 1e-10) if dtype == torch.float64 else (2e-3, 2e-4)
    with choice.everywhere():
        for _ in range(2):
            found = []
            for net in (stock, ours):
                torch.manual_seed(5)
                output = net(x)
                grads = torch.autograd.grad(output.square().sum(), [x, *net.parameters()])
                found.append([output.detach(), *grads, *net.buffers(), torch.cuda.get_rng_state()])
            for got, want in zip(found[1], found[0], strict=True):
                torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
    assert plans_of(ours).hits == 1, str(plans_of(ours).kinds)
