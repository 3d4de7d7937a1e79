"""One QLoRA fine-tune, from loading to a reloaded adapter that answers, measured.

Everything goes through what a user of Unsloth would write: `FastLanguageModel.from_pretrained`, `get_peft_model`, `get_chat_template`, trl's
`SFTTrainer`. Nothing of the training loop is replaced, so the same lines run Unsloth's kernels on a GPU and its CPU backend without one, and
a comparison measures Unsloth rather than this file. On a CPU bitsandbytes' own backend holds the weights in 4 bits.

Under torchrun (`--nproc`, ranks.py) the same lines run on every rank over one sharded model; rank 0 keeps the records.

The last act is a proof: the adapter is saved, the trained model answers a question, both are dropped, and the adapter loaded from disk has
to give the same tokens.
"""

import difflib
import gc
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from .. import fsdp2
from ..errors import Refused, UsageError
from ..fsdp2 import switch
from . import data, embedded
from .adapter import adapter_dtypes, first_prompt, generate, restore_dtypes
from .options import EMBEDDED_MODELS, Options
from .progress import Display
from .recorder import StepRecorder, newest_checkpoint, peak_rss, read_steps, write_json
from .summary import summarize

REQUEST = "request.json"  # what the run in this folder was asked to do


def prepare_folder(folder: Path, options: Options, resume: bool) -> Path | None:
    """Make `folder` and return the checkpoint to continue from. Raises Refused rather than mix two runs in one folder."""
    request = folder / REQUEST
    if not resume:
        if request.exists():
            refuse(folder)
        make_folder(folder)
        return None
    if not request.is_file():
        raise UsageError(f"--resume: there is no run in {folder}.", "Leave --resume out to start one.")
    before = json.loads(request.read_text(encoding="utf-8"))
    changed = {name: value for name, value in options.as_dict().items() if before.get(name) != value}
    if changed:
        listed = ", ".join(f"{name} was {before.get(name)!r}, now {value!r}" for name, value in changed.items())
        raise Refused(
            f"--resume: the run in {folder} was started with other options: {listed}.", "Give the same options."
        )
    return newest_checkpoint(folder)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--output {folder} cannot be used as a folder: {error.strerror}.", "Give a new or an empty folder."
        ) from error


def refuse(folder: Path) -> NoReturn:
    raise Refused(
        f"--output {folder} already holds a run.", "Choose another folder, or add --resume to continue that run."
    )


