"""The sharded parameter by itself: bytes, gather, free, copies, what may not be done with it."""

import copy
import random

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from torch import nn

from unsloth_ext.fsdp2 import reference
from unsloth_ext.fsdp2.nf4_cut import NF4Cut
from unsloth_ext.fsdp2.nf4_parameter import NF4Shard


def _quantised(shape, nested=True, seed=0, blocksize=64, dtype=torch.float32, device="cpu"):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    return functional.quantize_4bit(weight, blocksize=blocksize, compress_statistics=nested, quant_type="nf4")


SHAPES = [(136, 370), (68, 136), (256, 512), (1, 64), (3, 7), (333, 1001), (64, 1024)]


@pytest.mark.parametrize("nested", [True, False])
def test_pieces_are_those_of_the_reference(nested):
    for shape in SHAPES:
        blocksize, world = random.choice([64, 128, 4096]), random.choice([1, 2, 3, 5, 8])
        packed, state = _quantised(shape, nested, random.randrange(10**6), blocksize)
        shards = [NF4Shard.of_whole(packed, state, rank, world) for rank in range(world)]
        cut = shards[0].cut
        fields = {"packed": (packed, cut.group_bytes), "absmax": (state.absmax, cut.group_blocks)}
        if nested:
            fields["absmax2"] = (state.state2.absmax, 1)
        for name, (whole, per_group) in fields.items():
            pieces = [getattr(s.fields, name) for s in shards]
            for mine, expected in zip(pieces, reference.cut(whole, per_group, cut.groups, world), strict=True):
                assert torch.equal(mine, expected), (shape, blocksize, world, name)
            assert torch.equal(reference.join(pieces, whole.numel()), whole.reshape(-1))


def test_bytes_stored_as_bfloat16_are_cut_as_bytes():
    weight = torch.randn(128, 256)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    for dtype in (torch.bfloat16, torch.float32):
        again = NF4Shard.of_whole(packed.view(-1).view(dtype).view(-1, 1), state, 1, 2).fields.packed
        assert torch.equal(again, NF4Shard.of_whole(packed, state, 1, 2).fields.packed)


def test_what_peft_and_torch_ask_of_it():
    packed, state = _quantised((64, 512), dtype=torch.bfloat16)
    shard = nn.Parameter(NF4Shard.of_whole(packed, state, 0, 2), requires_grad=False)
    assert isinstance(shard, nn.Parameter) and type(shard) is NF4Shard and not shard.requires_grad
    assert shard.compress_statistics and shard.quant_type == "nf4" and shard.dtype == torch.bfloat16
    assert shard.numel() == 64 * 512 and shard.bytes_held() == (8192 + 256 + 4)
    twin = copy.deepcopy(shard)
    twin.fields.packed.zero_()
    assert shard.fields.packed.any() and type(twin) is NF4Shard
    assert shard.to(torch.float32).dtype == torch.bfloat16  # like Params4bit: packed bytes have no other dtype
    assert "rank 0 of 2" in repr(shard)


def test_what_cannot_be_done_says_so():
    packed, state = _quantised((64, 1024))
    shard = NF4Shard.of_whole(packed, state, 0, 2)
    with pytest.raises(NotImplementedError, match=r"unsloth_ext\.fsdp2\.shard"):
        shard + 1
    with pytest.raises(RuntimeError, match="cut for 2 ranks"):
        torch.chunk(shard, 4)
    with pytest.raises(RuntimeError, match="stand-in"):
        torch.chunk(shard, 2)[1].fields  # noqa: B018
    with pytest.raises(RuntimeError, match="same part of the same weight"):
        shard.copy_(NF4Shard.of_whole(packed, state, 1, 2))
    with pytest.raises(ValueError, match="absmax must be 512 contiguous entries"):
        NF4Shard.of_fields(shard.cut, 0, type(shard.fields)(**vars(shard.fields) | {"absmax": torch.zeros(3)}))
    fp4 = functional.quantize_4bit(torch.randn(64, 64), quant_type="fp4")[1]
    with pytest.raises(ValueError, match="'nf4'"):
        NF4Cut.of(fp4, 2)


