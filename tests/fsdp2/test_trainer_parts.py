"""The switch, losses that read the head themselves, float16's scaler, generation with everything gathered, and the loading hook."""

import json
import os

import fsdp2_models as models
import fsdp2_trainers as scripts
import pytest
import torch

from unsloth_ext.errors import UsageError
from unsloth_ext.fsdp2 import switch


@pytest.mark.parametrize("text, expected", [
    ("", None), ("0", None), (" off ", None),
    ("1", switch.Settings()), ("TRUE", switch.Settings()),
    ("cpu_offload", switch.Settings(cpu_offload=True)),
    ("residency=2GiB, reshard_after_forward=false", switch.Settings(residency=2 << 30, reshard_after_forward=False)),
    ("residency=all,mixed_precision=bf16", switch.Settings(residency="all", mixed_precision="bfloat16")),
    ("residency=auto", switch.Settings()), ("residency=0", switch.Settings(residency=0)),
    ("sharded_load=0,residency=1.5MiB", switch.Settings(sharded_load=False, residency=3 << 19)),
])  # fmt: skip
def test_the_variable_is_read(text, expected):
    assert switch.parse(text) == expected


@pytest.mark.parametrize("text, said", [
    ("offload", "no setting 'offload'"), ("cpu_offload=maybe", "cpu_offload must be true or false, got 'maybe'"),
    ("residency=2GB", "'2gb'"), ("residency=-1", "'-1'"), ("mixed_precision=int8", "'int8'"), ("1,cpu_offload", "setting '1'"),
])  # fmt: skip
def test_a_wrong_variable_is_named(text, said):
    with pytest.raises(UsageError, match=said):
        switch.parse(text)


_STATES = """
import unsloth_ext, json
from transformers import PreTrainedModel, Trainer
pristine, loads = dict(vars(Trainer)), vars(PreTrainedModel)["from_pretrained"]
states = lambda: {r.id: (r.state, r.reason) for r in unsloth_ext.status() if r.id in ("fsdp2.trainer", "fsdp2.loading")}
before = states()
unsloth_ext.fsdp2.enable(residency=5)
on = states()
assert vars(Trainer)["__init__"] is not pristine["__init__"] and vars(PreTrainedModel)["from_pretrained"] is not loads
unsloth_ext.fsdp2.disable()
assert dict(vars(Trainer)) == pristine and vars(PreTrainedModel)["from_pretrained"] is loads
off = states()
del Trainer._load_best_model
try:
    unsloth_ext.fsdp2.enable()
except unsloth_ext.errors.UnslothExtError as error:
    print(json.dumps([before, on, off, str(error)]))
assert vars(PreTrainedModel)["from_pretrained"] is loads and unsloth_ext.fsdp2.switch.requested() is None
"""


def test_the_patches_follow_the_switch(python):
    before, on, off, said = json.loads(python(_STATES).stdout.splitlines()[-1])
    assert (
        "cannot be made to shard" in said and "_load_best_model" in said
    )  # not a run that is silently whole on every rank
    assert [{state for state, _ in found.values()} for found in (before, on, off)] == [
        {"disabled"},
        {"applied"},
        {"disabled"},
    ]
    assert len(on) == 2 and all("UNSLOTH_EXT_FSDP2=1" in reason for _, reason in before.values())


def test_the_variable_switches_them_on(python):
    done = python(
        "import unsloth_ext; print([r.state for r in unsloth_ext.status() if r.id in ('fsdp2.trainer', 'fsdp2.loading')])",
        UNSLOTH_EXT_FSDP2="cpu_offload",
    )
    assert done.stdout.strip() == "['pending', 'pending']"


def test_a_wrong_variable_stops_the_import(python):
    done = python("import unsloth_ext", check=False, UNSLOTH_EXT_FSDP2="reshard=no")
    assert done.returncode and "UNSLOTH_EXT_FSDP2 has no setting 'reshard'" in done.stderr


class _ReadsTheHead(torch.autograd.Function):
    """Like a fused loss: the weight is multiplied here, and once more in the backward, from the reference that was kept."""

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        ctx.weight = weight
        with torch.enable_grad():
            ctx.hidden = hidden.detach().requires_grad_()
            ctx.loss = torch.nn.functional.cross_entropy((ctx.hidden @ weight.T).flatten(0, 1), labels.flatten())
        return ctx.loss.detach()

    @staticmethod
    def backward(ctx, grad):
        assert ctx.weight.untyped_storage().nbytes() > 0 and torch.isfinite(ctx.weight.sum())
        wanted = [ctx.hidden, ctx.weight] if ctx.weight.requires_grad else [ctx.hidden]
        found = torch.autograd.grad(ctx.loss, wanted)
        return found[0] * grad, found[1] * grad if len(found) == 2 else None, None


