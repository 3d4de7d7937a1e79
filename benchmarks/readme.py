"""`make readme`: write the generated parts of README.md and pr_descriptions/*.md again.

A part stands between `<!-- generated: NAME -->` and `<!-- end -->`; NAME is one of the functions in PARTS. Figures come from
benchmarks/data, patch states from the registry and the releases' own files, the release table from patches/matrix.json.
With --check nothing is written and the exit code says whether something would change.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import record

ROOT = Path(__file__).parent.parent
PINNED, OLD = {"unsloth": "2026.10.9", "unsloth_zoo": "2026.10.9"}, {"unsloth": "2026.9.14", "unsloth_zoo": "2026.9.9"}
_PART = re.compile(r"(<!-- generated: ([a-z_]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def patches() -> str:
    import unsloth_ext
    from unsloth_ext.patching.release import folder_of
    from unsloth_ext.patching.survey import survey
    from unsloth_ext.series.base import pristine_tree

    def states(releases):
        folders = {package: pristine_tree(package, release) / package for package, release in releases.items()}
        # The TRL of the tested stack; the older release's own (up to 0.24) is none that a patch is for.
        others = ("transformers", "bitsandbytes", *(("trl",) if releases is PINNED else ()))
        return survey(unsloth_ext.patches(), folders | {other: folder_of(other) for other in others})

    waiting = [patch for patch in unsloth_ext.patches() if patch.switch and not patch.on_unless_switched_off]
    switch = {patch.id: f", with `{patch.switch}=1`" for patch in waiting}

    def cell(row):
        reason = "for a later TRL" if row.reason == "trl is not installed" else row.reason
        return "applied" + switch.get(row.id, "") if row.state == "applied" else f"{row.state}: {reason}"

    rows = [
        (f"`{now.id}`", now.challenge, now.summary, cell(now), cell(old))
        for now, old in zip(states(PINNED), states(OLD), strict=True)
    ]
    return table(("patch", "challenge", "what it does", f"on {PINNED['unsloth']}", f"on {OLD['unsloth']}"), rows)


def releases() -> str:
    matrix = json.loads((ROOT / "patches" / "matrix.json").read_text())
    names = list(dict.fromkeys(row["id"] for row in matrix["rows"]))
    outcome = {(row["release"], row["id"]): row["result"] for row in matrix["rows"]}
    found = list(dict.fromkeys(row["release"] for row in matrix["rows"]))
    short = {"not for this release": "–"}
    rows = [(f"`{n}`", *(short.get(what := outcome.get((r, n), ""), what) for r in found)) for n in names]
    return table(("patch", *found), rows)


def claims() -> str:
    rows = []
    for benchmark in record.load():
        facts = benchmark["environment"]
        for c in benchmark["claims"]:
            rows.append(
                (
                    f"`{c['id']}`",
                    f"{c['value']:g} {c['unit']}",
                    c["target"],
                    c["baseline"],
                    facts.get("card", facts.get("cpu")),
                )
            )
    return table(("claim", "measured", "target", "against", "on"), rows)


def unread_keywords() -> str:
    found = [b for b in record.load() if b["benchmark"] == "unread_keywords"]
    if not found:
        return "Not measured yet.\n"
    facts, rows = found[0]["environment"], found[0]["rows"]
    return (
        table(
            ("call", "ms p20 / p50 / p80", "peak MiB above the inputs"),
            [(r["case"], f"{r['p20']:.1f} / {r['p50']:.1f} / {r['p80']:.1f}", f"{r['peak_mib']:.0f}") for r in rows],
        )
        + f"\n{facts['card']}, torch {facts['torch']}, unsloth_zoo {facts['unsloth_zoo']}: 16384 tokens, hidden 4096, vocabulary 128256, "
        "bf16 head, forward and backward, 10 steps after 3 warm ones.\n"
    )


def nf4_dequantize() -> str:
    found = [b for b in record.load() if b["benchmark"] == "nf4_dequantize"]
    if not found:
        return "Not measured yet.\n"
    facts, rows = found[0]["environment"], found[0]["rows"]
    names = ("Unsloth's bitsandbytes path", "Unsloth's kernel", "unsloth_ext", "device copy")
    shown = [r for r in rows if "shape" in r and "dtype" in r]
    lines = [
        (f"{r['shape'][0]} x {r['shape'][1]} {r['dtype']}", *(f"{r[n]['p50']:.2f}" for n in names),
         f"{r[names[1]]['p50'] / r[names[2]]['p50']:.2f}x")
        for r in shown
    ]  # fmt: skip
    head = (
        "weight",
        "bitsandbytes path",
        "today's kernel",
        "this kernel",
        "device copy of the same bytes",
        "against today's",
    )
    return table(head, lines) + (
        f"\n{facts['card']}, torch {facts['torch']}, Triton {facts['triton']}, bitsandbytes {facts['bitsandbytes']}, Unsloth "
        f"{facts['unsloth']}. Microseconds of GPU time a launch, p50 of CUDA graph replays over rotating buffers of more than 200 MB, "
        "the contestants in turn.\n"
    )


PARTS = {part.__name__: part for part in (patches, releases, claims, unread_keywords, nf4_dequantize)}


def main() -> int:
    check = "--check" in sys.argv[1:]
    stale = []
    for file in [ROOT / "README.md", *sorted((ROOT / "pr_descriptions").glob("*.md"))]:
        old = file.read_text()
        new = _PART.sub(lambda found: found.group(1) + PARTS[found.group(2)]() + found.group(3), old)
        if new != old:
            stale.append(str(file.relative_to(ROOT)))
            if not check:
                file.write_text(new)
    if stale:
        print(("out of date, run `make readme`: " if check else "written: ") + ", ".join(stale))
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
