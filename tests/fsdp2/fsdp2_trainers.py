"""Scripts that users write with transformers and trl, as functions: the same lines in one process and under torchrun."""

import contextlib
import os
import random

import fsdp2_models as models

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextlib.contextmanager
def torchrun(rank, world, **settings):
    """The surroundings of a script that torchrun has started and that has `unsloth_ext.fsdp2.enable(**settings)` on top."""
    import datasets
    import transformers
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from unsloth_ext import fsdp2

    before = dict(os.environ)
    if world > 1:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1", MASTER_PORT="1",
        )  # fmt: skip  # the process group is there already, over a file
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    fsdp2.enable(**settings)
    try:
        yield
    finally:
        fsdp2.disable()
        for state in (AcceleratorState, PartialState, GradientState):
            state._shared_state.clear()
        os.environ.clear()
        os.environ.update(before)


def tokenizer():
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(207))]
    made = Tokenizer(kinds.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def sentences(count, seed, least=3, most=14):
    draw = random.Random(seed)
    return [" ".join(f"w{draw.randrange(207)}" for _ in range(draw.randint(least, most))) for _ in range(count)]


def options(folder, world, **changes):
    """Four rows a step: two a micro-batch in one process, one in each of two."""
    return dict(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=2 // world, gradient_accumulation_steps=2,
        learning_rate=1e-3, max_grad_norm=0.1, logging_steps=1, report_to="none", use_cpu=True, seed=7, bf16=False,
        save_strategy="no", lr_scheduler_type="linear", disable_tqdm=True, gradient_checkpointing=False,
    ) | changes  # fmt: skip


def model_of(checkpoint):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, device_map={"": "cpu"})


def with_adapters(checkpoint):
    """In float32: trl turns the adapters of a 4-bit model to bfloat16, which no comparison of losses survives."""
    model = models.with_lora(model_of(checkpoint))
    model.get_base_model().is_loaded_in_4bit = False
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # bitsandbytes' evaluation there wants sizes that ours are not
    return model


def losses(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def sft(checkpoint, folder, world, *, rows=48, loading=with_adapters, **changes):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = loading(checkpoint)
    data = Dataset.from_dict({"text": sentences(rows, 1)})
    return SFTTrainer(
        model=model, args=SFTConfig(**options(folder, world, max_length=32, **changes)), train_dataset=data,
        eval_dataset=data.select(range(6)), processing_class=tokenizer(),
    )  # fmt: skip


def plain(checkpoint, folder, world, **changes):
    """transformers alone, with rows that are token ids already."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    names, model = tokenizer(), with_adapters(checkpoint)
    rows = [names(text)["input_ids"] for text in sentences(48, 8)]
    rows = [{"input_ids": row, "attention_mask": [1] * len(row), "labels": row} for row in rows]
    return Trainer(
        model=model, args=TrainingArguments(**options(folder, world, **changes)), train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(names), processing_class=names,
    )  # fmt: skip


def dpo(checkpoint, folder, world, **changes):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model = with_adapters(checkpoint)
    columns = {"prompt": [f"{s} " for s in sentences(48, 2)], "chosen": sentences(48, 3), "rejected": sentences(48, 4)}
    return DPOTrainer(
        model=model, args=DPOConfig(**options(folder, world, max_length=48, **changes)),
        train_dataset=Dataset.from_dict(columns), processing_class=tokenizer(),
    )  # fmt: skip


def grpo(checkpoint, folder, world, **changes):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model = with_adapters(checkpoint)
    config = GRPOConfig(**options(
        folder, world, max_completion_length=6, num_generations=2, per_device_train_batch_size=2,
        gradient_accumulation_steps=1, max_steps=2, **changes,
    ))  # fmt: skip
    return GRPOTrainer(
        model=model, args=config, train_dataset=Dataset.from_dict({"prompt": sentences(16, 6)}),
        processing_class=tokenizer(),
        reward_funcs=lambda completions, **_: [float(len(set(c.split()))) for c in completions],
    )  # fmt: skip
