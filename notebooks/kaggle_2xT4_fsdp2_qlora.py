"""The source of kaggle_2xT4_fsdp2_qlora.ipynb; `python notebooks/build.py` makes it. Cells are marked by percent signs."""
# ruff: noqa: E402

# %% [markdown]
# # QLoRA under FSDP2 on Kaggle's two T4
#
# An 8B model in 4 bits, LoRA, float16, `transformers.Trainer`, gradient checkpointing: first on one T4, then with the same script
# sharded over both, and the losses side by side. Packed weights and their scales are sharded, each card reads only its part of the
# checkpoint, and the script does not know: the switch is an environment variable.
#
# Choose the accelerator **GPU T4 x2** and turn the internet on. Without a GPU the notebook runs with two CPU processes and the
# tiny model of `unsloth_ext`; that shows the wiring, not the speed.

# %% [markdown]
# ## Install
# Put the address from which you cloned or opened this repository into `REPOSITORY`, for example
# `git+https://github.com/<owner>/<repository>`, or a folder you have uploaded, and run the cell. Elsewhere it installs nothing.

# %%
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = os.environ.get("UNSLOTH_EXT", "")  # git+https://github.com/<owner>/<repository>

if "KAGGLE_KERNEL_RUN_TYPE" in os.environ and importlib.util.find_spec("unsloth_ext") is None:
    if not REPOSITORY:
        raise ValueError("Put the address of this repository into REPOSITORY in this cell, then run it again.")
    packages = ["torch>=2.11", "transformers>=5", "peft", "bitsandbytes>=0.49", "accelerate", "datasets", REPOSITORY]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", *packages], check=True)

# %%
try:
    found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout.strip().splitlines()
except (OSError, subprocess.CalledProcessError):
    found = []
if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # switched off
    found = []
print("\n".join(found) or "no card: two processes of the CPU")

MODEL = os.environ.get("FSDP2_MODEL", "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit" if found else "embedded-tiny")
STEPS = int(os.environ.get("FSDP2_STEPS", "10"))
LENGTH = int(os.environ.get("FSDP2_LENGTH", "1024" if found else "96"))
WORK = Path(os.environ.get("FSDP2_WORK", "fsdp2_runs")).resolve()
WORK.mkdir(exist_ok=True)
if MODEL.startswith("embedded"):
    from unsloth_ext.training.embedded import ensure_base

    MODEL = str(ensure_base(MODEL))

# %% [markdown]
# ## The script
# Plain transformers and peft. `import unsloth_ext` is its only line that would not stand in a script for one card, and without the
# environment variable that line changes nothing here. Four rows a step: two a micro-batch on one card, one on each of two.

# %%
SCRIPT = """
import json, os, sys, time
import unsloth_ext
import torch
from peft import LoraConfig, get_peft_model
from transformers import (AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, DataCollatorForSeq2Seq, Trainer,
                          TrainingArguments, set_seed)
from unsloth_ext.training.data import read_rows, tokenize

checkpoint, output, steps, length = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
cuda, world = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", "1"))
dtype = torch.float16 if cuda else torch.float32
device = {"": int(os.environ.get("LOCAL_RANK", "0")) if cuda else "cpu"}
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)

tokenizer = AutoTokenizer.from_pretrained(checkpoint)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=nf4, dtype=dtype, device_map=device)
set_seed(3407)
lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0, task_type="CAUSAL_LM",
                  target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
model = get_peft_model(model, lora)
model.config.use_cache = False

text = [{"text": " ".join(m["content"] for m in row["messages"])} for row in read_rows("embedded")]
rows = tokenize(text[:8 * steps], tokenizer, length)
trainer = Trainer(
    model=model, train_dataset=rows, processing_class=tokenizer,
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    args=TrainingArguments(
        output_dir=output, max_steps=steps, per_device_train_batch_size=2 // world, gradient_accumulation_steps=2,
        learning_rate=2e-4, lr_scheduler_type="linear", max_grad_norm=1.0, fp16=cuda, use_cpu=not cuda, seed=3407,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
        optim="adamw_torch", logging_steps=1, save_steps=max(1, steps // 2), save_total_limit=2, report_to="none", disable_tqdm=True,
    ),
)
begin = time.perf_counter()
trainer.train(resume_from_checkpoint="--resume" in sys.argv)
seconds = time.perf_counter() - begin
trainer.save_model(output)
peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
if trainer.is_world_process_zero():
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    facts = {"losses": losses, "seconds": seconds, "peak_gib_of_rank_0": peak, "ranks": world}
    open(os.path.join(output, "result.json"), "w").write(json.dumps(facts))
"""
script = WORK / "train.py"
script.write_text(SCRIPT)


