"""`save_checkpoint`, `load_checkpoint`, `latest_checkpoint`: a training run that can be killed at any moment and goes on.

    unsloth_ext.fsdp2.save_checkpoint("out/checkpoint-100", model, optimizer, scheduler, extra={"step": 100})
    ...
    if (folder := unsloth_ext.fsdp2.latest_checkpoint("out")) is not None:
        extra = unsloth_ext.fsdp2.load_checkpoint(folder, model, optimizer, scheduler)

A checkpoint holds what training changes: trained parameters, the optimizer's state and options, the scheduler, each rank's random
number generators, and what the caller adds. The base model is read again from where it came from, unless `base=True`. Parameters
and optimizer states are written by torch.distributed.checkpoint, each rank its own part, under their names, so any number of
ranks reads what any number wrote. With the same number a resumed run is the uninterrupted one bit for bit.

The folder is written under another name, and renamed when every rank has flushed its files and a manifest lists them all with
their sizes and SHA-256 (atomic_folder.py). A PEFT model's adapter lies in it in PEFT's format too, so any checkpoint can be used
for inference. Folders of transformers' Trainer from one device or DDP are read as well (trainer_checkpoint.py).
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.distributed import checkpoint as dcp

from ..errors import UsageError
from ..version import __version__
from . import optimizer_state, rng, trainer_checkpoint
from .adapter_state import save_adapter, write_adapter
from .atomic_folder import (
    MANIFEST,
    Damaged,
    begin,
    commit,
    discard,
    files_of,
    hashes,
    partial,
    read_manifest,
    verify,
)  # fmt: skip
from .complete import TENSORS, first_whole, is_trainers, say, within
from .held import base_state
from .stored import Reader, Stored, as_bytes, load_plain, parameter_key
from .team import Team
from .whole import local_of, plain_names, settle, unwrap

__all__ = ["latest_checkpoint", "load_checkpoint", "save_adapter", "save_checkpoint"]

_TRAINING = "training.pt"


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizer=None,
    scheduler=None,
    *,
    extra: dict | None = None,
    base: bool = False,
    write: Callable[[Path], None] | None = None,
    adapter_name: str | None = "default",
    timeout: datetime.timedelta | None = None,
) -> None:
    """Save the training run to `folder`, which appears when it is complete. Called by every rank, or by one process alone.

    folder: on a file system that all ranks share. A checkpoint that is there already is replaced when the new one is complete;
        other things there are kept as `replaced-<name>-1`.
    model: from `shard`, from DistributedDataParallel, or whole. optimizer: torch's, bitsandbytes' (`on_local_shards`), or either
        within accelerate's wrapper. scheduler: anything with state_dict and load_state_dict.
    extra: numbers, texts, lists, dicts, tensors; `load_checkpoint` returns rank 0's.
    base: also the frozen parameters, packed as they are. Not of a 4-bit model that is not sharded.
    write: called on every rank with the unfinished folder, to add files of one's own, which the manifest then covers. Names must
        differ between ranks.
    adapter_name: of the adapter that is also written in PEFT's format, if the model has one; None for none.
    timeout: how long to wait for a rank, here and after each part of the work (10 minutes).

    Raises `UsageError` for what cannot be saved, `UnslothExtError` on every rank where one failed or is missing, with its name.
    `folder` is then what it was.
    """
    model, folder = unwrap(model), Path(folder)
    team = Team(f"saving {folder}", timeout)
    settle(model)

    def collect():
        tensors = {parameter_key(n): p.detach() for n, p in optimizer_state.named(model) if p.requires_grad}
        if not tensors:
            raise UsageError(f"{type(model).__name__} has no parameter that requires a gradient: nothing to save")
        if base:
            if whole := _whole_4bit(model):
                raise UsageError(
                    f"base=True saves the 4-bit weights of a sharded model, and {whole} is whole",
                    "Leave base out: the model is read again from where it came from. save_full writes it as a 4-bit model.",
                )
            tensors |= _base(model)
        facts = None
        if optimizer is not None:
            states, facts = optimizer_state.describe(model, optimizer)
            tensors |= states
        parts = {
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "extra": dict(extra or {}),
        }
        for name, part in parts.items():
            as_bytes(name, part)
        return tensors, facts, parts

    tensors, facts, parts = team.together(collect)
    everyone = team.gather(facts)
    parts["optimizer"] = None if facts is None else optimizer_state.merge(everyone)
    team.on_first_only(begin, folder)
    work = partial(folder)
    try:
        team.together(_is_shared, work)
        _write_tensors(team, work / TENSORS, tensors)
        if adapter_name in getattr(model, "peft_config", ()):
            write_adapter(team, model, work, adapter_name, "auto")

        def write_own():
            (work / f"rng_state_{team.rank}.pth").write_bytes(as_bytes("the random number generators", rng.states()))
            if team.first:
                (work / _TRAINING).write_bytes(as_bytes("the optimizer's options", parts))
            if write is not None:
                write(work)

        team.together(write_own)
        names = team.on_first(files_of, work)
        sums = team.gather(team.together(hashes, work, names[team.rank :: team.world]))
        files = {name: one[name] for name in names for one in sums if name in one}
        manifest = {
            "world_size": team.world,
            "layout": {
                "sharded": any(local_of(p) is not p for p in model.parameters()),
                "base": base,
                "optimizer": None if facts is None else facts["class"],
                "tensors": f"{TENSORS}: torch.distributed.checkpoint, keys parameter/, optimizer/, base/",
            },
            "torch": torch.__version__,
            "unsloth_ext": __version__,
            "files": files,
        }
        team.on_first_only(commit, folder, manifest)
    except BaseException:
        if team.first:
            discard(folder)
        raise


def _is_shared(work: Path) -> None:
    if not work.is_dir():
        raise UsageError(f"{work} is not there: the folder must be on a file system that all ranks share")


def _write_tensors(team: Team, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """What `torch.distributed.checkpoint.save` does, through its planner and writer, but with exchanges between the steps that
    name a rank that has died. Its own would wait for the process group's timeout."""
    planner, writer = dcp.DefaultSavePlanner(), dcp.FileSystemWriter(folder, sync_files=True)

    def plan():
        planner.set_up_planner(tensors, writer.storage_meta(), team.first)
        writer.set_up_storage_writer(team.first)
        return writer.prepare_local_plan(planner.create_local_plan())

    plans = team.gather(team.together(plan))

    def plan_of_all():
        agreed, metadata = planner.create_global_plan(plans)
        return writer.prepare_global_plan(agreed), metadata

    agreed, metadata = team.on_first(plan_of_all)

    def write():
        written = writer.write_data(planner.finish_plan(agreed[team.rank]), planner)
        written.wait()
        return written.value()

    results = team.gather(team.together(write))
    team.on_first_only(writer.finish, metadata, results)


