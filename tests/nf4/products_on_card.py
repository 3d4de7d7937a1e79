"""For the tests of products on a card: the card that the kernels are for, and matrices among NaN."""

import pytest
import torch


@pytest.fixture(autouse=True)
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for compute capability 9.0")


def matrix(rows, columns, dtype, around=0):
    """Among NaN, where there is something around it."""
    whole = torch.full((rows, columns + 2 * around), float("nan"), device="cuda", dtype=dtype)
    part = whole[:, around : around + columns]
    return part.copy_(torch.randn(rows, columns, device="cuda"))


def off(found, xs, weights, transposed):
    """From the sum in fp64, as a part of it."""
    exact = sum(x.double() @ (w.double().t() if transposed else w.double()) for x, w in zip(xs, weights, strict=True))
    return ((found.double() - exact).norm() / exact.norm()).item()
