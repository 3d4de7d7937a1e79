"""8-bit steps of many parameters at once: the bits of bitsandbytes alone, its checkpoints, and what goes one by one."""

import copy
import gc
import weakref

import pytest
import torch
from eight_bit_pairs import (
    KINDS,
    SHAPES,
    TOGETHER,
    Counted,
    adamw,
    assert_same,
    bnb,
    every,
    give_gradients,
    pair,
    parameters,
    run,
    saved,
)

from unsloth_ext.compiling import step_together
from unsloth_ext.compiling.eight_bit_steps import refusal
from unsloth_ext.errors import Refused, UsageError


def elements(numbers):
    return sum(torch.Size(SHAPES[n]).numel() for n in numbers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)]
)
def test_the_same_bits(kind, dtypes):
    both = pair(KINDS[kind], dtypes=dtypes)
    for step in range(5):
        run(both, [step])
        assert_same(*both)


def test_one_call_for_many(monkeypatch):
    alone, together = pair(adamw)
    run([alone, together], range(2))
    counted = Counted(monkeypatch)
    give_gradients([alone, together], 2)
    by_itself, ours = counted.of(alone.step), counted.of(together.step)
    assert len(by_itself) == 9 + 5  # of the two groups, those in 8 bits
    assert (
        ours[0] == elements(TOGETHER) and len(ours) == 2 + 2 + 1
    )  # a call a group; 33 x 255 twice and 5003 by themselves
    assert sum(ours) == sum(by_itself)


@pytest.mark.parametrize("chunk_bytes, calls", [(1, 9), (4 * 16384, 6), (1 << 30, 3)])
def test_chunks(monkeypatch, chunk_bytes, calls):
    """The most that goes together is bounded; a chunk of one goes alone."""
    alone, together = pair(adamw, chunk_bytes=chunk_bytes)
    del alone.param_groups[1], together.param_groups[1]
    counted = Counted(monkeypatch)
    for step in range(4):
        give_gradients([alone, together], step)
        alone.step()
        found = counted.of(together.step)
        assert_same(alone, together)
    assert len(found) == calls and all(
        n * 4 <= chunk_bytes for n in found if n not in {torch.Size(s).numel() for s in SHAPES}
    )
    step_together(together, chunk_bytes=1 << 30)
    give_gradients([alone, together], 9)
    alone.step()
    assert len(counted.of(together.step)) == 3
    assert_same(alone, together)


def test_parameters_without_a_gradient(monkeypatch):
    """They are left out of a step, and go by themselves from then on: their step count is another."""
    both = pair(adamw)
    counted = Counted(monkeypatch)
    run(both, range(2), without=[1])  # no state for it yet
    for step, without in enumerate([(), (3, 12), (), (0,), tuple(range(30)), ()], start=2):
        give_gradients(both, step, without)
        both[0].step()
        calls = counted.of(both[1].step)
        assert_same(*both)
    assert max(calls) == elements(TOGETHER[3:]) and elements([1]) in calls


def test_a_schedule_skip_zeros_and_settings_that_change():
    both = pair(lambda groups: bnb.optim.AdamW8bit(groups, lr=1e-2))
    for optimizer in both:
        optimizer.args.skip_zeros = True
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1)) for optimizer in both]
    for step in range(5):
        run(both, [step])
        for schedule in schedules:
            schedule.step()
        if step == 2:
            for optimizer in both:
                optimizer.param_groups[0] |= {"betas": (0.7, 0.9), "eps": 1e-5, "weight_decay": 0.3}
        assert_same(*both)
    assert both[0].param_groups[0]["lr"] == both[1].param_groups[0]["lr"] < 1e-2


def test_closures_and_hooks():
    both, seen = pair(adamw), []
    for optimizer in both:
        optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
        optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    for step in range(3):
        for optimizer in both:

            def closure(optimizer=optimizer, step=step):
                optimizer.zero_grad()
                loss = sum(((p - step) ** 2).sum() for p in every(optimizer))
                loss.backward()
                return loss

            loss = optimizer.step(closure)
            assert loss.requires_grad and all(p.grad is not None for p in every(optimizer))
        assert_same(*both)
    assert seen == ["before", "after"] * 6
    both[1].zero_grad()
    assert all(p.grad is None for p in every(both[1]))


def test_a_gradient_scaler():
    both = pair(adamw)
    for step in range(4):
        give_gradients(both, step)
        for optimizer in both:
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            scaler.scale(torch.ones(()))
            if step == 2:
                every(optimizer)[0].grad[0] = float("inf")
            scaler.step(optimizer)
        assert_same(*both)
    assert both[1].state[every(both[1])[0]]["step"] == 3