class _Unit(nn.Module):
    """A 4-bit layer beside a bfloat16 one and a trainable float32 one: dtypes that FSDP2 gathers in one buffer of bytes."""

    def __init__(self, shape, packed, state):
        super().__init__()
        self.base = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, compute_dtype=torch.float32, quant_type="nf4")
        self.base.weight = bnb.nn.Params4bit(
            packed, quant_state=state, quant_type="nf4", bnb_quantized=True, requires_grad=False
        )
        self.half = nn.Linear(5, 3, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        self.lora = nn.Linear(shape[1], 7, bias=False)

    def forward(self, x):
        return self.base(x), self.lora(x)


def _gather(rank, world, shape, nested, all_patterns=False):
    from torch.distributed.fsdp import fully_shard

    from unsloth_ext import nf4
    from unsloth_ext.fsdp2.processes import default_mesh
    from unsloth_ext.fsdp2.sharding import cut_4bit

    torch.manual_seed(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    packed, state = _quantised(shape, nested, device=device)
    if all_patterns:  # every 16-bit pattern (all NaNs of bfloat16 and float16 among them) and many of 32 bits
        words = torch.arange(1 << 16).to(torch.int32)
        pairs = torch.stack([words, torch.flip(words, [0])], 1).to(torch.int16).reshape(-1)
        packed = pairs.view(torch.uint8)[: packed.numel()].clone().reshape(-1, 1).to(device)
        assert packed.unique().numel() == 256 and packed.view(-1).view(torch.bfloat16).isnan().sum() > 250
    unit = _Unit(shape, packed.clone(), state).to(device)
    unit.base.support_avx512bf16_for_cpu = False
    x = torch.randn(2, shape[1], device=device)
    expected = unit(x)[0]
    cut_4bit(unit, rank, world, packed.device)
    lora = unit.lora.weight.detach().clone()
    fully_shard(unit, mesh=default_mesh(device))
    seen = []
    for _ in range(3):
        assert torch.equal(unit(x)[0], expected)
        unit.unshard()
        weight = unit.base.weight
        seen.append((weight, weight.quant_state))
        assert type(weight) is bnb.nn.Params4bit and not weight.requires_grad
        assert torch.equal(weight.data, packed) and torch.equal(unit.lora.weight, lora)
        assert torch.equal(weight.quant_state.absmax, state.absmax)
        dense = functional.dequantize_4bit(packed, state) if shape[1] % 64 == 0 else nf4.dequantize(packed, state)
        assert torch.equal(nf4.dequantize(weight, weight.quant_state), dense)
        assert torch.equal(nf4.dequantize(weight.t(), weight.quant_state), dense.t())
        matmul = bnb.matmul_4bit(x, weight.t(), quant_state=weight.quant_state)
        assert torch.equal(matmul, bnb.matmul_4bit(x, packed.t(), quant_state=state))
        unit.reshard()
        freed = weight.untyped_storage().nbytes(), weight.quant_state.absmax.untyped_storage().nbytes()
        assert freed == (0, 0) or world == 1  # one rank owns absmax whole
    assert all(w is seen[0][0] and s is seen[0][1] for w, s in seen), "a kernel's plan is keyed on them"
    return unit.base.weight.to_local().bytes_held()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_gather_gives_bitsandbytes_own_weight(ranks, world):
    for shape, nested in (((136, 370), True), ((64, 1024), False), ((7, 64), True)):
        held = ranks(world, _gather, shape=shape, nested=nested)
        groups = -(-shape[0] * shape[1] // (64 * 256))
        assert set(held) == {-(-groups // world) * (8192 + (260 if nested else 1024))}


@pytest.mark.parametrize("world", [2, 4])
def test_every_byte_pattern_survives_the_gather(ranks, world):
    ranks(world, _gather, shape=(512, 1024), nested=True, all_patterns=True)


@pytest.mark.gpu
def test_every_byte_pattern_survives_the_gather_on_cards(cuda_ranks):
    for shape, nested, patterns in (((512, 1024), True, True), ((136, 370), True, False), ((64, 1024), False, False)):
        cuda_ranks(2, _gather, shape=shape, nested=nested, all_patterns=patterns)


def _save_packed(rank, world, folder, seed):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import fully_shard

    from unsloth_ext.fsdp2 import packed_state
    from unsloth_ext.fsdp2.processes import default_mesh
    from unsloth_ext.fsdp2.sharding import cut_4bit

    shape = (136, 870)
    unit = _Unit(shape, *_quantised(shape, seed=seed))
    cut_4bit(unit, rank, world, torch.device("cpu"))
    fully_shard(unit, mesh=default_mesh("cpu"))
    state = packed_state(unit)
    assert set(state) == {"base.weight", "base.weight.absmax", "base.weight.nested_absmax"}
    if seed == 1:
        dcp.save(state, checkpoint_id=folder)
    else:
        dcp.load(state, checkpoint_id=folder)
    unit.unshard()
    return unit.base.weight.data, unit.base.weight.quant_state.absmax, unit.base.weight.quant_state.state2.absmax


def test_packed_shards_of_two_ranks_load_on_four(ranks, tmp_path):
    saved = ranks(2, _save_packed, folder=str(tmp_path), seed=1)
    loaded = ranks(4, _save_packed, folder=str(tmp_path), seed=2)
    assert not torch.equal(saved[0][0], _quantised((136, 870), seed=2)[0])
    for answer in [*saved, *loaded]:
        assert all(torch.equal(a, b) for a, b in zip(answer, saved[0], strict=True))
