"""Layers as operators of a step's graph: the uncompiled losses and gradients, each kind of layer compiled once, and no call taken for another."""

import copy
import functools
import gc
import weakref

import compile_models as models
import pytest
import torch

from unsloth_ext.compiling import CompileError, compile_model
from unsloth_ext.errors import UsageError

EXACT = 1e-5


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_code(monkeypatch):
    """Inductor as far as its passes over graphs, which then are interpreted: compiling C++ for them takes half a minute a test."""
    from functorch.compile import make_boxed_func
    from torch._inductor import compile_fx

    original, handed = compile_fx.compile_fx, []

    def interpreted(graph, example_inputs, **kwargs):
        handed.append(graph)
        return make_boxed_func(graph.forward)

    def whole(graph, example_inputs, inner_compile=interpreted, **kwargs):
        return original(graph, example_inputs, inner_compile=inner_compile, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", interpreted)
    monkeypatch.setattr(compile_fx, "compile_fx", whole)
    return handed


def _ready(family="llama", **options):
    model = models.make(family, **options)
    return model, [models.batch(padded=True), models.batch(rows=3, padded=True), models.batch(rows=4, padded=True)]


@pytest.mark.parametrize(
    "family, layers, kinds",
    [("llama", 4, 2), *(pytest.param(f, n, 2, marks=pytest.mark.extended) for f, n in (("gemma2", 5), ("qwen3", 3)))],
)
def test_the_uncompiled_loss_and_gradients(no_code, family, layers, kinds):
    # Kinds: the first layer's input, from a frozen embedding, asks for no gradient.
    model, batches = _ready(family, layers=layers)
    wanted = models.step(model, *batches)
    compiled = compile_model(model, "step")
    for _ in range(2):
        assert models.worst_difference(models.step(model, *batches), wanted) <= EXACT
    report = compiled.report()
    assert (report.graphs, report.breaks, report.shared_layers, report.not_shared) == (
        1 + kinds,
        0,
        layers,
        None,
    ), report
    assert report.compiled_calls == 6 and f"{layers} layers compiled by kind" in str(report)
    operators = [n for graph in no_code for n in graph.graph.nodes if "layer_" in str(n.target)]
    assert len(operators) == 2 * layers  # one forward and one backward each, in the step's two graphs
    compiled.restore()
    assert models.worst_difference(models.step(model, *batches), wanted) == 0


@pytest.mark.extended
def test_as_many_graphs_without(no_code):
    model, batches = _ready(layers=2, four_bit=False)
    wanted = models.step(model, *batches)
    compiled = compile_model(model, "step", shared_layers=False)
    assert models.worst_difference(models.step(model, *batches), wanted) <= EXACT
    assert (compiled.report().graphs, compiled.report().shared_layers) == (1, 0)


@pytest.mark.extended
@pytest.mark.slow
def test_through_inductor():
    model, batches = _ready(layers=3)
    wanted = models.step(model, *batches)
    compiled = compile_model(model, "step")
    assert models.worst_difference(models.step(model, *batches), wanted) <= EXACT
    assert compiled.report().shared_layers == 3


@pytest.mark.extended
def test_checkpointing(no_code):
    model, batches = _ready(layers=3, four_bit=False, checkpointing=True)
    wanted = models.step(model, *batches)
    compiled = compile_model(model, "step")
    assert models.worst_difference(models.step(model, *batches), wanted) <= EXACT
    assert compiled.report().shared_layers == 3
    forwards = [n for graph in no_code for n in graph.graph.nodes if "layer_forward" in str(n.target)]
    if not hasattr(type(model.get_base_model().model.layers[0]).forward, "__wrapped__"):
        assert len(forwards) > 3  # some are computed again in the backward
    else:  # newer transformers checkpoint within forward, so each layer's backward does so itself
        backward = max(no_code[:2], key=lambda graph: len(graph.graph.nodes))
        assert any("recompute" in node.meta for node in backward.graph.nodes)


@pytest.mark.extended
def test_a_call_of_another_form_is_another_kind(no_code):
    model, batches = _ready(layers=3, four_bit=False)
    for one in batches:
        one["attention_mask"][:] = 1
    bare = [{key: value for key, value in one.items() if key != "attention_mask"} for one in batches]
    wanted = models.step(model, *batches, *bare)
    compiled = compile_model(model, "step")
    assert models.worst_difference(models.step(model, *batches, *bare), wanted) <= EXACT
    graphs = compiled.report().graphs
    for _ in range(2):  # and the first one is still known
        assert models.worst_difference(models.step(model, *batches, *bare), wanted) <= EXACT
    assert compiled.report().graphs == graphs


@pytest.mark.extended
def test_what_changes_in_a_layer_is_noticed(no_code):
    model, batches = _ready(layers=2, four_bit=False)
    compiled = compile_model(model, "step")
    first, losses = model(**batches[0]).loss.item(), []
    projection = model.base_model.model.model.layers[1].mlp.down_proj

    def losses_after(change):
        change()
        losses.append(model(**batches[0]).loss.item())

    losses_after(lambda: projection.scaling.update(default=7.0))
    losses_after(lambda: setattr(projection.lora_B.default, "weight", torch.nn.Parameter(torch.randn(64, 4))))
    assert len({round(loss, 6) for loss in (first, *losses)}) == 3
    assert compiled.report().shared_layers == 2
    compiled.restore()
    assert losses[1] == pytest.approx(model(**batches[0]).loss.item(), rel=EXACT)


@pytest.mark.extended
def test_adapters_that_are_switched_off_and_on(no_code):
    model, batches = _ready(layers=3, four_bit=False)
    compiled, losses = compile_model(model, "step"), []
    for switch in ("enable_adapter_layers", "disable_adapter_layers", "enable_adapter_layers"):
        getattr(model.base_model, switch)()
        losses.append(model(**batches[0]).loss.item())
    assert losses[0] == pytest.approx(losses[2], rel=EXACT) and abs(losses[0] - losses[1]) > 1e-3
    compiled.restore()
    assert losses[2] == pytest.approx(model(**batches[0]).loss.item(), rel=EXACT)


@pytest.mark.extended
def test_without_gradients_and_in_evaluation(no_code):
    model, batches = _ready(layers=2, four_bit=False)
    wanted = model(**batches[0]).loss.item()
    compiled = compile_model(model, "step")
    model(**batches[0]).loss.backward()
    with torch.no_grad():
        assert model(**batches[0]).loss.item() == pytest.approx(wanted, rel=EXACT)
    assert compiled.report().not_shared is None
    assert model.eval()(**batches[0]).loss.item() == pytest.approx(wanted, rel=EXACT)
    assert compiled.report().plain_calls == {"evaluation": 1}


@pytest.mark.extended
def test_dropout_is_the_same_forward_and_backward(no_code):
    # With no other weight than one layer's down_proj to train, the loss's slope along the gradient tells which mask the backward had.
    model, batches = _ready(layers=2, four_bit=False, dropout=0.5)
    compile_model(model, "step")
    weight = model.base_model.model.model.layers[1].mlp.down_proj.lora_B.default.weight

    def loss():
        torch.manual_seed(5)
        return model(**batches[0]).loss

    loss().backward()
    direction, step = weight.grad.clone(), 1e-2
    with torch.no_grad():
        direction /= direction.norm()
        weight.add_(direction, alpha=step)
        above = loss_value(loss)
        weight.add_(direction, alpha=-2 * step)
        below = loss_value(loss)
    assert (above - below) / (2 * step) == pytest.approx((weight.grad * direction).sum().item(), rel=2e-2)


def loss_value(loss):
    with torch.enable_grad():  # the same graph
        return loss().item()


@pytest.mark.extended
def test_a_number_of_a_layer(no_code, monkeypatch):
    import transformers.models.llama.modeling_llama as llama

    original, more = llama.LlamaDecoderLayer.forward, "one"

    @functools.wraps(original)  # as Unsloth wraps it
    def forward(self, *args, **kwargs):  # the number is an input of the layer's graph
        return original(self, *args, **kwargs) * (self.self_attn.number + args[0].shape[1] + len(more))

    monkeypatch.setattr(llama.LlamaDecoderLayer, "forward", forward)
    model, batches = _ready(layers=2, four_bit=False)
    layers = model.base_model.model.model.layers
    for layer in layers:
        layer.self_attn.number = 3
    wanted = [model(**one).loss.item() for one in batches]
    compiled = compile_model(model, "step")
    found = [model(**one).loss.item() for one in batches]
    assert found == pytest.approx(wanted, rel=EXACT) and compiled.report().shared_layers == 2
    layers[0].self_attn.number = 500
    found = model(**batches[0]).loss.item()
    compiled.restore()
    assert found == pytest.approx(model(**batches[0]).loss.item(), rel=EXACT) and found != pytest.approx(wanted[0])


@pytest.mark.extended
def test_layers_that_cannot_be_operators_are_compiled_one_by_one(no_code, monkeypatch):
    import transformers.models.llama.modeling_llama as llama

    original = llama.LlamaDecoderLayer.forward

    def forward(self, hidden_states, **kwargs):
        found = original(self, hidden_states, **kwargs)
        self.seen = found * 2  # a tensor beside its output
        return found

    monkeypatch.setattr(llama.LlamaDecoderLayer, "forward", forward)
    model, batches = _ready(layers=2, four_bit=False)
    wanted = models.step(model, *batches)
    compiled = compile_model(model, "step")
    assert models.worst_difference(models.step(model, *batches), wanted) <= EXACT
    report, seen = compiled.report(), model.base_model.model.model.layers[1].seen
    assert seen.shape[0] == 4 and seen.abs().max() > 0  # of the last batch
    assert (
        report.shared_layers == 0
        and "gives 2 tensors" in report.not_shared
        and "each layer compiled by itself" in str(report)
    )


@pytest.mark.extended
def test_packed(no_code):
    from unsloth_ext.compiling import use_packed_attention

    model = models.make(layers=2)
    batches = [models.packed_batch(n) for n in (2, 3, 5)]  # the longest document is a number of its own in each
    use_packed_attention(model)
    wanted = models.step(model, *(one | {"use_cache": False} for one in batches))
    compiled = compile_model(model, "step")
    assert models.worst_difference(models.step(model, *batches), wanted) <= EXACT
    report = compiled.report()
    assert report.shared_layers == 2 and report.graphs_by_region[type(model).__name__] == 1, report


@pytest.mark.extended
def test_a_number_that_a_layer_is_called_with(no_code, monkeypatch):
    # It is a symbol, and no size of a tensor: in the output, in the backward, and in what is known of it.
    import transformers.models.llama.modeling_llama as llama

    original = llama.LlamaDecoderLayer.forward

    def forward(self, hidden_states, times=1, **kwargs):
        found = original(self, hidden_states, **kwargs)
        return torch.where(hidden_states > 0, found * times, found) if times > 3 else found

    monkeypatch.setattr(llama.LlamaDecoderLayer, "forward", forward)
    model, batches = _ready(layers=2, four_bit=False)
    batches = [one | {"times": times} for one, times in zip(batches, (5, 9, 2), strict=True)]
    wanted = models.step(model, *batches)
    compiled = compile_model(model, "step")
    assert models.worst_difference(models.step(model, *batches), wanted) <= EXACT
    report = compiled.report()
    assert report.shared_layers == 2 and report.graphs_by_region[type(model).__name__] == 2, report


@pytest.mark.extended
def test_a_hook_in_a_layer_that_cannot_be_traced_is_named(no_code):
    model, batches = _ready(layers=3, four_bit=False)

    def clip(module, args, output):
        if output.abs().max() > 1e6:  # depends on data: no graph can hold it
            output = output.clamp(-1e6, 1e6)
        return output

    model.base_model.model.model.layers[1].mlp.register_forward_hook(clip)
    compiled = compile_model(model, "step")
    with pytest.raises(CompileError, match=r"layers\.1\.mlp"):
        model(**batches[0])
    compiled.restore()
    assert model(**batches[0]).loss.isfinite()


@pytest.mark.extended
def test_the_operators(no_code, monkeypatch):
    from unsloth_ext.compiling import shared_layers

    model, batches = _ready(layers=2, four_bit=False)
    compile_model(model, "step")
    seen, original = [], shared_layers.Region.run

    def run(region, tensors, numbers):
        seen.append(list(tensors))
        return original(region, tensors, numbers)

    monkeypatch.setattr(shared_layers.Region, "run", run)
    model(**batches[0])
    number, call = max((n, c) for n, c in shared_layers._calls.items() if c.used)
    tensors = [torch.zeros(1)] * (max(call.places) + 1)  # of arguments that the layer does not use
    for index, (place, tensor) in enumerate(zip(call.places, seen[-1], strict=True)):
        tensors[place] = tensor.detach().clone().requires_grad_(index in call.region.inputs_with_gradient)
    torch.library.opcheck(torch.ops.unsloth_ext.layer_forward.default, (tensors, [], number))


@pytest.mark.extended
def test_a_model_is_freed(no_code):
    model, batches = _ready(layers=2, four_bit=False)
    compiled = compile_model(model, "step")
    model(**batches[0]).loss.backward()
    alive = weakref.ref(model)
    del model, compiled
    torch._dynamo.reset()
    gc.collect()
    assert alive() is None


@pytest.mark.extended
def test_an_earlier_loss_after_a_change(no_code):
    model, batches = _ready(layers=2, four_bit=False)
    wanted = [model(**batches[0]).loss]
    projection = model.base_model.model.model.layers[1].mlp.down_proj
    projection.scaling["default"] = 5.0
    wanted.append(model(**batches[0]).loss)
    sum(wanted).backward()
    gradient, projection.lora_A.default.weight.grad = projection.lora_A.default.weight.grad, None
    projection.scaling["default"] = 2.0
    compiled = compile_model(model, "step")
    losses = [model(**batches[0]).loss]
    projection.scaling["default"] = 5.0
    losses.append(model(**batches[0]).loss)
    sum(losses).backward()
    torch.testing.assert_close(projection.lora_A.default.weight.grad, gradient, rtol=1e-4, atol=1e-6)
    assert compiled.report().shared_layers == 2


@pytest.mark.extended
def test_a_layer_that_the_step_changes_before_it(no_code):
    model, batches = _ready(layers=3, four_bit=False)
    layer = model.base_model.model.model.layers[1]

    def before(module, args, kwargs):
        module.mlp.down_proj.scaling["default"] = 9.0

    def after(module, args, kwargs, output):
        module.mlp.down_proj.scaling["default"] = 2.0

    layer.register_forward_pre_hook(before, with_kwargs=True)
    layer.register_forward_hook(after, with_kwargs=True)
    wanted = models.step(model, *batches)
    compiled = compile_model(model, "step")
    assert models.worst_difference(models.step(model, *batches), wanted) <= EXACT
    assert "changes a layer" in compiled.report().not_shared


@pytest.mark.extended
def test_an_input_laid_out_otherwise(no_code):
    model, batches = _ready(layers=2, four_bit=False)
    embedded = [model.get_input_embeddings()(one.pop("input_ids")).detach() for one in batches]
    embedded[1] = embedded[1].transpose(0, 1).contiguous().transpose(0, 1)
    batches = [one | {"inputs_embeds": x} for one, x in zip(batches, embedded, strict=True)]
    wanted = models.step(model, *batches)
    compiled = compile_model(model, "step")
    assert models.worst_difference(models.step(model, *batches), wanted) <= EXACT
    assert compiled.report().shared_layers == 2


@pytest.mark.extended
def test_dropout_that_is_computed_again_is_no_operator(no_code):
    model, batches = _ready(layers=2, four_bit=False, checkpointing=True, dropout=0.5)
    compiled = compile_model(model, "step")
    model(**batches[0]).loss.backward()
    assert "dropout" in compiled.report().not_shared


@pytest.mark.extended
def test_no_copy_and_a_wrapper_that_stays(no_code):
    model, batches = _ready(layers=2, four_bit=False)
    compile_model(model, "step")
    layer, calls = model.base_model.model.model.layers[1], []
    inside = layer.forward

    def wrapped(*args, **kwargs):
        if not torch.compiler.is_compiling():
            calls.append(1)
        return inside(*args, **kwargs)

    model(**batches[0])
    layer.forward = wrapped
    layer.mlp.down_proj.scaling["default"] = 5.0  # all is learnt anew
    model(**batches[0])
    assert layer.forward is wrapped
    with pytest.raises(UsageError, match="cannot be copied"):
        copy.deepcopy(model)
