"""Python text in the format that Unsloth's own checks ask for.

It is ruff 0.6.9 with a line length of 100 and a few rules around it. Before ruff, a signature with three or more parameters and
a default gets a trailing comma (ruff then writes one parameter a line), any other signature loses it, and an assert that fits on
one line loses the commas that hold it open. After ruff, every `=` stands between spaces, in keywords and defaults too; string
literals side by side on a line become one; a short nested block has no blank line after its imports; a `pass` beside other
statements goes.

Each rule here collects edits from tokens and the syntax tree and is dropped as a whole if the text would then mean something
else, so formatting never changes a program.
"""

from __future__ import annotations

import ast
import io
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Callable
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path

from ..errors import UnslothExtError, UsageError

RUFF_VERSION = "0.6.9"
LINE_LENGTH = 100
# Upstream leaves these data-like files alone, wherever they stand.
UNFORMATTED = ("chat_templates.py", "ollama_template_mappers.py", "_auto_install.py", "mapper.py")

Position = tuple[int, int]  # row from 1, column in characters from 0
Edit = tuple[Position, Position, str]  # replace what lies between the two by the string
_LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT)
_STRING_STARTS = {tokenize.STRING, getattr(tokenize, "FSTRING_START", tokenize.STRING)}
_FSTRING_END = getattr(tokenize, "FSTRING_END", None)  # Python 3.12 splits f-strings into tokens


@lru_cache(maxsize=64)  # what one patch of a series leaves, the next one finds
def format_like_upstream(text: str) -> str:
    """The text as upstream's formatter leaves it. Raises UsageError for text that is not Python, or without ruff 0.6.9."""
    for rule in (signature_commas, short_asserts):
        text = _applied(rule, text)
    done = subprocess.run(
        [
            *_ruff(),
            "format",
            "--isolated",
            f"--line-length={LINE_LENGTH}",
            "--target-version=py311",
            "--stdin-filename=x.py",
            "-",
        ],
        input=text.encode(),
        capture_output=True,
    )
    if done.returncode:
        raise UsageError(f"ruff cannot format this: {done.stderr.decode().strip()}", "Correct the Python syntax first.")
    text = done.stdout.decode()
    for rule in (equals_between_spaces, imports_without_gap, one_literal, no_idle_pass):
        text = _applied(rule, text)
    return text


def is_formatted_upstream(path: str) -> bool:
    """Whether upstream's formatter looks at a file of this name."""
    return path.endswith(".py") and not path.endswith(UNFORMATTED)


def lint_like_upstream(text: str) -> list[str]:
    """What upstream's linter says: one string a finding, without a file name."""
    options = (
        "--isolated",
        "--select=E9,F63,F7,F82",
        "--output-format=concise",
        "--no-cache",
        "--stdin-filename=x.py",
        "-",
    )
    done = subprocess.run([*_ruff(), "check", "--quiet", *options], input=text.encode(), capture_output=True)
    if done.returncode not in (0, 1):
        raise UnslothExtError(
            f"ruff check failed: {done.stderr.decode().strip()}", f"Run: pip install ruff=={RUFF_VERSION}"
        )
    return [line.removeprefix("x.py:") for line in done.stdout.decode().splitlines() if line.startswith("x.py:")]


@cache
def _ruff() -> tuple[str, ...]:
    hint = f"Upstream formats with exactly this version; run: pip install ruff=={RUFF_VERSION}"
    beside = Path(sys.executable).with_name("ruff")  # starts without a Python around it
    candidates = [(str(path),) for path in (beside, shutil.which("ruff")) if path and Path(path).is_file()]
    candidates.append((sys.executable, "-m", "ruff"))
    seen = []
    for command in candidates:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True)
        version = done.stdout.strip().removeprefix("ruff ")
        if done.returncode == 0 and version == RUFF_VERSION:
            return command
        if done.returncode == 0:
            seen.append(version)
    if seen:
        raise UsageError(f"ruff {RUFF_VERSION} is needed, found {seen[0]}", hint)
    raise UsageError(f"ruff {RUFF_VERSION} is needed and ruff is not installed", hint)


def _applied(rule: Callable[[str, list[tokenize.TokenInfo], ast.Module], list[Edit]], text: str) -> str:
    """The text after the rule's edits, or as it was if it cannot be read or would mean something else."""
    try:
        edits = rule(text, *_read(text))
        changed = _edited(text, edits) if edits else text
        same = changed == text or rule is no_idle_pass or _meaning(changed) == _meaning(text)
    except (SyntaxError, tokenize.TokenError):
        return text
    return changed if same else text