def _fused_steps(model, batches):
    causal, losses, optimizer = model.get_base_model(), [], None
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)

    def forward(input_ids, labels, **_):
        hidden = causal.model(input_ids=input_ids).last_hidden_state[:, :-1]
        return _ReadsTheHead.apply(hidden, causal.get_output_embeddings().weight, labels[:, 1:])

    causal.forward = forward
    for batch in batches:
        with torch.no_grad():
            before = model(input_ids=batch, labels=batch)  # a reference forward between, as DPO has
        loss = model(input_ids=batch, labels=batch)
        assert torch.equal(loss.detach(), before)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _head_read(rank, world, folder, lora):
    from unsloth_ext.fsdp2 import bytes_held, load, shard
    from unsloth_ext.fsdp2.trainer import serve

    model = serve(shard(models.with_lora(load(folder, dtype=torch.float32), **lora)))
    held = bytes_held(model)
    losses = _fused_steps(model, models.batches(4, 4)[:, rank * 4 // world : (rank + 1) * 4 // world])
    return losses, held, bytes_held(model)


@pytest.mark.parametrize("lora", [{}, {"modules_to_save": ["lm_head"]}], ids=["frozen", "trained"])
def test_a_loss_that_reads_the_head_finds_it_whole(ranks, checkpoints, lora):
    one = models.with_lora(models.whole(checkpoints["nf4"]), **lora)
    expected = _fused_steps(one, models.batches(4, 4))
    answers = ranks(2, _head_read, folder=str(checkpoints["nf4"]), lora=lora)
    torch.testing.assert_close(torch.tensor([a[0] for a in answers]).mean(0), torch.tensor(expected), rtol=0, atol=1e-5)
    for _, before, after in answers:
        assert before == after  # nothing stays gathered


def _scaled(rank, world, folder, overflow, kind, clip):
    import bitsandbytes as bnb

    from unsloth_ext.fsdp2 import clip_grad_norm_, load, on_local_shards, shard
    from unsloth_ext.fsdp2.gradient_scaler import ShardedScaler

    model = shard(models.with_lora(load(folder, dtype=torch.float32)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.to_local().clone() for p in parameters]
    if kind == "8bit":
        optimizer = on_local_shards(bnb.optim.AdamW8bit(parameters, lr=1e-2, min_8bit_size=16))
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=True)
        optimizer = on_local_shards(optimizer) if kind == "local" else optimizer
    scaler = ShardedScaler(device="cpu", init_scale=256.0)
    batch = models.batches(1, 2)[0]
    scaler.scale(model(input_ids=batch, labels=batch).loss).backward()
    for parameter in parameters if rank in overflow else ():
        parameter.grad.to_local().view(-1)[:1] = torch.inf  # an overflow that this rank alone can see
    if clip:
        scaler.unscale_(optimizer)
        clip_grad_norm_(parameters, 1.0)
    scaler.step(optimizer)
    optimizer.zero_grad()
    assert not any(p.grad is not None for p in (*parameters, *optimizer.param_groups[0]["params"]))
    scaler.update()
    moved = any(not torch.equal(a, p.to_local()) for a, p in zip(before, parameters, strict=True))
    return moved, scaler.get_scale()


@pytest.mark.parametrize("overflow", [(), (1,), (0, 1)], ids=["none", "one rank", "both ranks"])
@pytest.mark.parametrize(("kind", "clip"), [("whole", True), ("whole", False), ("local", False), ("8bit", True)])
def test_ranks_skip_a_step_together(ranks, checkpoints, overflow, kind, clip):
    answers = ranks(2, _scaled, folder=str(checkpoints["nf4"]), overflow=overflow, kind=kind, clip=clip)
    for moved, scale in answers:
        assert moved == (not overflow) and scale == (128.0 if overflow else 256.0)


def _gathered_generation(rank, world, folder, options):
    from unsloth_ext.fsdp2 import bytes_held, load, shard
    from unsloth_ext.fsdp2.generation import all_gathered
    from unsloth_ext.fsdp2.trainer import serve

    model = serve(shard(models.with_lora(load(folder, dtype=torch.float32)), **options)).eval()
    held, prompt = bytes_held(model), models.batches(1, 1, length=5)[0]
    with all_gathered(model):
        spoken = model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False)
        layer = model.get_base_model().model.layers[0]
        assert layer.mlp.up_proj.base_layer.weight.quant_state is not None  # still whole after its forwards
        head = model.get_base_model().get_output_embeddings().weight
        assert not hasattr(head, "to_local")  # decoding that calls no decoder reads it next
    assert bytes_held(model) == held
    model.train()
    model(input_ids=prompt, labels=prompt).loss.backward()
    return spoken, model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False), held, bytes_held(model)


