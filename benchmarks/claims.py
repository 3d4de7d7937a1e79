"""`make claims`: every claim of benchmarks/data in one table. Exit code 1 if one does not hold or has not been measured."""

import sys

import record
from rich.console import Console
from rich.table import Table

# What must be among them, so that a deleted file is not a claim less.
EXPECTED = (
    "foundation.import_ms",
    "foundation.train_compare.max_loss_difference",
    "loss.unread_keywords.frozen.peak_vs_with_keyword",
    "loss.unread_keywords.frozen.time_vs_with_keyword",
    *(
        f"nf4.dequantize.{name}"
        for name in (
            "protocol_vs_2025",
            "min_vs_2025",
            "vs_2026_10_upto_4m",
            "vs_2026_10_16m",
            "vs_2026_10_58m",
            "vs_2026_10_235m",
            "min_vs_2026_10",
            "protocol_vs_2026_10",
            "bandwidth_share_58m",
            "eager_us",
        )
    ),
    "nf4.step_8b.dequantize_ms",
    *(f"nf4.matmul.{name}" for name in ("rows1_us", "rows16_us", "rows64_us", "rows256_us", "min_vs_best_peer")),
    *(f"generate.8b.{name}" for name in ("batch1_ms", "batch4_ms", "batch16_ms", "batch64_ms", "min_vs_unsloth")),
    *(
        f"loss.{memory}.{unit}"
        for memory in ("frozen_fast", "frozen_lean", "trained_fast", "trained_lean")
        for unit in ("ms", "mib")
    ),
    *(f"loss.{memory}.vs_best_peer" for memory in ("frozen_fast", "trained_fast", "grpo")),
    "loss.trained.dw_error_max",
    "loss.generic.vs_specialised",
    "loss.challenge.vram_saving",
    "loss.llama1b.max_step_difference",
    *(f"fsdp2.8b_x2.{name}" for name in ("tokens_vs_ddp", "held_gib", "load_peak_over_ideal")),
    *(f"fsdp2.70b_x4.{name}" for name in ("load_peak_over_ideal", "tokens_vs_upstream", "trains_under_24gb")),
    "fsdp2.405b.step",
    "fsdp2.quant_state_share",
    "fsdp2.loss_difference",
    *(f"compile.{name}" for name in ("breaks", "graphs_64_shapes", "graphs_64_packings", "1b.ms", "loss_difference")),
    *(f"compile.8b_{name}.ms" for name in ("auto", "8gib", "12gib", "20gib")),
    "compile.packed_8b.vs_unsloth",
    "compile.step_8b.first_step_s",
    "compile.packed_attention.vs_flash",
    "compile.products_8b.vs_one_by_one",
)


def main() -> int:
    table = Table("claim", "value", "target", "holds", "against", "measured on", box=None, pad_edge=False)
    failed, missing = 0, set(EXPECTED)
    for benchmark in record.load():
        facts = benchmark["environment"]
        place = f"{facts.get('card') or facts.get('cpu', '?')}, {facts['date'][:10]}"
        for claim in benchmark["claims"]:
            missing.discard(claim["id"])
            holds = record.holds(claim["value"], claim["target"])  # again, from the figures
            failed += not holds
            verdict = "yes" if holds else "[bold red]NO[/]"
            table.add_row(
                claim["id"], f"{claim['value']:g} {claim['unit']}", claim["target"], verdict, claim["baseline"], place
            )
    for id in sorted(missing):
        table.add_row(id, "", "", "[bold red]NOT MEASURED[/]", "", "")
    Console(width=None if sys.stdout.isatty() else 180).print(table)
    return 1 if failed or missing else 0


if __name__ == "__main__":
    sys.exit(main())