@lru_cache(maxsize=4)  # six rules read a text, and few of them change it
def _read(text: str) -> tuple[list[tokenize.TokenInfo], ast.Module]:
    return list(tokenize.generate_tokens(io.StringIO(text).readline)), ast.parse(text)


@lru_cache(maxsize=4)
def _meaning(text: str) -> str:
    return ast.dump(_read(text)[1])


def _edited(text: str, edits: list[Edit]) -> str:
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    for (row, column), (end_row, end_column), new in sorted(set(edits), reverse=True):
        text = text[: starts[row - 1] + column] + new + text[starts[end_row - 1] + end_column :]
    return text


def equals_between_spaces(text: str, tokens: list[tokenize.TokenInfo], tree: ast.Module) -> list[Edit]:
    """`f(a=1)` becomes `f(a = 1)`. The inside of an f-string is left alone, so that all Pythons give the same: 3.11 cannot see it."""
    edits: list[Edit] = []
    lines = text.split("\n")
    depth = 0
    for token in tokens:
        if token.type == tokenize.STRING or _FSTRING_END is None:
            pass
        elif token.type in _STRING_STARTS:
            depth += 1
        elif token.type == _FSTRING_END:
            depth -= 1
        if depth or token.type != tokenize.OP or token.string != "=":
            continue
        line = lines[token.start[0] - 1]
        before, after = line[: token.start[1]], line[token.end[1] :]
        if before and not before[-1].isspace():
            edits.append((token.start, token.start, " "))
        if after and not after[0].isspace():
            edits.append((token.end, token.end, " "))
    return edits


def signature_commas(text: str, tokens: list[tokenize.TokenInfo], tree: ast.Module) -> list[Edit]:
    """The trailing comma that decides whether ruff writes a signature on one line or one parameter a line."""
    wants = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            a = node.args
            count = len(a.posonlyargs + a.args + a.kwonlyargs) + bool(a.vararg) + bool(a.kwarg)
            has_default = bool(a.defaults) or any(default is not None for default in a.kw_defaults)
            wants[node.lineno] = count >= 3 and has_default
    edits: list[Edit] = []
    for at, token in enumerate(tokens):
        if token.type != tokenize.NAME or token.string != "def" or token.start[0] not in wants:
            continue
        # Only the first bracket that is a parenthesis: `def f[T: (int, str)](...)` is newer than upstream's floor.
        opening = next(i for i in range(at, len(tokens)) if tokens[i].string == "(")
        closing = _closing(tokens, opening)
        last = next(t for t in reversed(tokens[:closing]) if t.type not in _LAYOUT)
        if last.string == "(":
            continue
        if wants[token.start[0]] and last.string != ",":
            edits.append((last.end, last.end, ","))
        elif not wants[token.start[0]] and last.string == ",":
            edits.append((last.start, last.end, ""))
    return edits


def _closing(tokens: list[tokenize.TokenInfo], opening: int) -> int:
    depth = 0
    for at in range(opening, len(tokens)):
        if tokens[at].type == tokenize.OP:
            depth += tokens[at].string in ("(", "[", "{")
            depth -= tokens[at].string in (")", "]", "}")
            if not depth:
                return at
    raise tokenize.TokenError("bracket is never closed")


def short_asserts(text: str, tokens: list[tokenize.TokenInfo], tree: ast.Module) -> list[Edit]:
    """Without its trailing commas, ruff joins an assert that was written over several lines and fits on one."""
    lines = text.split("\n")
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    solid = [token for token in tokens if token.type not in _LAYOUT]
    edits: list[Edit] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assert) or node.end_lineno == node.lineno:
            continue
        rows = range(node.lineno, node.end_lineno + 1)
        if comments.intersection(rows) or _joined_length(lines[rows[0] - 1 : rows[-1]]) > LINE_LENGTH:
            continue
        for token, following in pairwise(solid):
            if token.string == "," and token.start[0] in rows and following.string in (")", "]", "}"):
                comma: Edit = (token.start, token.end, "")
                if ast.dump(ast.parse(_edited(text, [comma]))) == ast.dump(tree):  # not the comma of a one-tuple
                    edits.append(comma)
    return edits


def _joined_length(lines: list[str]) -> int:
    """The length of a statement written on one line, estimated from above."""
    return len(lines[0]) - len(lines[0].lstrip()) + len(" ".join(line.strip() for line in lines))


