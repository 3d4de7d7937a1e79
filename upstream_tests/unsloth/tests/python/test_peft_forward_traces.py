"""torch.compile reaches the model through PeftModel_fast_forward: no graph break there."""

import os

os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")

import unsloth  # noqa: F401, E402 (before transformers)
import torch  # noqa: E402
from unsloth.models import llama  # noqa: E402


class Base(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Linear(4, 4)
        self.seen = None

    def forward(self, input_ids, **kwargs):
        return self.model(input_ids), sorted(kwargs)


class Wrapped(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.base_model = Base()

    def forward(self, *args, **kwargs):
        return llama.PeftModel_fast_forward(self, *args, **kwargs)


def test_one_graph():
    model, x = Wrapped(), torch.randn(2, 4)
    compiled = torch.compile(model, fullgraph = True, backend = "eager")
    out, names = compiled(x, labels = x)
    assert torch.equal(out, model.base_model.model(x)) and "logits_to_keep" in names


def test_eager_is_as_before():
    model, x = Wrapped(), torch.randn(2, 4)
    out, names = model(x, labels = x)
    assert torch.equal(out, model.base_model.model(x)) and "num_logits_to_keep" in names
