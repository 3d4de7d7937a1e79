"""A pipeline has the loss, the gradients and the adapters of one process, whatever the schedule, the family and the batch."""

import itertools
import json

import fsdp2_models as models
import pytest
import torch
from packaging.version import Version

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    "qwen3": {"num_hidden_layers": 4},
}
SHORT = [("interleaved-1f1b", 2)]
if Version(torch.__version__).release >= (2, 13):
    SHORT.append(("zbv", 2))
SCHEDULES = [
    pytest.param("gpipe", 1, marks=pytest.mark.extended),
    ("1f1b", 1),
    ("interleaved-1f1b", 3),
    ("interleaved-zero-bubble", 2),
    *SHORT,
]


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """{"llama": folder in NF4, "llama-16bit": folder, ...}"""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, found = tmp_path_factory.mktemp("families"), {}
    sizes = models.config(num_hidden_layers=6).to_diff_dict()
    sizes = {
        k: v for k, v in sizes.items() if k not in ("model_type", "architectures", "transformers_version", "dtype")
    }
    for name, changes in FAMILIES.items():
        config = AutoConfig.for_model(name, **(sizes | changes))
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        found[f"{name}-16bit"], found[name] = folder / f"{name}-16bit", folder / f"{name}-nf4"
        model.save_pretrained(found[f"{name}-16bit"], max_shard_size="300KB")
        models.whole(found[f"{name}-16bit"]).save_pretrained(found[name], max_shard_size="150KB")
    return {name: str(path) for name, path in found.items()}


def _lora(**options):
    from peft import LoraConfig

    settings = dict(r=6, lora_alpha=12, target_modules=models.TARGETS, init_lora_weights=False, task_type="CAUSAL_LM")
    return LoraConfig(**(settings | options))


def _one(folder, seed, dtype=torch.float32, **options):
    from peft import get_peft_model

    model = models.whole(folder, dtype=dtype)
    torch.manual_seed(seed)
    return get_peft_model(model, _lora(**options)).train()


def _pipeline(folder, seed, lora=None, **options):
    from unsloth_ext.fsdp2 import pipeline

    torch.manual_seed(seed)
    lora = _lora(**(lora or {})) if not isinstance(lora, str) else lora
    return pipeline(folder, lora=lora, **(dict(microbatches=4, dtype=torch.float32) | options))


def _gradients(rank, world, folder, seed, batch, schedule, stages, **options):
    from unsloth_ext.fsdp2.pipeline_load import Elsewhere

    pipe = _pipeline(folder, seed, schedule=schedule, stages_per_rank=stages, **options)
    loss = pipe.step(**batch)
    foreign = [m.name for m in pipe.model.modules() if isinstance(m, Elsewhere)]
    cut = [list(span) for span in pipe.cut]
    return loss, {n: p.grad for n, p in pipe.named_parameters()}, (cut, pipe.rank_of, foreign)


def _batch(kind="plain", rows=8, length=12):
    ids = torch.randint(0, 211, (rows, length))
    if kind == "plain":
        return {"input_ids": ids, "labels": ids.clone()}
    labels = ids.masked_fill(torch.rand(rows, length) < 0.3, -100)
    labels[:, 3] = ids[:, 3]
    if kind == "packed":
        start = torch.randint(2, length - 2, (rows, 1))
        at = torch.arange(length).expand(rows, -1)
        return {"input_ids": ids, "labels": labels, "position_ids": torch.where(at < start, at, at - start)}
    kept = torch.randint(4, length + 1, (rows, 1))
    mask = (torch.arange(length) < kept).long()
    if kind == "left-padded":
        mask = mask.flip(1)
        mask[:, 2:4] = 1
    return {"input_ids": ids, "labels": labels.masked_fill(mask == 0, -100), "attention_mask": mask}


def _expected(model, batch):
    """(loss, gradients) of one process. With a cache, which is transformers' default, packed positions would not be seen."""
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def _same(answers, expected, message):
    loss, gradients = expected
    found = {}
    for got, part, _ in answers:
        torch.testing.assert_close(got, loss, rtol=0, atol=1e-5, msg=lambda text: f"{message}: loss: {text}")
        assert not set(found) & set(part)
        found |= part
    assert set(found) == set(gradients)
    for name, expected_gradient in gradients.items():
        torch.testing.assert_close(
            found[name], expected_gradient, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{message}: {name}: {text}"
        )


