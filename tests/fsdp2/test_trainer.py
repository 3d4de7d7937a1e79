"""Unchanged scripts of transformers and trl over two processes, against the same lines in one."""

import fsdp2_models as models
import fsdp2_trainers as scripts
import pytest
import torch

pytest.importorskip("trl")


def _run(rank, world, script, checkpoint, folder, settings=None, **changes):
    """(losses, gradient norms, what the checks below need)"""
    from unsloth_ext.fsdp2 import bytes_held
    from unsloth_ext.fsdp2.trainer import is_ours

    with scripts.torchrun(rank, world, **(settings or {})):
        trainer = getattr(scripts, script)(checkpoint, folder, world, **changes)
        trainer.train()
        optimizer = trainer.optimizer.optimizer
        facts = {
            "ours": is_ours(trainer.model),
            "held": bytes_held(trainer.model),
            "state_size": sum(v.numel() for s in optimizer.state.values() for v in s.values() if hasattr(v, "numel")),
            "type": type(optimizer).__module__,
            "checkpointing": trainer.model.get_base_model().is_gradient_checkpointing,
            "accelerate": str(trainer.accelerator.distributed_type),
        }
        facts["plain"] = not any(hasattr(p, "to_local") for g in optimizer.param_groups for p in g["params"])
        return scripts.losses(trainer), scripts.losses(trainer, "grad_norm"), facts


def _close(found, expected, atol=1e-4):
    for one, two in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=0, atol=atol)


@pytest.fixture(scope="module")
def one_process(ranks, checkpoints, tmp_path_factory):
    """losses of `script` in one process, each computed once"""
    known = {}

    def get(script, **changes):
        key = (script, *sorted(changes.items()))
        if key not in known:
            folder = tmp_path_factory.mktemp("one")
            arguments = dict(script=script, checkpoint=str(checkpoints["nf4"]), folder=str(folder), **changes)
            known[key] = ranks(1, _run, **arguments)[0]
        return known[key]

    return get


@pytest.mark.parametrize("script", ["sft", "dpo", "plain"])
def test_losses_equal_one_process(ranks, checkpoints, tmp_path, one_process, script):
    expected = one_process(script)
    answers = ranks(2, _run, script=script, checkpoint=str(checkpoints["nf4"]), folder=str(tmp_path))
    assert len(expected[0]) == 6
    for losses, norms, facts in answers:
        _close((losses, norms), expected)
        assert facts["ours"] and facts["plain"] and facts["state_size"] < 0.6 * expected[2]["state_size"]
        assert facts["accelerate"].endswith("MULTI_CPU")
        held, whole = facts["held"], expected[2]["held"]  # 16 KiB groups: a tiny model is much padded
        assert held["packed"] < 0.85 * whole["packed"] and held["frozen"] < 0.55 * whole["frozen"]


def test_grpo_generates_and_steps(ranks, checkpoints, tmp_path):
    for losses, norms, facts in ranks(2, _run, script="grpo", checkpoint=str(checkpoints["nf4"]), folder=str(tmp_path)):
        assert len(losses) == 2 and max(norms) > 0 and facts["ours"]


@pytest.mark.parametrize("case", ["full_shard offload", "fsdp2 dict", "accelerate launch", "residency", "8bit"])
def test_configurations_and_optimizers(ranks, checkpoints, tmp_path, one_process, monkeypatch, case):
    expected = one_process("sft", max_steps=3)
    settings, changes, environment = {}, {}, {}
    if case == "full_shard offload":
        changes = {"fsdp": case, "optim": "adamw_torch"}
    elif case == "fsdp2 dict":
        changes = {"fsdp": True, "fsdp_config": {"reshard_after_forward": False, "activation_checkpointing": True}}
    elif case == "accelerate launch":
        environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true",
                       "FSDP_OFFLOAD_PARAMS": "false", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}  # fmt: skip
    elif case == "residency":
        settings, changes = {"residency": "all", "sharded_load": False}, {"optim": "adamw_torch"}
    else:
        changes = {"optim": "adamw_bnb_8bit"}
    for losses, norms, facts in ranks(
        2, _with_environment, environment=environment, script="sft", checkpoint=str(checkpoints["nf4"]),
        folder=str(tmp_path), settings=settings, max_steps=3, **changes,
    ):  # fmt: skip
        assert facts["ours"] and facts["accelerate"].endswith("MULTI_CPU")
        assert facts["checkpointing"] == (case == "fsdp2 dict")
        assert facts["plain"]  # torch would take DTensors one by one
        if case == "8bit":
            assert facts["type"].startswith("bitsandbytes")
            _close(
                (losses, norms), expected, atol=5e-2
            )  # small tensors keep 32-bit states; the optimizer's arithmetic is its own
        else:
            _close((losses, norms), expected)