def run_job(options: Options, folder: Path, resume: bool = False, label: str = "train") -> dict:
    """Train in `folder` and return what run.json then holds. An error is recorded there too before it is raised."""
    rows, ranks = data.read_rows(options.dataset), switch.world_size()
    if ranks == 1:
        checkpoint = prepare_folder(folder, options, resume)
    else:  # the process that started the ranks has prepared it
        checkpoint = newest_checkpoint(folder) if resume else None
    base = str(embedded.ensure_base(options.model)) if options.model in EMBEDDED_MODELS else options.model
    if not resume and ranks == 1:
        write_json(folder / REQUEST, options.as_dict())  # after the base: a build that failed is no run to protect
    run: dict = {
        "format": 1,
        "side": label,
        "status": "failed",
        "options": options.as_dict(),
        "resumed_from": checkpoint and checkpoint.name,
    }
    try:
        _run(run, options, folder, base, rows, checkpoint, label)
        run["status"] = "finished"
    except KeyboardInterrupt:
        run["status"] = "interrupted"
        raise
    except Exception as error:
        run["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        run["steps"] = read_steps(folder / "steps.jsonl")
        run["summary"] = {**summarize(run["steps"]), **run.get("summary", {})}
        if _rank() == 0:
            write_json(folder / "run.json", run)
    return run


def _rank() -> int:
    return int(os.environ.get("RANK", "0")) if switch.world_size() > 1 else 0


def _run(
    run: dict, options: Options, folder: Path, base: str, rows: list[dict] | None, checkpoint: Path | None, label: str
) -> None:
    _set_environment(folder)
    clock = time.perf_counter()
    from unsloth import FastLanguageModel  # isort: skip  # before transformers, trl and peft
    import torch

    import unsloth_ext

    from .. import environment

    _quiet()
    run["environment"] = environment.describe()
    cuda, ranks = torch.cuda.is_available(), switch.world_size()
    if ranks > 1:
        run["environment"]["processes"] = str(ranks)
        if cuda and int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise UsageError(f"--nproc asks for {ranks} cards, and this machine has {torch.cuda.device_count()}.")
    loading = dict(
        max_seq_length=options.max_seq_length,
        dtype=None if options.dtype == "auto" else getattr(torch, options.dtype),
        load_in_4bit=options.load_in_4bit,
    )
    checkpointing = {"unsloth": "unsloth", "true": True, "false": False}[options.gradient_checkpointing]
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=base, random_state=options.seed, use_gradient_checkpointing=checkpointing, **loading
    )
    rows = data.hub_rows(options.dataset) if rows is None else rows
    if options.chat_template:
        tokenizer = _chat_template(tokenizer, options.chat_template)
    elif data.needs_chat_template(rows) and not tokenizer.chat_template:
        raise UsageError(
            f"{options.model} has no chat template and the dataset holds messages.",
            "Name one: --chat-template llama-3.1.",
        )
    token_rows = data.tokenize(rows, tokenizer, options.max_seq_length)
    model = FastLanguageModel.get_peft_model(
        model,
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing=checkpointing,
        random_state=options.seed,
        max_seq_length=options.max_seq_length,
    )
    run["model"] = model_facts(model, tokenizer, len(token_rows))
    if options.load_in_4bit and not run["model"]["linear_4bit"]:
        print("The base model was not loaded in 4 bits; see Unsloth's messages above.", file=sys.stderr)
    if checkpoint and (checkpoint / "sharded_optimizer").is_dir():
        fsdp2.enable()  # ranks wrote it; one process reads it by the same hooks
    trainer = _trainer(options, folder, model, tokenizer, token_rows)
    seconds = {"load": time.perf_counter() - clock}

    total = options.steps or _steps_per_epochs(trainer, options)
    with Display(label, total, "card" if cuda else "peak RSS") as display:
        recorder = StepRecorder(
            folder / "steps.jsonl" if _rank() == 0 else Path(os.devnull),
            display.show if _rank() == 0 else lambda record: None,
            first_step=int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0,
        )
        recorder.attach(trainer)
        clock = time.perf_counter()
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            recorder.close()
            run["patches"] = [row.as_dict() for row in unsloth_ext.status()]
    seconds["train"] = time.perf_counter() - clock
    run["summary"] = {
        "memory": "torch.cuda.max_memory_allocated" if cuda else "peak RSS of the process",
        "peak_rss_bytes": peak_rss(),
    }

    clock = time.perf_counter()
    adapter = folder / "adapter"
    if ranks > 1:
        fsdp2.save_adapter(model, adapter)
    else:
        model.save_pretrained(str(adapter))
    if _rank() == 0:
        tokenizer.save_pretrained(str(adapter))
    if ranks > 1:
        torch.distributed.barrier()  # the others are about to read it
    seconds["save"] = time.perf_counter() - clock

    clock = time.perf_counter()
    prompt = first_prompt(rows, tokenizer)
    trained = generate(FastLanguageModel, model, tokenizer, prompt)
    dtypes = adapter_dtypes(model)
    del model, trainer, recorder
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    model, tokenizer = FastLanguageModel.from_pretrained(model_name=str(adapter), **loading)
    restore_dtypes(model, dtypes)
    if ranks > 1:
        fsdp2.shard(model)
    reloaded = generate(FastLanguageModel, model, tokenizer, prompt)
    seconds["reload and answer"] = time.perf_counter() - clock
    run["sample"] = {
        "prompt": prompt,
        "trained": tokenizer.decode(trained, skip_special_tokens=True),
        "reloaded": tokenizer.decode(reloaded, skip_special_tokens=True),
        "tokens": trained,
        "same_tokens": trained == reloaded,
    }
    run["summary"]["wall_seconds"] = {name: round(value, 2) for name, value in seconds.items()}