@pytest.mark.parametrize(("schedule", "stages"), SCHEDULES)
def test_every_schedule_has_the_gradients_of_one_process(ranks, families, schedule, stages):
    folder, seed, batch = families["llama"], int(torch.randint(1 << 30, ())), _batch("padded", rows=7)
    answers = ranks(2, _gradients, folder=folder, seed=seed, batch=batch, schedule=schedule, stages=stages)
    _same(answers, _expected(_one(folder, seed), batch), schedule)
    cut, rank_of, _ = answers[0][2]
    assert sorted(itertools.chain(*cut)) == list(range(6))
    for rank, (_, gradients, (_, _, foreign)) in enumerate(answers):
        mine = {i for span, owner in zip(cut, rank_of, strict=True) if owner == rank for i in span}
        assert {int(n.split(".layers.")[1].split(".")[0]) for n in gradients} == mine
        assert {n for n in foreign if n.startswith("layer ")} == {f"layer {i}" for i in range(6) if i not in mine}
        assert ("the embedding" in foreign) == (rank_of[0] != rank)
        assert ("the head" in foreign) == (rank_of[-1] != rank)


def _by(messages, folder, seed, batches, device, **options):
    """[loss, evaluated loss, gradients] of steps with batches of several lengths, and bytes that travel by copies."""
    pipe = _pipeline(folder, seed, messages=messages, **options)
    found = []
    for batch in batches:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        loss = pipe.step(**batch)
        extra = [] if pipe._kind.v_shaped else [pipe.evaluate(**batch).cpu()]
        found.append([loss.cpu(), *extra, {n: p.grad.cpu() for n, p in pipe.named_parameters()}])
        for parameter in pipe.parameters():
            parameter.grad = None
    slot = 0 if pipe._messages is None else pipe._messages.slot
    return found, slot


def _both_ways(rank, world, folder, seed, batches, device="cpu", **options):
    return [_by(messages, folder, seed, batches, device, **options) for messages in ("collective", "copies", "auto")]


@pytest.mark.parametrize(
    ("schedule", "world", "stages", "microbatches"),
    [
        # Seven tensors one after the other, through two places.
        pytest.param("gpipe", 2, 1, 7, marks=pytest.mark.extended),
        ("interleaved-1f1b", 3, 2, 6),
        pytest.param("1f1b", 4, 1, 6, marks=pytest.mark.extended),
        pytest.param("interleaved-zero-bubble", 3, 2, 6, marks=pytest.mark.extended),
        *(pytest.param(schedule, 2, stages, 5, marks=pytest.mark.extended) for schedule, stages in SHORT[1:]),
    ],
)
def test_messages_by_copies_change_no_bit(ranks, families, schedule, world, stages, microbatches):
    """Longer batches want larger places, shorter ones have them."""
    seed, batches = int(torch.randint(1 << 30, ())), [_batch("padded", 7, length) for length in (9, 17, 11, 25)]
    options = dict(schedule=schedule, stages_per_rank=stages, microbatches=microbatches)
    for (collective, none), (copies, slot), (auto, not_asked) in ranks(
        world, _both_ways, folder=families["llama"], seed=seed, batches=batches, **options
    ):
        torch.testing.assert_close(copies, collective, rtol=0, atol=0)
        torch.testing.assert_close(auto, collective, rtol=0, atol=0)
        assert (none, not_asked) == (0, 0) and slot >= 17 * 136 * 4


def _fails_in_a_step(rank, world, folder, device="cpu"):
    from datetime import timedelta

    from unsloth_ext.errors import UnslothExtError

    batch = torch.arange(48, device=device).view(4, 12)
    pipe = _pipeline(folder, 1, messages="copies", timeout=timedelta(seconds=5))
    pipe.step(batch, batch)
    if rank == 0:
        pipe.stages[0].register_forward_pre_hook(_no_memory)
    found = []
    for _ in range(2):
        try:
            pipe.step(batch, batch)
        except (RuntimeError, UnslothExtError) as error:
            found.append(str(error))
    return found