def _with_environment(rank, world, environment, **arguments):
    import os

    before = dict(os.environ)
    os.environ.update(environment)
    try:
        return _run(rank, world, **arguments)
    finally:
        os.environ.clear()
        os.environ.update(before)


def _saved_and_spoken(rank, world, checkpoint, folder):
    """save_model, then answers: ranks stop at different lengths, and one generates with the inner model."""
    with scripts.torchrun(rank, world):
        trainer = scripts.sft(checkpoint, folder, world, max_steps=2)
        trainer.model.eval()
        prompt = torch.tensor([[5, 9, 17 + rank]])
        first = trainer.model.generate(input_ids=prompt, max_new_tokens=3 + 4 * rank, do_sample=False)
        trainer.train()
        metrics = trainer.evaluate()
        trainer.save_model(folder)
        trainer.model.eval()
        spoken = trainer.model.generate(input_ids=torch.tensor([[5, 9, 17]]), max_new_tokens=6, do_sample=False)
        with torch.no_grad():
            logits = trainer.model(input_ids=models.batches(1, 2)[0]).logits
        return first.shape[1], metrics["eval_loss"], spoken, logits


def test_generate_evaluate_and_save_model(ranks, checkpoints, tmp_path):
    from peft import PeftModel

    answers = ranks(2, _saved_and_spoken, checkpoint=str(checkpoints["nf4"]), folder=str(tmp_path))
    one = PeftModel.from_pretrained(models.whole(checkpoints["nf4"]), tmp_path).eval()
    for module in one.modules():
        module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        logits = one(input_ids=models.batches(1, 2)[0]).logits
        spoken = one.generate(input_ids=torch.tensor([[5, 9, 17]]), max_new_tokens=6, do_sample=False)
    assert [a[0] for a in answers] == [6, 10]
    assert (tmp_path / "tokenizer.json").is_file() and (tmp_path / "training_args.bin").is_file()
    for _, loss, tokens, found in answers:
        assert loss == answers[0][1] and torch.equal(tokens, spoken)
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)


_SAVING = dict(
    save_strategy="steps", save_steps=2, save_total_limit=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
    metric_for_best_model="loss", greater_is_better=True,  # so the "best" is the first, and loading it makes a difference
)  # fmt: skip


def _resumed(rank, world, checkpoint, folder, resume=None, **changes):
    with scripts.torchrun(rank, world):
        trainer = scripts.sft(checkpoint, folder, world, **_SAVING, **changes)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.best_model_checkpoint == f"{folder}/checkpoint-2"
        if resume is None:  # the mean over batches, which are others on another number of ranks
            assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)
        return scripts.losses(trainer), scripts.losses(trainer, "grad_norm")


