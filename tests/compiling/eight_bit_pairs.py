"""Two copies of the same parameters: one bitsandbytes steps by itself, the other goes together. Used on a CPU and on a card."""

import io

import pytest
import torch

from unsloth_ext.compiling.eight_bit_steps import step_together

bnb = pytest.importorskip("bitsandbytes", minversion="0.50")

# Multiples of 256 elements, in 8 bits from 4096 on; 33 x 255 and 5003 are none; 5 x 5 and 16 x 16 keep 32 bits.
SHAPES = [
    (64, 128),
    (16, 512),
    (33, 255),
    (128, 64),
    (5, 5),
    (8192,),
    (64, 96),
    (5003,),
    (16, 16),
    (256, 32),
    (16, 272),
]
TOGETHER = [0, 1, 3, 5, 6, 9, 10]

KINDS = {
    "AdamW8bit": lambda groups: bnb.optim.AdamW8bit(groups, lr=1e-2),
    "Adam8bit": lambda groups: bnb.optim.Adam8bit(groups, lr=1e-2, betas=(0.8, 0.95)),
    "Lion8bit": lambda groups: bnb.optim.Lion8bit(groups, lr=1e-2),
    "Adagrad8bit": lambda groups: bnb.optim.Adagrad8bit(groups, lr=1e-2),
    "RMSprop8bit": lambda groups: bnb.optim.RMSprop8bit(groups, lr=1e-2),
    "SGD8bit": lambda groups: bnb.optim.SGD8bit(groups, lr=1e-2, momentum=0.9),
    "AdamW": lambda groups: bnb.optim.AdamW(groups, lr=1e-2, optim_bits=8),  # what optim="adamw_8bit" makes
}
adamw = KINDS["AdamW8bit"]


def parameters(device="cpu", dtype=torch.float32, shapes=SHAPES, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw).to(device, dtype)) for shape in shapes]


def pair(make, device="cpu", dtypes=(torch.float32, torch.float32), **options):
    """(alone, together): `make(groups)` optimizers over two groups of parameters, the second with half of the shapes."""
    found = []
    for _ in range(2):
        first = parameters(device, dtypes[0])
        second = parameters(device, dtypes[1], SHAPES[::2] + SHAPES[3:4], seed=1)
        found.append(make([{"params": first}, {"params": second, "lr": 3e-3, "weight_decay": 0.1}]))
    return found[0], step_together(found[1], **options)


def every(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def give_gradients(optimizers, step, without=()):
    """The same gradients to each of `optimizers`, other ones at each step; those numbered in `without` get none."""
    draw = torch.Generator().manual_seed(1000 + step)
    for number, same in enumerate(zip(*map(every, optimizers), strict=True)):
        gradient = torch.randn(same[0].shape, generator=draw) * 10.0 ** (number % 5 - 3)
        gradient[gradient.abs() < 1e-4] = 0.0  # for skip_zeros
        for p in same:
            p.grad = None if number in without else gradient.to(p.device, p.dtype, copy=True)


def run(optimizers, steps, without=()):
    for step in steps:
        give_gradients(optimizers, step, without)
        for optimizer in optimizers:
            optimizer.step()


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    return file


def equal(a, b):
    """Bit for bit: also where there is no number, and -0 is not 0."""
    return torch.equal(*(x.detach().contiguous().view(-1).view(torch.uint8) for x in (a, b)))


def assert_same(alone, together):
    """Parameters, gradients and all of the state, bit for bit."""
    for number, (p, q) in enumerate(zip(every(alone), every(together), strict=True)):
        assert equal(p, q), number
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or equal(p.grad, q.grad)), number
        ours, theirs = together.state.get(q, {}), alone.state.get(p, {})
        assert list(ours) == list(theirs), number
        for key, value in theirs.items():
            if isinstance(value, torch.Tensor):
                assert value.shape == ours[key].shape and equal(value, ours[key]), (number, key)
            else:
                assert value == ours[key], (number, key)
    assert len(together.state) == len(alone.state)


class Counted:
    """Counts what bitsandbytes' 8-bit kernel is called for: [elements of each call]."""

    def __init__(self, monkeypatch):
        import bitsandbytes.functional as functional

        self.calls, original = [], functional.optimizer_update_8bit_blockwise

        def counted(name, g, p, *args, **kwargs):
            self.calls.append(p.numel())
            return original(name, g, p, *args, **kwargs)

        monkeypatch.setattr(functional, "optimizer_update_8bit_blockwise", counted)

    def of(self, action):
        self.calls.clear()
        action()
        return list(self.calls)