@pytest.mark.parametrize("options", [{}, {"residency": "all"}, {"reshard_after_forward": False}], ids=str)
def test_generation_with_everything_gathered(ranks, checkpoints, options):
    for one, other, before, after in ranks(2, _gathered_generation, folder=str(checkpoints["nf4"]), options=options):
        assert torch.equal(one, other)
        assert before["trainable"] == after["trainable"] or options


def _loaded(rank, world, folders):
    import contextlib
    import io
    import shutil
    from pathlib import Path

    import transformers

    from unsloth_ext.fsdp2.nf4_parameter import NF4Shard
    from unsloth_ext.fsdp2.row_shard import RowShard

    found = {}
    with scripts.torchrun(rank, world):
        load = transformers.AutoModelForCausalLM.from_pretrained

        def attempt(name, *args, **kwargs):
            switch._said.clear()
            with contextlib.redirect_stderr(io.StringIO()) as said:
                try:
                    model = load(*args, **kwargs)
                finally:
                    found[name] = ("failed", "", None, said.getvalue())
            weight = model.model.layers[0].self_attn.q_proj.weight
            found[name] = (type(weight).__name__, str(model.dtype), model.config.use_cache, said.getvalue())

        fresh = models.quantization()
        attempt(
            "nf4", folders["nf4"], device_map="auto", dtype=torch.bfloat16, attn_implementation="eager", use_cache=False
        )
        attempt("16bit", folders["16bit"], quantization_config=fresh, torch_dtype="auto")
        attempt("plain", folders["16bit"])
        fresh.bnb_4bit_quant_type = "fp4"
        attempt("fp4", folders["16bit"], quantization_config=fresh)
        attempt("unknown", folders["nf4"], key_mapping={"nothing": "nothing"})
        (broken := Path(folders["broken"])).mkdir(exist_ok=True)
        for file in Path(folders["nf4"]).iterdir():
            shutil.copy(file, broken / f"rank{rank}-{file.name}")
            (broken / f"rank{rank}-{file.name}").replace(broken / file.name)
        config = json.loads((broken / "config.json").read_text())
        config["quantization_config"]["llm_int8_skip_modules"] = ["lm_head", "down_proj"]
        (broken / f"rank{rank}").write_text(json.dumps(config))
        (broken / f"rank{rank}").replace(broken / "config.json")
        torch.distributed.barrier()
        with contextlib.suppress(Exception):  # whatever transformers makes of such a checkpoint is its own affair
            attempt("mixed", str(broken))
        model = transformers.LlamaForCausalLM.from_pretrained(folders["nf4"], use_cache=False)
        assert isinstance(model.lm_head.weight, RowShard) and model.config.use_cache is False
        # accelerate's configuration, under which transformers leaves zeros on all ranks but the first
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
        assert all(p.any() for p in load(folders["16bit"]).parameters())
        assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
        wish = transformers.AutoConfig.from_pretrained(folders["nf4"])
        load(folders["nf4"], config=wish)
        assert wish.quantization_config["load_in_4bit"]  # the caller's object is the caller's
        assert issubclass(NF4Shard, torch.Tensor)
    return found


def test_from_pretrained_reads_parts_where_it_can_and_says_where_not(ranks, checkpoints, tmp_path):
    folders = {name: str(path) for name, path in checkpoints.items()} | {"broken": str(tmp_path / "broken")}
    for rank, found in enumerate(ranks(2, _loaded, folders=folders)):
        assert found["nf4"][:3] == ("NF4Shard", "torch.bfloat16", False)
        assert found["16bit"][:2] == ("NF4Shard", "torch.bfloat16") and found["plain"][0] == "Parameter"
        assert found["fp4"][0] == "Params4bit" and found["unknown"][0] == "Params4bit"
        if rank == 0:
            assert "read in parts" in found["nf4"][3] and found["plain"][3] == ""
            assert "loaded whole" in found["mixed"][3] and "down_proj" in found["mixed"][3]
            assert "'fp4'" in found["fp4"][3] and "key_mapping=" in found["unknown"][3]