@pytest.mark.parametrize("first, second", [(0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("kind", ["AdamW8bit", "Lion8bit"])
def test_a_checkpoint_goes_both_ways(kind, first, second):
    """From bitsandbytes' own to ours, back, and on; the file is no larger, and holds the same."""
    both = pair(KINDS[kind])
    run(both, range(3))
    sizes = [len(saved(optimizer).getvalue()) for optimizer in both]
    assert sizes[1] <= sizes[0]
    file = saved(both[first])
    file.seek(0)
    resumed = pair(KINDS[kind])[second]
    with torch.no_grad():
        for p, q in zip(every(resumed), every(both[0]), strict=True):
            p.copy_(q)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(3, 6):
        run([*both, resumed], [step])
        assert_same(*both)
        assert_same(both[0], resumed)


def test_loading_in_the_middle_of_a_run(monkeypatch):
    both = pair(adamw)
    run(both, range(2))
    kept = [copy.deepcopy(optimizer.state_dict()) for optimizer in both]
    run(both, range(2, 4))
    for optimizer, state in zip(both, kept, strict=True):
        optimizer.load_state_dict(state)
    run(both, [4])
    assert_same(*both)
    counted = Counted(monkeypatch)
    give_gradients(both, 5)
    assert len(counted.of(both[1].step)) == 5  # together again
    both[0].step()
    assert_same(*both)


def cloned(key):
    def change(optimizer, p):
        optimizer.state[p][key] = optimizer.state[p][key].clone()

    return change


def in_a_storage_of_its_own(optimizer, p):
    for key in ("state1", "state2", "absmax1", "absmax2"):  # at the same address as before
        optimizer.state[p][key] = torch.from_numpy(optimizer.state[p][key].numpy())


def parameter_elsewhere(optimizer, p):
    p.data = p.data.clone()


def on_top_of_another(optimizer, p):
    if p is every(optimizer)[3]:  # of as many elements
        p.data = every(optimizer)[0].data.view_as(p)


@pytest.mark.parametrize("numbers", [(3,), (0, 10), TOGETHER])
@pytest.mark.parametrize("change", [
    cloned("state1"), cloned("state2"), cloned("absmax1"), cloned("absmax2"), cloned("qmap1"), cloned("qmap2"),
    in_a_storage_of_its_own, parameter_elsewhere, on_top_of_another,
])  # fmt: skip
def test_what_was_moved(monkeypatch, change, numbers):
    """States that were replaced are laid side by side again in the next step; no step reads where they were."""
    both = pair(adamw)
    run(both, range(2))
    kept = [optimizer.state[every(optimizer)[3]]["state1"] for optimizer in both]
    for optimizer in both:
        for number in numbers:
            change(optimizer, every(optimizer)[number])
    counted = Counted(monkeypatch)
    for step in range(2, 4):
        give_gradients(both, step)
        both[0].step()
        found = counted.of(both[1].step)
        assert_same(*both)
    assert len(found) == 5 + 2 * (change is on_top_of_another and 3 in numbers)
    del kept


def test_an_unbatched_step_at_any_time():
    """A state is bitsandbytes' own: its step works on it between two of ours."""
    both = pair(adamw)
    for step in range(6):
        give_gradients(both, step)
        both[0].step()
        type(both[1]).step(both[1]) if step % 2 else both[1].step()
        assert_same(*both)


def test_overrides_go_alone(monkeypatch):
    manager = bnb.optim.GlobalOptimManager.get_instance()
    both = pair(adamw)
    run(both, range(2))
    for optimizer in both:
        manager.override_config(every(optimizer)[3], key_value_dict={"lr": 0.5, "betas": (0.1, 0.2)})
    try:
        counted = Counted(monkeypatch)
        for step in range(2, 4):
            give_gradients(both, step)
            both[0].step()
            calls = counted.of(both[1].step)
            assert_same(*both)
        assert elements([0, 1]) in calls and elements(TOGETHER[3:]) in calls
    finally:
        for optimizer in both:
            manager.pid2config.pop(id(every(optimizer)[3]))


def test_new_groups_and_parameters(monkeypatch):
    both = pair(adamw)
    run(both, range(2))
    for optimizer in both:
        optimizer.add_param_group({"params": parameters(seed=5)})
    run(both, range(2, 4))
    counted = Counted(monkeypatch)
    give_gradients(both, 4)
    both[0].step()
    assert counted.of(both[1].step).count(elements(TOGETHER)) == 2
    assert_same(*both)


@pytest.mark.parametrize("what", ["transposed", "gradient", "shared memory"])
def test_memory_that_does_not_fit(what):
    found = []
    for _ in range(2):
        whole = parameters()
        if what == "transposed":
            whole[1] = torch.nn.Parameter(whole[1].detach().t())
        if what == "shared memory":  # each step of the one changes the other
            whole[3] = torch.nn.Parameter(whole[5].detach()[:4096])
        found.append(adamw(whole))
    step_together(found[1])
    for step in range(4):
        give_gradients(found, step)
        if what == "gradient":
            for optimizer in found:
                p = every(optimizer)[0]
                p.grad = p.grad.t().contiguous().t()
        for optimizer in found:
            optimizer.step()
        assert_same(*found)


@pytest.mark.parametrize("before", [1, 3])
def test_other_maps_go_alone(before):
    both = pair(adamw)
    run(both, range(before))
    for optimizer in both:
        state = optimizer.state[every(optimizer)[3]]
        state["qmap1"] = state["qmap1"].flip(0).neg()
    for step in range(before, before + 3):
        run(both, [step])
        assert_same(*both)


def test_a_class_that_somebody_changes_later(monkeypatch):
    """What is wrapped around its step is called, as it would be."""

    class Own(bnb.optim.AdamW8bit):
        pass

    both, calls = [Own(parameters(shapes=SHAPES[:2]), lr=1e-2) for _ in range(2)], []
    step_together(both[1])
    run(both, range(2))
    original = Own.step

    def wrapped(self, closure=None):
        calls.append(self)
        return original(self, closure)

    monkeypatch.setattr(Own, "step", wrapped)
    run(both, [2])
    assert len(calls) == 2
    assert_same(*both)


def test_nothing_is_kept_alive():
    optimizer = step_together(adamw(parameters()))
    for step in range(3):
        give_gradients([optimizer], step)
        optimizer.step()
    state = weakref.ref(optimizer.state[every(optimizer)[0]]["state1"])
    optimizer.state.clear()
    assert state() is None
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


class OwnUpdate(bnb.optim.AdamW8bit):
    def update_step(self, group, p, gindex, pindex):
        super().update_step(group, p, gindex, pindex)
        p.data.mul_(0.5)


@pytest.mark.parametrize("make, reason", [
    (lambda p: bnb.optim.PagedAdamW8bit(p), "its state is paged"),
    (lambda p: bnb.optim.AdEMAMix8bit(p), "ademamix does not work block by block"),
    (lambda p: bnb.optim.LAMB8bit(p), "lamb does not work block by block"),
    (lambda p: bnb.optim.LARS8bit(p, lr=1e-2, momentum=0.9), "lars does not work block by block"),
    (lambda p: bnb.optim.AdamW32bit(p), "its state is not in 8 bits"),
    (OwnUpdate, "OwnUpdate.update_step is not the one of bitsandbytes 0.50"),
])  # fmt: skip
def test_what_is_refused(make, reason):
    optimizer = make(parameters())
    assert reason in refusal(optimizer)
    with pytest.raises(Refused, match=reason):
        step_together(optimizer)
    assert "step" not in vars(optimizer)


def test_an_unknown_source_is_refused(monkeypatch):
    from unsloth_ext.compiling import eight_bit_steps

    known = {**eight_bit_steps._KNOWN, "Optimizer8bit": eight_bit_steps._KNOWN["Optimizer8bit"] | {"step": ("0" * 16,)}}
    monkeypatch.setattr(eight_bit_steps, "_KNOWN", known)
    with pytest.raises(Refused, match=r"AdamW8bit.step is not the one of bitsandbytes 0\.50"):
        step_together(adamw(parameters()))


def test_wrong_use():
    with pytest.raises(UsageError, match=r"is for bitsandbytes' optimizers, got torch\.optim\.sgd\.SGD"):
        step_together(torch.optim.SGD(parameters(), lr=1.0))
    for wrong in (0, -1, 1.5):
        with pytest.raises(UsageError, match="chunk_bytes must be a positive number of bytes, got"):
            step_together(adamw(parameters()), chunk_bytes=wrong)
    optimizer = adamw(parameters())
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0)
    with pytest.raises(UsageError, match="before the scheduler is made"):
        step_together(optimizer)
