"""`pipeline(checkpoint, lora=...)`: QLoRA over several cards by layers, on torch.distributed.pipelining.

    model = unsloth_ext.fsdp2.pipeline("a/checkpoint", lora=LoraConfig(...))          # on every rank, under torchrun
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    for batch in loader:                                                              # the same batches on every rank
        loss = model.step(batch["input_ids"], batch["labels"], batch["attention_mask"])
        model.clip_grad_norm_(1.0)
        optimizer.step(); optimizer.zero_grad()
    model.save_adapter("adapter")

Each rank holds its own layers and nothing else, so nothing is gathered: what travels is [rows, length, hidden] between
neighbours, once forward and once back for each microbatch. That is what to choose where cards are linked slowly, or where a model
is too large for one card and FSDP2's gathers cost too much. The price is the bubble, in which ranks wait for each other
(pipeline_schedules.py), and a whole batch a step that every rank must be given. With interleaved 1F1B a rank has several stages,
which divides the bubble by their number. Weight gradients are too small under LoRA for zero bubble to win; it can be chosen.

`unsloth_ext.compiling.compile_model(model.model)` compiles the layers of all stages: 8B, two H200, rows of 4096: 24.9 where it was
19.4 thousand tokens a second (two runs), and less memory at the peak.

torch's public interface only: stages are told shapes and dtypes, so that no step is spent on finding them; another length makes
new stages, which costs milliseconds. The loss is that of one process: every microbatch's sum over the number of labels of all.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..errors import Refused, UsageError
from . import pipeline_load as loading
from . import switch
from .atomic_folder import begin, discard, flush, move_in
from .pipeline_batch import agreed
from .pipeline_cut import cut_layers, head_in_layers, rank_of_stage, spans
from .pipeline_schedules import SCHEDULES, actions, check, slots_needed
from .pipeline_stage import Stage
from .processes import LIMIT, default_mesh, device_of, meet
from .team import Team

if TYPE_CHECKING:
    from .pipeline_messages import Messages

__all__ = ["PipelineModel", "pipeline"]

MESSAGES = ("auto", "copies", "collective")


def pipeline(
    checkpoint: str | Path,
    *,
    lora,
    schedule: str = "interleaved-1f1b",
    stages_per_rank: int | None = None,
    microbatches: int = 8,
    layers: list[int] | None = None,
    dtype: torch.dtype | None = None,
    checkpointing: bool = False,
    messages: str = "auto",
    quantization_config=None,
    attn_implementation: str | None = None,
    mesh: DeviceMesh | None = None,
    timeout: datetime.timedelta | None = None,
) -> PipelineModel:
    """A 4-bit Llama, Mistral or Qwen with LoRA, cut into stages over all processes. Called by every rank.

    checkpoint: a folder with safetensors files or a repository on the hub: NF4 of bitsandbytes, or 16 or 32 bit, then quantised.
    lora: peft's `LoraConfig`, or the folder of a saved adapter to go on with.
    schedule: "interleaved-1f1b", "1f1b", "gpipe", "interleaved-zero-bubble" or "zbv".
    stages_per_rank: how many stages a rank has; 2 where the schedule can (more: smaller bubble, more messages), else 1.
    microbatches: into how many parts `step` cuts a batch. At least the number of ranks, better a multiple of it.
    layers: how many layers each stage has, first to last; cut evenly if None, the head weighed (pipeline_cut.py).
    dtype: of what is not quantised and of activations; the checkpoint's own if None. A 16-bit one computes under autocast.
    checkpointing: recompute each layer's activations in its backward.
    messages: how tensors go to the neighbouring stages. "collective": by the process group's send and receive. "copies": by the cards'
        copy engines (pipeline_messages.py), on one host only. "auto": by copies on cards where that is possible.
    quantization_config, attn_implementation: as in transformers; NF4 with double quantisation if None.
    mesh: one dimension, over all processes; made if None. timeout: how long to wait for a rank (10 minutes).

    Raises `UsageError` for arguments and checkpoints that do not fit, `Refused` for what a pipeline cannot do,
    `UnslothExtError` on every rank where only some failed or one is missing.
    """
    timeout = timeout or LIMIT
    mesh = default_mesh(timeout=timeout) if mesh is None else mesh
    meet("building the pipeline", timeout)
    error = None
    try:
        ranks, rank, device = dist.get_world_size(), dist.get_rank(), device_of(mesh)
        if mesh.ndim != 1 or mesh.size() != ranks:
            raise UsageError(f"mesh must be one dimension over all {ranks} processes, got {tuple(mesh.shape)}")
        if ranks < 2:
            raise UsageError("a pipeline needs at least 2 processes", "Start it with torchrun --nproc-per-node 2.")
        kind, stages_per_rank = check(schedule, ranks, stages_per_rank, microbatches)
        if messages not in MESSAGES:
            raise UsageError(f"messages must be {' or '.join(MESSAGES)}, got {messages!r}")
        if kind.v_shaped and Version(torch.__version__).release < (2, 13):
            raise Refused(
                f"schedule {schedule!r} on torch {torch.__version__}, whose V-shaped schedules begin by sending to themselves",
                "Use 'interleaved-1f1b', or torch 2.13 or later.",
            )
        lora, folder = loading.adapter_config(lora)
        blue = loading.blueprint(checkpoint, mesh, device, dtype, quantization_config, attn_implementation)
        if blue.dtype == torch.float16:
            raise Refused(
                "dtype float16 needs a scaled loss, which a pipeline does not have", "Use bfloat16 or float32."
            )
        config = blue.model.config
        total = config.num_hidden_layers
        if layers is None:
            layers = cut_layers(total, ranks, stages_per_rank, head_in_layers(config), kind.v_shaped)
        cut = spans(layers, total, ranks, stages_per_rank)
        rank_of = rank_of_stage(len(cut), ranks, kind.v_shaped)
        mine = [s for s in range(len(cut)) if rank_of[s] == rank]
        first, last = 0 in mine, len(cut) - 1 in mine
        own = {i for s in mine for i in cut[s]}
    except Exception as problem:
        error = problem
    Team(f"planning the pipeline of {checkpoint}", timeout).agree(error)
    try:
        model = loading.fill(blue, own, first, last, device)
        model.config.name_or_path = model.name_or_path = str(checkpoint)
        model = loading.with_adapters(model, lora, folder, own, first, last)
        if not any(p.requires_grad for p in model.parameters()):
            raise UsageError(
                f"rank {rank} with the layers {sorted(own)} would have nothing to train",
                "Put adapters on more layers, or cut them differently (layers).",
            )
        if checkpointing:
            base = model.get_base_model()  # whose method has another name since transformers 5.23
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": False})
    except Exception as problem:
        error = problem
    Team(f"loading {checkpoint}", timeout).agree(error)
    stages = {s: Stage(model.get_base_model(), cut[s], s == 0, s == len(cut) - 1, blue.dtype) for s in mine}
    return PipelineModel(model, stages, cut, rank_of, schedule, microbatches, messages, device, mesh, timeout)


class PipelineModel:
    """What `pipeline` returns: one rank's stages, and the training step over all of them. Not made directly.

    model: the peft model with this rank's layers, the others `Elsewhere`; for looking at, `step` runs it. cut: the layers of each
    stage; rank_of: the rank of each stage. All methods except `parameters` and `named_parameters` are collectives.
    """

    def __init__(self, model, stages, cut, rank_of, schedule, microbatches, messages, device, mesh, timeout):
        self.model, self.stages, self.cut, self.rank_of = model, stages, cut, rank_of
        self.microbatches, self.device = microbatches, device
        self._schedule_name, self._kind = schedule, SCHEDULES[schedule]
        self._group, self._mesh, self._timeout = mesh.get_group(), mesh, timeout
        self._must_copy = messages == "copies"
        self._may_copy = self._must_copy or (messages == "auto" and device.type == "cuda")
        self._messages: Messages | None = None
        self._failed: str | None = None  # why a step did
        # Batches are compared on the host, beside the training.
        self._talk = None if "gloo" in dist.get_backend_config() else dist.new_group(backend="gloo", timeout=timeout)
        # NCCL makes a communicator at its first use, which waits for all ranks; in the middle of a schedule they are not all there.
        dist.all_reduce(torch.zeros((), device=device), group=self._group)
        self._made: tuple = (None, None)
        self._items = torch.ones((), device=device)

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's trained parameters, for its optimizer."""
        return (p for p in self.model.parameters() if p.requires_grad)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As `parameters`, with the names that they have in the whole peft model."""
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    # -- a step ------------------------------------------------------------------------------------------------------------

    def step(
        self, input_ids, labels, attention_mask=None, position_ids=None, *, num_items_in_batch=None
    ) -> torch.Tensor:
        """Forward and backward of a whole batch; gradients are added to those that are there. -> its loss, float32 [], everywhere.

        input_ids, labels: int64 [rows, length], the same on every rank, on any device; label -100 is ignored, and position i
            predicts label i + 1. attention_mask: [rows, length] of 0 and 1. position_ids: [rows, length], where they are not
            0 1 2 ... A number of rows that is no multiple of `microbatches` is filled up with rows without labels.
        num_items_in_batch: what the sum of the losses is divided by; the number of labels that are not ignored if None. With
            gradient accumulation, that of all the batches of a step.

        Raises `UsageError` for tensors that do not fit, `UnslothExtError` where ranks were given different batches or one is gone.
        """
        return self._run((input_ids, labels, attention_mask, position_ids), num_items_in_batch, backward=True)

    def evaluate(
        self, input_ids, labels, attention_mask=None, position_ids=None, *, num_items_in_batch=None
    ) -> torch.Tensor:
        """The loss that `step` would return, without gradients and without dropout. Raises as `step`, and `Refused` for "zbv"."""
        if self._kind.v_shaped:
            raise Refused("torch's V-shaped schedules have no forward alone", "Evaluate with another schedule.")
        for stage in self.stages.values():
            stage.eval()
        try:
            with torch.no_grad():
                batch = (input_ids, labels, attention_mask, position_ids)
                return self._run(batch, num_items_in_batch, backward=False)
        finally:
            for stage in self.stages.values():
                stage.train()

    def _run(self, batch, items, backward: bool) -> torch.Tensor:
        (input_ids, labels, attention_mask, position_ids), items = agreed(
            batch, items, self._failed, self.microbatches, self.device, self._talk
        )
        self._items.copy_(items)
        schedule = self._schedule(input_ids.shape[0] // self.microbatches, input_ids.shape[1])
        first, last = 0 in self.stages, len(self.cut) - 1 in self.stages
        masks = {"attention_mask": attention_mask, "position_ids": position_ids}
        masks = {name: value for name, value in masks.items() if value is not None}
        losses: list[torch.Tensor] = []
        run = schedule.step if backward else schedule.eval
        try:
            run(
                *([input_ids] if first else []),
                target=labels if last else None,
                losses=losses,
                return_outputs=False,
                **masks,
            )
        except BaseException as problem:
            # The other ranks wait for messages, or have sent some, that nobody will count.
            cause, self._made = (
                problem.__cause__ or problem,
                (None, None),
            )  # torch says in which stage, and why only in the cause
            self._failed = f"{type(cause).__name__}: {cause}".strip().partition("\n")[0]
            if self._messages is not None:
                self._messages.give_up()
            raise
        loss = torch.stack([x.detach().float() for x in losses]).sum() if last else torch.zeros((), device=self.device)
        # No broadcast: who has it knows that all have taken what was sent to them.
        dist.all_reduce(loss, group=self._group)
        return loss

    def _schedule(self, rows: int, length: int):
        """torch's schedule for microbatches of this shape. The last one is kept: its buffers are as large as the activations."""
        key, schedule = self._made
        if key != (rows, length):
            from torch.distributed.pipelining import PipelineStage

            from .pipeline_messages import StageWithMessages

            self._made = (None, None)
            hidden, last = self.model.config.hidden_size, len(self.cut) - 1
            dtype = next(iter(self.stages.values())).dtype
            by_copies = self._connect(rows * length * hidden * dtype.itemsize)
            made = []
            for number, stage in self.stages.items():
                ids = torch.empty((rows, length), dtype=torch.int64, device="meta")
                states = torch.empty((rows, length, hidden), dtype=dtype, device="meta", requires_grad=True)
                made.append(
                    (StageWithMessages if by_copies else PipelineStage)(
                        stage,
                        number,
                        last + 1,
                        self.device,
                        input_args=(states if number else ids,),
                        output_args=(states,),
                        group=self._group,
                    )  # fmt: skip
                )
                if by_copies:
                    made[-1].messages, made[-1].travels = self._messages, states
            schedule = self._kind.make(made, self.microbatches, self._loss)
            self._made = ((rows, length), schedule)
        return schedule

    def _connect(self, size: int) -> bool:
        """Whether messages go by copies. A collective where they may and `size` bytes are more than before."""
        from .pipeline_messages import connected

        before = self._messages
        if not self._may_copy or (before is not None and size <= before.slot):
            return self._may_copy
        if before is not None:  # memory that was shared stays torch's: lengths that rise would add up
            size = max(size, 2 * before.slot)
        rank, ranks = self._mesh.get_local_rank(), self._mesh.size()
        slots = slots_needed(actions(self._schedule_name, ranks, len(self.cut) // ranks, self.microbatches))
        found = connected(self.rank_of, rank, size, slots, self._mesh, self.device, self._timeout)
        if isinstance(found, str):
            if self._must_copy:
                raise UsageError(f"messages='copies' is not possible: {found}", "Leave it at 'auto'.")
            switch.say(f"Stages send by the collective, not by copies: {found}.")
            self._may_copy, found = False, None
        self._messages = found  # what was connected before is let go only now, when all ranks' cards have done with it
        return self._may_copy

    def _loss(self, hidden, labels):
        return self.stages[len(self.cut) - 1].loss(hidden, labels, self._items)

    # -- after a step ------------------------------------------------------------------------------------------------------

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale all ranks' gradients to a norm of at most `max_norm` together. -> their norm before, float32 []."""
        parameters = [p for p in self.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters]) if parameters else torch.zeros(())
        square = norm.to(device=self.device, dtype=torch.float32).square()
        dist.all_reduce(square, group=self._group)
        norm = square.sqrt()
        if parameters:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def save_adapter(self, folder: str | Path) -> Path:
        """Write adapter_model.safetensors and adapter_config.json as peft does, with the adapters of all ranks, on rank 0.

        A new folder appears when it is complete. `PeftModel.from_pretrained` loads them on one device, `pipeline(lora=folder)` in a
        pipeline. Raises `UnslothExtError` on every rank if it cannot be written.
        """
        folder, error, everyone = Path(folder), None, [None] * dist.get_world_size()
        part = {name: t.detach().cpu().contiguous() for name, t in loading.adapter_state(self.model).items()}
        dist.gather_object(part, everyone if dist.get_rank() == 0 else None, dst=0, group=self._talk)
        if dist.get_rank() == 0:
            try:
                _write(
                    self.model.peft_config["default"], {k: t for found in everyone for k, t in found.items()}, folder
                )
            except Exception as problem:
                error = problem
        Team(f"saving the adapter to {folder}").agree(error)
        return folder


def _write(config, state: dict[str, torch.Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    scratch = begin(folder)
    try:
        save_file(state, str(scratch / "adapter_model.safetensors"), metadata={"format": "pt"})
        inference_mode, config.inference_mode = config.inference_mode, True  # as peft writes it
        try:
            config.save_pretrained(str(scratch))
        finally:
            config.inference_mode = inference_mode
        for file in scratch.iterdir():
            flush(file)
        move_in(folder, "adapter_model.safetensors")
    except BaseException:
        discard(folder)
        raise
