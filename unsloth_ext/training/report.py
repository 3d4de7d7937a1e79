"""report.json and report.html: what a comparison found, for a program and for a person.

The page is one file without script or network, made from report.json alone, so an old result can be rendered by a newer version. It opens
with the verdict, then shows what the verdict rests on, from the strongest evidence (the curves) to the small print (options, versions).
Every piece of text that comes from outside, a model's answer as much as a patch's reason, passes through `escape`.
"""

import json
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from ..errors import UsageError
from .compare import SIDES, load_side
from .curves import Curve, chart
from .recorder import write_json

NAMES = {"pristine": "pristine Unsloth", "patched": "Unsloth + unsloth_ext", "train": "this run"}
OPTION_NAMES = {
    "load_in_4bit": "4-bit base",
    "lora_rank": "LoRA rank",
    "lora_alpha": "LoRA alpha",
    "max_seq_length": "max sequence length",
}
ENVIRONMENT_NAMES = {"cpu": "CPU", "cuda": "CUDA", "python": "Python", "commit": "unsloth_ext commit"}


def write(runs: list[dict], verdict: dict, folder: Path) -> Path:
    """Write both files into `folder` and return the page's path."""
    write_json(folder / "report.json", {"format": 1, "verdict": verdict, "runs": runs})
    page = folder / "report.html"
    page.write_text(render(runs, verdict), encoding="utf-8")
    return page


def load(path: Path) -> tuple[list[dict], float, Path]:
    """(runs, tolerance, folder) from a report.json, or from the folder of a comparison or a run. Raises UsageError."""
    folder = path if path.is_dir() else path.parent
    sides = [load_side(folder / side) for side in SIDES if (folder / side).is_dir()]
    if path.is_file() or (folder / "report.json").is_file():
        file = path if path.is_file() else folder / "report.json"
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
            return report["runs"], report["verdict"]["tolerance"], folder
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{file} is not a report: {error!r}", "Give a report.json that `unsloth-ext train` wrote."
            ) from error
    runs = [run for run in sides or [load_side(folder)] if run]
    if not runs:
        raise UsageError(
            f"{path} holds no run.", "Give a report.json, or the folder that `unsloth-ext train` wrote to."
        )
    return runs, 1e-2, folder


def render(runs: list[dict], verdict: dict) -> str:
    """The page as text."""
    options = next((run["options"] for run in runs if "options" in run), {})
    environment = next((run["environment"] for run in reversed(runs) if "environment" in run), {})
    title = f"QLoRA fine-tune of {model_name(options)}"
    parts = [
        f'<p class="eyebrow">{escape(_eyebrow(runs, environment))}</p><h1>{escape(title)}</h1>',
        _verdict(verdict),
        _figures(runs, verdict),
        *_crashes(runs),
        _charts(runs, verdict),
        _measurements(runs),
        _patches(runs),
        _samples(runs, options),
        _facts(
            "Options",
            {OPTION_NAMES.get(k, k.replace("_", " ")): _option(v) for k, v in options.items() if v is not None},
        ),
        _facts("Environment", {ENVIRONMENT_NAMES.get(k, k): v for k, v in environment.items()}),
        f"<footer>Made by <code>unsloth-ext train{' --compare' if len(runs) > 1 else ''}</code>. "
        "<code>unsloth-ext report</code> renders it again from report.json.</footer>",
    ]
    skeleton = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    return Template(skeleton).substitute(title=escape(title), body="\n".join(part for part in parts if part))


def model_name(options: dict) -> str:
    model = str(options.get("model", "a model"))
    return {"embedded": "the embedded model", "embedded-tiny": "the tiny embedded model"}.get(
        model, Path(model).name if model.startswith("/") else model
    )


def _eyebrow(runs: list[dict], environment: dict) -> str:
    kind = "Pristine Unsloth against Unsloth + unsloth_ext" if len(runs) > 1 else "Unsloth training run"
    where = environment.get("card") or environment.get("cpu", "")
    return ", ".join(part for part in (kind, where, environment.get("date")) if part)


