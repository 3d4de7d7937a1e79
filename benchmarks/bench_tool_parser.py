"""The tool-call parser on a CPU: MB/s on what models write, and how its time grows with the length of the text.

The baseline of the speed is `json.loads` of the same calls, which reads values but neither finds calls nor streams. The growth is
the time for ten times the text, for the texts that are worst for a parser: 10 is linear, 100 would be quadratic.
"""

import json
import time

from record import claim, percentiles, write

from unsloth_ext.tools.parsing import StreamingParser, parse

CALL = {
    "name": "book_table",
    "parameters": {
        "city": "San Francisco",
        "guests": 4,
        "days": [1, 2.5],
        "note": 'by the "window"\nplease',
        "vip": True,
    },
}
TEXTS = {
    "json": json.dumps(CALL),
    "json list": json.dumps([CALL] * 8),
    "pythonic": "["
    + ", ".join(['book_table(city="San Francisco", guests=4, days=[1, 2.5], note="by the \\"window\\"")'] * 4)
    + "]",
    "content": "The table is booked for four, by the window, at eight. " * 20,
    "code": "<|python_tag|>" + "for number in range(10):\n    print(number)\n" * 20,
    "long argument": json.dumps({"name": "write", "parameters": {"path": "a.py", "text": "a line of text\n" * 500}}),
}
WORST = {
    "open brackets": "[",
    "open braces": "{",
    "nested objects": '{"name":',
    "quotes": '"',
    "backslashes in a string": "\\\\",
    "function tags": "<function=",
    "open function tags": "<function=f>{",
    "semicolons after a call": ";",
    "python tags": "<|python_tag|>",
    "half tokens": "<|eot_id|",
    "calls": '{"name":"f","parameters":{}};',
    "spaces": " ",
}
PREFIX = {
    "backslashes in a string": '{"name": "f", "parameters": {"a": "',
    "semicolons after a call": '{"name":"f","parameters":{}}',
}
SHORT, LONG = 10_000, 100_000


def stream(text: str) -> None:
    parser = StreamingParser()
    for start in range(0, len(text), 4):  # about a token
        parser.feed(text[start : start + 4])
    parser.finish()


def seconds(action, text: str, samples: int = 9) -> list[float]:
    measured = []
    for _ in range(samples):
        start = time.process_time()
        action(text)
        measured.append(time.process_time() - start)
    return measured


def megabytes_per_second(action, text: str) -> dict:
    size = len(text.encode())
    repeats = max(1, 200_000 // size)

    def repeated(text: str) -> None:
        for _ in range(repeats):
            action(text)

    return percentiles([size * repeats / 1e6 / max(taken, 1e-9) for taken in seconds(repeated, text)])


def main() -> None:
    rows = []
    for name, text in TEXTS.items():
        baseline = megabytes_per_second(json.loads, text) if name in ("json", "json list", "long argument") else None
        for mode, action in (("one shot", parse), ("in pieces of 4", stream)):
            ours = megabytes_per_second(action, text + "<|eot_id|>")
            rows.append({"text": name, "mode": mode, "unit": "MB/s", "ours": ours, "json.loads": baseline})
    worst = 0.0
    for name, piece in WORST.items():
        short, long = (PREFIX.get(name, "") + piece * (size // len(piece)) for size in (SHORT, LONG))
        for mode, action in (("one shot", parse), ("in pieces of 4", stream)):
            # The short one ten times, so that the clock's steps do not count.
            tenfold = min(seconds(lambda text, action=action: [action(text) for _ in range(10)], short, 5))
            ratio = min(seconds(action, long, 5)) / (tenfold / 10)
            worst = max(worst, ratio)
            rows.append({"text": name, "mode": mode, "unit": "time of 10x the text", "ours": round(ratio, 2)})
    slowest = min(row["ours"]["p50"] for row in rows if row["unit"] == "MB/s")
    write(
        "tool_parser",
        rows,
        [
            claim(
                "tools.parser.growth", round(worst, 1), "times for 10x the text, worst case", "<= 20", "10 is linear"
            ),
            claim(
                "tools.parser.speed",
                round(slowest, 2),
                "MB/s, slowest text",
                ">= 0.2",
                "a model writes below 0.001 MB/s",
            ),
        ],
    )


if __name__ == "__main__":
    main()
