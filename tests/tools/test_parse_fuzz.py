"""Random and mutated texts, and the texts that are worst for a parser: nothing raises, and time is linear in length."""

import json
import time

import pytest
from parser_texts import random_text

from unsloth_ext.tools.parsing import ParseError, StreamingParser, parse


@pytest.mark.parametrize("count", [25_000, pytest.param(100_000, marks=pytest.mark.extended)])
def test_random_texts(fuzz, count):
    called = refused = 0
    for number in range(count):
        text = random_text(fuzz)
        try:
            message = parse(text)
            called += bool(message.tool_calls)
            if number % 4 == 0:
                json.dumps([call.arguments for call in message.tool_calls], allow_nan=False).encode()
                try:
                    assert parse(text, strict=True).stop == message.stop
                except ParseError as error:
                    refused += 1
                    assert 0 <= error.position <= len(text) and error.reason
        except ParseError:
            raise AssertionError(f"lenient parsing raised, text {text!r}") from None
        except Exception as error:
            raise AssertionError(f"text {text!r}") from error
    assert called > count / 10 and refused > count / 20  # they are not all nonsense


PREFIXES = ("", "<|python_tag|>", '{"name": "', '[f(a="', "x<function=f>{}", 'x{"name": "f", "parameters": {}}')
REPEATED = (
    *(
        "[",
        "{",
        "(",
        '"',
        "\\",
        "<",
        "<|",
        ";",
        " ",
        "\n{",
        "9",
        '{"a":',
        '{"name":',
        "[f(a=",
        "<function=",
        "<function=f>{",
    ),
    *(
        "<|python_tag|>",
        "<|eot_id|",
        '{"name":"f","parameters":{}};',
        "brave_search.call(",
        "brave_",
        '{"a": [1, "x"]}, ',
        "a word ",
        "`",
        "`x",
        "\n```",
        "<function=f>{}</function>",
    ),
)


def seconds(read, text: str) -> float:
    start = time.process_time()
    read(text)
    return time.process_time() - start


def stream(text: str, size: int = 7) -> None:
    parser = StreamingParser()
    for start in range(0, len(text), size):
        parser.feed(text[start : start + size])
    parser.finish()


@pytest.mark.parametrize("prefix", PREFIXES)
def test_time_is_linear(prefix):
    """Eight times the text takes eight times as long; a quadratic parser would take 64 times as long."""
    for repeated in REPEATED:
        short = prefix + repeated * (2_000 // len(repeated))
        long = prefix + repeated * (16_000 // len(repeated))
        for read in (parse, stream):
            for _ in range(12):  # something else may have taken the time
                # Below a millisecond, other things than the parser are measured.
                ratio = seconds(read, long) / max(seconds(read, short), 1e-3)
                if ratio < 24:
                    break
            assert ratio < 24, (prefix, repeated, read, ratio)
