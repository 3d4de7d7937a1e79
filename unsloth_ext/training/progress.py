"""The state of a running job in one line: a bar on a terminal, a plain line now and then in a log file."""

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_LINES = 12  # so many lines in a log, however long the job


class Display:
    """`show(record)` after every step; use as a context manager."""

    def __init__(self, label: str, total: int | None = None, memory: str = "memory"):
        self.console = Console(file=sys.stderr)
        self.label, self.memory, self.total = label, memory, total
        self.bar = None

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.bar.start()
            self.task = self.bar.add_task(self.label, total=self.total, numbers="starting")
        return self

    def __exit__(self, *_) -> None:
        if self.bar:
            self.bar.stop()

    def show(self, record: dict) -> None:
        numbers = step_numbers(record, self.memory)
        if self.bar:
            self.bar.update(self.task, completed=record["step"], total=self.total, numbers=numbers)
        elif record["step"] in (1, self.total) or record["step"] % max(1, (self.total or 60) // PLAIN_LINES) == 0:
            self.say(f"{self.label}  step {record['step']}/{self.total or '?'}  {numbers}")

    def say(self, text: str) -> None:
        (self.bar.console if self.bar else self.console).print(text, highlight=False, markup=False, soft_wrap=True)


def step_numbers(record: dict, memory: str) -> str:
    loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
    return f"loss {loss}  {record['tokens_per_second']:,.0f} tokens/s  {memory} {record['peak_memory_bytes'] / 2**30:.2f} GiB"