def test_one_process_is_told_about_torchrun(monkeypatch, capsys):
    from unsloth_ext.fsdp2.trainer import shard_for_trainer

    monkeypatch.setattr(switch, "_enabled", switch.Settings())
    monkeypatch.setattr(switch, "_said", set())
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    model = torch.nn.Linear(3, 3)
    assert shard_for_trainer(model) is model
    said = capsys.readouterr().err
    assert "nothing is sharded" in said and "torchrun --nproc-per-node" in said


def test_a_model_that_is_left_to_accelerate_keeps_its_configuration(monkeypatch, capsys):
    from types import SimpleNamespace

    from unsloth_ext.fsdp2.trainer import shard_for_trainer

    monkeypatch.setattr(switch, "_enabled", switch.Settings())
    monkeypatch.setattr(switch, "_said", set())
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}.items():
        monkeypatch.setenv(name, value)
    arguments = SimpleNamespace(fsdp="full_shard", fsdp_config={}, optim="muon", bf16_full_eval=True)
    before, model = dict(vars(arguments)), torch.nn.Linear(3, 3)
    assert shard_for_trainer(model, arguments) is model
    assert vars(arguments) == before and os.environ["ACCELERATE_USE_FSDP"] == "true"
    assert "left to accelerate" in capsys.readouterr().err


def test_the_adapter_that_is_saved_has_the_name_that_it_was_given():
    import peft

    from unsloth_ext.fsdp2.trainer_saving import _adapter_of

    lora = peft.LoraConfig(target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), lora, adapter_name="policy")
    assert _adapter_of(model) == "policy" and _adapter_of(torch.nn.Linear(3, 3)) == "default"
    model.add_adapter("default", lora)
    assert _adapter_of(model) == "default"


def test_where_unsloth_shards_nothing_is_done_and_one_line_says_so(monkeypatch, capsys, tmp_path):
    import sys
    import types

    unsloth = types.ModuleType("unsloth")
    unsloth.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "unsloth", unsloth)
    monkeypatch.setattr(switch, "_said", set())
    monkeypatch.setenv("UNSLOTH_FSDP2", "1")
    assert not switch.unsloth_shards()  # a release without an FSDP2 of its own
    (tmp_path / "models").mkdir()
    (tmp_path / "models/fsdp2_native.py").touch()
    assert switch.unsloth_shards() and switch.unsloth_shards()
    assert capsys.readouterr().err.count("Unsloth's own FSDP2 shards this model") == 1
    monkeypatch.setenv("UNSLOTH_FSDP2", "0")
    assert not switch.unsloth_shards()


def _prepared(rank, world, folder, cast):
    """Scripts prepare a 4-bit model before its adapters: everything else in float32; Unsloth: another dtype to dequantise to."""
    from peft import prepare_model_for_kbit_training

    from unsloth_ext.fsdp2 import load, shard
    from unsloth_ext.fsdp2.sharded_from_pretrained import _dequantise_to

    model = load(folder, dtype=torch.bfloat16) if world > 1 else models.whole(folder, dtype=torch.bfloat16)
    if cast:
        if world > 1:
            _dequantise_to(model, torch.float16)
        for module in model.modules():
            if world == 1 and getattr(getattr(module, "weight", None), "quant_state", None) is not None:
                module.weight.quant_state.dtype = torch.float16
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    model = models.with_lora(model)
    if world > 1:
        shard(model)
    batch = models.batches(1, 2)[0]
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    return (
        loss.item(),
        str(model.get_input_embeddings().weight.dtype),
        str(getattr(layer.base_layer.weight, "dtype", None)),
    )


@pytest.mark.parametrize("cast", [False, True], ids=["as stored", "float16"])
def test_a_model_prepared_for_training_as_scripts_do(ranks, checkpoints, cast):
    expected = _prepared(0, 1, str(checkpoints["nf4"]), cast)
    for loss, dtype, _ in ranks(2, _prepared, folder=str(checkpoints["nf4"]), cast=cast):
        assert dtype == expected[1] == "torch.float32"
        assert loss == pytest.approx(expected[0], abs=1e-4)