def _no_memory(*_):
    raise torch.OutOfMemoryError("none is left")


def test_a_step_that_failed_is_the_last_one(ranks, families):
    """What the others have sent, or wait for, is not counted any more."""
    zero, one = ranks(2, _fails_in_a_step, folder=families["llama"])
    assert "failed to run forward" in zero[0] and "rank 0 has not come to this exchange within 5 s" in one[0]
    assert (
        zero[1] == one[1]
        and "this pipeline cannot go on: a step failed on rank 0: OutOfMemoryError: none is left" in one[1]
    )


@pytest.mark.gpu
def test_messages_by_copies_on_cards(cuda_ranks, families):
    """Eager attention and float32: cuDNN's and flash's backwards differ from run to run."""
    seed, batches = int(torch.randint(1 << 30, ())), [_batch("padded", 16, length) for length in (9, 170, 11, 170) * 3]
    for schedule, stages in (("1f1b", 1), ("interleaved-1f1b", 2)):
        options = dict(schedule=schedule, stages_per_rank=stages, microbatches=8, attn_implementation="eager")
        for (collective, none), (copies, slot), (auto, asked) in cuda_ranks(
            2, _both_ways, folder=families["llama"], seed=seed, batches=batches, device="cuda", **options
        ):
            torch.testing.assert_close(copies, collective, rtol=0, atol=1e-6)
            torch.testing.assert_close(auto, collective, rtol=0, atol=1e-6)
            assert none == 0 and asked == slot > 0


@pytest.mark.parametrize(
    ("family", "kind", "options"),
    [
        ("llama-16bit", "plain", {"lora": {"modules_to_save": ["lm_head", "norm", "embed_tokens"]}}),
        ("mistral", "left-padded", {"checkpointing": True}),
        ("qwen2-16bit", "packed", {"layers": [1, 2, 3, 0], "attn_implementation": "eager"}),
        ("qwen3", "padded", {"lora": {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1, 2]}}),
    ],
    ids=["16bit-trained-ends", "sliding-checkpointed", "tied-packed-uneven", "few-adapters"],
)
def test_families_and_batches_have_the_gradients_of_one_process(ranks, families, family, kind, options):
    seed, batch = int(torch.randint(1 << 30, ())), _batch(kind)
    attention = options.get("attn_implementation")
    schedules = {"checkpointing": SHORT, "lora": [*SHORT[:1], ("interleaved-zero-bubble", 2)]}
    for schedule, stages in next((s for option, s in schedules.items() if option in options), SHORT[:1]):
        arguments = dict(folder=families[family], seed=seed, batch=batch, schedule=schedule, stages=stages)
        answers = ranks(2, _gradients, **arguments, **options)
        one = _one(families[family], seed, **options.get("lora", {}))
        if attention:
            one.set_attn_implementation(attention)
        _same(answers, _expected(one, batch), f"{family} {schedule}")


def _train(rank, world, folder, seed, batches, out):
    pipe = _pipeline(folder, seed, {"init_lora_weights": True})
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=3e-3)
    losses, norms = [], []
    for step in batches:
        items = sum(int((b["labels"][:, 1:] != -100).sum()) for b in step)
        losses.append(sum(pipe.step(**b, num_items_in_batch=items) for b in step).item())
        norms.append(pipe.clip_grad_norm_(0.3).item())
        optimizer.step()
        optimizer.zero_grad()
    before, again = pipe.evaluate(**batches[0][0]), pipe.step(**batches[0][0])
    for value in (again, pipe.evaluate(**batches[0][0])):
        torch.testing.assert_close(value, before, rtol=0, atol=1e-5)
    pipe.save_adapter(out)
    resumed = _pipeline(folder, seed + 1, str(out), schedule="gpipe")
    names = [name for name, _ in pipe.named_parameters()]
    return losses, norms, before.item(), resumed.evaluate(**batches[0][0]).item(), names


