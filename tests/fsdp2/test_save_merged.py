"""A merged model is what PEFT merges from the dequantised one in float32, bit for bit; a 4-bit one is what one device writes."""

import copy
import json
import random

import fsdp2_models as models
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_save_adapter import _filled

from unsloth_ext.errors import Refused, UnslothExtError

EMBEDDINGS = [*models.TARGETS, "embed_tokens", "lm_head"]
KINDS = {
    "plain": ("nf4", {}, 2),
    "rank-stabilised, head trained": ("nf4", dict(modules_to_save=["lm_head"], use_rslora=True), 4),
    "DoRA": ("nf4", dict(use_dora=True), 2),
    "tied": ("tied-16bit", {}, 2),
    "tied, head trained": ("tied-16bit", dict(modules_to_save=["lm_head"]), 2),
    "flat, embedding adapted": ("flat-nf4", dict(extra=["embed_tokens", "lm_head"]), 1),
}


def _model(folder, lora, seed, whole=None):
    from peft import LoraConfig, get_peft_model

    lora = dict(lora)
    targets = [*models.TARGETS, *lora.pop("extra", ())]
    settings = LoraConfig(r=6, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM", **lora)
    return _filled(get_peft_model(models.whole(folder) if whole is None else whole, settings), seed)


def _dequantised(folder, device="cpu"):
    """The model in float32 with plain linear layers."""
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM

    four_bit = models.whole(folder, device=device)
    config = copy.deepcopy(four_bit.config)
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in four_bit.named_parameters():
            state = getattr(parameter, "quant_state", None)
            weights[name].copy_(parameter if state is None else dequantize_4bit(parameter.data, state))
    return plain


def _merged(rank, world, folder, lora, seed, out, alone=False):
    from unsloth_ext.fsdp2 import save_merged, shard

    model = _model(folder, lora, seed)
    if not alone:
        shard(model, mixed_precision=torch.bfloat16)  # what is gathered for a forward is rounded; what is saved is not
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    save_merged(model, out, torch.bfloat16, max_shard_size="60KB")
    for name, parameter in model.named_parameters():
        if name in before:
            local, old = (t.to_local() if hasattr(t, "to_local") else t for t in (parameter, before[name]))
            assert torch.equal(local, old), name


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_peft_merges_from_the_dequantised_model(ranks, checkpoints, tmp_path, kind):
    from transformers import AutoModelForCausalLM

    name, lora, world = KINDS[kind]
    folder, seed = str(checkpoints[name]), random.randrange(1 << 30)
    given = dict(folder=folder, lora=lora, seed=seed, out=str(tmp_path / "merged"))
    _merged(0, 1, alone=True, **given) if world == 1 else ranks(world, _merged, **given)
    reference = _model(folder, lora, seed, _dequantised(folder)).merge_and_unload().to(torch.bfloat16)
    expected = reference.state_dict()
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    found = {}
    for file in sorted(set(index["weight_map"].values())):
        tensors = load_file(tmp_path / "merged" / file)
        size = sum(t.nbytes for t in tensors.values())
        assert size <= 60_000 or len(tensors) == 1
        assert all(index["weight_map"][name] == file for name in tensors)
        found |= tensors
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    trained_head = "modules_to_save" in lora or "extra" in lora
    if "tied" in name and not trained_head:
        expected.pop("lm_head.weight")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == torch.bfloat16 and torch.equal(found[key], tensor), key
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] == ("tied" in name and not trained_head)
    assert config["architectures"] == ["LlamaForCausalLM"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).eval()
    state = loaded.state_dict()
    for key, tensor in reference.state_dict().items():
        assert torch.equal(state[key], tensor), key
    assert torch.isfinite(loaded(input_ids=models.batches(1, 2)[0]).logits).all()


def _on_cards(rank, world, folder, seed, out):
    """Merged on two cards and by PEFT on one of them."""
    from unsloth_ext.fsdp2 import save_merged, shard

    device = torch.device("cuda", rank)
    model = _model(folder, {}, seed, models.whole(folder, device=device))
    plain = _dequantised(folder, device)
    reference = _model(folder, {}, seed, plain).merge_and_unload().to(torch.bfloat16).state_dict()
    save_merged(shard(model, mixed_precision=torch.bfloat16), f"{out}/False", max_shard_size="60KB")
    model = _model(folder, {}, seed, models.whole(folder, device=device))
    save_merged(shard(model, cpu_offload=True), f"{out}/True", max_shard_size="60KB")
    return {name: tensor.cpu() for name, tensor in reference.items()}


@pytest.mark.gpu
def test_two_cards_merge_what_peft_merges_on_one(cuda_ranks, checkpoints, tmp_path):
    seed = random.randrange(1 << 30)
    expected = cuda_ranks(2, _on_cards, folder=str(checkpoints["nf4"]), seed=seed, out=str(tmp_path))[0]
    for offload in (False, True):
        files = (tmp_path / str(offload)).glob("*.safetensors")
        found = {k: t for file in files for k, t in load_file(file).items()}
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


