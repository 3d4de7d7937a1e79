"""Challenge B: QLoRA under FSDP2, sharded in everything.

`load` reads a 4-bit model in slices, `shard` shards it (or any that is loaded already), `accumulate` and `gathered` serve the
training loop, `packed_state` and `bytes_held` look at what a rank holds. They are imported when first asked for, because this
package must not import torch.
"""

_WHERE = {
    "accumulate": "sharding",
    "bytes_held": "held",
    "gathered": "sharding",
    "load": "sharded_load",
    "on_local_shards": "optimizers",
    "packed_state": "held",
    "shard": "sharding",
}


def __getattr__(name):
    if name in _WHERE:
        from importlib import import_module

        return getattr(import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
