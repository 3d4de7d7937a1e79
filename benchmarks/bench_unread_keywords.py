"""The fused cross entropy with a keyword that it does not read (packed_seq_lengths=), pristine and patched, in one process.

One H200-sized case: 16384 tokens, hidden 4096, vocabulary 128256, frozen bf16 head; forward and backward. The baseline is the
installed unsloth_zoo with the patch taken out (`disable`), the same call. Peak memory is above the inputs.
"""

import sys

import record

TOKENS, HIDDEN, VOCABULARY = 16384, 4096, 128256


def main() -> None:
    import unsloth_ext

    import unsloth  # noqa: F401
    import torch
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
        states.grad = None
        loss = cross_entropy_loss.unsloth_fused_ce_loss(None, states, head, None, labels, **kwargs)
        loss.backward()
        return loss.detach()

    def measure(case, **kwargs):
        for _ in range(3):
            loss = step(**kwargs)
        torch.cuda.synchronize()
        states.grad = None
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
        row = {"case": case, "unit": "ms", "peak_mib": round(peak, 1), "loss": loss.item()} | record.percentiles(times, 3)
        print(row, flush=True)
        return row

    rows = []
    for enabled in (False, True):
        (unsloth_ext.enable if enabled else unsloth_ext.disable)("loss.unread_keywords")
        (status,) = [row for row in unsloth_ext.status() if row.id == "loss.unread_keywords"]
        if status.state != ("applied" if enabled else "disabled"):
            sys.exit(f"bench_unread_keywords: {status.id} is {status.state}: {status.reason}")
        name = "unsloth_ext" if enabled else "pristine"
        rows.append(measure(f"{name}, no keyword"))
        rows.append(measure(f"{name}, packed_seq_lengths=", **keyword))
    plain, before, _, after = rows
    record.write("unread_keywords", rows, [
        record.claim("loss.unread_keywords.peak_share", round(after["peak_mib"] / before["peak_mib"], 3), "x", "<= 0.25",
                     f"pristine unsloth_zoo with the keyword, {before['peak_mib']} MiB"),
        record.claim("loss.unread_keywords.peak_over_plain", round(after["peak_mib"] / plain["peak_mib"], 3), "x", "<= 1.05",
                     f"pristine unsloth_zoo without the keyword, {plain['peak_mib']} MiB"),
        record.claim("loss.unread_keywords.time_share", round(after["p50"] / before["p50"], 3), "x", "<= 1.0",
                     f"pristine unsloth_zoo with the keyword, {before['p50']} ms"),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
