"""The fused cross entropy with a keyword that it does not read (packed_seq_lengths=), pristine and patched, in one process.

One H200-sized case: 16384 tokens, hidden 4096, vocabulary 128256, bf16 head, frozen (LoRA) and trained; forward and backward. The
baseline is the installed unsloth_zoo with the patch taken out (`disable`), the same call. Peak memory is above the inputs.
"""

import sys

import record

TOKENS, HIDDEN, VOCABULARY = 16384, 4096, 128256


def main() -> None:
    import unsloth_ext  # isort: skip
    import torch
    import unsloth  # noqa: F401
    from unsloth_zoo.fused_losses import cross_entropy_loss

    if not torch.cuda.is_available():
        print("bench_unread_keywords: needs a CUDA card, left out")
        return
    generator = torch.Generator("cuda").manual_seed(3407)
    draw = dict(generator=generator, device="cuda", dtype=torch.bfloat16)
    head = torch.randn(VOCABULARY, HIDDEN, **draw) / HIDDEN**0.5
    states = torch.randn(1, TOKENS, HIDDEN, **draw).requires_grad_(True)
    labels = torch.randint(0, VOCABULARY, (1, TOKENS), generator=generator, device="cuda")
    keyword = {"packed_seq_lengths": torch.tensor([TOKENS], device="cuda")}

    def step(**kwargs):
        states.grad = head.grad = None
        loss = cross_entropy_loss.unsloth_fused_ce_loss(None, states, head, None, labels, **kwargs)
        loss.backward()
        return loss.detach()

    def measure(case, **kwargs):
        for _ in range(3):
            loss = step(**kwargs)
        torch.cuda.synchronize()
        states.grad = head.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(**kwargs)
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        times = []
        for _ in range(10):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            step(**kwargs)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        row = {"case": case, "unit": "ms", "peak_mib": round(peak, 1), "loss": loss.item()} | record.percentiles(
            times, 3
        )
        print(row, flush=True)
        return row

    rows = []
    for trained, enabled in ((False, False), (False, True), (True, False), (True, True)):
        head.requires_grad_(trained)
        (unsloth_ext.enable if enabled else unsloth_ext.disable)("loss.unread_keywords")
        status = next(row for row in unsloth_ext.status() if row.id == "loss.unread_keywords")
        if status.state != ("applied" if enabled else "disabled"):
            sys.exit(f"bench_unread_keywords: {status.id} is {status.state}: {status.reason}")
        name = f"{'unsloth_ext' if enabled else 'pristine'}, {'trained' if trained else 'frozen'} head"
        rows.append(measure(f"{name}, no keyword"))
        rows.append(measure(f"{name}, packed_seq_lengths=", **keyword))
    record.write("unread_keywords", rows, claims_of(rows))


def claims_of(rows: list[dict]) -> list[dict]:
    claims = []
    for kind, (plain, before, _, after) in {"frozen": rows[:4], "trained": rows[4:]}.items():
        for what, key, unit in (("peak", "peak_mib", "MiB"), ("time", "p50", "ms")):
            for against, target, row in (("with_keyword", "<= 1.0", before), ("without_keyword", "<= 1.05", plain)):
                id = f"loss.unread_keywords.{kind}.{what}_vs_{against}"
                baseline = f"pristine unsloth_zoo {against.replace('_', ' ')}, {row[key]} {unit}"
                claims.append(record.claim(id, round(after[key] / row[key], 3), "x", target, baseline))
    return claims


if __name__ == "__main__":
    main()
