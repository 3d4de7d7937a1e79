"""Challenge B: QLoRA under FSDP2, sharded in everything.

`load` reads a 4-bit model in slices, `shard` shards it (or any that is loaded already), `accumulate` and `gathered` serve the
training loop, `packed_state` and `bytes_held` look at what a rank holds. `save_checkpoint`, `load_checkpoint` and
`latest_checkpoint` stop and resume a run; `save_adapter`, `save_merged` and `save_full` hand its result on. `enable` lets a Trainer
do all of that (switch.py). They are imported
when first asked for, because this package must not import torch.
"""

_WHERE = {
    "accumulate": "sharding",
    "bytes_held": "held",
    "clip_grad_norm_": "clipping",
    "disable": "switch",
    "enable": "switch",
    "gathered": "sharding",
    "latest_checkpoint": "checkpointing",
    "load": "sharded_load",
    "load_checkpoint": "checkpointing",
    "on_local_shards": "optimizers",
    "packed_state": "held",
    "pipeline": "pipeline_model",
    "save_adapter": "adapter_state",
    "save_checkpoint": "checkpointing",
    "save_full": "merged",
    "save_merged": "merged",
    "shard": "sharding",
}


def __getattr__(name):
    if name in _WHERE:
        from importlib import import_module

        return getattr(import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
