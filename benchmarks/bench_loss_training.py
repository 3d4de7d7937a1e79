"""Does a run train as it does on full logits? A QLoRA run of a 1B model on real text, once with each way to take the loss.

A Llama-3.2-1B-shaped checkpoint with random weights in 4 bit, LoRA of rank 16 on all seven projections, batch 2 x 2048 of the
standard library's sources, AdamW. Each run starts from the same adapters and sees the same batches; its losses are compared step
by step with those of the run whose loss is torch's cross entropy on all logits in fp32.
"""

import argparse
import os
import sys
import sysconfig
from pathlib import Path

import record
import torch
import torch.nn.functional as F
from bench_nf4_step import model_of


def batches(tokenizer: Path, steps: int, batch: int, length: int):
    """[steps, batch, length] tokens: the standard library's files, one after the other."""
    from transformers import AutoTokenizer

    encode, found = AutoTokenizer.from_pretrained(tokenizer), []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        found += encode(file.read_text(encoding="utf-8", errors="replace"), add_special_tokens=False).input_ids
        if len(found) >= steps * batch * length:
            return torch.tensor(found[: steps * batch * length]).view(steps, batch, length)
    raise SystemExit(f"bench_loss_training: the sources have {len(found)} tokens, {steps * batch * length} are needed")


def hidden_states(model, tokens):
    """[batch, length, hidden]: what would go into lm_head."""
    os.environ["UNSLOTH_RETURN_HIDDEN_STATES"] = "1"  # read on each call
    try:
        return model(input_ids=tokens).logits
    finally:
        del os.environ["UNSLOTH_RETURN_HIDDEN_STATES"]


def full_logits(model, tokens):
    logits = F.linear(hidden_states(model, tokens)[:, :-1], model.get_output_embeddings().weight)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), tokens[:, 1:].reshape(-1))


def half_the_rows(model, tokens):
    hidden, weight = hidden_states(model, tokens)[:, :-1], model.get_output_embeddings().weight
    halves = zip(hidden.flatten(0, 1).chunk(2), tokens[:, 1:].reshape(-1).chunk(2), strict=True)
    sums = [F.cross_entropy(F.linear(h, weight).float(), y, reduction="sum") for h, y in halves]
    return sum(sums) / tokens[:, 1:].numel()


def specialised(model, tokens):
    from unsloth_ext.loss.cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden_states(model, tokens), model.get_output_embeddings().weight, tokens, shift=True)


def generic(model, tokens):
    from unsloth_ext.loss import chunked_loss, functions

    hidden = hidden_states(model, tokens)[:, :-1]
    return chunked_loss(functions.cross_entropy(), hidden, model.get_output_embeddings(), tokens[:, 1:])


def by_unsloth(model, tokens):
    return model(input_ids=tokens, labels=tokens).loss


SIDES = {  # the way to take the loss, and whether the loss room's patches are in
    "full logits": (full_logits, True),
    "full logits, half the rows at a time": (half_the_rows, True),
    "linear_cross_entropy": (specialised, True),
    "chunked_loss": (generic, True),
    "Unsloth with unsloth_ext": (by_unsloth, True),
    "Unsloth": (by_unsloth, False),
}
OURS = ("linear_cross_entropy", "chunked_loss")


def train(model, start, loss_of, data, rate, device):
    """The losses of the steps, and beside each that of full logits at the same weights."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in start:
                parameter.copy_(start[name])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    losses, beside = [], []
    for tokens in data:
        tokens = tokens.to(device)
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                beside.append(full_logits(model, tokens).item())
            loss = loss_of(model, tokens)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, beside


def compare(model, data, rate, device):
    """A row for each side."""
    import unsloth_ext

    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    rows, reference = [], None
    for side, (loss_of, with_patches) in SIDES.items():
        (unsloth_ext.enable if with_patches else unsloth_ext.disable)("loss")
        losses, beside = train(model, start, loss_of, data, rate, device)
        reference = reference or losses
        rows.append(
            {
                "side": side,
                "unit": "nats",
                "max difference from the run on full logits": max(map(_distance, losses, reference)),
                "max difference from full logits at the same weights": max(map(_distance, losses, beside)),
                "losses": losses,
            }
        )
        print({key: value for key, value in rows[-1].items() if key != "losses"}, losses[0], losses[-1], flush=True)
    unsloth_ext.enable("loss")
    return rows


def _distance(a, b):
    return abs(a - b)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokenizer", type=Path, help="a folder with the Llama 3 tokenizer (128256 tokens)")
    parser.add_argument("--architecture", default="llama-3.2-1b")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    args = parser.parse_args()
    if not torch.cuda.is_available() or args.tokenizer is None:
        print("bench_loss_training: needs a CUDA card and --tokenizer, left out")
        return 0
    import unsloth_ext  # isort: skip  # noqa: F401
    import unsloth  # noqa: F401

    data = batches(args.tokenizer, args.steps, 2, 2048)
    model = model_of(args.architecture, None, args.tokenizer, 2048, False)
    rows = compare(model, data, args.learning_rate, "cuda")
    whole, beside = (
        max(row[f"max difference from {of}"] for row in rows if row["side"] in OURS)
        for of in ("the run on full logits", "full logits at the same weights")
    )
    full = f"torch's cross entropy on full logits in fp32, {args.steps} steps"
    claims = [
        record.claim(
            "loss.llama1b.max_step_difference", round(whole, 6), "nats", "<= 0.001", f"{full}, a run of its own"
        ),
        record.claim("loss.llama1b.difference_at_same_weights", round(beside, 6), "nats", "<= 0.001", full),
    ]
    the_claimed_case = args.architecture == "llama-3.2-1b" and args.steps == 60
    record.write("loss_training", rows, claims if the_claimed_case else [])
    return 0


if __name__ == "__main__":
    sys.exit(main())