def test_training_clipping_saving_and_going_on(ranks, families, tmp_path):
    """Steps of two batches of different lengths; then the saved adapter in one process and in another pipeline."""
    folder, seed = families["llama"], int(torch.randint(1 << 30, ()))
    batches = [[_batch("padded", 4, 11), _batch("plain", 5, 9 + i)] for i in range(4)]
    answers = ranks(2, _train, folder=folder, seed=seed, batches=batches, out=tmp_path / "adapter")
    one = _one(folder, seed, init_lora_weights=True)
    optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=3e-3)
    for step, (loss, norm) in enumerate(zip(*answers[0][:2], strict=True)):
        total = sum((b["labels"][:, 1:] != -100).sum() for b in batches[step])
        value = sum(one(**b, num_items_in_batch=total).loss for b in batches[step])
        value.backward()
        expected = torch.nn.utils.clip_grad_norm_(one.parameters(), 0.3)
        assert loss == pytest.approx(value.item(), abs=1e-4) and norm == pytest.approx(expected.item(), rel=1e-3)
        optimizer.step()
        optimizer.zero_grad()
    assert answers[0][:4] == answers[1][:4]
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(models.whole(folder), str(tmp_path / "adapter"))
    stored = {n for n, _ in loaded.named_parameters() if "lora_" in n}
    assert stored == {*answers[0][4], *answers[1][4]}
    with torch.no_grad():
        value = loaded.train()(**batches[0][0]).loss.item()
    assert answers[0][2] == pytest.approx(value, abs=1e-4) and answers[0][3] == pytest.approx(value, abs=1e-4)
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["inference_mode"] is True and settings["base_model_name_or_path"] == folder


def test_bfloat16(ranks, families):
    seed, batch = int(torch.randint(1 << 30, ())), _batch()
    arguments = dict(folder=families["llama"], seed=seed, batch=batch, schedule="interleaved-1f1b", stages=2)
    answers = ranks(2, _gradients, **arguments, dtype=torch.bfloat16)
    loss, gradients = _expected(_one(families["llama"], seed), batch)
    for got, part, _ in answers:
        assert abs(got - loss) < 0.05
        for name, gradient in part.items():
            assert gradient.dtype == torch.float32
            cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), gradients[name].flatten(), 0)
            assert cosine > 0.97, name


def _reads(rank, world, folder):
    from unsloth_ext.fsdp2.checkpoint_index import CheckpointIndex

    read, original = [], CheckpointIndex.whole

    def whole(self, name):
        read.append((name, self.numel(name)))
        return original(self, name)

    CheckpointIndex.whole = whole
    try:
        pipe = _pipeline(folder, 1)
    finally:
        CheckpointIndex.whole = original
    return read, [list(span) for s, span in enumerate(pipe.cut) if pipe.rank_of[s] == rank]


def test_a_rank_reads_only_its_layers(ranks, families):
    for rank, (read, layers) in enumerate(ranks(2, _reads, folder=families["llama"])):
        mine = {f"layers.{i}." for span in layers for i in span}
        ends = {0: ["embed_tokens"], 1: ["model.norm", "lm_head"]}[rank]
        for name, numel in read:
            if numel > 1000:  # the facts of a quantised weight are read to check all of them
                assert any(part in name for part in [*mine, *ends]), name
        for part in [*mine, *ends]:
            assert any(part in name for name, _ in read), part


# -- who fails, and how ------------------------------------------------------------------------------------------------------


def _errors(rank, world, folder, tied, cases):
    from unsloth_ext.errors import UnslothExtError

    found = []
    for options in cases:
        try:
            _pipeline(tied if options.pop("tied", False) else folder, 1, **options)
            found.append("nothing")
        except UnslothExtError as error:
            found.append(str(error))
    return found


def test_what_cannot_be_a_pipeline_is_refused_on_every_rank(ranks, families):
    cases = {
        "the model has 6 layers, fewer than the 8 stages": {"stages_per_rank": 4},
        "schedule must be one of gpipe": {"schedule": "2f2b"},
        "messages must be auto or copies or collective, got 'post'": {"messages": "post"},
        "stages_per_rank must be 1 for schedule '1f1b', got 2": {"schedule": "1f1b", "stages_per_rank": 2},
        "microbatches must be a multiple of 2": {"microbatches": 5},
        "microbatches must be at least the 2 ranks": {"schedule": "1f1b", "microbatches": 1},
        "layers must add up to the 6 layers": {"layers": [2, 2, 2, 2]},
        "layers must say how many layers each of the 4 stages has": {"layers": [3, 3]},
        "use_dora": {"lora": {"use_dora": True}},
        "init_lora_weights='pissa'": {"lora": {"init_lora_weights": "pissa"}},
        "float16": {"dtype": torch.float16},
        "the head is tied to the embedding": {"tied": True, "lora": {"modules_to_save": ["lm_head"]}},
        "rank 0 with the layers": {"lora": {"layers_to_transform": [5]}, "layers": [1, 1, 2, 2]},
        "has no adapter_config.json": {"lora": "/nowhere"},
    }
    both = ranks(2, _errors, folder=families["llama"], tied=families["qwen2"], cases=list(cases.values()))
    for expected, *messages in zip(cases, *both, strict=True):
        assert all(expected in message for message in messages), (expected, messages)