def load_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizer=None,
    scheduler=None,
    *,
    adapter_name: str = "default",
    timeout: datetime.timedelta | None = None,
) -> dict:
    """Load a checkpoint into a model (and optimizer and scheduler) made as for the saved run. Returns its `extra`.

    Called by every rank, or by one process alone; by any number of ranks, whatever number wrote it. The optimizer must be new or
    of the same settings; it needs no step before. Also reads a checkpoint-N folder of transformers' Trainer. After a sharded run the
    result is {"global_step": N}; after one on one device or DDP {"trainer_state": {...}}, and its optimizer's integers are matched to
    the parameters in order.

    Without an optimizer only weights are loaded (and the scheduler), and the random number generators stay as they are. With one:

    * The same number of ranks: everything is restored bit for bit.
    * Another number: random number generators are left as they are. States of bitsandbytes' 8-bit optimizers, whose blocks begin
      with a rank's part, are dequantised and quantised again for the new cut. One line on rank 0 says so.

    Raises `UsageError` where the checkpoint does not fit the model or the optimizer, naming the parameter; `Damaged` (an
    `UnslothExtError`) where a file is missing, truncated or changed, naming the file. Nothing has been loaded then.
    """
    model, folder = unwrap(model), within(Path(folder))
    team = Team(f"loading {folder}", timeout)
    settle(model)
    stored = team.together(_open, team, folder, model, optimizer, adapter_name)

    def plan() -> dict[str, torch.Tensor]:
        wanted = _parameters(folder, stored, model)
        if optimizer is not None:
            if stored.optimizer is None:
                raise UsageError(f"{folder} was saved without an optimizer", "Pass optimizer=None.")
            optimizer_state.check(stored.optimizer, model, optimizer)
            wanted |= optimizer_state.targets(stored.optimizer, stored.sizes, model, optimizer)
        if scheduler is not None and stored.scheduler is None:
            raise UsageError(f"{folder} was saved without a scheduler", "Pass scheduler=None.")
        return wanted

    wanted = team.together(plan)

    def load() -> int:
        stored.fill(wanted)
        again = 0
        if optimizer is not None:
            filled = {key: tensor for key, tensor in wanted.items() if key.startswith("optimizer/")}
            again = optimizer_state.install(stored.optimizer, filled, model, optimizer)
        if scheduler is not None:
            scheduler.load_state_dict(stored.scheduler)
        if optimizer is not None and stored.rng is not None:
            rng.restore(stored.rng, team.rank % max(1, torch.cuda.device_count()))
        return again

    again = sum(team.gather(team.together(load)))
    notes = []
    if optimizer is not None and stored.rng is None:
        notes.append(
            f"written by {stored.world} processes, read by {team.world}: random number generators are not restored"
        )
    if again:
        notes.append(f"the 8-bit optimizer states of {again} parts were quantised anew for another cut")
    if _whole_4bit(model) and any(key.startswith("base/") for key in stored.sizes):
        notes.append(
            "its base is of a sharded model; this one, in 4 bits and whole, keeps the base that it was loaded with"
        )
    if notes and team.first:
        say(f"{folder}: {'; '.join(notes)}")
    return stored.extra