def _set_environment(folder: Path) -> None:
    """Before Unsloth is imported: its generated modules go into this run's folder, so that two runs never share them."""
    own = f"-rank{_rank()}" if _rank() else ""
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(folder.resolve() / f"unsloth_compiled_cache{own}")
    for name, value in {
        **embedded.POLITE_THREADS,
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "BITSANDBYTES_NOWELCOME": "1",
    }.items():
        os.environ.setdefault(name, value)


def _quiet() -> None:
    """Other people's bars and notices; Unsloth's own lines stay, they say which path it takes."""
    import warnings

    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(transformers|trl|peft|accelerate|torch|bitsandbytes)\b")


def _chat_template(tokenizer, name: str):
    from unsloth.chat_templates import CHAT_TEMPLATES, get_chat_template

    if name not in CHAT_TEMPLATES:
        near = difflib.get_close_matches(name, CHAT_TEMPLATES, n=5, cutoff=0) or sorted(CHAT_TEMPLATES)
        raise UsageError(f"--chat-template {name!r} is not one of Unsloth's.", f"The nearest are: {', '.join(near)}.")
    return get_chat_template(tokenizer, chat_template=name)


def _trainer(options: Options, folder: Path, model, tokenizer, token_rows: list[dict]):
    from datasets import Dataset
    from transformers import PrinterCallback, ProgressCallback
    from trl import SFTConfig, SFTTrainer
    from unsloth import is_bfloat16_supported

    half = options.dtype if options.dtype != "auto" else ("bfloat16" if is_bfloat16_supported() else "float16")
    length = {"max_steps": options.steps} if options.steps else {"num_train_epochs": options.epochs}
    config = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(5, (options.steps or 50) // 5),
        weight_decay=0.01,
        optim="adamw_torch",
        bf16=half == "bfloat16",
        fp16=half == "float16",
        seed=options.seed,
        data_seed=options.seed,
        max_length=options.max_seq_length,
        packing=options.packing,
        gradient_checkpointing=options.gradient_checkpointing != "false",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=options.save_steps,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        **length,
    )
    trainer = SFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=Dataset.from_list(token_rows), args=config
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    _keep_dtypes(trainer)
    return trainer


def _keep_dtypes(trainer) -> None:
    """Make a resume go on in the dtype it was started in."""
    load = trainer._load_from_checkpoint

    def load_and_restore(*args, **kwargs):
        dtypes = adapter_dtypes(trainer.model)
        result = load(*args, **kwargs)
        restore_dtypes(trainer.model, dtypes)
        return result

    trainer._load_from_checkpoint = load_and_restore


def _steps_per_epochs(trainer, options: Options) -> int:
    updates = math.ceil(len(trainer.get_train_dataloader()) / options.gradient_accumulation)
    return math.ceil(updates * options.epochs)


def model_facts(model, tokenizer, rows: int) -> dict:
    """What was really loaded: 4-bit modules are counted, not believed."""
    quantized = [module for module in model.modules() if _is_4bit(getattr(module, "weight", None))]
    return {
        "architecture": model.config.architectures[0] if model.config.architectures else type(model).__name__,
        "parameters": sum(_numel(parameter) for parameter in model.parameters()),
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        # peft's wrapper shows its inner weight as its own, hence the set.
        "linear_4bit": len({id(module.weight) for module in quantized}),
        "dtype": str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "pad_token": tokenizer.pad_token,
        "eos_token": tokenizer.eos_token,
        "rows": rows,
    }


def _is_4bit(weight) -> bool:
    return getattr(weight, "quant_state", None) is not None or type(weight).__name__ == "NF4Shard"


def _numel(parameter) -> int:
    if type(parameter).__name__ == "NF4Shard":  # a rank's part, which knows the whole
        return parameter.cut.shape.numel()
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()