def test_a_run_resumes_on_two_on_one_and_from_one(ranks, checkpoints, tmp_path, capsys):
    import shutil

    from unsloth_ext.fsdp2 import latest_checkpoint
    from unsloth_ext.fsdp2.trainer_saving import newest_whole

    arguments = dict(checkpoint=str(checkpoints["nf4"]), folder=str(tmp_path / "two"))
    one = ranks(1, _resumed, **arguments | {"folder": str(tmp_path / "one")})[0]
    two = ranks(2, _resumed, **arguments)
    _close(two[0], one)
    assert sorted(p.name for p in (tmp_path / "two").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]

    assert latest_checkpoint(tmp_path / "two").name == "checkpoint-6"  # with this package's own functions too
    # The newest is damaged: a byte of a rank's file has changed. It is passed over.
    damaged = next((tmp_path / "two/checkpoint-6/sharded_optimizer/tensors").glob("__1_*"))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    assert newest_whole(tmp_path / "two") == latest_checkpoint(tmp_path / "two") == tmp_path / "two/checkpoint-2"
    said = capsys.readouterr().err
    assert "checkpoint-6 is passed over" in said and damaged.name in said
    assert ranks(2, _resumed, **arguments, resume=True) == two  # bit for bit

    # Killed between the adapter and the end: no trainer_state.json.
    (tmp_path / "two/checkpoint-6/trainer_state.json").unlink()
    _close(ranks(1, _resumed, **arguments, resume=True)[0], one)
    assert not (tmp_path / "two/checkpoint-6/sharded_optimizer").exists()
    shutil.copytree(tmp_path / "one/checkpoint-2", tmp_path / "from_one/checkpoint-2")
    found = ranks(2, _resumed, **arguments | {"folder": str(tmp_path / "from_one")}, resume=True)
    _close(found[0], one)


def _refusals(rank, world, checkpoint, folder):
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainingArguments

    from unsloth_ext import fsdp2
    from unsloth_ext.errors import UnslothExtError
    from unsloth_ext.fsdp2.trainer import is_ours

    messages = {}
    with scripts.torchrun(rank, world):
        model = scripts.with_adapters(checkpoint)

        def attempt(name, trainer_options=(), **changes):
            try:
                options = scripts.options(folder, world, **changes)
                Trainer(**{"model": model, "args": TrainingArguments(**options)} | dict(trainer_options))
                messages[name] = "nothing was said"
            except UnslothExtError as error:
                messages[name] = str(error)
            AcceleratorState._shared_state.clear()

        attempt("hybrid", fsdp="hybrid_shard", fsdp_config={"version": 1})
        attempt("xla", fsdp="full_shard", fsdp_config={"xla": True})
        attempt("size", fsdp="full_shard", fsdp_config={"auto_wrap_policy": "SIZE_BASED_WRAP"})
        parameters = [p for p in model.parameters() if p.requires_grad]
        attempt("optimizer", {"optimizers": (torch.optim.AdamW(parameters), None)})
        attempt("galore", optim="galore_adamw", optim_target_modules=["q_proj"])
        attempt("model_init", {"model": None, "model_init": lambda: model})
        attempt("eval", bf16_full_eval=True)
        trainer = Trainer(model=model, args=TrainingArguments(**scripts.options(folder, world)))
        once = fsdp2.bytes_held(model)
        Trainer(
            model=trainer.model, args=TrainingArguments(**scripts.options(folder, world))
        )  # sharded already: taken as it is
        assert fsdp2.bytes_held(model) == once
        reference = trainer.accelerator.prepare_model(scripts.model_of(checkpoint), evaluation_mode=True)
        with torch.no_grad():
            logits = reference(input_ids=models.batches(1, 1)[0]).logits
    return messages, is_ours(reference), logits


def test_what_a_sharded_trainer_cannot_do_is_refused_by_name(ranks, checkpoints, tmp_path):
    said = {
        "hybrid": "asks for hybrid_shard", "xla": "asks for XLA", "size": "size_based_wrap", "galore": "whole gradients",
        "optimizer": "as they were before sharding", "model_init": "model_init", "eval": "bf16_full_eval",
    }  # fmt: skip
    with torch.no_grad():
        expected = models.whole(checkpoints["nf4"]).train()(input_ids=models.batches(1, 1)[0]).logits
    for messages, sharded, logits in ranks(2, _refusals, checkpoint=str(checkpoints["nf4"]), folder=str(tmp_path)):
        assert sharded  # a frozen reference model too
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        for name, words in said.items():
            assert words in messages[name], (name, messages[name])