def run(name, *, ranks, switch="", resume=False):
    """Start the script, on one card or under torchrun, and give what it measured."""
    output = WORK / name
    environment = {**os.environ, "UNSLOTH_EXT_FSDP2": switch, "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    if ranks == 1 and found:
        environment["CUDA_VISIBLE_DEVICES"] = "0"
    words = [sys.executable, *launcher, str(script), MODEL, str(output), str(STEPS), str(LENGTH)]
    done = subprocess.run(
        words + (["--resume"] if resume else []),
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        raise RuntimeError(f"{name} ended with exit code {done.returncode}:\n{done.stdout[-6000:]}")
    print("\n".join(line for line in done.stdout.splitlines() if line.startswith("unsloth_ext")))
    return json.loads((output / "result.json").read_text())


# %% [markdown]
# ## One card

# %%
one = run("one", ranks=1)
print(f"{one['seconds']:.1f} s, peak {one['peak_gib_of_rank_0']:.2f} GiB")

# %% [markdown]
# ## Both cards, sharded
# The same file. `UNSLOTH_EXT_FSDP2=1` is the switch.

# %%
two = run("two", ranks=2, switch="1")
print(f"{two['seconds']:.1f} s, peak {two['peak_gib_of_rank_0']:.2f} GiB on rank 0")

# %% [markdown]
# ## The losses
# They differ by roundings: float16 sums in another order. On a CPU everything is float32.

# %%
TOLERANCE = 5e-3 if found else 1e-3
print("step     one card   two cards  difference")
for step, (a, b) in enumerate(zip(one["losses"], two["losses"], strict=True), 1):
    print(f"{step:4}  {a:11.5f} {b:11.5f} {b - a:11.2e}")
worst = max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True))
print(f"largest difference: {worst:.2e}")
assert worst <= TOLERANCE, f"the losses differ by {worst}, more than {TOLERANCE}"

# %% [markdown]
# ## With the weights in host memory
# `cpu_offload` keeps shards, gradients and optimizer state in the host's memory: slower, and the cards hold one layer at a time. It
# starts from the checkpoint that the run above left half way, so this is a resume as well: sharded on two cards, to two with offload.

# %%
import shutil

shutil.copytree(WORK / "two", WORK / "offload", dirs_exist_ok=True)
shutil.rmtree(WORK / "offload" / f"checkpoint-{STEPS}", ignore_errors=True)
offload = run("offload", ranks=2, switch="cpu_offload", resume=True)
print(f"{offload['seconds']:.1f} s, peak {offload['peak_gib_of_rank_0']:.2f} GiB on rank 0")
assert max(abs(a - b) for a, b in zip(two["losses"], offload["losses"], strict=True)) <= TOLERANCE

# %% [markdown]
# ## The adapter, on one card
# What rank 0 saved is an ordinary peft adapter.

# %%
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

dtype = torch.float16 if found else torch.float32
nf4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
)
device = 0 if found else "cpu"
base = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=nf4, dtype=dtype, device_map={"": device})
model = PeftModel.from_pretrained(base, str(WORK / "two")).eval()
tokenizer = AutoTokenizer.from_pretrained(MODEL)
question = tokenizer("What does `pathlib.Path` do?", return_tensors="pt").to(device)
answer = model.generate(**question, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(answer[0], skip_special_tokens=True))