def _bad_batches(rank, world, folder):
    from unsloth_ext.errors import UsageError

    pipe, good, found = _pipeline(folder, 1), torch.arange(48).view(4, 12), []
    cases = [
        dict(input_ids=good + rank, labels=good),
        dict(input_ids=good, labels=good[:, :-1] if rank else good),
        dict(input_ids=good, labels=torch.full_like(good, -100)),
        dict(input_ids=good, labels=good, attention_mask=torch.ones(4, 12) if rank else None),
        dict(input_ids=good, labels=good, num_items_in_batch=0),
        dict(input_ids=good[0], labels=good[0]),
        dict(input_ids=good, labels=good, num_items_in_batch=10 + rank),
    ]
    for case in cases:
        with pytest.raises(UsageError) as caught:
            pipe.step(**case)
        found.append(str(caught.value))
    with pytest.raises(RuntimeError, match="on another rank"):
        pipe.model(good)
    return found, pipe.step(good, good).item()


def test_a_bad_batch_is_an_error_on_every_rank_and_the_next_step_works(ranks, families):
    (zero, loss), (one, other) = ranks(2, _bad_batches, folder=families["llama"])
    assert zero == one and loss == other and loss > 0
    expected = ["input_ids differ", "labels must have the shape (4, 12)", "nothing to learn", "integer dtype",
                "num_items_in_batch must be a positive", "[rows, length]", "num_items_in_batch differ"]  # fmt: skip
    for message, part in zip(zero, expected, strict=True):
        assert part in message


def _dies(rank, world, folder, during):
    import os

    import torch.distributed as dist

    from unsloth_ext.errors import UnslothExtError

    pipe, good, done = _pipeline(folder, 1), torch.arange(48).view(4, 12), torch.ones(1)
    pipe.step(good, good)
    if rank == 0:
        dist.send(done, 1)
    else:
        dist.recv(done, 0)  # the first step is over for both
        if during:
            pipe.stages[3].register_forward_pre_hook(lambda *_: os._exit(3))
            pipe.step(good, good)
        os._exit(3)
    with pytest.raises((UnslothExtError, RuntimeError)) as caught:
        pipe.step(good, good)
    return type(caught.value).__name__, str(caught.value)


@pytest.mark.parametrize("during", [False, True])
def test_a_dead_rank_is_an_error_and_no_wait(ranks, families, during):
    name, message = ranks(2, _dies, folder=families["llama"], during=during, may_die=(1,))[0]
    assert during or (name == "UnslothExtError" and "did not come to the step" in message)


def _on_cards(rank, world, folder, seed, batch, schedule, stages, **options):
    loss, gradients, _ = _gradients(rank, world, folder, seed, batch, schedule, stages, **options)
    return loss.cpu(), {n: g.cpu() for n, g in gradients.items()}, None


@pytest.mark.gpu
@pytest.mark.parametrize(("schedule", "stages"), SCHEDULES)
def test_on_two_cards(cuda_ranks, families, schedule, stages):
    seed, batch = int(torch.randint(1 << 30, ())), _batch("padded")
    arguments = dict(folder=families["llama"], seed=seed, batch=batch, schedule=schedule, stages=stages)
    answers = cuda_ranks(2, _on_cards, **arguments)
    loss, gradients = _expected(_one(families["llama"], seed), batch)
    for got, part, _ in answers:
        torch.testing.assert_close(got, loss, rtol=0, atol=1e-3)
        for name, gradient in part.items():
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-2, atol=1e-3)
