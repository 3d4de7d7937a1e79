"""Unsloth's fused losses on a CPU, pristine beside routed. Run by test_loss_patch.py in a process of its own: it imports Unsloth."""

import unsloth_ext  # isort: skip
import unsloth  # noqa: F401  isort: skip
import inspect

import pytest
import torch
import torch.nn.functional as F
from unsloth_zoo.fused_losses import chunked_logprob
from unsloth_zoo.fused_losses import cross_entropy_loss as ce
from unsloth_zoo.fused_losses import fused_linear as fl
from unsloth_zoo.fused_losses.forward_adapter import unsloth_fused_lm_head_loss

from unsloth_ext.loss import routes, unsloth_losses

T, D, V = 24, 16, 131  # two sequences of 12


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """The table's row for CPUs, empty as shipped for Unsloth's losses: route(True) fills it."""

    def route(on):
        monkeypatch.setitem(routes.BETTER, "cpu", routes.ROUTES if on else frozenset())

    route(False)
    return route


@pytest.fixture
def served(monkeypatch):
    """What the routes have served since."""
    calls = []
    for name in ("summed_cross_entropy", "masked_log_probs"):
        original = vars(unsloth_losses)[name]
        monkeypatch.setattr(unsloth_losses, name, lambda *a, _o=original, _n=name, **k: calls.append(_n) or _o(*a, **k))
    return calls


