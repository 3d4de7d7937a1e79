"""Unsloth's FastLanguageModel under the switch on CPUs: the model that two processes read in parts is the one that one reads whole.

Unsloth goes through a loaded model and rebuilds its ends: weights with one address are tied to it, and a weight that is in parts
has none. The head must still be the head.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import fsdp2_models as models
import pytest

SCRIPT = """
import json, os, sys
import unsloth_ext
from unsloth import FastLanguageModel
import torch, torch.distributed as dist
folder, output = sys.argv[1:3]
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
from unsloth_zoo.patching_utils import patch_model_and_tokenizer
model, tokenizer = FastLanguageModel.from_pretrained(folder, max_seq_length=64, dtype=torch.float32, load_in_4bit=True)
model, tokenizer = patch_model_and_tokenizer(model, tokenizer, downcast_rope=False)  # which on a card from_pretrained does
from unsloth.tokenizer_utils import zero_pad_embedding_rows
model.get_input_embeddings().padding_idx = tokenizer.pad_token_id
zero_pad_embedding_rows(model, tokenizer)  # so too
model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, lora_dropout=0, random_state=1, use_gradient_checkpointing=False,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
FastLanguageModel.for_training(model)
if world > 1:
    from unsloth_ext.fsdp2.trainer import shard_for_trainer
    model = shard_for_trainer(model)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
tokens = torch.randint(4, 200, (3, 4, 12), generator=torch.Generator().manual_seed(2))
mine = tokens[:, rank * 4 // world : (rank + 1) * 4 // world]
losses = []
for rows in mine:
    loss = model(input_ids=rows, labels=rows).loss
    loss.backward(); optimizer.step(); optimizer.zero_grad()
    mean = loss.detach().double()
    if world > 1:
        dist.all_reduce(mean)
    losses.append(mean.item() / world)
facts = {"losses": losses, "sharded": type(model).__name__.startswith("FSDP")}
if rank == 0:
    json.dump(facts, open(output, "w"))
if world > 1:
    dist.barrier(); dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from transformers import AutoTokenizer, LlamaForCausalLM

    from unsloth_ext.training.embedded import ensure_base

    folder = tmp_path_factory.mktemp("untied")
    tokenizer = AutoTokenizer.from_pretrained(ensure_base("embedded"))
    config = models.config(
        vocab_size=len(tokenizer), hidden_size=64, head_dim=16, intermediate_size=192, num_hidden_layers=2
    )
    assert not config.tie_word_embeddings
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _run(script, folder, output, processes, **environment):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(folder), str(output)], cwd=output.parent, capture_output=True, text=True,
        timeout=600, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "UNSLOTH_COMPILE_DISABLE": "1", "GLOO_SOCKET_IFNAME": "lo",
                          "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(output.read_text()), done.stderr


@pytest.mark.extended
@pytest.mark.skipif(find_spec("unsloth") is None, reason="needs Unsloth")
def test_the_model_in_parts_is_the_whole_one(tmp_path, checkpoint):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    one, _ = _run(script, checkpoint, tmp_path / "one.json", 1)
    two, said = _run(script, checkpoint, tmp_path / "two.json", 2, UNSLOTH_EXT_FSDP2="1")
    assert two["sharded"] and not one["sharded"] and "read in parts" in said
    assert max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True)) < 2e-5


TABLES = """
import json, os, sys
import unsloth_ext
import unsloth
import torch
from transformers import LlamaConfig
from unsloth.models.llama import LlamaRotaryEmbedding

class OnCpu:  # their tables are for a card's number
    device = staticmethod(lambda index: torch.device("cpu", index))
    __getattr__ = lambda self, name: getattr(torch, name)

llama = sys.modules[LlamaRotaryEmbedding.__module__]
llama.torch, llama.DEVICE_COUNT = OnCpu(), 1

def table(most, *asked):
    rope = LlamaRotaryEmbedding(config=LlamaConfig(head_dim=16, max_position_embeddings=most))
    rows, batch = [], type("", (), {"device": torch.device("cpu", 0), "dtype": torch.float32})
    for rows_asked in asked:
        rope.extend_rope_embedding(batch, most, rows_asked)
        cos, sin = rope.get_cached(rows_asked, 0)
        rows.append(len(cos))
    return rows, cos, sin

short, cos, sin = table(131072, 4096)
grown, more, other = table(131072, 4096, 20000, 4096, 131072)
same = torch.equal(cos, more[: len(cos)]) and torch.equal(sin, other[: len(sin)])
state = [r.state for r in unsloth_ext.status() if r.id == "fsdp2.rotary_tables"]
json.dump({"rows": short + grown + table(32768, 4096)[0], "same": same, "state": state}, open(sys.argv[2], "w"))
"""


@pytest.mark.extended
@pytest.mark.skipif(find_spec("unsloth") is None, reason="needs Unsloth")
def test_rotary_tables_have_the_rows_that_are_asked_for(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TABLES)
    ranked = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    ours, _ = _run(script, "-", tmp_path / "ours.json", 1, UNSLOTH_EXT_FSDP2="1", **ranked)
    assert ours["state"] == ["applied"] and ours["same"]
    assert ours["rows"] == [
        8192,
        8192,
        24576,
        24576,
        131072,
        32768,
    ]  # the last: decoding counts on all that such a model knows
    alone, _ = _run(script, "-", tmp_path / "alone.json", 1, UNSLOTH_EXT_FSDP2="1")
    off, _ = _run(script, "-", tmp_path / "off.json", 1, **ranked)
    assert alone["rows"] == off["rows"] == [32768, 32768, 32768, 32768, 131072, 32768]
