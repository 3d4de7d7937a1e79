"""The embedded base model: a small Llama, made on the spot from the standard library's sources.

A demonstration that first downloads a checkpoint is one that many people never see, and a random model is no base: LoRA bends what is
there. So a byte-level BPE tokenizer is trained and a small Llama pretrained for half a minute on two cores, and kept in the cache as an
ordinary checkpoint. It has Llama 3's special tokens in Llama 3's order at the end of the vocabulary, and, as many base checkpoints on the
hub, no pad token: choosing one is the loader's work and belongs to what is tried here.

The same seed, sources and library versions give the same weights on one machine. The folder's name is a fingerprint of all of them, and it
appears by a rename: a reader sees either nothing or a whole checkpoint.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from ..cache import cache_dir
from ..errors import UnslothExtError
from . import standard_library

# Llama 3's pre-tokenizer pattern, as published with its tokenizer.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
NAMED_SPECIALS = (
    BOS,
    EOS,
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
# OpenMP threads that sleep while they wait. Spinning ones are a little faster alone and ten times slower beside one other busy process.
POLITE_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
N_SPECIALS = 32  # Llama 3 has 256; in 4096 tokens that would be a sixteenth of the vocabulary


@dataclass(frozen=True)
class Size:
    """Shape and training budget. One pretraining step is `batch` blocks of `block` tokens."""

    vocab: int = 4096
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 704
    steps: int = 160
    batch: int = 8
    block: int = 128
    learning_rate: float = 2e-3
    seed: int = 3407


SIZES = {
    "embedded": Size(),
    # The tests' size: bitsandbytes' CPU kernels take no row shorter than 64.
    "embedded-tiny": Size(
        vocab=1024, hidden=64, layers=2, heads=2, kv_heads=1, intermediate=128, steps=20, batch=8, block=64
    ),
}


def fingerprint(size: Size) -> str:
    """Twelve hex digits over everything that the weights depend on."""
    libraries = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    facts = {
        "recipe": 1,
        "size": asdict(size),
        "sources": standard_library.digest(),
        "libraries": libraries,
        "specials": NAMED_SPECIALS,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def base_folder(model: str) -> Path:
    """Where the base called `model` (a key of SIZES) lives or will live."""
    return cache_dir() / f"{model}-{fingerprint(SIZES[model])}"


def ensure_base(model: str) -> Path:
    """The folder of the base checkpoint, built first if this cache does not hold it.

    The build runs in a process of its own: it needs transformers, and in the caller's process Unsloth has to be imported before that.
    """
    folder = base_folder(model)
    if not folder.is_dir():
        command = [sys.executable, "-c", f"from {__name__} import build; build({model!r}, {str(folder)!r})"]
        done = subprocess.run(command, stdout=sys.stderr, env={**POLITE_THREADS, **os.environ}, check=False)
        if done.returncode:
            raise UnslothExtError(
                f"Building the embedded base model failed (exit code {done.returncode}).",
                "Its messages are above; torch, transformers and tokenizers must be installed.",
            )
    return folder


def build(model: str, destination: str | Path, size: Size | None = None) -> None:
    """Train the tokenizer and the weights, save both as a checkpoint, and move it to `destination` in one step."""
    size = size or SIZES[model]
    destination = Path(destination)
    building = destination.with_name(f".{destination.name}.building-{os.getpid()}")
    try:
        tokenizer = train_tokenizer(size)
        llama = pretrain(tokenizer, size)
        llama.save_pretrained(building)
        tokenizer.save_pretrained(building)
        try:
            building.rename(destination)
        except OSError:
            # Another process was faster and its checkpoint is the same one; anything else is a real error.
            if not destination.is_dir():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware: twice as fast as float32 where it does, many times slower where it does not."""
    try:
        return bool({"amx_bf16", "avx512_bf16"} & set(Path("/proc/cpuinfo").read_text().split()))
    except OSError:
        return False


def train_tokenizer(size: Size):
    """A byte-level BPE of `size.vocab` tokens in transformers' format, Llama 3's special tokens last, and no pad token."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = [
        *NAMED_SPECIALS,
        *(f"<|reserved_special_token_{3 + i}|>" for i in range(N_SPECIALS - len(NAMED_SPECIALS))),
    ]
    bpe = Tokenizer(models.BPE(ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocab - len(specials), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator((text for _, text in standard_library.sources()), trainer)
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    bpe.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bpe.token_to_id(BOS))]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def pretrain(tokenizer, size: Size):
    """A LlamaForCausalLM after `size.steps` steps of next-token prediction on the sources, in bfloat16 as checkpoints are published."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(size.seed)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    stream = [token for _, text in standard_library.sources() for token in tokenizer(text).input_ids]
    blocks = torch.tensor(stream[: len(stream) // size.block * size.block]).view(-1, size.block)
    blocks = blocks[torch.randperm(len(blocks))[: size.steps * size.batch]]

    optimizer = torch.optim.AdamW(llama.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=size.learning_rate, total_steps=size.steps, pct_start=0.1
    )
    llama.train()
    for step, batch in enumerate(blocks.split(size.batch), 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=native_bfloat16()):
            loss = llama(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            print(f"Building the embedded base model: step {step}/{size.steps}, loss {loss.item():.2f}", flush=True)
    return llama.eval().to(torch.bfloat16)
