"""Run in two processes, as `loss_sharded.py SEED RANK FILE`: a head under FSDP2 and DDP, against the average of full gradients."""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from unsloth_ext.loss import chunked_loss, functions

D, V, T = 8, 21, 13  # 21 rows do not divide by 2 ranks


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(D, D, dtype=torch.float64)
        self.lm_head = nn.Linear(D, V, dtype=torch.float64)

    def forward(self, x, labels=None, function=None):
        hidden = torch.tanh(self.body(x))
        if function is None:
            return hidden
        return chunked_loss(function, hidden, self.lm_head, labels, chunk_size=4).sum()


def batch(rank, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(T, D, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, V, (T,), generator=generator)


def plain(seed, world, factor):
    """The gradients of one process that sees each rank's batch, averaged over ranks."""
    torch.manual_seed(seed)
    model = Model()
    total = 0.0
    for rank in range(world):
        x, labels = batch(rank)
        total = total + factor(rank) * F.cross_entropy(model.lm_head(model(x)), labels) / world
    total.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def compare(model, expected):
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor), name
        torch.testing.assert_close(p.grad.full_tensor(), expected[name], msg=lambda m, name=name: f"{name}: {m}")


def main(seed, rank, meeting):
    world = 2
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    x, labels = batch(rank)
    cross_entropy = functions.cross_entropy()

    def per_token(logits, labels):
        return F.cross_entropy(logits, labels, reduction="none") / T

    def factor(rank):  # each rank has its own incoming gradient
        return 1.0 + rank

    expected = plain(seed, world, factor)
    for function in (cross_entropy, per_token):
        # a unit of its own: a DTensor wherever the loss is computed
        torch.manual_seed(seed)
        model = Model()
        fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        hidden = model(x)
        with CommDebugMode() as counted:
            loss = chunked_loss(function, hidden, model.lm_head, labels, chunk_size=4).sum()
        gathers = counted.get_total_counts()
        assert gathers == 2, f"weight and bias are gathered once each for 4 chunks, not {gathers}"
        (loss * factor(rank)).backward()
        compare(model, expected)

        # part of the root's unit, computed inside the root's forward (plain tensors there) and outside (DTensors)
        for inside in (True, False):
            torch.manual_seed(seed)
            model = Model()
            fully_shard(model, mesh=mesh, reshard_after_forward=True)
            if inside:
                loss = model(x, labels, function)
            else:
                loss = chunked_loss(function, model(x), model.lm_head, labels, chunk_size=4).sum()
            (loss * factor(rank)).backward()
            compare(model, expected)

    # DDP averages what leaves through autograd; a rank may have fewer tokens, or none
    for rows in (T, 5 * rank):
        torch.manual_seed(seed)
        model = Model()
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(x[:rows], labels[:rows], cross_entropy).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        total = (
            F.cross_entropy(model.lm_head(model(x[:rows])), labels[:rows])
            if rows
            else sum(p.sum() for p in model.parameters()) * 0
        )
        total.backward()
        for mine, p in zip(grads, model.parameters(), strict=True):
            dist.all_reduce(p.grad)
            torch.testing.assert_close(mine, p.grad / world)

    # a frozen head is gathered as well, and the mixed-precision policy says in what
    torch.manual_seed(seed)
    model = Model().float()
    model.lm_head.requires_grad_(False)
    seen = set()

    def watched(logits, labels):
        seen.add(logits.dtype)
        return cross_entropy(logits, labels)

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(model.lm_head, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    chunked_loss(watched, model(x.float()), model.lm_head, labels, chunk_size=4).backward()
    assert seen == {torch.bfloat16}, seen
    assert model.lm_head.weight.grad is None and model.body.weight.grad is not None

    # no gradients wanted
    with torch.no_grad():
        values = chunked_loss(functions.token_logprobs(), model(x.float()), model.lm_head, labels, chunk_size=4)
    assert values.shape == (T,)
    try:
        chunked_loss(cross_entropy, model.lm_head.weight, model.lm_head, labels)
    except TypeError as error:
        assert "hidden is a DTensor" in str(error)
    else:
        raise AssertionError("a DTensor as hidden was accepted")
    dist.barrier()
    dist.destroy_process_group()
    print(f"rank {rank} of {world} done")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
