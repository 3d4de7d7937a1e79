"""The ready-made functions and objectives against the papers' formulas in fp64, and their gradients by gradcheck."""

import loss_heads
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unsloth_ext.loss import chunked_loss, functions, objectives, reference

B, S, D, V, TEACHER = 4, 5, 3, 7, 4


@pytest.fixture
def case():
    class Case:
        hidden = torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
        labels = torch.randint(0, V, (B, S))
        mask = (torch.rand(B, S) < 0.7).double()
        teacher_hidden = torch.randn(B, S, TEACHER, dtype=torch.float64)
        teacher = nn.Linear(TEACHER, V, dtype=torch.float64)
        others = torch.randn(2, B, S, dtype=torch.float64) / 4
        advantages = torch.randn(B, dtype=torch.float64)
        size = int(torch.randint(6, B * S + 2, ()))

        @property
        def logits(self):
            return (self.hidden @ self.weight.T).reshape(-1, V)

        @property
        def flat(self):
            return self.labels.reshape(-1)

        def check(self, chunked, expected):
            """The value, and the gradients of hidden and weight both against the formula's and against differences."""
            mine, theirs = chunked(self.hidden, self.weight), expected()
            torch.testing.assert_close(mine, theirs)
            tensors = [self.hidden, self.weight]
            torch.testing.assert_close(torch.autograd.grad(mine, tensors), torch.autograd.grad(theirs, tensors))
            torch.autograd.gradcheck(chunked, tensors, fast_mode=True)

        def chunked(self, function, *targets, **options):
            return lambda hidden, weight: chunked_loss(
                function, hidden, weight, *targets, chunk_size=self.size, **options
            )

        def logps(self, hidden, weight, **options):
            return chunked_loss(functions.token_logprobs(**options), hidden, weight, self.labels, chunk_size=self.size)

        def plain_logps(self, **options):
            return [v.reshape(B, S) for v in reference.token_logprobs(self.logits, self.flat, **options)]

    case = Case()
    case.mask[:, 0] = 1  # no sequence is empty
    return case


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"weight": True}, "all"])
def test_cross_entropy(case, options, ignored):
    if ignored:
        case.labels[case.mask == 0] = -100
    options = {"label_smoothing": 0.2, "z_loss": 0.1, "weight": True} if options == "all" else options
    if "weight" in options:
        options = options | {"weight": torch.rand(V, dtype=torch.float64)}
    case.check(
        case.chunked(functions.cross_entropy(**options), case.labels),
        lambda: reference.cross_entropy(case.logits, case.flat, **options),
    )
    if "z_loss" not in options:  # and torch's own mean
        torch.testing.assert_close(
            case.chunked(functions.cross_entropy(**options), case.labels)(case.hidden, case.weight),
            F.cross_entropy(case.logits, case.flat, **options),
        )


def test_cross_entropy_of_capped_and_scaled_logits(case):
    case.check(
        case.chunked(functions.cross_entropy(softcap=1.5, scale=0.7), case.labels),
        lambda: reference.cross_entropy(reference.capped(case.logits, 1.5, 0.7), case.flat),
    )


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal(case, gamma):
    case.check(
        case.chunked(functions.focal(gamma=gamma), case.labels),
        lambda: reference.focal(case.logits, case.flat, gamma=gamma),
    )


def test_focal_of_a_certain_label_has_a_finite_gradient():
    hidden = torch.tensor([[100.0, 0.0]], requires_grad=True)
    chunked_loss(functions.focal(gamma=0.5), hidden, torch.eye(2), torch.tensor([0])).backward()
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_kl_divergence(case, reverse):
    def expected():
        student = torch.softmax(case.logits / 2, -1)
        teacher = torch.softmax(case.teacher(case.teacher_hidden).reshape(-1, V).detach() / 2, -1)
        return 4 * (reference.kl(student, teacher) if reverse else reference.kl(teacher, student)).mean()

    function = functions.kl_divergence(case.teacher, temperature=2.0, reverse=reverse)
    case.check(case.chunked(function, case.teacher_hidden), expected)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_jsd_with_masked_rows(case, beta):
    case.labels[case.mask == 0] = -100
    keep = case.flat != -100
    case.check(
        case.chunked(functions.jsd(case.teacher.weight, beta=beta), case.teacher_hidden, case.labels),
        lambda: reference.jsd(
            case.logits[keep], (case.teacher_hidden @ case.teacher.weight.T).detach().reshape(-1, V)[keep], beta
        ),
    )


def test_mse(case):
    target = torch.randn(B, S, V, dtype=torch.float64)
    case.check(case.chunked(functions.mse(), target), lambda: F.mse_loss(case.logits, target.reshape(-1, V)))
    case.check(
        case.chunked(functions.mse(case.teacher), case.teacher_hidden),
        lambda: F.mse_loss(case.logits, case.teacher(case.teacher_hidden).reshape(-1, V).detach()),
    )


def test_mse_of_a_value_head():
    hidden, values = torch.randn(9, D, requires_grad=True), torch.randn(9)
    head = nn.Linear(D, 1)
    loss = chunked_loss(functions.mse(), hidden, head, values, chunk_size=4)
    torch.testing.assert_close(loss, F.mse_loss(head(hidden)[:, 0], values))


