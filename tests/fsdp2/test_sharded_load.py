"""Loading in slices: the same bits as on one device, no more bytes than a rank's part, clear words for broken checkpoints."""

import json
import shutil

import fsdp2_models as models
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from unsloth_ext.fsdp2.checkpoint_index import CheckpointIndex


def _identical(rank, world, folder, nested=True):
    from unsloth_ext.fsdp2 import load, shard

    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    one = models.whole(folder, nested, device=device)
    options = {} if "nf4" in folder else {"quantization_config": models.quantization(nested)}
    model = shard(load(folder, dtype=torch.float32, **options))
    for module in model.modules():
        if hasattr(module, "unshard"):
            module.unshard()
    expected = dict(one.named_parameters(remove_duplicate=False))
    found = dict(model.named_parameters(remove_duplicate=False))
    assert set(found) == set(expected)
    four_bit = 0
    for name, parameter in found.items():
        value = parameter.data
        if isinstance(value, DTensor):  # the embedding of cards that read each other's rows is never whole
            assert name.endswith("embed_tokens.weight") and device.type == "cuda", name
            value = value.full_tensor()
        assert torch.equal(value, expected[name].data), name
        if (state := getattr(expected[name], "quant_state", None)) is not None:
            other, four_bit = parameter.quant_state, four_bit + 1
            assert torch.equal(state.absmax, other.absmax) and torch.equal(state.code, other.code), name
            assert (state.shape, state.dtype, state.blocksize) == (other.shape, other.dtype, other.blocksize)
            if nested:
                assert state.offset.item() == other.offset.item(), name
                assert torch.equal(state.state2.absmax, other.state2.absmax)
                assert torch.equal(state.state2.code, other.state2.code)
    for name, buffer in one.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name
    assert model.is_loaded_in_4bit and model.config.quantization_config.load_in_4bit
    return four_bit


@pytest.mark.parametrize("kind, world", [("nf4", 2), ("nf4", 3), ("flat-nf4", 4), ("16bit", 2), ("16bit", 4)])
def test_every_bit_is_that_of_one_device(ranks, checkpoints, kind, world):
    answers = ranks(world, _identical, folder=str(checkpoints[kind]), nested=kind != "flat-nf4")
    assert answers == [21] * world


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nf4", "16bit"])
def test_every_bit_is_that_of_one_card(cuda_ranks, checkpoints, kind):
    assert cuda_ranks(2, _identical, folder=str(checkpoints[kind])) == [21, 21]


def test_without_double_quantisation_and_tied(ranks, checkpoints):
    assert ranks(3, _identical, folder=str(checkpoints["tied-16bit"]), nested=False) == [21] * 3


class _Live(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes that were alive in storages that operations made. The mapped files are the page cache's, not ours."""

    def __init__(self):
        super().__init__()
        self.known, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        from torch.multiprocessing.reductions import StorageWeakRef
        from torch.utils._pytree import tree_leaves

        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves(args) if type(t) is torch.Tensor}
        for tensor in tree_leaves(out):
            if (
                type(tensor) is torch.Tensor
                and tensor.device.type == "cpu"
                and tensor.untyped_storage()._cdata not in given
            ):
                storage = tensor.untyped_storage()
                self.known[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.known = {at: pair for at, pair in self.known.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.known.values()))
        return out


def _load_peak(rank, world, folder):
    from unsloth_ext.fsdp2 import bytes_held, load, shard
    from unsloth_ext.fsdp2.nf4_parameter import NF4Shard

    with _Live() as live:
        model = load(
            folder, dtype=torch.bfloat16, quantization_config=None if "nf4" in folder else models.quantization()
        )
    held = bytes_held(model)
    largest = max(
        p.bytes_held() if isinstance(p, NF4Shard) else p.rows.nbytes for p in model.parameters() if p.ndim > 1
    )
    shard(model)
    after = bytes_held(model)
    return sum(held.values()), live.peak, largest, held, after


@pytest.mark.parametrize("kind", ["nf4", "16bit"])
def test_a_rank_holds_its_part_and_a_part_of_one_weight(ranks, tmp_path, kind):
    from transformers import LlamaForCausalLM

    torch.manual_seed(2)
    model = LlamaForCausalLM(models.config(hidden_size=512, intermediate_size=1536, head_dim=128, vocab_size=4000))
    model = model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "16bit")
    if kind == "nf4":
        models.whole(tmp_path / "16bit", dtype=torch.bfloat16).save_pretrained(tmp_path / "nf4")
    linear = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    dense = sum(p.nbytes for n, p in model.named_parameters() if "proj" not in n)
    whole = linear // 2 + linear // 64 + linear // 64 // 256 * 4 + dense
    for held, peak, largest, parts, after in ranks(4, _load_peak, folder=str(tmp_path / kind)):
        assert held <= whole / 4 * 1.01 + 8192, (held, whole)
        assert parts["quant_state"] <= (linear / 64 + linear / 64 / 64) / 4 * 1.01 + 128
        # Beside its part of the model a rank has at most its part of one weight in the making.
        assert peak <= held + largest, (peak, held, largest)
        assert after["packed"] == parts["packed"] and after["quant_state"] == parts["quant_state"]


