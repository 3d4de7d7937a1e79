"""`compile_model` beside sharding, pipelines and DDP: the gradients of one process, and a layer is one graph."""

import fsdp2_models as models
import pytest
import torch
from test_pipeline import _batch, _expected, _lora, _one, _pipeline, families  # noqa: F401


def _pipelined(rank, world, folder, seed, batch, backend, **options):
    from unsloth_ext.compiling import compile_model

    pipe = _pipeline(folder, seed, messages="copies", **options)
    compiled = compile_model(pipe.model, backend=backend)
    loss = pipe.step(**batch)
    gradients = {n: p.grad for n, p in pipe.named_parameters()}
    return loss, gradients, compiled.report()


def _sharded(rank, world, folder, seed, batch, backend, order, checkpointing):
    from peft import get_peft_model

    from unsloth_ext.compiling import compile_model
    from unsloth_ext.fsdp2 import load, shard

    torch.manual_seed(seed)
    model = get_peft_model(load(folder, dtype=torch.float32), _lora()).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compiled = compile_model(model, backend=backend) if order == "before" else None
    model = shard(model, gather="copies")
    compiled = compiled or compile_model(model, backend=backend)
    for _ in range(2):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
    gradients = {n: p.grad.full_tensor() / 2 for n, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), gradients, compiled.report()


def _under_ddp(rank, world, folder, seed, batch, backend):
    from peft import get_peft_model
    from torch.nn.parallel import DistributedDataParallel

    from unsloth_ext.compiling import compile_model

    torch.manual_seed(seed)
    model = get_peft_model(models.whole(folder, dtype=torch.float32), _lora()).train()
    compiled = compile_model(model, backend=backend)
    first, torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = torch.distributed._DEFAULT_FIRST_BUCKET_BYTES, 500
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1e-3)
    torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = first
    loss = wrapped(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, compiled.report()


def _same_as_one_process(answers, expected, together=True):
    """together: every rank has all gradients."""
    loss, gradients = expected
    found = {}
    for got, part, report in answers:
        torch.testing.assert_close(got, loss, rtol=0, atol=1e-5)
        assert not set(found) & set(part) or together
        found |= part
        # The first layer's input wants no gradient, the others' does.
        assert report.breaks == 0 and report.graphs <= 2 and report.compiled_calls, str(report)
        assert not report.plain_calls, str(report)
    assert set(found) == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.extended
@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {"schedule": "interleaved-1f1b"}), ("qwen3", {"schedule": "1f1b", "checkpointing": True})],
)
def test_a_pipeline(ranks, families, family, options, backend="aot_eager"):  # noqa: F811
    seed, batch = int(torch.randint(1 << 30, ())), _batch()
    answers = ranks(2, _pipelined, folder=families[family], seed=seed, batch=batch, backend=backend, **options)
    _same_as_one_process(answers, _expected(_one(families[family], seed), batch), together=False)


def _refusals(rank, world, folder):
    from unsloth_ext.compiling import compile_model
    from unsloth_ext.errors import Refused

    pipe, found = _pipeline(folder, 1), []
    for options in ({"scope": "step"}, {"cuda_graphs": True}):
        with pytest.raises(Refused) as caught:
            compile_model(pipe.model, **options)
        found.append(str(caught.value))
    return found, [name for name, module in pipe.model.named_modules() if "forward" in module.__dict__]


def test_a_pipeline_is_compiled_by_layers_or_refused(ranks, families):  # noqa: F811
    for found, changed in ranks(2, _refusals, folder=families["llama"]):
        assert all("layers of other ranks" in text for text in found) and not changed


@pytest.mark.extended
@pytest.mark.parametrize(("order", "checkpointing"), [("before", False), ("after", True)])
def test_a_sharded_model(ranks, families, order, checkpointing):  # noqa: F811
    seed, batch = int(torch.randint(1 << 30, ())), _batch()
    options = dict(folder=families["llama"], seed=seed, batch=batch, backend="aot_eager")
    answers = ranks(2, _sharded, order=order, checkpointing=checkpointing, **options)
    _same_as_one_process(answers, _expected(_one(families["llama"], seed), batch))


def test_under_ddp_a_layer_stays_one_graph(ranks, families):  # noqa: F811
    """Dynamo would cut it where a bucket of gradients is full."""
    seed, batch = int(torch.randint(1 << 30, ())), _batch()
    options = dict(folder=families["llama"], seed=seed, batch=batch, backend="aot_eager")
    answers = ranks(2, _under_ddp, **options)
    _same_as_one_process(answers, _expected(_one(families["llama"], seed), batch))
