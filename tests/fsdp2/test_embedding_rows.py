"""An embedding whose rows are read where they lie: every bit, for every model that has it, and FSDP2's own where it cannot be."""

import copy
import gc
import pickle
import random
import re
import weakref
from importlib.util import find_spec

import fsdp2_models as models
import pytest
import torch
import torch.distributed as dist
from test_save_resume import HALF, _run

SIZES = [(5, 24), (211, 136), (1, 8), (1000, 33), (24, 16)]  # on 4 ranks 5 rows are 2, 2, 1 and none


def _equal(one, other):
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


def _connected(whole, mesh, sharded, dtype=None):
    """An embedding of this weight that is read by rows; sharded: as `load` brings it."""
    from unsloth_ext.fsdp2.embedding_rows import EmbeddingRows, can_be_read_by_rows
    from unsloth_ext.fsdp2.peer_gather import connect
    from unsloth_ext.fsdp2.processes import device_of, position
    from unsloth_ext.fsdp2.row_shard import RowShard, rows_of

    rank, world = position(mesh)
    embedding = torch.nn.Embedding(*whole.shape, padding_idx=0, _weight=whole.clone()).requires_grad_(False)
    if sharded:
        start, stop = rows_of(rank, world, len(whole))
        embedding.weight = torch.nn.Parameter(RowShard(whole[start:stop], whole.shape, rank, world), False)
    assert can_be_read_by_rows(embedding)
    rows = EmbeddingRows(embedding, mesh, rank, world, device_of(mesh), dtype)
    assert connect([], mesh, others=[rows]) is None
    return embedding


def _lookups(rank, world, shape, seed, device="cpu"):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    from unsloth_ext.fsdp2 import gathered
    from unsloth_ext.fsdp2.row_shard import rows_of

    mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    random = torch.Generator().manual_seed(seed)
    for number, (count, width) in enumerate(SIZES):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[number % 3]
        whole = torch.randn(count, width, generator=random).to(dtype)
        embedding = _connected(whole.to(device) if number % 2 else whole, mesh, sharded=bool(number % 2))
        whole = whole.to(device)
        for size, kind in (
            ((64,), torch.int64),
            ((3, 17), torch.int32),
            ((0,), torch.int64),
            ((2, 0), torch.int32),
            ((), torch.int64),
        ):
            ids = torch.randint(0, count, size, generator=random).to(device, kind)
            ids = ids.t() if len(size) == 2 else ids
            assert _equal(embedding(ids), torch.nn.functional.embedding(ids, whole))
        odd = torch.tensor([0, -1, count, count - 1, 1 << 40, -(1 << 40)], device=device)
        found = embedding(odd)
        assert _equal(found[[0, 3]], whole[[0, count - 1]]) and found[[1, 2, 4, 5]].isnan().all()
        with pytest.raises(RuntimeError, match="int64 or int32, got torch.float32"):
            embedding(torch.zeros(2, device=device))

        own = embedding.weight
        start, stop = rows_of(mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1), count)
        assert isinstance(own, DTensor) and own.shape == whole.shape and not own.requires_grad
        assert own.placements == (*[Replicate()] * (len(shape) - 1), Shard(0)) and own.device_mesh == mesh
        assert _equal(own.to_local(), whole[start:stop]) and _equal(own.full_tensor(), whole)
        with gathered(embedding), gathered(embedding):
            assert _equal(embedding.weight.data, whole) and type(embedding.weight) is torch.nn.Parameter
        assert embedding.weight is own
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied or pickled"):
                copied(embedding)

        # Its memory is what the others read: what a checkpoint is loaded into.
        dist.barrier()
        own.to_local().mul_(2)
        if device == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        ids = torch.arange(count, device=device)
        assert _equal(embedding(ids), whole * 2)
        dist.barrier()
        gone = weakref.ref(embedding._unsloth_ext_rows)
        del embedding, own
        assert gone() is None  # at once, not when garbage is collected next
    return True


@pytest.mark.parametrize("shape", [(2,), (4,), (2, 2), pytest.param((3,), marks=pytest.mark.extended)])
def test_rows_are_those_of_the_whole_weight(ranks, shape):
    world = shape[0] if len(shape) == 1 else 4
    assert all(ranks(world, _lookups, shape=shape, seed=random.randrange(1 << 30)))


@pytest.mark.gpu
def test_rows_between_cards(cuda_ranks):
    assert all(cuda_ranks(2, _lookups, shape=(2,), seed=random.randrange(1 << 30), device="cuda"))