def _option(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _verdict(verdict: dict) -> str:
    problems = "".join(f"<li>{escape(problem)}</li>" for problem in verdict["problems"])
    word, style = ("Holds.", "") if verdict["holds"] else ("Does not hold.", " fails")
    listed = f"<ul>{problems}</ul>" if problems else ""
    return f'<div class="verdict{style}"><p><b>{word}</b> {escape(verdict["headline"])}.</p>{listed}</div>'


def _figures(runs: list[dict], verdict: dict) -> str:
    cells = []
    if len(runs) > 1 and verdict.get("largest_difference") is not None:
        at = f"at step {verdict['at_step']}; " if verdict["largest_difference"] else ""
        cells.append(
            ("Largest loss difference", short(verdict["largest_difference"]), f"{at}tolerance {verdict['tolerance']:g}")
        )
    measured = [run for run in runs if run["summary"].get("steps")]
    for key, name, form in (
        (
            "last_loss",
            "Loss",
            lambda s: (short(s["last_loss"]), f"from {short(s['first_loss'])} in {s['steps']} steps"),
        ),
        ("tokens_per_second", "Speed, median", lambda s: (f"{s['tokens_per_second']['p50']:,.0f}", "tokens/s")),
        ("peak_memory_bytes", "Peak memory", lambda s: (memory(s["peak_memory_bytes"]), s.get("memory", ""))),
    ):
        if measured and key in measured[-1]["summary"]:
            value, below = form(measured[-1]["summary"])
            if len(measured) > 1 and key != "last_loss":
                below = (
                    f"{below}; pristine {form(measured[0]['summary'])[0]}"
                    if key == "tokens_per_second"
                    else f"pristine {form(measured[0]['summary'])[0]}"
                )
            cells.append((name, value, below))
    return (
        '<dl class="figures">'
        + "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(below)}</small></dd></div>"
            for name, value, below in cells
        )
        + "</dl>"
        if cells
        else ""
    )


def _crashes(runs: list[dict]) -> list[str]:
    parts = []
    for run in runs:
        if run["status"] != "finished":
            log = "\n".join(run.get("log_tail", [])) or "(it left no log)"
            reason = " ".join(str(run.get("error") or run["status"]).split())
            parts.append(
                f"<h2>{escape(NAMES.get(run['side'], run['side']))} did not finish</h2>"
                f"<p>It ended after {len(run['steps'])} steps: {escape(reason)}</p>"
                f'<p>The last lines of its log:</p><pre class="log">{escape(log)}</pre>'
            )
    return parts


def _charts(runs: list[dict], verdict: dict) -> str:
    if not any(run["steps"] for run in runs):
        return ""

    def curves(field: str) -> list[Curve]:
        styles = ("first", "second") if len(runs) > 1 else ("second",)
        return [
            Curve(style, [(record["step"], record[field]) for record in run["steps"]])
            for style, run in zip(styles, runs, strict=True)
        ]

    legend = "".join(
        f'<li><i class="{style}"></i>{escape(NAMES.get(run["side"], run["side"]))}</li>'
        for style, run in zip(("first", "second") if len(runs) > 1 else ("alone",), runs, strict=True)
    )
    parts = [f'<h2>Step by step</h2><ul class="legend">{legend}</ul>', chart("Loss", "nats per token", curves("loss"))]
    if len(runs) > 1 and verdict.get("largest_difference") is not None:
        differences = [
            (a["step"], b["loss"] - a["loss"] if a["loss"] is not None and b["loss"] is not None else None)
            for a, b in zip(*(run["steps"] for run in runs), strict=False)
        ]
        parts.append(
            chart(
                "Difference of the losses, patched minus pristine",
                "nats per token",
                [Curve("second", differences)],
                band=verdict["tolerance"],
            )
        )
        parts.append(f'<p class="note">{escape(_difference_note(verdict))}</p>')
    parts.append(chart("Speed", "tokens per second", curves("tokens_per_second"), zero_based=True))
    if note := _speed_note(runs):
        parts.append(f'<p class="note">{escape(note)}</p>')
    return "".join(parts)


def _speed_note(runs: list[dict]) -> str:
    """Whether a difference of the speeds stands out from the spread of each."""
    if len(runs) < 2 or not all("tokens_per_second" in run["summary"] for run in runs):
        return ""
    first, second = (run["summary"]["tokens_per_second"] for run in runs)
    if first["p20"] <= second["p80"] and second["p20"] <= first["p80"]:
        return "The ranges from p20 to p80 overlap, so this run shows no difference in speed."
    return (
        f"The ranges from p20 to p80 do not overlap; the medians differ by a factor of {second['p50'] / first['p50']:.2f}. "
        "The sides ran one after the other, so anything else that the machine did meanwhile is in these numbers too."
    )


def _difference_note(verdict: dict) -> str:
    tolerance, worst = verdict["tolerance"], verdict["largest_difference"]
    data = (
        "Both sides saw the same tokens at every step."
        if verdict["same_data"]
        else "The two sides did not see the same tokens."
    )
    if worst == 0:
        return f"The losses are the same to the last bit. {data}"
    where = "is shaded" if worst * 1.15 > tolerance / 8 else "lies far outside this chart"
    return f"The tolerance of ±{tolerance:g} {where}. {data}"


