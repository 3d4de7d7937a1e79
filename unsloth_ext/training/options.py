"""What a person may ask of `unsloth-ext train`, checked before anything slow is imported.

Importing Unsloth takes ten seconds and loading a model takes minutes, so a typing mistake must not cost either: every value is judged here,
with the standard library alone, and a bad one is refused by the name it has on the command line. Options left unset take a default that
depends on the model: the embedded one is small enough for two CPU cores, a real one is not.
"""

import argparse
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..errors import UsageError

EMBEDDED_MODELS = ("embedded", "embedded-tiny")
EMBEDDED_DATA = "embedded"
GRADIENT_CHECKPOINTING = ("unsloth", "true", "false")
DTYPES = ("auto", "bfloat16", "float16", "float32")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

# Unset options take these. Small batches of short rows keep the embedded job at a minute; the others are Unsloth's usual notebook values.
EMBEDDED_DEFAULTS = dict(
    max_seq_length=256, batch_size=8, gradient_accumulation=1, steps=80, learning_rate=8e-3, chat_template="llama-3.1"
)
REAL_DEFAULTS = dict(
    max_seq_length=2048, batch_size=2, gradient_accumulation=4, steps=60, learning_rate=2e-4, chat_template=None
)


@dataclass
class Options:
    """One training job. Lengths are in tokens, batch sizes in rows; `None` is filled in by `resolve`."""

    model: str = "embedded"
    dataset: str = EMBEDDED_DATA
    max_seq_length: int | None = None
    batch_size: int | None = None
    gradient_accumulation: int | None = None
    lora_rank: int = 16
    lora_alpha: int = 16
    steps: int | None = None
    epochs: float | None = None
    learning_rate: float | None = None
    seed: int = 3407
    gradient_checkpointing: str = "unsloth"
    packing: bool = False
    chat_template: str | None = None
    dtype: str = "auto"
    load_in_4bit: bool = True
    save_steps: int = 20

    def resolve(self) -> "Options":
        """Fill the unset options and check all of them. Raises UsageError naming the option, the value and the way out."""
        defaults = EMBEDDED_DEFAULTS if self.model in EMBEDDED_MODELS else REAL_DEFAULTS
        for name, value in defaults.items():
            if getattr(self, name) is None and not (name == "steps" and self.epochs is not None):
                setattr(self, name, value)
        self._check()
        return self

    def _check(self) -> None:
        for name in ("batch_size", "gradient_accumulation", "lora_rank", "lora_alpha", "save_steps", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{flag(name)} must be at least 1, got {value}.")
        if self.steps is not None and self.epochs is not None:
            raise UsageError(
                f"--steps {self.steps} and --epochs {self.epochs} exclude each other.", "Give one of them."
            )
        if self.epochs is not None and not 0 < self.epochs < float("inf"):
            raise UsageError(f"--epochs must be a positive number, got {self.epochs}.")
        if self.max_seq_length < 16:
            raise UsageError(f"--max-seq-length must be at least 16 tokens, got {self.max_seq_length}.")
        if not 0 < self.learning_rate <= 1:
            raise UsageError(
                f"--learning-rate must lie in (0, 1], got {self.learning_rate}.", "A usual LoRA value is 2e-4."
            )
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed must lie in [0, 2**32), got {self.seed}.")
        for name, allowed in (("gradient_checkpointing", GRADIENT_CHECKPOINTING), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{flag(name)} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        self._check_model()

    def _check_model(self) -> None:
        if self.model in EMBEDDED_MODELS:
            return
        folder = Path(self.model).expanduser()
        if folder.is_dir():
            if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
                raise UsageError(
                    f"--model {self.model}: no config.json or adapter_config.json in that folder.",
                    "Point it at a checkpoint in transformers' format.",
                )
            self.model = str(folder.resolve())
        elif not HUB_ID.fullmatch(self.model):
            raise UsageError(
                f"--model {self.model!r} is neither a folder nor a hub id.",
                "Give a local checkpoint, an id such as unsloth/Llama-3.2-1B, or `embedded`.",
            )

    def as_dict(self) -> dict:
        return asdict(self)

    def argv(self) -> list[str]:
        """The command line that asks for exactly this job: how a comparison hands it to its two processes."""
        words = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool):
                words.append(flag(field.name) if value else "--no-" + flag(field.name)[2:])
            elif value is not None:
                words.append(f"{flag(field.name)}={value}")
        return words

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "Options":
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)}).resolve()


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a job, in the order in which a person thinks of them."""
    unset = Options()

    def default_of(name: str) -> str:
        return f"(default: {EMBEDDED_DEFAULTS[name]} with the embedded model, else {REAL_DEFAULTS[name] or 'its own'})"

    what = parser.add_argument_group("what to train")
    what.add_argument(
        "--model",
        default=unset.model,
        metavar="PATH|ID",
        help="a local checkpoint or hub id (default: embedded, built here)",
    )
    what.add_argument(
        "--dataset",
        default=unset.dataset,
        metavar="PATH|ID",
        help="a .jsonl or .txt file, a folder of text, or a hub id; rows hold messages, text, or prompt and completion (default: embedded)",
    )
    what.add_argument(
        "--chat-template", metavar="NAME", help=f"a template name of Unsloth's {default_of('chat_template')}"
    )
    what.add_argument("--max-seq-length", type=int, metavar="TOKENS", help=default_of("max_seq_length"))
    what.add_argument(
        "--packing",
        action=argparse.BooleanOptionalAction,
        default=unset.packing,
        help="put several rows into one sequence",
    )

    how = parser.add_argument_group("how to train")
    length = how.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help=f"optimizer steps {default_of('steps')}")
    length.add_argument("--epochs", type=float, metavar="N", help="passes over the data, instead of --steps")
    how.add_argument("--batch-size", type=int, metavar="ROWS", help=default_of("batch_size"))
    how.add_argument("--gradient-accumulation", type=int, metavar="N", help=default_of("gradient_accumulation"))
    how.add_argument("--learning-rate", type=float, metavar="LR", help=default_of("learning_rate"))
    how.add_argument("--lora-rank", type=int, default=unset.lora_rank, metavar="R", help="(default: %(default)s)")
    how.add_argument("--lora-alpha", type=int, default=unset.lora_alpha, metavar="A", help="(default: %(default)s)")
    how.add_argument(
        "--seed",
        type=int,
        default=unset.seed,
        help="of the adapter's start and of the data order (default: %(default)s)",
    )
    how.add_argument("--gradient-checkpointing", choices=GRADIENT_CHECKPOINTING, default=unset.gradient_checkpointing)
    how.add_argument(
        "--dtype", choices=DTYPES, default=unset.dtype, help="of the computation (default: bfloat16 where it is fast)"
    )
    how.add_argument(
        "--load-in-4bit", action=argparse.BooleanOptionalAction, default=unset.load_in_4bit, help="NF4 base weights"
    )
    how.add_argument(
        "--save-steps",
        type=int,
        default=unset.save_steps,
        metavar="N",
        help="a checkpoint every N steps (default: %(default)s)",
    )
