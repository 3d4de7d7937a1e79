"""Upstream's format, rule by rule. Each case is the text as it comes out; the input differs as the test says."""

import ast

import pytest

from unsloth_ext.errors import UsageError
from unsloth_ext.series import upstream_format
from unsloth_ext.series.upstream_format import format_like_upstream, is_formatted_upstream, lint_like_upstream

SPACED = {
    "keyword": ("f(a=1, b=2)\n", "f(a = 1, b = 2)\n"),
    "default": ("def f(a=1):\n    pass\n", "def f(a = 1):\n    pass\n"),
    "lambda": ("g = lambda x=1, *, y=2: x\n", "g = lambda x = 1, *, y = 2: x\n"),
    "annotation": ("def f(a: int=1) -> int:\n    x: int=2\n", "def f(a: int = 1) -> int:\n    x: int = 2\n"),
    "comparison": ("a == b != c <= d >= e\n", "a == b != c <= d >= e\n"),
    "augmented": ("a+=1\nb = c = 2\n", "a += 1\nb = c = 2\n"),
    "walrus": ("if (n := f(a=1)):\n    print(n)\n", "if n := f(a = 1):\n    print(n)\n"),
    "f-string": ('x = f"{a=} {f(b=1)} {c==1}"\n', 'x = f"{a=} {f(b=1)} {c==1}"\n'),
    "string": ('f("a=b", c="d=e")\n', 'f("a=b", c = "d=e")\n'),
    "empty string": ('print(x, end="")\n', 'print(x, end = "")\n'),
    "decorator": ("@f(a=1)\ndef g(): ...\n", "@f(a = 1)\ndef g(): ...\n"),
    "comment": ("f(a=1)  # b=2\n", "f(a = 1)  # b=2\n"),
    "several lines": (
        "f(\n    a=1,\n    b=[\n        c,\n    ],\n)\n",
        "f(\n    a = 1,\n    b = [\n        c,\n    ],\n)\n",
    ),
    "docstring": ('"""\na=1\n"""\nf(b=1)\n', '"""\na=1\n"""\n\nf(b = 1)\n'),
    "unicode": ('f("é", a=1, b="ü", c=2)\n', 'f("é", a = 1, b = "ü", c = 2)\n'),
}


@pytest.mark.parametrize("before, after", SPACED.values(), ids=SPACED)
def test_every_equals_sign_stands_between_spaces(before, after):
    assert format_like_upstream(before) == after


RULES = {
    "three parameters and a default go one a line": (
        "def f(a, b, c=1):\n    return a\n",
        "def f(\n    a,\n    b,\n    c = 1,\n):\n    return a\n",
    ),
    "required keywords are no default": ("def f(a, *, b, c):\n    return a\n", "def f(a, *, b, c):\n    return a\n"),
    "two parameters stay on a line": (
        "def f(\n    a,\n    b=1,\n):\n    return a\n",
        "def f(a, b = 1):\n    return a\n",
    ),
    "without a default they stay": (
        "def f(\n    a,\n    b,\n    c,\n):\n    return a\n",
        "def f(a, b, c):\n    return a\n",
    ),
    "calls keep their comma": ("f(\n    a,\n)\n", "f(\n    a,\n)\n"),
    "no parameters": ("def f():\n    return 1\n", "def f():\n    return 1\n"),
    "a short assert is joined": ("assert f(\n    a,\n    b,\n), (\n    'no',\n)[0]\n", 'assert f(a, b), ("no",)[0]\n'),
    "a commented assert is not": ("assert f(\n    a,  # why\n    b,\n)\n", "assert f(\n    a,  # why\n    b,\n)\n"),
    "no gap after nested imports": (
        "def f():\n    import os\n\n    return os\n",
        "def f():\n    import os\n    return os\n",
    ),
    "a comment keeps the gap": (
        "def f():\n    import os\n\n    # why\n    return os\n",
        "def f():\n    import os\n\n    # why\n    return os\n",
    ),
    "literals become one": ("x = 'a' 'b'\n", 'x = "ab"\n'),
    "a plain one goes into the f-string": ("x = f'{a}' ' {b}'\n", 'x = f"{a} {{b}}"\n'),
    "bytes and raw strings do not": ("x = (b'a' b'b', r'\\a' f'{b}')\n", 'x = (b"a" b"b", r"\\a" f"{b}")\n'),
    "an idle pass goes": ("x = 1\nif x:\n    pass\n    x = 2\n", "x = 1\nif x:\n    x = 2\n"),
    "upstream does not look into a block of one": ("if x:\n    pass\n    x = 2\n", "if x:\n    pass\n    x = 2\n"),
}


@pytest.mark.parametrize("before, after", RULES.values(), ids=RULES)
def test_the_rules_around_ruff(before, after):
    assert format_like_upstream(before) == after


@pytest.mark.parametrize("text", [after for _, after in [*SPACED.values(), *RULES.values()]])
def test_formatted_text_stays_as_it_is(text):
    assert format_like_upstream(text) == text


def test_long_lines_wrap_at_100_before_the_spaces_come():
    call = f"f({', '.join(f'argument_{n}=value_{n}' for n in range(10))})\n"
    formatted = format_like_upstream(call)
    assert formatted.count("\n") > 2 and " = value_3" in formatted
    assert ast.dump(ast.parse(formatted)) == ast.dump(ast.parse(call))


def test_what_is_not_python_is_refused():
    with pytest.raises(UsageError, match="ruff cannot format"):
        format_like_upstream("def f(:\n")


def test_files_that_upstream_leaves_alone():
    assert is_formatted_upstream("unsloth/loss.py")
    assert not is_formatted_upstream("unsloth/chat_templates.py") and not is_formatted_upstream("unsloth/a.html")


def test_the_linter_finds_what_upstream_looks_for_and_nothing_else():
    assert lint_like_upstream("import os\nx=1\n") == []
    assert "F821" in lint_like_upstream("print(undefined_name)\n")[0]


@pytest.mark.parametrize("version, said", [("ruff 0.9.0", "found 0.9.0"), (None, "not installed")])
def test_another_ruff_is_an_error_that_says_what_to_install(monkeypatch, tmp_path, version, said):
    """A Python without the ruff module, and a `ruff` on the path of another version, or none."""
    monkeypatch.setattr(upstream_format.sys, "executable", "/bin/false")
    monkeypatch.setenv("PATH", str(tmp_path))
    if version:
        (tmp_path / "ruff").write_text(f"#!/bin/sh\necho {version}\n")
        (tmp_path / "ruff").chmod(0o755)
    upstream_format._ruff.cache_clear()
    with pytest.raises(UsageError, match=rf"{said}\n.*pip install ruff==0.6.9"):
        format_like_upstream("read_by_no_other_test = 1\n")  # what was formatted once is not formatted again
    upstream_format._ruff.cache_clear()