def imports_without_gap(text: str, tokens: list[tokenize.TokenInfo], tree: ast.Module) -> list[Edit]:
    """In a nested block of at most three statements no blank line follows the imports."""
    lines = text.split("\n")
    edits: list[Edit] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module):
            continue
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if not isinstance(block, list) or len(block) > 3:
                continue
            for first, second in pairwise(block):
                gap = range(first.end_lineno + 1, second.lineno)
                if isinstance(first, ast.Import | ast.ImportFrom) and not isinstance(
                    second, ast.Import | ast.ImportFrom
                ):
                    if gap and not any(lines[row - 1].strip() for row in gap):
                        edits.append(((gap[0], 0), (gap[-1] + 1, 0), ""))
    return edits


def no_idle_pass(text: str, tokens: list[tokenize.TokenInfo], tree: ast.Module) -> list[Edit]:
    """A `pass` in a block that has other statements is taken out. Upstream does not look inside a block of one statement."""
    lines = text.split("\n")
    edits: list[Edit] = []
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        waiting += getattr(node, "handlers", [])
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if not isinstance(block, list) or len(block) < 2:
                continue
            waiting += block
            for statement in block:
                if isinstance(statement, ast.Pass):
                    row, line = statement.lineno, lines[statement.lineno - 1]
                    alone = line.strip() == "pass"
                    end = (row + 1, 0) if alone else (row, statement.end_col_offset)
                    edits.append(((row, 0 if alone else statement.col_offset), end, ""))
    return edits


def one_literal(text: str, tokens: list[tokenize.TokenInfo], tree: ast.Module) -> list[Edit]:
    """`"a" "b"` on one line becomes `"ab"`; a plain literal beside an f-string goes into it, its braces doubled."""
    lines = text.split("\n")
    asserts = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    edits: list[Edit] = []
    for run in _literal_runs(tokens):
        start, end = run[0][0], run[-1][1]
        merged = _merged([lines[row - 1][column:end_column] for (row, column), (_, end_column) in run])
        if merged is None:
            continue
        inside = next((n for n in asserts if n.lineno <= start[0] <= n.end_lineno and n.lineno < n.end_lineno), None)
        if inside and merged.lstrip("uUrR").startswith(("f", "F")):
            # ruff would wrap the condition of an assert whose message no longer fits
            rows = lines[inside.lineno - 1 : inside.end_lineno]
            at = start[0] - inside.lineno
            rows[at] = rows[at][: start[1]] + merged + rows[at][end[1] :]
            if _joined_length(rows) > LINE_LENGTH:
                continue
        edits.append((start, end, merged))
    return edits


def _literal_runs(tokens: list[tokenize.TokenInfo]) -> list[list[tuple[Position, Position]]]:
    """Runs of two or more string literals that stand side by side on one line."""
    literals: list[tuple[Position, Position] | None] = []
    depth, start = 0, (0, 0)
    for token in tokens:
        if token.type in _STRING_STARTS and token.type != tokenize.STRING:
            start = start if depth else token.start
            depth += 1
        elif _FSTRING_END is not None and token.type == _FSTRING_END:
            depth -= 1
            if not depth:
                literals.append((start, token.end))
        elif not depth:
            literals.append((token.start, token.end) if token.type == tokenize.STRING else None)
    runs: list[list[tuple[Position, Position]]] = [[]]
    for literal in literals:
        on_one_line = literal is not None and literal[0][0] == literal[1][0]
        if not on_one_line or (runs[-1] and runs[-1][-1][1][0] != literal[0][0]):
            runs.append([])
        if on_one_line:
            runs[-1].append(literal)
    return [run for run in runs if len(run) > 1]


def _merged(literals: list[str]) -> str | None:
    """One literal for several, or None where upstream leaves them side by side."""
    parts = []
    for literal in literals:
        quote_at = min(at for at in (literal.find('"'), literal.find("'")) if at >= 0)
        prefix, rest = literal[:quote_at].lower(), literal[quote_at:]
        quote = rest[:3] if rest[:3] in ('"""', "'''") and len(rest) >= 6 else rest[0]
        parts.append((prefix, quote, rest[len(quote) : -len(quote)]))
    prefixes = {prefix for prefix, _, _ in parts}
    quotes = {quote for _, quote, _ in parts}
    if len(quotes) > 1 or any("b" in prefix for prefix in prefixes):
        return None
    quote = quotes.pop()
    folded = ["f" in prefix for prefix, _, _ in parts]
    if not any(folded):
        return (
            f"{literals[0][: len(parts[0][0])]}{quote}{''.join(p[2] for p in parts)}{quote}"
            if len(prefixes) == 1
            else None
        )
    if all(folded) or any("r" in prefix for prefix in prefixes):
        return None
    doubled = (body if "f" in prefix else body.replace("{", "{{").replace("}", "}}") for prefix, _, body in parts)
    return f"f{quote}{''.join(doubled)}{quote}"
