"""What the records of a run amount to: its speed, its memory, the course of its loss, and whether it holds.

Plain arithmetic on JSON, so that a report can be made again years later from the files alone.
"""

WARM_UP_STEPS = 2  # left out of the speed figures: kernels compile and caches fill


def summarize(steps: list[dict]) -> dict:
    """Speed, memory and the course of the loss over `steps`; empty if there are none."""
    if not steps:
        return {}
    speeds = sorted(record["tokens_per_second"] for record in steps[WARM_UP_STEPS:] or steps)
    losses = [record["loss"] for record in steps]
    quarter = max(1, len(losses) // 4)
    first, last = _mean(losses[:quarter]), _mean(losses[-quarter:])
    return {
        "steps": len(steps),
        "tokens": sum(record["tokens"] for record in steps),
        "tokens_per_second": {f"p{p}": round(_percentile(speeds, p / 100), 1) for p in (20, 50, 80)},
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in steps),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "first_quarter_loss": first,
        "last_quarter_loss": last,
    }


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else sum(values) / len(values)


def _percentile(ordered: list[float], fraction: float) -> float:
    """Linear between neighbours, as numpy's default."""
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def outcome(run: dict) -> list[str]:
    """The reasons why `run` does not hold; empty if it does."""
    summary, reasons = run["summary"], []
    if run["status"] != "finished":
        return [" ".join(str(run.get("error") or f"the run was {run['status']}").split())]
    broken = next((record["step"] for record in run["steps"] if record["loss"] is None), None)
    if broken is not None:
        reasons.append(f"the loss is not finite at step {broken}")
    elif summary["steps"] > 1 and summary["last_quarter_loss"] >= summary["first_quarter_loss"]:
        reasons.append(
            f"the loss did not fall: {summary['first_quarter_loss']:.4f} to {summary['last_quarter_loss']:.4f}"
        )
    if not run["sample"]["same_tokens"]:
        reasons.append("the reloaded adapter gives other tokens than the trained model")
    return reasons
