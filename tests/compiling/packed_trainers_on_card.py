# ruff: noqa: E402  (in the order that patches need)
"""Unsloth's trainers on packed rows: `packed_trainers_on_card.py packing|padding_free|dpo 0|1 kept|checkpointed`, with 1 by the package's
patches for packed batches. The last line is JSON: losses, gradient norms, calls of packed attention (in a graph: one), graphs, seconds of
training."""

import json
import os
import sys
import time

os.environ["UNSLOTH_EXT_PACKED"] = sys.argv[2]

import torch  # isort: skip
import unsloth_ext.compiling.attention as attention  # isort: skip  (before unsloth)

CALLS, own = [], attention.packed_attention


@torch.compiler.assume_constant_result
def note_call():  # once a graph, while it is traced; a number counted up in a graph would be guarded, and each call another graph
    CALLS.append(1)


def counted(*args, **kwargs):
    note_call()
    return own(*args, **kwargs)


attention.packed_attention = counted  # the patches take it from there
from unsloth import FastLanguageModel  # isort: skip  (before trl)

from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from unsloth_ext.training.data import read_rows
from unsloth_ext.training.embedded import ensure_base

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def texts(count):
    return [
        " ".join(m["content"] for m in row["messages"])[: 200 + 137 * i % 700]
        for i, row in enumerate(read_rows("embedded")[:count])
    ]


def main(kind, layers):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(ensure_base("embedded")), max_seq_length=256, dtype=torch.bfloat16, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=8,
        lora_alpha=16,
        lora_dropout=0,
        target_modules=TARGETS,
        random_state=1,
        use_gradient_checkpointing="unsloth" if layers == "checkpointed" else False,
    )
    common = dict(
        output_dir="out", max_steps=6, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-3, logging_steps=1,
        report_to="none", seed=3, bf16=True, fp16=False, optim="adamw_torch", save_strategy="no", disable_tqdm=True,
        max_length=256,
    )  # fmt: skip
    if kind == "dpo":
        rows = [{"prompt": t[:20], "chosen": t[20:50], "rejected": t[50:90]} for t in texts(60) if len(t) > 90]
        arguments = DPOConfig(**common, padding_free=True)
        trainer = DPOTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
    else:
        rows = Dataset.from_list([{"text": text} for text in texts(90)])
        arguments = SFTConfig(**common, dataset_text_field="text", **{kind: True})
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    start = time.perf_counter()
    trainer.train()
    seconds = round(time.perf_counter() - start, 1)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = {"losses": [e["loss"] for e in log], "norms": [e["grad_norm"] for e in log], "calls": len(CALLS)}
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    print(json.dumps(found | {"graphs": graphs, "seconds": seconds}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[3])
