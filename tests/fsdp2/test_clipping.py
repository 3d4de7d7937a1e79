"""Clipping by the norm of all ranks' parts, against torch on the whole gradients."""

import math

import pytest
import torch


def _clipped(rank, world, whole, shape, norm_type, max_norm):
    """(norm, the whole gradients after clipping)"""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    from unsloth_ext.fsdp2 import clip_grad_norm_

    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    placements = [Replicate(), Shard(0)][-len(shape) :]
    parameters = []
    for gradient in whole:
        sharded = distribute_tensor(torch.zeros_like(gradient), mesh, placements)
        parameters.append(torch.nn.Parameter(sharded))
        parameters[-1].grad = distribute_tensor(gradient, mesh, placements)
    parameters.append(torch.nn.Parameter(torch.zeros(3)))  # without a gradient
    norm = clip_grad_norm_(iter(parameters), max_norm, norm_type)
    assert not isinstance(norm, DTensor)
    return norm, [p.grad.full_tensor() for p in parameters[:-1]]


@pytest.mark.parametrize("shape", [(2,), (2, 2), (4,)], ids=str)
@pytest.mark.parametrize("norm_type", [2, math.inf, 3.0])
def test_as_torch_clips_the_whole(ranks, shape, norm_type):
    # Other norms are torch's, which rounds them to bfloat16.
    for dtype in (torch.float32, torch.float64, *([] if norm_type == 3 else [torch.bfloat16])):
        for max_norm in (0.5, 1e6):
            # Three rows over four ranks leave one without.
            whole = [torch.randn(n, m).to(dtype) for n, m in ((16, 24), (3, 40), (1, 7))]
            parameters = [torch.nn.Parameter(torch.zeros_like(gradient, dtype=torch.float64)) for gradient in whole]
            for parameter, gradient in zip(parameters, whole, strict=True):
                parameter.grad = gradient.double().clone()
            expected = torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
            arguments = dict(whole=whole, shape=shape, norm_type=norm_type, max_norm=max_norm)
            close = dict(rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
            answers = ranks(math.prod(shape), _clipped, **arguments)
            for norm, clipped in answers:
                torch.testing.assert_close(norm.double(), expected, **close)
                assert norm.shape == () and torch.equal(norm, answers[0][0])
                for found, parameter in zip(clipped, parameters, strict=True):
                    torch.testing.assert_close(found.double(), parameter.grad, **close)


@pytest.mark.parametrize("row", [0, 3])  # of the first rank, of the last
@pytest.mark.parametrize("norm_type", [2, math.inf])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(ranks, bad, norm_type, row):
    whole = [torch.randn(4, 5), torch.randn(2, 3)]
    whole[0][row, 1] = bad
    for norm, clipped in ranks(2, _clipped, whole=whole, shape=(2,), norm_type=norm_type, max_norm=1.0):
        assert str(norm.item()) == str(bad) and not all(gradient.isfinite().all() for gradient in clipped)


def _none(rank, world):
    from unsloth_ext.fsdp2 import clip_grad_norm_

    return clip_grad_norm_([torch.nn.Parameter(torch.zeros(2))], 1.0).item()


def test_without_a_gradient_it_is_zero(ranks):
    assert ranks(2, _none) == [0.0, 0.0]