def test_token_logprobs_and_entropy(case):
    function = functions.token_logprobs(temperature=0.8, entropy=True, entropy_gradient=True)
    logps, entropies = chunked_loss(function, case.hidden, case.weight, case.labels, chunk_size=case.size)
    expected = case.plain_logps(temperature=0.8)
    torch.testing.assert_close([logps, entropies], expected)
    tensors = [case.hidden, case.weight]
    torch.testing.assert_close(
        torch.autograd.grad((logps * entropies).sum(), tensors),
        torch.autograd.grad((expected[0] * expected[1]).sum(), tensors),
    )


def test_entropy_to_look_at_costs_no_second_pass(case):
    calls = []
    inner = functions.token_logprobs(entropy=True)

    def counted(logits, labels):
        calls.append(len(labels))
        return inner(logits, labels)

    counted.rowwise = inner.rowwise
    frozen = case.weight.detach()
    logps, entropies = chunked_loss(counted, case.hidden, frozen, case.labels, chunk_size=7)
    assert logps.requires_grad and not entropies.requires_grad
    chunks = len(calls)
    (grad,) = torch.autograd.grad((logps * case.mask).sum(), case.hidden)
    assert len(calls) == chunks
    expected = torch.autograd.grad((case.plain_logps()[0] * case.mask).sum(), case.hidden)[0]
    torch.testing.assert_close(grad, expected)


def test_rowwise_is_claimed_only_where_it_is_so(case):
    """A cotangent for one row reaches no other row."""
    logits = torch.randn(6, V, dtype=torch.float64, requires_grad=True)
    function = functions.token_logprobs(entropy=True, entropy_gradient=True, softcap=3.0, scale=0.5)
    assert function.rowwise
    for output in function(logits, torch.randint(0, V, (6,))):
        (grad,) = torch.autograd.grad(output[2], logits, retain_graph=True)
        assert grad[2].abs().sum() > 0 and grad[[0, 1, 3, 4, 5]].abs().sum() == 0


def test_dpo(case):
    case.check(
        lambda h, w: objectives.dpo(case.logps(h, w), case.others[0], case.mask, beta=0.3),
        lambda: reference.dpo(case.plain_logps()[0], case.others[0], case.mask, 0.3),
    )


def test_orpo(case):
    case.check(
        lambda h, w: objectives.orpo(case.logps(h, w), case.mask, beta=0.3),
        lambda: reference.orpo(case.plain_logps()[0], case.mask, 0.3),
    )


def test_simpo(case):
    def expected():
        logps = case.plain_logps()[0]
        mean = torch.stack([row[keep.bool()].mean() for row, keep in zip(logps, case.mask, strict=True)])
        return -torch.log(torch.sigmoid(2 * (mean[:2] - mean[2:]) - 0.5)).mean()

    case.check(lambda h, w: objectives.simpo(case.logps(h, w), case.mask, gamma=0.5), expected)


def test_grpo_with_kl_and_entropy(case):
    old, ref = (case.plain_logps()[0].detach() + other for other in case.others)
    options = {"beta": 0.2, "entropy_coef": 0.1}

    def chunked(hidden, weight):
        logps, entropies = case.logps(hidden, weight, entropy=True, entropy_gradient=True)
        return objectives.grpo(
            logps, case.advantages, case.mask, old_logps=old, reference_logps=ref, entropies=entropies, **options
        )

    def expected():
        logps, entropies = case.plain_logps()
        return reference.grpo(logps, case.advantages, case.mask, old, ref, entropies, epsilon=0.2, **options)

    case.check(chunked, expected)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_grpo_by_sequences(case, level):
    old = case.plain_logps()[0].detach() + case.others[0]

    def expected():
        logps, total = case.plain_logps()[0], 0.0
        for b in range(B):
            keep = case.mask[b].bool()
            ratio = (logps[b] - old[b])[keep]
            ratio = (ratio.mean().expand_as(ratio) if level == "sequence" else ratio).exp()
            gain = torch.minimum(ratio * case.advantages[b], ratio.clamp(0.8, 1.2) * case.advantages[b])
            total = total - gain.mean() / B
        return total

    case.check(
        lambda h, w: objectives.grpo(
            case.logps(h, w), case.advantages, case.mask, old_logps=old, level=level, aggregate="sequence"
        ),
        expected,
    )


def test_grpo_ignores_what_is_masked():
    logps = torch.zeros(2, 3, requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    far = torch.tensor([[0.0, 0.0, -1e4], [-1e4, 0.0, 0.0]])
    loss = objectives.grpo(logps, torch.ones(2), mask, old_logps=far, reference_logps=-far, beta=0.1)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logps.grad).all()


@pytest.mark.parametrize("head_name", ["bias", "lora", "sequence"])
@pytest.mark.parametrize("name", ["cross_entropy", "focal", "token_logprobs", "kl_divergence", "jsd", "mse"])
def test_every_function_on_module_heads(name, head_name):
    """gradcheck by every trainable tensor of the head."""
    head = loss_heads.EXACT[head_name](D, V, torch.float64)
    hidden = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(V, D, dtype=torch.float64)
    if name in ("kl_divergence", "jsd", "mse"):
        function, target = getattr(functions, name)(teacher), torch.randn(5, D, dtype=torch.float64)
    else:
        function, target = getattr(functions, name)(), torch.randint(0, V, (5,))
    tensors = loss_heads.trainable(head)

    def run(hidden, *_):
        return chunked_loss(function, hidden, head, target, chunk_size=2)

    torch.autograd.gradcheck(run, (hidden, *tensors), fast_mode=True)
