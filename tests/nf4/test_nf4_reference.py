"""The oracle against bitsandbytes' CPU code, and its own corner cases."""

from dataclasses import replace

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nf4_states import expected, specs

from unsloth_ext.nf4 import reference


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 512, 4096])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_of_quantised_weights_equals_bitsandbytes(dtype, blocksize, nested):
    torch.manual_seed(3407)
    weight = torch.randn(48, 130, dtype=dtype)
    packed, state = bnb.quantize_4bit(weight, blocksize=blocksize, compress_statistics=nested, quant_type="nf4")
    assert torch.equal(expected(packed, state), bnb.dequantize_4bit(packed, state))


@settings(max_examples=60, deadline=None)
@given(specs(columns=st.integers(1, 8), magnitude="usual", storage=torch.uint8, shift=0))
def test_of_random_states_equals_bitsandbytes(spec):
    # Rows of whole blocks: with any other, bitsandbytes 0.50.2 takes wrong scales on a CPU (not on a GPU).
    packed, state = replace(spec, columns=spec.columns * spec.blocksize).make()
    assert torch.equal(expected(packed, state), bnb.dequantize_4bit(packed, state))


def test_the_table_is_bitsandbytes_own():
    assert torch.equal(torch.tensor(reference.CODE), bnb.get_4bit_type("nf4", device="cpu"))


def test_subnormals_become_zeros_of_their_sign():
    tiny = torch.tensor([1e-39, -1e-39, 1.2e-38, -0.0])
    assert reference.flush(tiny).tolist() == [0.0, -0.0, tiny[2].item(), -0.0]
    assert torch.signbit(reference.flush(tiny)).tolist() == [False, True, False, True]
    assert reference.product(torch.tensor(1e-20), torch.tensor(1e-19)) == 0


def test_the_offset_is_added_after_a_rounding():
    code2, absmax2, offset = torch.tensor([1 + 2**-12]), torch.tensor([1 + 2**-12]), torch.tensor(-(1 + 2**-11))
    scale = reference.scales(torch.zeros(1, dtype=torch.uint8), code2, absmax2, offset, 256)
    assert scale.item() == 0.0  # a fused multiply-add would leave 2**-24
