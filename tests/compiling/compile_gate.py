"""Traces Unsloth's training step, forward and loss, on a card that is not there, and counts graphs and breaks.

    python tests/compiling/compile_gate.py [--batches 64] [--packings 64] [--checkpointing unsloth] [--scope step] [--seed 1] [--own 12]

64 random (batch, length) and 64 random packings of a row go through one `compile_model` each way. Lengths that fill cuDNN's bucket are
among them, but not first (attention_patch.py: a graph that is traced with one is for those alone). The last line is JSON.
"""

import argparse
import json
import random
import time
import types

import compile_fake_card as card
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from unsloth_ext.compiling.compiled_model import compile_model
from unsloth_ext.compiling.packed import _bound


def report_of(model, scope, batches):
    torch._dynamo.reset()
    compiled = compile_model(model, scope=scope, backend="eager")  # traced in full; nothing is generated for the card
    start = time.perf_counter()
    for batch in batches:
        with card.tensors():
            arguments = batch()
        with card.MODE:
            out = model(**arguments)
        assert out.loss.device.type == "cuda" and out.loss.shape == ()
    report = compiled.report()
    compiled.restore()
    print(report, f"\n  {len(batches)} batches in {time.perf_counter() - start:.1f} s", flush=True)
    return {
        "graphs": report.graphs,
        "breaks": report.breaks,
        "calls": report.compiled_calls,
        "plain": report.plain_calls,
    }


def own_graphs(model, batches):
    """How many graphs Unsloth's own compile of the layers makes of these batches: automatic dynamic shapes, breaks allowed."""
    counter = CompileCounterWithBackend("eager")
    layers = [module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")]
    forward = type(layers[0]).forward
    run = torch.compile(getattr(forward, "_unsloth_block_original", forward), dynamic=None, backend=counter)
    for layer in layers:
        layer.forward = types.MethodType(lambda self, *args, **kwargs: run(self, *args, **kwargs), layer)
    for batch in batches:
        with card.tensors():
            arguments = batch()
        try:
            with card.MODE:
                model(**arguments)
        except RuntimeError as error:  # after the layers: the last norm is no operator, and launches
            if "active drivers" not in str(error):
                raise
    for layer in layers:
        del layer.__dict__["forward"]
    return counter.frame_count


def padded(number):
    batch, length = random.choice((1, 2, 3, 4, 8)), random.randint(2, card.MAX_LENGTH)
    if number < 2:  # the first of one row, and of several
        batch, length = number + 1, length - (length % card.BUCKET == 0)
    elif number % 8 == 0:
        length = card.BUCKET * random.randint(1, card.MAX_LENGTH // card.BUCKET)

    def make():
        ids = card.ids(batch, length)
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    return make


def packed(least=0):
    """What Unsloth's collator gives for a packed row, with the boundaries found as `packed_arguments` finds them on the host."""
    lengths, total = [], 0
    while total <= least:
        lengths = [random.randint(1, 400) for _ in range(random.randint(2, 12))]
        total = sum(lengths)

    def make():
        ids = card.ids(1, total)
        boundaries = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        torch._dynamo.maybe_mark_dynamic(boundaries, 0)
        boundaries._unsloth_ext_covers = (total, ids.device)
        longest = _bound(max(lengths))
        return {
            "input_ids": ids,
            "labels": ids,
            "position_ids": card.ids(1, total),
            "packed_seq_lengths": torch.zeros(len(lengths), dtype=torch.int32),
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": longest,
            "max_length_k": longest,
        }

    return make


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--packings", type=int, default=64)
    parser.add_argument("--own", type=int, default=0, help="packings for Unsloth's own compile of the layers")
    parser.add_argument("--checkpointing", choices=("unsloth", "True", "False"), default="False")
    parser.add_argument("--scope", choices=("step", "block"), default="step")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--seed", type=int, help="of the shapes; any if left out")
    parser.add_argument("--family", choices=card.FAMILIES, default="llama")
    options = parser.parse_args()
    random.seed(options.seed)
    checkpointing = {"True": True, "False": False}.get(options.checkpointing, options.checkpointing)
    model = card.model(options.family, options.layers, checkpointing)
    found = {}
    if options.batches:
        found["batches"] = report_of(model, options.scope, [padded(i) for i in range(options.batches)])
    if options.packings:
        found["packings"] = report_of(model, options.scope, [packed() for _ in range(options.packings)])
    if options.own:
        found["own"] = own_graphs(
            model, [packed(least=256) for _ in range(options.own)]
        )  # products of fewer rows go another way
    print(json.dumps(found))


if __name__ == "__main__":
    main()
