"""Every optimizer that the Trainer may step quickly: the steps of torch on the whole parameters."""

import pytest
import torch


def _stepped(rank, world, name, whole, gradients):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from unsloth_ext.fsdp2.optimizers import step_quickly

    mesh = init_device_mesh("cpu", (world,))
    parameters = [torch.nn.Parameter(distribute_tensor(one, mesh, [Shard(0)])) for one in whole]
    optimizer = step_quickly(getattr(torch.optim, name)(parameters, lr=0.01))
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = distribute_tensor(gradient, mesh, [Shard(0)])
        optimizer.step()
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in parameters)
    local = not any(hasattr(p, "to_local") for group in optimizer.param_groups for p in group["params"])
    return [p.full_tensor().detach() for p in parameters], local


NAMES = ["Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]


@pytest.mark.parametrize("name", NAMES)
def test_it_takes_the_steps_of_the_whole(ranks, name):
    shapes = [(8, 5), (3, 4), (1, 7)]  # the second rank has nothing of the last
    whole = [torch.randn(shape) for shape in shapes]
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(4)]
    expected = [torch.nn.Parameter(one.clone()) for one in whole]
    optimizer = getattr(torch.optim, name)(expected, lr=0.01)
    for step in gradients:
        for parameter, gradient in zip(expected, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    for found, local in ranks(2, _stepped, name=name, whole=whole, gradients=gradients):
        assert local == (name != "Adagrad")  # which has state from the beginning
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=1e-5, atol=1e-6)


def test_the_list_is_what_is_tested():
    from unsloth_ext.fsdp2.optimizers import _ELEMENTWISE

    assert sorted(kind.__name__ for kind in _ELEMENTWISE) == sorted(NAMES)


def test_a_closure_is_refused():
    from unsloth_ext.errors import UsageError
    from unsloth_ext.fsdp2 import on_local_shards

    optimizer = on_local_shards(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1))
    optimizer.step()
    optimizer.step(None)
    for call in (lambda: optimizer.step(lambda: 0.0), lambda: optimizer.step(closure=lambda: 0.0)):
        with pytest.raises(UsageError, match="no closure"):
            call()


def _together(rank, world, whole, gradients):
    import bitsandbytes as bnb
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from unsloth_ext.compiling import step_together
    from unsloth_ext.fsdp2 import on_local_shards

    mesh = init_device_mesh("cpu", (world,))
    found = []
    for arrange in (lambda o: o, step_together):
        parameters = [torch.nn.Parameter(distribute_tensor(one, mesh, [Shard(0)])) for one in whole]
        optimizer = arrange(on_local_shards(bnb.optim.AdamW8bit(parameters, lr=0.01, min_8bit_size=256)))
        for step in gradients:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = distribute_tensor(gradient, mesh, [Shard(0)])
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.to_local().detach() for p in parameters])
    chunks = [len(chunk.members) for chunk in optimizer._unsloth_ext_together.chunks]
    return *found, chunks


def test_8_bit_steps_together_on_local_shards(ranks):
    shapes = [(16, 64), (33, 5), (64, 16), (32, 32)]  # 512 elements a rank, but for the second
    whole = [torch.randn(shape) for shape in shapes]
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(4)]
    for alone, together, chunks in ranks(2, _together, whole=whole, gradients=gradients):
        assert chunks == [3] and all(map(torch.equal, alone, together))
