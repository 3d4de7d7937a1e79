"""A decoder layer of Unsloth's own, wrapped by block compile, inside a torch.compile of the user's: also under
gradient checkpointing, whose body may not write to what is outside of it."""

import os

os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")

import unsloth  # noqa: F401, E402 (before transformers)
import pytest  # noqa: E402
import torch  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from unsloth.models import _block_compile  # noqa: E402


def make_layer():
    class DecoderLayer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, hidden_states, **kwargs):
            return torch.sin(self.linear(hidden_states))

    DecoderLayer.forward.__module__ = "unsloth.models.llama"
    plain = DecoderLayer.forward
    _block_compile._wrap(DecoderLayer, dict(_block_compile._COMPILE_OPTIONS))
    assert DecoderLayer.forward is not plain and getattr(DecoderLayer.forward, _block_compile._MARK)
    return DecoderLayer(), plain


@pytest.mark.parametrize("checkpointed", [False, True])
def test_one_graph_with_the_plain_numbers(checkpointed):
    layer, plain = make_layer()

    def step(x):
        out = checkpoint(layer, x, use_reentrant = False) if checkpointed else layer(x)
        return out.square().sum()

    x = torch.randn(3, 5, 4, requires_grad = True)
    found = torch.compile(step, fullgraph = True, backend = "aot_eager")(x)
    wanted = plain(layer, x).square().sum()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(wanted, x))
    assert _block_compile._IN_BLOCK[0] == _block_compile._OFF


def test_evaluation_is_the_plain_forward():
    layer, plain = make_layer()
    x = torch.randn(3, 5, 4)
    assert torch.equal(layer.eval()(x), plain(layer, x))
