"""compile_model on plain transformers + peft + bitsandbytes, on a CPU: the uncompiled numbers, few graphs, no break."""

import gc
import time
import weakref
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch

from unsloth_ext.compiling import CompileError, compile_model
from unsloth_ext.errors import Refused, UsageError

NEEDED = ("transformers", "peft", "bitsandbytes")
pytestmark = pytest.mark.skipif(any(find_spec(name) is None for name in NEEDED), reason="make setup")

if find_spec("transformers"):
    import compile_models as models

EXACT = 1e-5  # fp32, against the largest value of each tensor


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


STEPS = [  # family, scope, layers, 4-bit base, graphs at the most
    ("llama", "step", 2, True, 1),
    pytest.param("gemma2", "step", 1, False, 1, marks=pytest.mark.extended),
    # Batches beyond the sliding window have a mask.
    pytest.param("mistral", "block", 1, True, 2, marks=pytest.mark.extended),
    ("qwen2", "block", 1, False, 1),
    ("qwen3", "block", 3, False, 2),  # the first layer's input, from a frozen embedding, asks for no gradient
]


@pytest.mark.parametrize("family, scope, layers, four_bit, graphs", STEPS)
def test_the_uncompiled_loss_and_gradients(family, scope, layers, four_bit, graphs):
    model = models.make(family, layers=layers, four_bit=four_bit)
    padded = scope == "step"  # transformers gives the layers a mask where it is needed, which is another graph
    batches = [models.batch(), models.batch(rows=3, padded=padded), models.batch()]  # accumulated
    wanted = models.step(model, *batches)
    compiled = compile_model(model, scope, backend="aot_eager")
    found = models.step(model, *batches)
    assert models.worst_difference(found, wanted) <= EXACT
    report = compiled.report()
    assert report.breaks == 0 and report.graphs <= graphs and report.plain_calls == {}, report
    assert report.compiled_calls == 3 * (1 if scope == "step" else layers) and report.compile_seconds > 0
    compiled.restore()
    assert models.worst_difference(models.step(model, *batches), wanted) == 0


@pytest.mark.parametrize("scope", ["step", "block"])
def test_checkpointing(scope):
    model = models.make(layers=1 if scope == "step" else 2, four_bit=False, checkpointing=True)
    model.enable_input_require_grads()  # a second hook: they stack
    batches = [models.batch(), models.batch()]
    wanted = models.step(model, *batches)
    compiled = compile_model(model, scope, backend="aot_eager")
    assert models.worst_difference(models.step(model, *batches), wanted) <= EXACT
    assert compiled.report().breaks == 0 and compiled.report().graphs == 1, compiled.report()
    compiled.restore()
    assert models.worst_difference(models.step(model, *batches), wanted) == 0


def test_seconds_of_a_compile_and_of_what_is_tuned_after_it():
    from unsloth_ext.compiling.compile_report import Ledger

    ledger, metrics = Ledger(), torch._dynamo.utils
    ledger._ids.add("7/0")
    for begin, end, later in (
        (1e9, 31e9, False),
        (40e9, 40.5e9, True),
    ):  # as torch records a kernel's tuning, when it first runs
        facts = {
            "compile_id": torch._guards.CompileId(frame_id=7, frame_compile_id=0),
            "is_forward": True,
            "is_runtime": later,
        }
        metrics.record_compilation_metrics(
            int(begin), int(end), facts | {"duration_us": int(end - begin) // 1000}, None, None
        )
    ledger.collect()
    ledger.collect()  # the same records again
    assert sum(ledger.seconds.values()) == pytest.approx(30.5)


def test_many_shapes_share_two_graphs():
    model = models.make(layers=1, four_bit=False, lora=False)
    compiled = compile_model(model, "step", backend="aot_eager")
    for _ in range(16):
        one = models.batch(rows=int(torch.randint(1, 5, ())), padded=bool(torch.randint(2, ())), high=100)
        found = model(**one).loss
        with torch.no_grad():
            wanted = type(model).forward(model, **one, use_cache=False).loss
        torch.testing.assert_close(found, wanted, rtol=EXACT, atol=EXACT)
    report = compiled.report()
    assert (report.breaks, report.compiled_calls) == (0, 16) and report.graphs <= 2, report
    assert len(report.reasons) == report.recompiles <= 1


def test_packings_share_a_graph():
    from unsloth_ext.compiling import use_packed_attention

    model = models.make(layers=1, four_bit=False, lora=False)
    batches = [models.packed_batch(n) for n in range(2, 10)]
    wanted = [model(**one, use_cache=False).loss for one in batches]
    use_packed_attention(model)
    compiled = compile_model(model, "step", backend="aot_eager")
    for one, expected in zip(batches, wanted, strict=True):
        torch.testing.assert_close(model(**one).loss, expected, rtol=EXACT, atol=EXACT)
    assert compiled.report().graphs <= 4 and compiled.report().breaks == 0, compiled.report()


@pytest.mark.parametrize("scope", ["block", pytest.param("step", marks=pytest.mark.extended)])
def test_evaluation_and_generation_run_as_before(scope):
    model = models.make(layers=1, four_bit=False)
    ids = models.batch(length=7)["input_ids"]
    wanted = model.eval()(input_ids=ids).logits
    generated = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    compiled = compile_model(model.train(), scope, backend="aot_eager")
    model(input_ids=ids, labels=ids).loss.backward()
    graphs = compiled.report().graphs
    model.eval()
    assert torch.equal(model(input_ids=ids).logits, wanted)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False), generated)
    report = compiled.report()
    assert report.graphs == graphs and report.plain_calls["evaluation"] >= (1 if scope == "step" else 5)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()  # and training goes on in the same graph
    assert compiled.report().graphs == graphs


