"""One line a step, on disk the moment the step is over.

`steps.jsonl` is what survives a crash, a kill or a full disk, so it is written as the job runs and never rewritten except by a resume, which
drops the steps it is about to repeat. The loss is summed here from the micro-batches instead of being read from the trainer's log: older
transformers round that one to four digits, which is coarser than the differences a comparison looks for.
"""

import hashlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

COMPLETE = "complete.json"  # in a checkpoint folder: everything before it was written


def write_json(path: Path, value: object) -> None:
    """Write whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_steps(path: Path) -> list[dict]:
    """The whole records of a steps.jsonl; a last line that a kill cut short is left out."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end and is still whole; one that is damaged is passed by, with a line."""
    from ..fsdp2.complete import first_whole

    complete = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return first_whole(sorted(complete, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True))


def peak_rss() -> int:
    """Bytes of memory this process has occupied at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def finite(value: float | None) -> float | None:
    """JSON has no NaN: a loss that is not a number becomes null, and the verdict names its step."""
    return float(value) if value is not None and math.isfinite(value) else None


class StepRecorder:
    """Measures each step of `trainer` and appends it to `path`; `show(record)` is called with every record."""

    def __init__(self, path: Path, show: Callable[[dict], None], first_step: int = 0):
        kept = [record for record in read_steps(path) if record["step"] <= first_step]
        path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8", buffering=1)
        self.records = kept
        self.show = show

    def attach(self, trainer) -> None:
        """Hook into `trainer`: its step callbacks, and its `training_step`, the one place that sees batch and loss."""
        import torch
        from transformers import TrainerCallback

        training_step = trainer.training_step
        cuda = torch.cuda.is_available()
        recorder = self

        def measured_step(model, inputs, *args, **kwargs):
            recorder._count(inputs)
            loss = training_step(model, inputs, *args, **kwargs)
            recorder.loss = recorder.loss + loss.detach()
            return loss

        trainer.training_step = measured_step

        class Callback(TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs):
                if cuda:
                    torch.cuda.reset_peak_memory_stats()  # the peak of training; loading has its own

            def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
                recorder.loss, recorder.tokens, recorder.digest = 0.0, 0, hashlib.blake2b(digest_size=8)
                recorder.learning_rate = optimizer.param_groups[0]["lr"]
                if cuda:
                    torch.cuda.synchronize()
                recorder.started = time.perf_counter()

            def on_step_end(self, args, state, control, **kwargs):
                loss, tokens, peak = recorder._of_all_ranks(
                    float(recorder.loss), torch.cuda.max_memory_allocated() if cuda else peak_rss()
                )  # waits for the device
                if cuda:
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - recorder.started
                recorder.pending = dict(
                    step=state.global_step,
                    loss=finite(loss),
                    learning_rate=recorder.learning_rate,
                    grad_norm=None,
                    tokens=tokens,
                    seconds=round(seconds, 6),
                    tokens_per_second=round(tokens / seconds, 3),
                    peak_memory_bytes=peak,
                    batch=recorder.digest.hexdigest(),
                )

            def on_log(self, args, state, control, logs=None, **kwargs):
                if recorder.pending and "loss" in (logs or {}):
                    norm = logs.get("grad_norm")
                    recorder._write({**recorder.pending, "grad_norm": finite(None if norm is None else float(norm))})

            def on_save(self, args, state, control, **kwargs):
                if not state.is_world_process_zero:
                    return
                folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
                write_json(folder / COMPLETE, {"step": state.global_step})

        trainer.add_callback(Callback())

    loss: object = 0.0
    tokens = 0
    pending: dict | None = None

    def _of_all_ranks(self, loss: float, peak: int) -> tuple[float, int, int]:
        """(mean loss, all tokens, the largest peak): each rank's gradient comes from its own rows, and their mean is what trains."""
        import torch.distributed as dist

        if not dist.is_initialized() or dist.get_world_size() == 1:
            return loss, self.tokens, peak
        found: list = [None] * dist.get_world_size()
        dist.all_gather_object(found, (loss, self.tokens, peak))
        losses, tokens, peaks = zip(*found, strict=True)
        return sum(losses) / len(losses), sum(tokens), max(peaks)

    def _count(self, inputs: dict) -> None:
        """Tokens and fingerprint of a micro-batch, padding left out: two loaders may pad differently and still train on the same rows."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        real = ids[mask.bool()] if mask is not None and mask.shape == ids.shape else ids.flatten()
        self.tokens += real.numel()
        self.digest.update(real.cpu().numpy().astype("<i8").tobytes())

    def _write(self, record: dict) -> None:
        self.pending = None
        self.records.append(record)
        self.file.write(json.dumps(record) + "\n")
        self.show(record)

    def close(self) -> None:
        self.file.close()