def _is_read_by_rows(model):
    from torch.distributed.fsdp import FSDPModule

    embedding = model.get_input_embeddings()
    assert hasattr(embedding, "_unsloth_ext_rows") != isinstance(embedding, FSDPModule)
    return hasattr(embedding, "_unsloth_ext_rows")


def _step(model, batch):
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    found = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return loss.item(), found


def _models(rank, world, folder, gather, precision, checkpointing):
    """What a model computes in all the ways in which its embedding is used."""
    from unsloth_ext.fsdp2 import accumulate, bytes_held, gathered, load, shard
    from unsloth_ext.fsdp2.generation import all_gathered, serve_generation

    batch, found = models.batches(2, 2)[rank % 2], {}
    model = load(folder, dtype=torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
    model = shard(models.with_lora(model), gather=gather, mixed_precision=precision)
    embedding, seen = model.get_input_embeddings(), []
    found["bytes"] = bytes_held(model)
    found["step"] = _step(model, batch)
    embedding.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    found["second step"] = _step(model, batch.flip(1).to(torch.int32).long())
    assert seen == [checkpointing]
    accumulate(model, last=False)
    model(input_ids=batch, labels=batch).loss.backward()
    accumulate(model, last=True)
    found["accumulated"] = _step(model, batch)
    with torch.no_grad():
        hidden = model.get_base_model().model(input_ids=batch).last_hidden_state
        found["decoder"] = hidden.clone()
        found["alone"] = embedding(batch).clone()
        found["given"] = model(inputs_embeds=embedding(batch).clone(), labels=batch).loss
        with gathered(embedding):
            found["weight"] = embedding.weight.data.clone()
            found["within"] = embedding(batch).clone()
        assert found["alone"].dtype == found["weight"].dtype == (precision or torch.float32)
    model.eval()
    serve_generation(model)
    with torch.inference_mode():
        found["tokens"] = model.generate(input_ids=batch[:, :4], max_new_tokens=3, do_sample=False)
        with all_gathered(model):
            found["all gathered"] = model(input_ids=batch).logits.clone()
    state = {name: (type(t), tuple(t.shape)) for name, t in model.state_dict().items()}
    by_rows = _is_read_by_rows(model)
    gone = weakref.ref(embedding._unsloth_ext_rows) if by_rows else None
    del model, embedding, hidden
    gc.collect()
    assert gone is None or gone() is None
    return by_rows, found, state


@pytest.mark.parametrize(
    ("precision", "checkpointing"),
    [(None, False), (torch.bfloat16, True)],
)
def test_a_model_is_that_of_the_collective(ranks, checkpoints, precision, checkpointing):
    given = dict(folder=str(checkpoints["nf4"]), precision=precision, checkpointing=checkpointing)
    collective, copies = (ranks(2, _models, gather=gather, **given) for gather in ("collective", "copies"))
    for (by_units, expected, names), (by_rows, found, same) in zip(collective, copies, strict=True):
        assert by_rows and not by_units and names == same
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        for name in ("alone", "weight", "within"):
            assert torch.equal(found[name], expected[name]), name


class _Scaled(torch.nn.Embedding):
    """As Gemma's."""

    def forward(self, ids):
        return super().forward(ids) * 2.0


def _changed(model, what):
    embedding, lora = model.get_input_embeddings(), {}
    if what == "trained, with LoRA on the layers":
        lora = dict(modules_to_save=["embed_tokens"])
    elif what == "max_norm":
        embedding.max_norm = 0.1
    elif what == "scaled":
        scaled = _Scaled(*embedding.weight.shape, _weight=torch.zeros(embedding.weight.shape, device="meta"))
        scaled.weight = embedding.weight
        model.set_input_embeddings(scaled)
    elif what == "wrapped":
        original = embedding.forward
        embedding.forward = lambda ids: original(ids) * 3.0
    elif what == "adapted":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(5)
        targets = [*models.TARGETS, "embed_tokens"]
        settings = LoraConfig(r=6, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(model, settings).train()
    model = models.with_lora(model, **lora)
    if what == "trained":
        model.get_input_embeddings().weight.requires_grad_(True)
    return model


UNITS = [
    "trained",
    "trained, with LoRA on the layers",
    "adapted",
    "max_norm",
    "scaled",
    "wrapped",
    "tied",
    "output dtype",
]


def _units(rank, world, folders):
    """Losses of one process and of the sharded model, and whether its embedding stayed with FSDP2, by what is odd about it."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from unsloth_ext.fsdp2 import shard

    batch, found = models.batches(1, 2)[0], {}
    for what in UNITS:
        folder = folders["tied-16bit" if what == "tied" else "nf4"]
        with torch.no_grad():
            expected = _changed(models.whole(folder), what)(input_ids=batch, labels=batch).loss.item()
        options = (
            dict(mixed_precision=MixedPrecisionPolicy(output_dtype=torch.float32)) if what == "output dtype" else {}
        )
        model = shard(_changed(models.whole(folder), what), gather="copies", **options)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        trained = [n for n, p in model.named_parameters() if "embed_tokens" in n and p.requires_grad]
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        found[what] = (
            expected,
            loss.item(),
            bool(trained),
            any(hasattr(m, "_unsloth_ext_rows") for m in model.modules()),
        )
    return found


def test_other_embeddings_stay_with_fsdp2(ranks, checkpoints):
    folders = {name: str(checkpoints[name]) for name in ("nf4", "tied-16bit")}
    for answer in ranks(2, _units, folders=folders):
        losses = set()
        for what, (expected, loss, trained, by_rows) in answer.items():
            assert abs(loss - expected) < 1e-5 and not by_rows, what
            assert trained == (what.startswith("trained") or what == "adapted"), what
            losses.add(round(loss, 6))
        assert len(losses) >= 5  # what is odd about it has been computed with


def _hindered(rank, world, folder):
    from unsloth_ext.errors import UsageError
    from unsloth_ext.fsdp2 import gathered, load, shard
    from unsloth_ext.fsdp2.embedding_rows import EmbeddingRows
    from unsloth_ext.fsdp2.peer_memory import HostMemory

    batch, found = models.batches(1, 2)[0], []
    for owner, name in ((EmbeddingRows, "move_in"), (HostMemory, "open")):
        original, said = getattr(owner, name), None
        model = models.with_lora(load(folder, dtype=torch.float32))
        if rank == 1:
            setattr(owner, name, lambda *_: (_ for _ in ()).throw(RuntimeError("no room")))
        try:
            shard(model, gather="copies")
        except UsageError as error:
            said = str(error)
        finally:
            setattr(owner, name, original)
        embedding = model.get_input_embeddings()
        with gathered(embedding):
            weight = embedding.weight.data.clone()
        found.append((said, _is_read_by_rows(model), weight, _step(model, batch)[0]))
    return found


def test_where_copies_are_impossible_it_is_a_unit(ranks, checkpoints):
    one = models.with_lora(models.whole(checkpoints["nf4"]))
    batch = models.batches(1, 2)[0]
    expected = one(input_ids=batch, labels=batch).loss.item()
    for answer in ranks(2, _hindered, folder=str(checkpoints["nf4"])):
        for said, by_rows, weight, loss in answer:
            assert "no room" in said and not by_rows and abs(loss - expected) < 1e-5
            assert torch.equal(weight, one.get_input_embeddings().weight)


def _saved(rank, world, folder, root):
    """Saved by copies and by the collective; and loaded into rows that have been overwritten."""
    from unsloth_ext.fsdp2 import load, load_checkpoint, save_adapter, save_checkpoint, save_full, save_merged, shard

    ids = torch.arange(211)
    for gather in ("collective", "copies"):
        model = shard(
            models.with_lora(load(folder, dtype=torch.float32)), gather=gather, mixed_precision=torch.bfloat16
        )
        for job in (save_merged, save_full, save_adapter):
            job(model, f"{root}/{gather}/{job.__name__}")
        save_checkpoint(f"{root}/{gather}/checkpoint-1", model, base=True)
    embedding, (other,) = model.get_input_embeddings(), {"collective", "copies"} - {gather}
    assert _is_read_by_rows(model)
    expected = embedding(ids)
    for written in (gather, other):
        dist.barrier()
        embedding.weight.to_local().zero_()
        dist.barrier()
        assert not embedding(ids).any()
        load_checkpoint(f"{root}/{written}/checkpoint-1", model)
        assert torch.equal(embedding(ids), expected) and expected.any()
    return True


def test_what_is_saved_is_the_same_and_goes_back(ranks, checkpoints, tmp_path):
    assert all(ranks(2, _saved, folder=str(checkpoints["nf4"]), root=str(tmp_path)))
    files = [f for f in (tmp_path / "collective").rglob("*.safetensors") if "checkpoint" not in str(f)]
    assert len(files) >= 3
    for file in files:
        same = tmp_path / "copies" / file.relative_to(tmp_path / "collective")
        assert same.read_bytes() == file.read_bytes(), file


def test_a_run_goes_on_bit_for_bit(ranks, checkpoints, tmp_path):
    given = dict(folder=str(checkpoints["nf4"]), data=random.randrange(1 << 30), root=str(tmp_path))
    given |= dict(sharding=dict(gather="copies"))
    first = ranks(2, _run, save=True, base=True, **given)
    again = ranks(2, _run, resume=True, seed=77, **given)
    for one, other in zip(first, again, strict=True):
        assert one[0][HALF:] == other[0]


INTERPRETED = """
import torch
from unsloth_ext.fsdp2.embedding_kernel import read_rows
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for count, width, ranks in ((7, 96, 3), (5, 1000, 4), (12, 4096 + 8, 2), (1, 1, 2)):
        whole, each = torch.randn(count, width).to(dtype), -(-count // ranks)
        parts = [whole[r * each : (r + 1) * each].clone() for r in range(ranks)]
        table = torch.tensor([part.data_ptr() for part in parts])
        for kind in (torch.int64, torch.int32):
            ids = torch.randint(0, count, (3, 2)).to(kind).t()
            ids[0, 0], ids[1, 2] = -1, count
            out = torch.full((*ids.shape, width), 7.0, dtype=dtype)
            read_rows(ids, table, out, each, count)
            known = (ids >= 0) & (ids < count)
            assert torch.equal(out[known], whole[ids[known]]) and out[~known].isnan().all(), (dtype, count, width)
        read_rows(ids[:0], table, out[:0], each, count)
print("same")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_kernel_interpreted(python):
    assert "same" in python(INTERPRETED, TRITON_INTERPRET="1", OMP_NUM_THREADS="1").stdout


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(("dtype", "loads"), [("bf16", 1), ("fp32", 2)])
def test_kernel_compiles_for_hopper(dtype, loads):
    """To loads of 16 bytes: each of them goes through the link between the cards."""
    import triton
    from triton.backends.compiler import GPUTarget

    from unsloth_ext.fsdp2.embedding_kernel import _BLOCK, _read_rows

    signature = dict(ids="*i64", table="*i64", out=f"*{dtype}", each="i32", count="i32", width="i32", BLOCK="constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 5)}
    source = triton.compiler.ASTSource(_read_rows, signature, {"BLOCK": _BLOCK}, aligned)
    assembly = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    for access in ("ld", "st"):
        assert len(re.findall(rf"{access}\.global\S*\.v4", assembly)) == loads, assembly


def _read(parts, ids, each, count):
    from unsloth_ext.fsdp2.embedding_kernel import read_rows

    table = torch.tensor([part.data_ptr() for part in parts], device="cuda")
    out = torch.empty(*ids.shape, parts[0].shape[1], dtype=parts[0].dtype, device="cuda")
    read_rows(ids, table, out, each, count)
    return out


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("count", "width", "ranks", "dtype"),
    [
        (128256, 4096, 3, torch.bfloat16),
        (5, 1000, 4, torch.float16),
        (211, 4104, 2, torch.float32),
        (97, 33, 8, torch.float32),
    ],
)
def test_kernel_on_a_card(count, width, ranks, dtype):
    whole, each = torch.randn(count, width, dtype=dtype, device="cuda"), -(-count // ranks)
    parts = [whole[r * each : (r + 1) * each].clone() for r in range(ranks)]
    parts = [part if len(part) else torch.empty(1, width, dtype=dtype, device="cuda") for part in parts]
    for kind in (torch.int64, torch.int32):
        ids = torch.randint(0, count, (4, 2048), device="cuda").to(kind)
        ids[0, 0], ids[1, 2] = count, -1
        known = (ids >= 0) & (ids < count)
        out = _read(parts, ids, each, count)
        assert torch.equal(out[known], torch.nn.functional.embedding(ids[known], whole)) and out[~known].isnan().all()


@pytest.mark.gpu
def test_kernel_beyond_32_bit_offsets():
    each, width = (1 << 31) // 4096 + 1000, 4096  # elements of a rank's part; and of the output
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of the card's memory")
    part = torch.empty(each, width, dtype=torch.bfloat16, device="cuda")
    part.view(torch.int16).random_(-30000, 30000)
    small = torch.randn(16, width, device="cuda").to(torch.bfloat16)
    ids = torch.arange(each + 16, device="cuda").flip(0)
    out = _read([part, small], ids, each, each + 16).view(torch.int16)
    assert torch.equal(out[:16].flip(0), small.view(torch.int16))
    for at in (0, 1000, each - 2000, each - 1000):
        there = part.view(torch.int16)[at : at + 1000]
        assert torch.equal(out[each + 16 - at - 1000 : each + 16 - at].flip(0), there), at
