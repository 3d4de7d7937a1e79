"""The loss with the vocabulary over two gloo processes equals the loss with all of it in one, and each gradient with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unsloth_ext.loss.vocabulary_parallel import vocabulary_parallel_cross_entropy

RANK = """
import sys; sys.path[:0] = {path!r}
import torch
import torch.distributed as dist
from linear_oracle import values
from unsloth_ext.loss import linear_softmax
from unsloth_ext.loss.vocabulary_parallel import vocabulary_parallel_cross_entropy as loss_of

rank = {rank}
dist.init_process_group("gloo", init_method="file://{meeting}", rank=rank, world_size=2)
linear_softmax.rows_of_chunk = lambda hidden_size: 16
for case, (cut, settings) in enumerate([(150, {{}}), (150, dict(z_loss=1e-2)), (40, dict(softcap=2.0, logit_scale=1.3)), (299, {{}})]):
    torch.manual_seed({seed} + case)
    hidden, weight, bias = torch.randn(37, 24).double(), torch.randn(300, 24).double(), torch.randn(300).double()
    labels = torch.randint(0, 300, (37,)); labels[::5] = -100
    if case == 3:
        weight[: 2] *= 40  # one rank holds nearly all of the mass
    whole = [x.requires_grad_() for x in (hidden, weight, bias)]
    renamed = {{k if k != "logit_scale" else "scale": v for k, v in settings.items()}}
    value, _, _ = values(hidden, weight, labels, bias, **renamed)
    g = torch.randn(37).double()
    mine = slice(0, cut) if rank == 0 else slice(cut, 300)
    h, w, b = (x.detach().clone().requires_grad_() for x in (hidden, weight[mine], bias[mine]))
    place = {{}} if cut == 150 else dict(vocab_start=mine.start, vocab_size=300)
    for memory in ("fast", "lean"):
        found = loss_of(h, w, labels, b, reduction="none", memory=memory, **place, **settings)
        torch.testing.assert_close(found, value, rtol=1e-11, atol=1e-11)
        dh, dw, db = torch.autograd.grad((found * g).sum(), (h, w, b))
        th, tw, tb = torch.autograd.grad((value * g).sum(), whole, retain_graph=True)
        for x, y in ((dh, th), (dw, tw[mine]), (db, tb[mine])):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)
        frozen = loss_of(h, w.detach(), labels, reduction="mean", memory=memory, **place, **settings)
        plain = values(hidden, weight, labels, **renamed)[0].sum() / (labels != -100).sum()
        torch.testing.assert_close(frozen, plain)
        torch.testing.assert_close(torch.autograd.grad(frozen, h)[0], torch.autograd.grad(plain, hidden)[0])
        labels2 = labels.clone(); labels2[7] = 300
        assert loss_of(h, w, labels2, reduction="none", **place).isnan().nonzero().tolist() == [[7]]
        assert loss_of(h, w, torch.full_like(labels, -100), **place) == 0
print("same")
dist.destroy_process_group()
"""


def test_two_ranks_equal_one(tmp_path):
    path = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    seed = int(torch.randint(0, 10**6, ()))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK.format(path=path, rank=rank, meeting=tmp_path / "meeting", seed=seed)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=600)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, text in zip(ranks, said, strict=True):
        assert rank.returncode == 0 and "same" in text, f"seed {seed}\n" + "\n".join(each[-3000:] for each in said)


def test_needs_a_process_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        vocabulary_parallel_cross_entropy(torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.long))
