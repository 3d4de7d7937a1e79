"""The one format in which every benchmark leaves its numbers: benchmarks/data/<benchmark>.json.

    {"benchmark", "environment": {card, driver, torch, ..., commit, date}, "rows": [...], "claims": [...]}

A row is one measured case: its parameters, `unit`, and p20/p50/p80 for ours and for the baseline of the same run. A claim says
which figure we stand for: {"id", "value", "unit", "target", "holds", "baseline"}. README, PR pages and `make claims` read
these files; no figure is typed by hand.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

DATA = Path(__file__).parent / "data"


def percentiles(samples: Sequence[float], digits: int = 4) -> dict[str, float]:
    """{"p20", "p50", "p80", "samples"} of at least three measured values."""
    if len(samples) < 3:
        raise ValueError(f"percentiles need at least 3 samples, got {len(samples)}")
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return {
        "p20": round(cuts[1], digits),
        "p50": round(cuts[4], digits),
        "p80": round(cuts[7], digits),
        "samples": len(samples),
    }


def claim(id: str, value: float, unit: str, target: str, baseline: str) -> dict:
    """A claim whose `target` is a comparison with `value`, e.g. "<= 0.01"; `baseline` names the code that it was measured against."""
    return {
        "id": id,
        "value": value,
        "unit": unit,
        "target": target,
        "holds": holds(value, target),
        "baseline": baseline,
    }


def holds(value: float, target: str) -> bool:
    """Whether `value` meets a target such as "<= 0.01" or ">= 1.2"."""
    operator, _, bound = target.partition(" ")
    return {"<=": value <= float(bound), ">=": value >= float(bound)}[operator]


def environment() -> dict:
    """What it was measured on. UNSLOTH_EXT_COMMIT names the commit where the checkout has no git folder."""
    from unsloth_ext.environment import describe

    facts = describe()
    if commit := os.environ.get("UNSLOTH_EXT_COMMIT"):
        facts["commit"] = commit
    return facts


def write(benchmark: str, rows: list[dict], claims: list[dict], facts: dict | None = None) -> Path:
    """Write benchmarks/data/<benchmark>.json (or into $UNSLOTH_EXT_BENCH_DATA) and print the claims."""
    folder = Path(os.environ.get("UNSLOTH_EXT_BENCH_DATA", DATA))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{benchmark}.json"
    content = {"benchmark": benchmark, "environment": facts or environment(), "rows": rows, "claims": claims}
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, file)
    for entry in claims:
        print(
            f"{entry['id']} = {entry['value']} {entry['unit']} (target {entry['target']}, {'holds' if entry['holds'] else 'DOES NOT HOLD'})"
        )
    print(file)
    return file


def load() -> list[dict]:
    """Every recorded benchmark, by name."""
    return [json.loads(file.read_text()) for file in sorted(DATA.glob("*.json"))]