def test_settings_are_restored_and_ours_while_we_trace(monkeypatch):
    seen = []

    def backend(graph, example_inputs):
        config = torch._dynamo.config
        seen.append((config.suppress_errors, config.specialize_float))
        return graph

    model = models.make(layers=1, four_bit=False, lora=False)
    compile_model(model, "step", backend=backend)
    with torch._dynamo.config.patch(suppress_errors=True, specialize_float=False, recompile_limit=77):
        before = torch._dynamo.config.get_config_copy()
        model(**models.batch())
        assert torch._dynamo.config.get_config_copy() == before
    assert seen == [(False, True)]


def test_two_models_do_not_share_a_limit():
    graphs = []
    for _ in range(2):
        model = models.make(layers=1, four_bit=False, lora=False)
        compiled = compile_model(model, "step", backend="eager")
        model(**models.batch())
        graphs.append((compiled.report().graphs, compiled.report().recompiles))
    assert graphs == [(1, 0)] * 2


def test_a_hook_that_cannot_be_traced_is_named():
    model = models.make(layers=2, four_bit=False, lora=False)
    layer = model.model.layers[1].mlp

    def clip(module, args, output):
        if output.abs().max() > 1e6:  # depends on data: no graph can hold it
            output = output.clamp(-1e6, 1e6)
        return output

    layer.register_forward_hook(clip)
    compiled = compile_model(model, "step", backend="aot_eager")
    with torch._dynamo.config.patch(suppress_errors=True), pytest.raises(CompileError) as caught:
        model(**models.batch())  # no silent fall back, whatever the process has set
    assert caught.value.module == "model.layers.1.mlp", caught.value
    assert "layers.1.mlp cannot be traced" in str(caught.value) and caught.value.__cause__ is not None
    assert compiled.report().compiled_calls == 0
    compiled.restore()
    assert model(**models.batch()).loss.isfinite()


def test_an_adapter_that_cannot_be_traced_is_named_in_block_scope():
    model = models.make(layers=1, four_bit=False)
    adapter = model.get_base_model().model.layers[0].self_attn.o_proj.lora_A["default"]
    adapter.forward = torch._dynamo.disable(adapter.forward)
    compile_model(model, backend="aot_eager")
    with pytest.raises(CompileError) as caught:
        model(**models.batch())
    assert caught.value.module.startswith("base_model.model.model.layers.0.self_attn.o_proj"), caught.value


def test_more_kinds_of_batches_than_the_limit():
    from unsloth_ext.compiling import compiled_model

    model = models.make(layers=1, four_bit=False, lora=False)
    compile_model(model, "step", dynamic=False, backend="eager")
    with pytest.raises(CompileError, match="was compiled for 2 kinds"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_model, "LIMIT", 2)
        for length in range(4, 9):
            model(**models.batch(length=length))