def test_only_slices_are_read(checkpoints, monkeypatch):
    """Of a large tensor the index reads the rows asked for: no whole-tensor call happens on packed bytes or embeddings."""
    index = CheckpointIndex(checkpoints["nf4"])
    name = "model.layers.1.mlp.up_proj.weight"
    assert index.shape(name) == (136 * 370 // 2, 1) and index.dtype(name) == torch.uint8
    whole = {k: v for f in checkpoints["nf4"].glob("*.safetensors") for k, v in load_file(f).items()}
    assert torch.equal(index.rows(name, 100, 164), whole[name][100:164])
    assert index.rows(name, 5, 5).shape == (0, 1)


def _fails(rank, world, folder, bad_rank=None, **options):
    from unsloth_ext.errors import UnslothExtError
    from unsloth_ext.fsdp2 import load

    try:
        load(
            folder if bad_rank in (None, rank) else options.pop("good"),
            **{k: v for k, v in options.items() if k != "good"},
        )
    except UnslothExtError as error:
        return str(error)
    return "loaded"


def _edit(folder, change):
    """Rewrite every safetensors file through change(tensors)."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})


def _broken(kind, folder):
    name = "model.layers.1.mlp.up_proj.weight"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = index["weight_map"][name]
    if kind == "missing file":
        (folder / file).unlink()
        return [file, "is missing"]
    if kind == "truncated file":
        (folder / file).write_bytes((folder / file).read_bytes()[:-1000])
        return [file, "truncated"]
    if kind == "missing tensor":
        _edit(folder, lambda t: t.pop(name, None))
        return [file, name, "has no tensor"]
    if kind == "missing absmax":
        _edit(folder, lambda t: t.pop(f"{name}.absmax", None))
        del index["weight_map"][f"{name}.absmax"]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return [f"{name}.absmax", "missing", file]
    if kind == "wrong dtype":
        key = f"{name}.absmax"
        _edit(folder, lambda t: t.update({key: t[key].float()}) if key in t else None)
        return [key, "torch.uint8", "torch.float32"]
    if kind == "short bytes":
        _edit(folder, lambda t: t.update({name: t[name][:-3]}) if name in t else None)
        return [name, file, "packed bytes"]
    if kind == "mixed":
        parts = [key for key in index["weight_map"] if key.startswith(name + ".")]

        def change(tensors):
            for key in parts:
                tensors.pop(key, None)
            if name in tensors:
                tensors[name] = torch.zeros(370, 136, dtype=torch.bfloat16)

        _edit(folder, change)
        for key in parts:
            del index["weight_map"][key]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return [name, file, "mixed quantisation", "llm_int8_skip_modules"]
    if kind == "int8":
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= {"load_in_4bit": False, "load_in_8bit": True, "_load_in_4bit": False}
        (folder / "config.json").write_text(json.dumps(config))
        return ["8-bit", "only bitsandbytes NF4"]
    if kind == "no safetensors":
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"")
        return ["neither model.safetensors", "pytorch_model.bin"]
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    ["missing file", "truncated file", "missing tensor", "missing absmax", "wrong dtype", "short bytes", "mixed", "int8",
     "no safetensors"],
)  # fmt: skip
def test_a_broken_checkpoint_is_named_on_every_rank(ranks, checkpoints, tmp_path, kind):
    folder = tmp_path / "broken-nf4"
    shutil.copytree(checkpoints["nf4"], folder)
    words = _broken(kind, folder)
    for message in ranks(2, _fails, folder=str(folder)):
        assert all(word in message for word in words), message


def test_one_rank_that_fails_is_named_on_all(ranks, checkpoints, tmp_path):
    messages = ranks(3, _fails, folder=str(tmp_path), good=str(checkpoints["nf4"]), bad_rank=1)
    assert all("1 of 3 ranks" in m and "rank 1:" in m for m in messages), messages


def _not_yet(rank, world, folder):
    from bitsandbytes.nn import Linear4bit

    from unsloth_ext.fsdp2 import load

    model = load(folder, dtype=torch.float32)
    errors = []
    for use in (lambda: model(input_ids=torch.zeros(1, 3, dtype=torch.long)),):
        try:
            use()
        except NotImplementedError as error:
            errors.append(str(error))
    wrapped = models.with_lora(model, modules_to_save=["lm_head"])
    layer = wrapped.get_base_model().model.layers[0].mlp.gate_proj
    assert isinstance(layer.base_layer, Linear4bit) and layer.lora_A["default"].weight.shape == (6, 136)
    assert layer.lora_B["default"].weight.shape == (370, 6) and layer.lora_A["default"].weight.device.type == "cpu"
    trainable, total = wrapped.get_nb_trainable_parameters()
    return errors, trainable, total


def test_peft_wraps_what_was_loaded_and_a_forward_too_soon_says_so(ranks, checkpoints):
    for errors, trainable, total in ranks(2, _not_yet, folder=str(checkpoints["nf4"])):
        assert len(errors) == 1 and "shard(model)" in errors[0]
        lora = 3 * 6 * ((136 + 136) * 2 + (136 + 68) * 2 + (136 + 370) * 3)
        assert trainable == lora + 211 * 136 and total > trainable


def _read_error(rank, world, folder):
    """Every file is there and whole, and one rank's card, or disk, fails at the last tensor."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from unsloth_ext.errors import UnslothExtError
    from unsloth_ext.fsdp2 import load

    class Broken(LlamaRMSNorm):
        def __setattr__(self, name, value):
            raise OSError("input/output error")

    class Model:
        def from_config(self, config, **options):
            model = LlamaForCausalLM._from_config(config, **options)
            if rank == 1:
                model.model.norm.__class__ = Broken
            return model

    try:
        load(folder, model_class=Model(), dtype=torch.float32)
    except UnslothExtError as error:
        return str(error)


def test_a_rank_that_cannot_read_its_part_is_named_on_all(ranks, checkpoints):
    for said in ranks(2, _read_error, folder=str(checkpoints["nf4"]), timeout=120):
        assert "failed on 1 of 2 ranks; rank 1: input/output error" in said


def _half_downloaded(rank, world, folders):
    import contextlib
    import io

    import fsdp2_trainers as scripts
    from transformers import AutoModelForCausalLM

    with scripts.torchrun(rank, world), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            model = AutoModelForCausalLM.from_pretrained(folders[rank], dtype=torch.float32)
            return type(model.model.layers[0].self_attn.q_proj.weight).__name__, said.getvalue()
        except OSError as error:
            return "OSError", str(error)


def test_a_rank_without_the_files_is_waited_for_by_none(ranks, checkpoints, tmp_path):
    (empty := tmp_path / "empty").mkdir()
    shutil.copy(checkpoints["nf4"] / "config.json", empty)
    folders = [str(checkpoints["nf4"]), str(empty)]
    (kind, said), (its_kind, its_own) = ranks(2, _half_downloaded, folders=folders, timeout=120)
    assert kind == "Params4bit" and "loaded whole on every rank" in said and "on rank 1 it has no safetensors" in said
    assert its_kind == "OSError" and "model.safetensors" in its_own  # transformers' own words


def _one_row(rank, world, folder):
    from unsloth_ext.fsdp2 import gathered, load, shard

    model = load(folder, dtype=torch.float32)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[3] = 0
        weight[-2].copy_(torch.arange(weight.shape[1]))
    with pytest.raises(NotImplementedError, match="before using the model"):
        weight[3] + 1
    shard(model)
    with gathered(model.get_input_embeddings()):
        return model.get_input_embeddings().weight.detach().clone()


def test_a_row_of_the_embedding_can_be_set_before_sharding(ranks, checkpoints):
    expected = models.whole(checkpoints["nf4"]).get_input_embeddings().weight.detach().clone()
    expected[3] = 0
    expected[-2] = torch.arange(expected.shape[1])
    for found in ranks(2, _one_row, folder=str(checkpoints["nf4"])):
        assert torch.equal(found, expected)


def _addresses(rank, world, folders):
    from unsloth_ext.fsdp2 import load

    found = []
    for folder in folders:
        model = load(
            folder, dtype=torch.float32, quantization_config=None if "nf4" in folder else models.quantization()
        )
        ends = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        found.append([end.data_ptr() for end in ends] + [end.detach().data_ptr() for end in ends])
    return found


def test_weights_in_parts_have_addresses_that_tell_tied_from_untied(ranks, checkpoints):
    """Unsloth ties an embedding and a head of one address: test_unsloth_parts.py runs that."""
    folders = [str(checkpoints[kind]) for kind in ("nf4", "tied-16bit")]
    for untied, tied in ranks(2, _addresses, folders=folders):
        assert untied[0] != untied[1] and untied[:2] == untied[2:]
        assert tied[0] == tied[1] and tied[:2] == tied[2:]
