"""Which batches are recorded as CUDA graphs, and what happens to gradients then: the part that needs no card."""

from importlib.util import find_spec

import pytest
import torch

from unsloth_ext.compiling import compile_model
from unsloth_ext.errors import UsageError

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("transformers", "peft", "bitsandbytes")), reason="make setup"
)

if find_spec("transformers"):
    import compile_models as models

    from unsloth_ext.compiling.cuda_graphs import SEEN, SHAPES, CudaGraphs, copied_out


class OnACard(torch.Tensor):
    """A host tensor that says it is on a card."""

    @property
    def device(self):
        return torch.device("cuda", 0)


@pytest.fixture
def decide(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    model = models.make(layers=1, lora=False, four_bit=False)
    graphs = CudaGraphs(model, model.model, True)

    def begin(rows=2, length=16, **more):
        ids = torch.zeros(rows, length, dtype=torch.long).as_subclass(OnACard)
        return graphs.begin({"input_ids": ids, **more})

    begin.graphs, begin.model = graphs, model
    return begin


def test_a_shape_is_recorded_when_it_repeats(decide):
    lengths = torch.randperm(400)[: SHAPES + 3].tolist()
    assert not any(decide(length=n + 1) for n in lengths for _ in range(SEEN - 1))
    assert [decide(length=n + 1) for n in lengths] == [True] * SHAPES + [False] * 3
    assert all(decide(length=n + 1) for n in lengths[:SHAPES])
    assert decide.graphs.plain[f"more than {SHAPES} shapes"] == 3 and decide.graphs.used == 2 * SHAPES


def test_a_number_of_the_batch_is_part_of_its_shape(decide):
    assert not any(decide(num_items_in_batch=n) for n in range(20))
    assert [decide(num_items_in_batch=99) for _ in range(SEEN)][-1]


@pytest.mark.parametrize(
    "more, reason",
    [
        ({"cu_seq_lens_q": 1}, "packed"),
        ({"output_hidden_states": True}, "hidden states handed out"),
        ({"attention_mask": torch.ones(2, 16)}, "inputs not on a CUDA card"),
    ],
)
def test_what_is_never_recorded(decide, more, reason):
    assert not any(decide(**more) for _ in range(SEEN + 2))
    assert decide.graphs.plain == {reason: SEEN + 2}


def test_checkpointing_and_no_gradients_are_not_recorded(decide):
    assert [decide() for _ in range(SEEN)][-1]
    with torch.no_grad():
        assert not decide()
    decide.model.model.layers[0].gradient_checkpointing = True
    assert not decide()
    decide.model.model.layers[0].gradient_checkpointing = False
    assert decide() and decide.graphs.plain["checkpointing"] == decide.graphs.plain["no gradients"] == 1


def test_under_a_memory_budget_nothing_is_recorded(decide):
    from unsloth_ext.compiling.memory_controller import memory_budget

    assert [decide() for _ in range(SEEN)][-1]
    budget = memory_budget(decide.model, "64GiB")
    assert not decide() and decide.graphs.plain["memory budget"] == 1
    budget.remove()
    assert decide()


def test_bad_arguments_and_restore_leave_nothing():
    model = models.make(layers=1)
    with pytest.raises(UsageError, match="cuda_graphs must be one of"):
        compile_model(model, cuda_graphs="always")
    with pytest.raises(UsageError, match="backend is 'aot_eager'"):
        compile_model(model, cuda_graphs=True, backend="aot_eager")
    state = next(p.quant_state for p in model.parameters() if getattr(p, "quant_state", None) is not None)
    compiled = compile_model(model, cuda_graphs=True)
    assert state.absmax._dynamo_static_input_type == "unguarded"
    compiled.restore()
    assert not hasattr(state.absmax, "_dynamo_static_input_type")


def test_a_copy_of_the_output_has_the_gradients():
    from transformers.modeling_outputs import CausalLMOutputWithPast

    x = torch.randn(3, requires_grad=True)
    loss = x.square().sum()
    found = copied_out(CausalLMOutputWithPast(loss=loss))
    assert type(found) is CausalLMOutputWithPast and found.loss.data_ptr() != loss.data_ptr()
    found.loss.backward()
    assert torch.equal(x.grad, 2 * x.detach())