def _open(team: Team, folder: Path, model: nn.Module, optimizer, adapter_name: str) -> Stored:
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder")
    if not (folder / MANIFEST).exists():
        if is_trainers(folder):
            return trainer_checkpoint.open_one(folder, team.rank, team.world, model, optimizer, adapter_name)
        if (folder / TENSORS).is_dir():
            read_manifest(folder)  # says that it was not finished
        raise UsageError(
            f"{folder} is no checkpoint: it has no {MANIFEST}, and it is no folder of transformers' Trainer",
            "Unfinished and foreign folders are passed by with latest_checkpoint(folder of checkpoints).",
        )
    manifest = read_manifest(folder)
    verify(folder, manifest, team.rank, team.world)
    for name in (_TRAINING, f"{TENSORS}/.metadata"):
        if name not in manifest["files"]:
            raise Damaged(f"{folder / MANIFEST} lists no {name}")
    training, reader = load_plain(folder / _TRAINING), Reader(folder / TENSORS)
    own = folder / f"rng_state_{team.rank}.pth"
    world = manifest["world_size"]
    same = world == team.world and own.is_file()
    return Stored(
        reader.sizes(), reader.fill, training["optimizer"], training["scheduler"], load_plain(own) if same else None,
        training["extra"], world,
    )  # fmt: skip


def _whole_4bit(model: nn.Module) -> str | None:
    """The name of a 4-bit weight that is not sharded, whose quant state no tensor of a checkpoint would hold."""
    return next((n for n, p in optimizer_state.named(model) if getattr(p, "quant_state", None) is not None), None)


def _base(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"base/{plain_names(name)}": tensor for name, tensor in base_state(model).items()}


def _parameters(folder: Path, stored: Stored, model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's own memory, to be filled. Raises `UsageError` where the checkpoint has other parameters."""
    wanted = {parameter_key(n): p.detach() for n, p in optimizer_state.named(model) if p.requires_grad}
    saved = {key for key in stored.sizes if key.startswith("parameter/")}
    hint = "Make the model with the adapter settings of the saved run."
    for which, keys in (("lacks", set(wanted) - saved), ("has", saved - set(wanted))):
        if keys:
            one = min(keys).partition("/")[2]
            trained = "that the model trains" if which == "lacks" else "that the model does not train"
            raise UsageError(f"{folder} {which} {len(keys)} parameters {trained}, {one!r} among them", hint)
    there = {key for key in stored.sizes if key.startswith("base/")}
    if there and not _whole_4bit(model):  # such a model keeps the base that it was loaded with
        base = _base(model)
        if differ := sorted(there ^ set(base)):
            raise UsageError(f"the base model in {folder} differs from this one in {differ[0].partition('/')[2]!r}")
        wanted |= base
    for key, tensor in wanted.items():
        if tuple(stored.sizes[key][0]) != tuple(tensor.shape):
            raise UsageError(
                f"{key.partition('/')[2]!r} has shape {tuple(stored.sizes[key][0])} in {folder}, {tuple(tensor.shape)} in the model",
                hint,
            )
    return wanted


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The last complete checkpoint in `folder`, or None. Not a collective; reads every byte of the one that it returns.

    Last by the number at the end of the name, then by the time of saving. Whatever is later but unfinished or damaged is passed
    by, with a line on stderr that says what is wrong with it. Folders of transformers' Trainer count, as far as they can be
    checked. A finished checkpoint whose renaming was cut short (`partial-`, `replaced-`) counts as well.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    candidates = []
    for path in folder.iterdir():
        number = re.search(r"(\d+)$", path.name)
        known = re.fullmatch(r"(checkpoint-\d+)|(partial-.*)", path.name) or (path / MANIFEST).exists()
        if path.is_dir() and known:
            try:
                saved = float(read_manifest(path).get("saved", 0.0))
            except (Damaged, TypeError, ValueError):
                saved = 0.0
            candidates.append((int(number.group(1)) if number else -1, saved, path.name, path))
    return first_whole(path for *_, path in sorted(candidates, reverse=True))