def test_refusals_change_nothing():
    import transformers

    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=32))
    before = {name: dict(module.__dict__) for name, module in other.named_modules()}
    with pytest.raises(Refused, match="GPT2LMHeadModel of the family gpt2"):
        compile_model(other)
    assert {name: dict(module.__dict__) for name, module in other.named_modules()} == before
    model = models.make(layers=1, four_bit=False)
    with pytest.raises(UsageError, match="scope must be one of block, step, got 'layer'"):
        compile_model(model, "layer")
    with pytest.raises(UsageError, match="options are Inductor's"):
        compile_model(model, backend="eager", options={"max_autotune": True})
    for wrong in ({"options": {"no_such_option": 1}}, {"backend": "no_such_backend"}):
        for scope in ("block", "step"):
            with pytest.raises(Exception, match="no_such"):
                compile_model(model, scope, **wrong)
            assert not any("forward" in module.__dict__ for module in model.modules())
    compiled = compile_model(model, backend="eager")
    with pytest.raises(Refused, match="compiled already"):
        compile_model(model, "step")
    compiled.restore()
    assert not any("forward" in module.__dict__ for module in model.modules())
    layer = model.get_base_model().model.layers[0]
    layer.forward = layer.forward  # somebody else's wrapper
    with pytest.raises(Refused, match=r"the forward of base_model\.model\.model\.layers\.0 was replaced"):
        compile_model(model)
    del layer.forward
    compile_model(model, backend="eager")


def test_torch_too_old(monkeypatch):
    model = models.make(layers=1, four_bit=False, lora=False)
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu128")
    with pytest.raises(Refused, match=r"needs torch 2\.11 or newer, this is 2\.10\.1"):
        compile_model(model)


def test_loss_errors_are_the_models_own():
    model = models.make(layers=1, four_bit=False, lora=False)
    compile_model(model, backend="eager")
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 4), models.VOCABULARY + 5))


def test_an_operator_that_cannot_be_lowered_is_described_in_short():
    """Inductor's own words for it hold all that its arguments are computed from, and double with each operator that reads two: compiling
    a step of 4 layers had no end on torch 2.11, which also writes them when it meets somebody else's operator."""
    from torch._inductor import lowering

    from unsloth_ext.compiling.compiled_model import _settings

    library = torch.library.Library("unsloth_ext_test", "FRAGMENT")
    for name in ("joined", "not_lowered"):
        library.define(f"{name}(Tensor x, Tensor y) -> Tensor")
        library.impl(name, torch.add, "CPU")
        torch.library.register_fake(f"unsloth_ext_test::{name}", lambda x, y: torch.empty_like(x), lib=library)
    library.define("many_not_lowered(Tensor[] x) -> Tensor")
    library.impl("many_not_lowered", lambda x: x[0] + 1, "CPU")
    torch.library.register_fake("unsloth_ext_test::many_not_lowered", lambda x: torch.empty_like(x[0]), lib=library)

    def fail(*args):
        raise NotImplementedError("on purpose")

    def deep(x, last=lambda x: torch.ops.unsloth_ext_test.not_lowered(x, x)):
        for _ in range(12):
            x = torch.ops.unsloth_ext_test.joined(x, x)
        return last(x)

    names = torch.ops.unsloth_ext_test
    operators = names.not_lowered.default, names.many_not_lowered.default
    lowering.lowerings |= dict.fromkeys(operators, fail)
    try:
        lengths = []
        for settings in (_settings, nullcontext):
            torch._dynamo.reset()
            with settings(), pytest.raises(Exception, match="on purpose") as caught:
                torch.compile(deep)(torch.ones(4, 4))
            lengths.append(len(str(caught.value)))
        torch._dynamo.reset()
        start = time.perf_counter()
        with _settings(), pytest.raises(Exception, match="on purpose") as caught:
            torch.compile(lambda x: names.many_not_lowered([deep(x, lambda x: x) + 1, x]))(torch.ones(4, 4))
        assert len(str(caught.value)) < 4000 and time.perf_counter() - start < 60
    finally:
        for operator in operators:
            del lowering.lowerings[operator]
        library._destroy()
    assert lengths[0] < 4000 < 100_000 < lengths[1], lengths  # else Inductor has mended it, and ours can go


@pytest.mark.parametrize(
    "scope, restored",
    [
        ("block", False),
        ("step", True),
        *(pytest.param(*case, marks=pytest.mark.extended) for case in (("block", True), ("step", False))),
    ],
)
def test_a_model_is_freed(scope, restored):
    model = models.make(layers=1, four_bit=False)
    compiled = compile_model(model, scope=scope, backend="eager")
    for length in (5, 5):
        ids = torch.randint(10, (2, length))
        model(input_ids=ids, labels=ids).loss.backward()
    assert compiled.report().graphs == 1  # the second call finds the first one's
    if restored:
        compiled.restore()
    gone = weakref.ref(model), weakref.ref(next(model.parameters()))
    del model, compiled
    gc.collect()
    assert [one() for one in gone] == [None, None]