def _four_bit(rank, world, folder, out):
    from unsloth_ext.fsdp2 import load, save_full, shard

    quantised = None if "nf4" in folder else models.quantization()
    model = shard(models.with_lora(load(folder, dtype=torch.float32, quantization_config=quantised)))
    save_full(model, out, max_shard_size="200KB")


@pytest.mark.parametrize("kind, world", [("16bit", 2), ("flat-nf4", 3), ("nf4", 1)])
def test_a_4bit_model_is_what_one_device_writes(ranks, checkpoints, tmp_path, kind, world):
    from unsloth_ext.fsdp2 import save_full

    out, folder = tmp_path / "out", checkpoints[kind]
    if world == 1:
        save_full(models.with_lora(models.whole(folder)), out, max_shard_size="200KB")
    else:
        ranks(world, _four_bit, folder=str(folder), out=str(out))
    theirs = checkpoints["nf4" if kind == "16bit" else kind]
    expected, found = ({k: t for f in p.glob("*.safetensors") for k, t in load_file(f).items()} for p in (theirs, out))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if "quant_state.bitsandbytes" in name:  # text, whose order does not matter
            assert json.loads(bytes(tensor)) == json.loads(bytes(found[name])), name
        else:
            assert tensor.dtype == found[name].dtype and torch.equal(tensor, found[name]), name
    for file in out.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    batch, (one, again) = models.batches(1, 2)[0], (_read(p) for p in (theirs, out))
    assert torch.equal(one(input_ids=batch).logits, again(input_ids=batch).logits)


def _read(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": "cpu"}).eval()


def test_what_cannot_be_merged_is_refused_by_name(checkpoints, tmp_path):
    from peft import IA3Config, get_peft_model

    from unsloth_ext.fsdp2 import save_full, save_merged

    folder, out = checkpoints["nf4"], tmp_path / "out"
    merged = models.with_lora(models.whole(folder))
    merged.merge_adapter()
    other = get_peft_model(
        models.whole(folder), IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    tokens = models.with_lora(models.whole(folder), trainable_token_indices=[1, 2])
    broken = models.with_lora(models.whole(folder))
    with torch.no_grad():
        broken.get_base_model().model.layers[1].mlp.up_proj.lora_A.default.weight[2, 3] = 1e30
    cases = [
        (merged, {}, "q_proj has its adapter merged already"),
        (other, {}, "IA3; only LoRA"),
        (tokens, {}, "embed_tokens.* TrainableTokens"),
        (
            broken,
            dict(dtype=torch.float16),
            "layers.1.mlp.up_proj.weight has values that are not finite in torch.float16",
        ),
        (
            broken,
            dict(dtype=torch.int8),
            "dtype must be torch.bfloat16, torch.float16 or torch.float32, got torch.int8",
        ),
        (broken, dict(max_shard_size="many"), "max_shard_size must be a positive .* got 'many'"),
        (broken, dict(max_shard_size=0), "max_shard_size .* got 0"),
    ]
    for model, options, says in cases:
        with pytest.raises(UnslothExtError, match=says):
            save_merged(model, out, **options)
        assert not list(tmp_path.iterdir())
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"")
    with pytest.raises(Refused, match="holds weights already"):
        save_merged(broken, out)
    with pytest.raises(Refused, match="no 4-bit weight"):
        save_full(torch.nn.Linear(2, 2), tmp_path / "other")


def _peak(rank, world, folder, out):
    from test_sharded_load import _Live

    from unsloth_ext.fsdp2 import load, save_adapter, save_full, save_merged, shard

    model = shard(models.with_lora(load(folder, dtype=torch.bfloat16)))
    peaks = {}
    for job in (save_adapter, save_full, save_merged):
        with _Live() as live:
            job(model, f"{out}/{job.__name__}")
        peaks[job.__name__] = live.peak
    return peaks


def test_one_weight_at_a_time(ranks, tmp_path):
    from transformers import LlamaForCausalLM

    config = models.config(hidden_size=256, intermediate_size=1024, head_dim=64, vocab_size=1000, num_hidden_layers=6)
    torch.manual_seed(2)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "16bit")
    models.whole(tmp_path / "16bit", dtype=torch.bfloat16).save_pretrained(tmp_path / "nf4")
    largest, total = max(p.numel() for p in model.parameters()), sum(p.numel() for p in model.parameters())
    for peaks in ranks(2, _peak, folder=str(tmp_path / "nf4"), out=str(tmp_path)):
        # In the making: packed bytes, 16 bit, float32, the adapters' product, and the result. On a card the host has the result only.
        assert peaks["save_merged"] <= largest * 16 < total * 2 * 0.9, (peaks, largest, total)
        assert peaks["save_full"] <= largest * 4 + 200_000, (peaks, largest)
        assert peaks["save_adapter"] <= 1024 * 6 * 4 * 4, peaks
    assert sum(f.stat().st_size for f in (tmp_path / "save_merged").glob("*.safetensors")) > total * 2
