"""On a card: the kernel has plain torch's bits, in a graph too."""

import pytest
import torch
from test_rope import case, exact

from unsloth_ext.compiling.rope import _rotate, rotate

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize(("batch", "length", "heads", "width"), [(2, 515, 32, 128), (1, 37, 7, 64), (3, 5, 2, 96)])
def test_kernel_and_graph(dtype, positions, batch, length, heads, width):
    given = case(dtype, batch, length, heads, width, positions)
    wanted = exact(*given)
    x, cos, sin, at = (None if one is None else one.cuda() for one in given)
    x = x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    torch._dynamo.reset()
    run = torch.compile(lambda x: rotate(x, cos, sin, at), fullgraph=True, dynamic=True)
    outer, found = torch.randn_like(x), []
    for function in (run, lambda x: rotate(x, cos, sin, at)):
        out = function(x)
        found.append((out, *torch.autograd.grad(out, x, outer)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    plain = _rotate(x, cos, sin, at, False), _rotate(outer, cos, sin, at, True)
    assert all(torch.equal(a, b) for a, b in zip(found[0], plain, strict=True))
    torch.testing.assert_close(found[0][0].double().cpu(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_bad_input():
    x, cos, sin, at = (one.cuda() for one in case(torch.bfloat16, positions=True))
    with pytest.raises(ValueError, match="the tables have 5 rows, and 19 positions are asked for"):
        rotate(x, cos[:5], sin, None)
    with pytest.raises(ValueError, match="positions must be one for each of 38 tokens, got 19"):
        rotate(x, cos, sin, at[:19])