def _measurements(runs: list[dict]) -> str:
    runs = [run for run in runs if run["summary"].get("steps")]
    if not runs:
        return ""
    rows = [
        ("Loss, first step", lambda s: short(s["first_loss"])),
        ("Loss, last step", lambda s: short(s["last_loss"])),
        ("Mean loss, first quarter", lambda s: short(s["first_quarter_loss"])),
        ("Mean loss, last quarter", lambda s: short(s["last_quarter_loss"])),
        ("Tokens", lambda s: f"{s['tokens']:,}"),
        *((f"Tokens/s, {p}", lambda s, p=p: f"{s['tokens_per_second'][p]:,.0f}") for p in ("p20", "p50", "p80")),
        ("Peak memory", lambda s: memory(s["peak_memory_bytes"])),
    ]
    phases = {phase: None for run in runs for phase in run["summary"].get("wall_seconds", {})}
    rows += [
        (f"Wall time, {phase}", lambda s, phase=phase: seconds(s.get("wall_seconds", {}).get(phase)))
        for phase in phases
    ]
    head = "".join(f'<th class="n" scope="col">{escape(NAMES.get(run["side"], run["side"]))}</th>' for run in runs)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f'<td class="n">{escape(value(run["summary"]))}</td>' for run in runs)
        + "</tr>"
        for name, value in rows
    )
    source = runs[-1]["summary"].get("memory")
    memory_note = f"Peak memory is {source}. " if source else ""
    return (
        f'<h2>Measurements</h2><div class="scroll"><table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="note" style="margin-top:.9rem">{escape(memory_note)}The first two steps are left out of the speeds; p20 and p80 are the '
        "percentiles around the median.</p>"
    )


def _patches(runs: list[dict]) -> str:
    patches = runs[-1].get("patches")
    if patches is None:
        return ""
    if not patches:
        return "<h2>Patches</h2><p>None is registered.</p>"
    rows = "".join(
        f'<tr><td><code>{escape(row["id"])}</code></td><td class="state {escape(row["state"], quote=True)}">{escape(row["state"])}</td>'
        f'<td>{escape(row["summary"])}{_reason(row["reason"])}</td></tr>'
        for row in patches
    )
    off = ""
    if len(runs) > 1 and (states := {row["state"] for row in runs[0].get("patches", [])}):
        off = f'<p class="note" style="margin-top:.9rem">On the pristine side every patch was {escape(", ".join(sorted(states)))}.</p>'
    return (
        '<h2>Patches</h2><table class="patches"><thead><tr><th scope="col">Patch</th><th scope="col">State</th>'
        f'<th scope="col">What it does</th></tr></thead><tbody>{rows}</tbody></table>{off}'
    )


def _reason(reason: str) -> str:
    return f'<br><span class="note">{escape(reason)}</span>' if reason else ""


def _samples(runs: list[dict], options: dict) -> str:
    runs = [run for run in runs if "sample" in run]
    if not runs:
        return ""
    parts = ["<h2>A sample from the trained model</h2>"]
    if str(options.get("model", "")).startswith("embedded"):
        parts.append(
            "<p>The embedded model is far too small to answer well. The sample shows that the saved adapter loads and that the model it gives "
            "is the trained one, token for token.</p>"
        )
    parts.append(f"<h3>Prompt</h3><pre>{escape(runs[0]['sample']['prompt'].rstrip())}</pre>")
    for run in runs:
        same = (
            "the reloaded adapter gives the same tokens"
            if run["sample"]["same_tokens"]
            else "the reloaded adapter gives other tokens"
        )
        parts.append(
            f"<h3>{escape(NAMES.get(run['side'], run['side']))}: {same}</h3><pre>{escape(run['sample']['trained']) or '(nothing)'}</pre>"
        )
        if not run["sample"]["same_tokens"]:
            parts.append(f"<h3>Reloaded</h3><pre>{escape(run['sample']['reloaded'])}</pre>")
    return "".join(parts)


def _facts(title: str, facts: dict[str, object]) -> str:
    if not facts:
        return ""
    rows = "".join(
        f"<div><dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items()
    )
    return f'<h2>{escape(title)}</h2><dl class="facts">{rows}</dl>'


def short(value: float | None) -> str:
    """Four significant digits, a small number in powers of ten."""
    if value is None:
        return "not finite"
    return "0" if value == 0 else f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def memory(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"