def test_plain_transformers_hears_that_nothing_shards(python):
    code = "import transformers.trainer as t; del t.Trainer._load_best_model; import unsloth_ext"
    done = python(code, UNSLOTH_EXT_FSDP2="1", RANK="0")
    assert (
        "UNSLOTH_EXT_FSDP2 is set, but no Trainer shards its model" in done.stderr and "_load_best_model" in done.stderr
    )
    assert "loaded whole" not in done.stderr  # that part could be put in


@pytest.mark.parametrize(
    "id, lost", [("fsdp2.trainer", "every rank holds the whole"), ("fsdp2.loading", "loaded whole")]
)
def test_a_transformers_that_is_too_old_is_named(monkeypatch, capsys, id, lost):
    import unsloth_ext
    from unsloth_ext.patching.registry import choose_target

    patch = next(p for p in unsloth_ext.patches() if p.id == id)
    monkeypatch.setenv(switch.VARIABLE, "1")
    monkeypatch.setattr(switch, "_said", set())
    assert choose_target(patch, "4.53.0")[1].versions == ">=4.53"
    verdict, target = choose_target(patch, "4.52.4")
    with pytest.raises(RuntimeError, match=r"transformers 4\.53 or newer is needed"):
        patch.changes(None, target)
    assert verdict is None and lost in capsys.readouterr().err


def test_float16_on_another_kind_of_card_is_refused(monkeypatch):
    from types import SimpleNamespace

    from unsloth_ext.errors import Refused
    from unsloth_ext.fsdp2.trainer import _attach

    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    accelerator = SimpleNamespace(
        device=torch.device("xpu", 0), scaler=object(), prepare_model=print, clip_grad_norm_=print
    )
    with pytest.raises(Refused, match=r"fp16=True .* knows no xpu device"):
        _attach(accelerator, lambda: None)
    accelerator.scaler = None
    _attach(accelerator, lambda: None)
    assert accelerator.prepare_model is not print


def _with_a_second_adapter(checkpoint):
    from peft import LoraConfig

    model = scripts.with_adapters(checkpoint)
    torch.manual_seed(6)
    model.add_adapter("ref", LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    return model


def _saved_with_all(rank, world, checkpoint, folder):
    from transformers import Trainer, TrainingArguments

    with scripts.torchrun(rank, world):
        model = _with_a_second_adapter(checkpoint)
        arguments = TrainingArguments(**scripts.options(folder, world, fsdp="shard_grad_op offload"))
        trainer = Trainer(model=model, args=arguments)
        trainer.save_model()
        reference = trainer.accelerator.prepare_model(scripts.model_of(checkpoint), evaluation_mode=True)
        return [(m._unsloth_ext_reshards, m._unsloth_ext_offloads) for m in (trainer.model, reference)]


def test_all_adapters_are_saved_as_peft_does_and_a_reference_model_is_sharded_as_its_policy(
    ranks, checkpoints, tmp_path
):
    from safetensors.torch import load_file

    one, two = tmp_path / "one", tmp_path / "two"
    _with_a_second_adapter(str(checkpoints["nf4"])).save_pretrained(one)
    for settings in ranks(2, _saved_with_all, checkpoint=str(checkpoints["nf4"]), folder=str(two)):
        assert settings == [(False, True)] * 2
    for folder in ("", "ref"):
        expected, found = (load_file(p / folder / "adapter_model.safetensors") for p in (one, two))
        assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)
        configs = [json.loads((p / folder / "adapter_config.json").read_text()) for p in (one, two)]
        assert configs[0]["r"] == configs[1]["r"] == (3 if folder else 6)


def test_an_adapter_of_another_name_is_resumed_from_its_own_folder(tmp_path):
    import peft

    from unsloth_ext.fsdp2 import latest_checkpoint, load_checkpoint

    def made(seed):
        torch.manual_seed(seed)
        lora = peft.LoraConfig(target_modules=["0"], init_lora_weights=False)
        return peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), lora, adapter_name="policy")

    saved, found = made(1), made(2)
    folder = tmp_path / "checkpoint-1"
    saved.save_pretrained(folder)  # what a Trainer does on one card
    assert (folder / "policy/adapter_model.safetensors").is_file()
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text("{}")
    assert latest_checkpoint(tmp_path) == folder
    load_checkpoint(folder, found, adapter_name="policy")
    for (name, a), b in zip(saved.named_parameters(), found.parameters(), strict=True):
        assert torch.equal(a, b) or not a.requires_grad, name