def inputs(dtype=torch.float32, bias=False, trained=True, ignored=3):
    hidden = torch.randn(2, T // 2, D).to(dtype).requires_grad_()
    weight = torch.nn.Parameter((torch.randn(V, D) / 2).to(dtype), requires_grad=trained)
    b = torch.nn.Parameter(torch.randn(V).to(dtype), requires_grad=trained) if bias else None
    labels = torch.randint(0, V, (2, T // 2))
    labels.view(-1)[torch.randperm(T)[:ignored]] = -100
    return hidden, weight, b, labels


def full(hidden, weight, bias, labels, *, n_items=None, mask=None, shift_labels=True, ignore_index=-100, **k):
    """The loss on full logits in fp64."""
    hidden, weight, bias = (None if x is None else x.double() for x in (hidden, weight, bias))
    z = F.linear(hidden, weight, bias)
    z = z * (k.get("logit_scale_multiply") or 1) / (k.get("logit_scale_divide") or 1)
    if cap := k.get("logit_softcapping"):
        z = cap * torch.tanh(z / cap)
    if mask is not None:
        labels = labels.masked_fill(mask == 0, ignore_index)
    if shift_labels:
        z, labels = z[:, :-1], labels[:, 1:]
    z, labels = z.reshape(-1, V), labels.reshape(-1)
    keep = labels != ignore_index
    total = F.cross_entropy(
        z, labels, reduction="sum", ignore_index=ignore_index, label_smoothing=k.get("label_smoothing", 0)
    )
    total = total + (k.get("z_loss", 0) * z.logsumexp(-1).square() * keep).sum()
    return total / (keep.sum().clamp(min=1) if n_items is None else n_items)


def gradients(loss, *tensors):
    tensors = [t for t in tensors if t is not None and t.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss * 3, tensors)]


def close(found, expected, dtype):
    """In half precision a logit of up to 8 is rounded by up to 8 half units, a third of that in the mean square, and exp makes it
    a relative error; its gradient and the result are rounded too. The worst of 72,000 comparisons was 0.008."""
    limit = {torch.float32: 1e-5, torch.float16: 0.002, torch.bfloat16: 0.01}[dtype]
    for a, b in zip(found, expected, strict=True):
        assert a.isfinite().all()
        error, size = (a.double() - b.double()).norm(), b.double().norm().clamp(min=1e-3)
        assert error <= limit * size


class Scaler:  # what trainer.accelerator.scaler is under fp16
    _enabled, _scale = True, torch.tensor(1024.0)

    def is_enabled(self):
        return True

    def get_scale(self):
        return 1024.0


CASES = {
    "plain": {},
    "bias": {"bias": True},
    "frozen": {"trained": False},
    "frozen bias": {"trained": False, "bias": True},
    "many ignored": {"ignored": 15},
    "none labelled": {"ignored": T},
    "n_items": {"n_items": torch.tensor([40, 40])},
    "n_items int": {"n_items": 17},
    "n_items 0": {"n_items": torch.tensor(0), "ignored": T},
    "mask": {"mask": torch.arange(T // 2).repeat(2, 1).ge(2).long()},
    "shifted": {"shift_labels": False},
    "ignore_index": {"ignore_index": 5, "ignored": 0},
    "scale": {"logit_scale_multiply": 0.5},
    "divide": {"logit_scale_divide": 4.0, "logit_softcapping": None},
    "softcap": {"logit_softcapping": 3.0},
    "smoothing": {"label_smoothing": 0.1},
    "all": {"logit_softcapping": 3.0, "label_smoothing": 0.1, "logit_scale_multiply": 2.0, "bias": True},
    "scaling": {"scaling": 512.0},
    "scaler": {"scaling": Scaler()},
    "trained, zeros are off": {"logit_softcapping": 0, "logit_scale_multiply": 0, "logit_scale_divide": 0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_cross_entropy(name, dtype, table, served):
    case = dict(CASES[name])
    made = {key: case.pop(key) for key in ("bias", "trained", "ignored") if key in case}
    hidden, weight, bias, labels = tensors = inputs(dtype, **made)
    theirs = gradients(ce.unsloth_fused_ce_loss(None, hidden, weight, bias, labels, **case), *tensors[:3])
    assert not served
    table(True)
    loss = ce.unsloth_fused_ce_loss(None, hidden, weight, bias, labels, **case)
    assert served == ["summed_cross_entropy"] and loss.dtype == torch.float32 and loss.shape == ()
    ours = gradients(loss, *tensors[:3])
    case.pop("scaling", None)
    n_items = case.pop("n_items", None)
    n_items = None if n_items is None else max(int(torch.as_tensor(n_items).reshape(-1)[0]), 1)
    exact = gradients(full(hidden, weight, bias, labels, n_items=n_items, **case), *tensors[:3])
    close(ours, exact, dtype)
    close(ours, theirs, dtype)
    assert [x.dtype for x in ours] == [x.dtype for x in theirs]


def test_evaluation_and_a_hidden_state_without_gradient(table, served):
    hidden, weight, bias, labels = inputs(bias=True)
    table(True)
    with torch.no_grad():
        loss = ce.unsloth_fused_ce_loss(None, hidden, weight, bias, labels)
    assert not loss.requires_grad and torch.isclose(loss, full(hidden, weight, bias, labels).float())
    found = gradients(ce.unsloth_fused_ce_loss(None, hidden.detach(), weight, bias, labels), weight, bias)
    close(found, gradients(full(hidden, weight, bias, labels), weight, bias), torch.float32)
    assert len(served) == 2


def test_autocast(table, served):
    hidden, weight, bias, labels = inputs(trained=False)
    table(True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ce.unsloth_fused_ce_loss(None, hidden, weight, bias, labels)
        assert F.linear(hidden, weight).dtype == torch.bfloat16  # still on
    found = gradients(loss, hidden)
    assert served and found[1].dtype == torch.float32
    close(found, gradients(full(hidden, weight, bias, labels), hidden), torch.bfloat16)


def test_a_label_out_of_range_raises_as_before(table):
    for on in (False, True):
        table(on)
        hidden, weight, bias, labels = inputs()
        labels[0, 3] = V
        with pytest.raises(IndexError, match=f"{V} is out of bounds"):
            ce.unsloth_fused_ce_loss(None, hidden, weight, bias, labels)


class Packed(torch.nn.Parameter):  # as bitsandbytes' Params4bit is one
    pass


def _marked(weight):
    weight.ds_id = 7
    return weight


@pytest.mark.parametrize(
    "change",
    [
        {"logits_bias": torch.ones(1, V)},
        {"rows_per_chunk": 5},
        {"weight": lambda w: torch.Tensor._make_subclass(Packed, w.detach())},
        {"weight": _marked},
        {"weight": lambda w: w.detach().to("meta")},
        {"label_smoothing": torch.nan},
        {"surprise": 1},
    ],
    ids=["logits_bias", "rows_per_chunk", "subclass", "zero-3", "another device", "bad smoothing", "unknown"],
)
def test_what_is_not_covered_goes_to_unsloth_as_it_came(change, table, served):
    table(True)
    hidden, weight, bias, labels = inputs()
    change = dict(change)
    weight = change.pop("weight", lambda w: w)(weight)
    seen = []
    wrapped = unsloth_losses.cross_entropy(lambda *args, **keywords: seen.append((args, keywords)) or "theirs")
    keywords = {"divisor": torch.tensor(5.0), "scaling": None, "fp32_head_grad": False, **change}
    assert wrapped(hidden, weight, bias, labels, **keywords) == "theirs"
    ((args, got),) = seen
    assert all(a is b for a, b in zip(args, (hidden, weight, bias, labels), strict=True))
    assert not served and got.keys() == keywords.keys() and all(got[k] is keywords[k] for k in got)


@pytest.mark.parametrize("keywords", [{"target_gb": 1.0}, {"n_chunks": 2}, {"overwrite": True}], ids=str)
def test_limits_on_memory_keep_unsloths_own_path(keywords, table, served):
    table(True)
    hidden, weight, bias, labels = inputs(trained=False)
    expected = full(hidden, weight, bias, labels).detach()
    with torch.no_grad():
        loss = ce.unsloth_fused_ce_loss(None, hidden.detach(), weight, bias, labels, torch_compile=False, **keywords)
    assert not served and torch.isclose(loss, expected.float())


def test_a_compiler_sees_one_graph(table, served):
    table(True)
    hidden, weight, bias, labels = inputs(bias=True, ignored=15)

    def step(hidden, weight, bias, labels):
        h = hidden * 2
        loss = ce.unsloth_fused_ce_loss(None, h, weight, bias, labels, n_items=torch.tensor(9), logit_softcapping=4.0)
        logps, entropy = fl.fused_linear_logprobs(h, weight, labels, bias=bias, return_entropy=True)
        return loss + logps.sum() - 0.1 * entropy.sum()

    expected = gradients(step(hidden, weight, bias, labels), hidden, weight, bias)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    close(gradients(compiled(hidden, weight, bias, labels), hidden, weight, bias), expected, torch.float32)


# -- log-probabilities -------------------------------------------------------------------------------------------------------


def full_logprobs(hidden, weight, bias, targets, temperature=1.0, **k):
    hidden, weight, bias = (None if x is None else x.double() for x in (hidden, weight, bias))
    z = F.linear(hidden, weight, bias)
    z = z * (k.get("logit_scale_multiply") or 1) / (k.get("logit_scale_divide") or 1)
    if cap := k.get("logit_softcapping"):
        z = cap * torch.tanh(z / cap)
    logp = (z / temperature).log_softmax(-1)
    keep = (targets >= 0) & (targets < V)
    if k.get("mask") is not None:
        keep = keep & (k["mask"] != 0)
    chosen = logp.gather(-1, targets.clamp(0, V - 1)[..., None])[..., 0]
    return chosen * keep, -(logp.exp() * logp).sum(-1) * keep, z.mean(-1) * keep


LOGPROBS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "mask": {"mask": torch.arange(T).view(2, -1).ge(9)},
    "bias, transforms": {"bias": True, "logit_scale_divide": 2.0, "logit_softcapping": 5.0, "temperature": 1.5},
    "entropy": {"return_entropy": True},
    "entropy, masked": {"return_entropy": True, "mask": torch.arange(T).view(2, -1).ge(9)},
    "entropy without gradient": {"return_entropy": True, "entropy_requires_grad": False},
    "entropy on demand": {"return_entropy": True, "entropy_requires_grad": None},
    "mean": {"return_mean_logits": True, "bias": True, "logit_scale_multiply": 2.0, "ignored": 2},
    "entropy, mean": {"return_mean_logits": True, "return_entropy": True},
}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", LOGPROBS)
def test_logprobs(name, trained, table, served):
    case = dict(LOGPROBS[name])
    hidden, weight, bias, labels = inputs(bias=case.pop("bias", False), trained=trained, ignored=case.pop("ignored", 3))
    rows = torch.randn(labels.shape)

    def run(function):
        outs = function()
        outs = list(outs) if isinstance(outs, tuple) else [outs]
        loss = (outs[0] * rows).sum()
        if case.get("return_entropy") and case.get("entropy_requires_grad", True) is not False:
            loss = loss + (outs[1] * rows.flip(0)).sum()
        # Not the loss itself: terms of either sign may cancel, and what is left is no measure of their error.
        return [*(x.detach() for x in outs), *gradients(loss, hidden, weight, bias)[1:]]

    def call():
        return fl.fused_linear_logprobs(hidden, weight, labels, bias=bias, **case)

    def exact():
        k = {key: value for key, value in case.items() if not key.startswith(("return", "entropy"))}
        logp, entropy, mean = full_logprobs(hidden, weight, bias, labels, **k)
        outs = [logp] + [entropy] * bool(case.get("return_entropy")) + [mean] * bool(case.get("return_mean_logits"))
        return tuple(outs)

    theirs = run(call)
    table(True)
    ours = run(call)
    assert served == ["masked_log_probs"]
    close(ours, run(exact), torch.float32)
    close(ours, theirs, torch.float32)
    assert [x.dtype for x in ours] == [x.dtype for x in theirs]


@pytest.mark.parametrize(
    "keywords",
    [
        {"return_is_top1": True},
        {"return_log_sum_sq_probs": True},
        {"rows_per_chunk": 4},
        {"max_rows_per_chunk": 4},
        {"return_mean_logits": True, "logit_softcapping": 5.0},
    ],
    ids=str,
)
def test_logprobs_that_are_not_covered(keywords, table, served):
    hidden, weight, bias, labels = inputs()
    expected = fl.fused_linear_logprobs(hidden, weight, labels, **keywords)
    table(True)
    found = fl.fused_linear_logprobs(hidden, weight, labels, **keywords)
    assert not served
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True):
        assert torch.equal(a, b)


def test_every_caller_reaches_the_route(table, served):
    import unsloth.models.rl_replacements as unsloth_rl
    from unsloth_zoo import rl_replacements

    table(True)
    hidden, weight, _, labels = inputs(trained=False, ignored=0)
    assert unsloth_rl._unsloth_fused_linear_logprobs is fl.fused_linear_logprobs
    expected = full_logprobs(hidden, weight, None, labels)[0].float()
    for function in (
        chunked_logprob.unsloth_chunked_logprobs,
        chunked_logprob.unsloth_masked_logprobs,
        rl_replacements.chunked_hidden_states_selective_log_softmax_recompute,
        rl_replacements.grpo_chunked_hidden_states_logprobs,
    ):
        assert torch.allclose(function(hidden, weight, labels), expected, atol=1e-5)
    assert served == ["masked_log_probs"] * 4


# -- the bugs ----------------------------------------------------------------------------------------------------------------


def test_z_loss_is_part_of_the_loss():
    hidden, weight, bias, labels = inputs(bias=True)
    loss = ce.unsloth_fused_ce_loss(None, hidden, weight, bias, labels, z_loss=0.01, logit_softcapping=6.0)
    expected = full(hidden, weight, bias, labels, z_loss=0.01, logit_softcapping=6.0)
    close(gradients(loss, hidden, weight, bias), gradients(expected, hidden, weight, bias), torch.float32)
    assert abs(loss - full(hidden, weight, bias, labels, logit_softcapping=6.0)) > 1e-3
    plain = ce.unsloth_fused_ce_loss(None, hidden, weight, bias, labels)
    assert torch.equal(plain, ce.unsloth_fused_ce_loss(None, hidden, weight, bias, labels, z_loss=0.0))
    packed = torch.Tensor._make_subclass(Packed, weight.detach())
    with pytest.raises(NotImplementedError, match="z_loss=0.01 needs a dense lm_head"):
        ce.unsloth_fused_ce_loss(None, hidden, packed, bias, labels, z_loss=0.01)


def lora_head(dtype=torch.float32, **config):
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential()
    model.add_module("lm_head", torch.nn.Linear(D, V, bias=False, dtype=dtype))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"], **config))
    head = model.base_model.model.lm_head
    torch.nn.init.normal_(head.lora_B["default"].weight)
    return head


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_dropout": 0.5}], ids=str)
def test_a_lora_adapter_on_the_head_counts_and_learns(config):
    head = lora_head(**config).eval()
    hidden, _, _, labels = inputs()
    adapter = [p for p in head.parameters() if p.requires_grad]
    loss = unsloth_fused_lm_head_loss(hidden, head, labels, num_items_in_batch=11, vocab_size=V, logit_scale_divide=2.0)
    logits = head(hidden).double() / 2
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1), reduction="sum") / 11
    found = gradients(loss, hidden, *adapter)
    close(found, gradients(expected, hidden, *adapter), torch.float32)
    without = full(hidden, head.base_layer.weight, None, labels, n_items=11, logit_scale_divide=2.0)
    base = gradients(without, hidden)[1]  # many numbers: two losses may be near each other by chance
    assert (found[1] - base).norm() > 0.1 * base.norm()
    head.enable_adapters(False)
    assert torch.isclose(
        unsloth_fused_lm_head_loss(hidden, head, labels, num_items_in_batch=11, logit_scale_divide=2.0), without.float()
    )


def test_a_4_bit_head_works():
    import bitsandbytes as bnb

    size = 64
    head = bnb.nn.Linear4bit(size, V, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    hidden, labels = torch.randn(1, T, size, requires_grad=True), torch.randint(0, V, (1, T))
    loss = unsloth_fused_lm_head_loss(hidden, head, labels)
    expected = F.cross_entropy(head(hidden)[0, :-1], labels[0, 1:])
    close(gradients(loss, hidden), gradients(expected, hidden), torch.float32)


def test_the_heads_gradient_is_summed_in_fp32(monkeypatch):
    hidden, weight = torch.randn(1, 256, 32).bfloat16(), (torch.randn(V, 32) / 8).bfloat16()
    weight.requires_grad_()
    labels = torch.randint(0, V, (1, 256))
    monkeypatch.setattr(fl, "_chunk_rows", lambda *a: 2)  # many chunks, as a large batch has

    def error(function):
        loss = function(hidden, weight, None, labels, n_items=256, shift_labels=False)
        exact = torch.autograd.grad(full(hidden, weight, None, labels, shift_labels=False), weight)[0]
        return (torch.autograd.grad(loss, weight)[0].double() - exact).norm() / exact.norm()

    ours = chunked_logprob.unsloth_chunked_ce_loss
    assert error(ours) < 0.7 * error(inspect.unwrap(ours))


def test_gradients_are_scaled_where_they_are_unless_the_graph_is_kept():
    hidden, weight, _, labels = inputs(ignored=0)
    made = []

    def run(**keywords):
        made.clear()
        loss = ce.unsloth_fused_ce_loss(None, hidden, weight, None, labels)
        node = loss.grad_fn
        while not hasattr(node, "saved_tensors"):
            node = node.next_functions[0][0]
        stored = [x.data_ptr() for x in node.saved_tensors]
        found = torch.autograd.grad(loss * 3, (hidden, weight), **keywords)
        return loss, found, stored

    _, (dh, dw), stored = run()
    assert dw.data_ptr() in stored
    loss, kept, stored = run(retain_graph=True)
    assert kept[1].data_ptr() not in stored
    again = torch.autograd.grad(loss * 3, (hidden, weight))
    exact = torch.autograd.grad(full(hidden, weight, None, labels) * 3, (hidden, weight))
    for found in ((dh, dw), kept, again):
        close(found, exact, torch.float32)
    weight.grad = None
    for _ in range(2):  # accumulation
        ce.unsloth_fused_ce_loss(None, hidden, weight, None, labels).backward()
    close([weight.grad], [2 / 3 * exact[1]], torch.float32)


def test_off_again_everything_is_unsloths():
    assert {row.state for row in unsloth_ext.status() if row.id.startswith("loss") and "trl" not in row.id} == {
        "applied"
    }
    backward = fl._ce_op._backward_fn
    unsloth_ext.disable("loss")
    for function in (fl.fused_linear_cross_entropy, fl.fused_linear_logprobs, ce.unsloth_fused_ce_loss):
        assert inspect.unwrap(function) is function
    assert fl._ce_op._backward_fn is not backward
    unsloth_ext.enable("loss")
    assert inspect.unwrap(fl.fused_linear_logprobs) is not fl.fused_linear_logprobs


# -- on a card ---------------------------------------------------------------------------------------------------------------

card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


@pytest.fixture
def card_table(monkeypatch):
    def route(on):
        monkeypatch.setitem(routes.BETTER, torch.cuda.get_device_capability(), routes.ROUTES if on else frozenset())

    return route


def card_inputs(trained, ignored=0.0, rows=3000, hidden=512, vocab=32003):
    h = torch.randn(1, rows, hidden, device="cuda").bfloat16().requires_grad_()
    w = (torch.randn(vocab, hidden, device="cuda") / 8).bfloat16().requires_grad_(trained)
    labels = torch.randint(vocab, (1, rows), device="cuda")
    return h, w, labels.masked_fill(torch.rand(1, rows, device="cuda") < ignored, -100)


@card
@pytest.mark.parametrize("ignored", [0.0, 0.6])
@pytest.mark.parametrize("trained", [False, True])
def test_on_a_card_ours_is_as_near_to_fp64_as_unsloths(trained, ignored, card_table, served):
    h, w, labels = card_inputs(trained, ignored)
    exact_h, exact_w = (x.detach().double().requires_grad_(x.requires_grad) for x in (h, w))
    logits = F.linear(exact_h, exact_w)[0, :-1]
    exact = gradients(F.cross_entropy(logits, labels[0, 1:]), exact_h, exact_w)
    errors = {}
    for on in (False, True):
        card_table(on)
        found = gradients(ce.unsloth_fused_ce_loss(None, h, w, None, labels), h, w)
        errors[on] = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
    assert served == ["summed_cross_entropy"]
    for ours, theirs in zip(errors[True], errors[False], strict=True):
        assert ours <= 1.1 * theirs + 1e-4, errors


@card
def test_on_a_card_the_policy_and_its_scorer_agree(card_table, served):
    card_table(True)
    h, w, labels = card_inputs(False)
    policy, _ = fl.fused_linear_logprobs(h, w, labels, return_entropy=True)
    with torch.no_grad():
        scored = fl.fused_linear_logprobs(h, w, labels)
    assert (policy - scored).abs().max() < 1e-5 and len(served) == 2


@card
def test_the_routed_loss_goes_into_a_cuda_graph(card_table):
    card_table(True)
    h, w, labels = card_inputs(False, ignored=0.3)

    def step():
        (gradient,) = torch.autograd.grad(ce.unsloth_fused_ce_loss(None, h, w, None, labels), h)
        return gradient

    expected = step()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    torch.cuda.synchronize()
    assert (found.double() - expected.double()).norm() <= 0.01 * expected.double().norm()
