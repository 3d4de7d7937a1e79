"""Text that every Python installation carries: the standard library's own sources.

They serve twice. The sources as they are pretrain the embedded base model; the docstrings in them, asked for one by one, are the chat rows
that the adapter learns from. Files are read in sorted order and parsed without being imported, so the result depends on the Python
version alone.
"""

import ast
import hashlib
import inspect
import random
import sysconfig
from functools import cache
from pathlib import Path

ROWS = 256  # a default run sees each two or three times
LONGEST_ANSWER = 400  # characters: two or three sentences, so that a row fits in 256 tokens

# Several wordings, so that the model has to read the name and cannot answer by the form of the question.
QUESTIONS = (
    "What does {name} do?",
    "Explain {name} from the Python standard library.",
    "In one paragraph: what is {name} for?",
)


@cache
def sources() -> tuple[tuple[str, str], ...]:
    """(module name, source) of every top-level module, sorted by name."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        if text.strip() and not path.stem.startswith("_sysconfigdata"):
            found.append((path.stem, text))
    return tuple(found)


def digest() -> str:
    """Eight hex digits that change when any of the sources does."""
    total = hashlib.sha256()
    for name, text in sources():
        total.update(f"{name}\0{text}\0".encode())
    return total.hexdigest()[:8]


def docstring_rows(limit: int = ROWS) -> list[dict]:
    """Chat rows `{"messages": [user, assistant]}`: a question about a function or class, answered by its docstring's first paragraph."""
    rows = []
    for module, text in sources():
        for name, documentation in _documented(ast.parse(text), module):
            answer = " ".join(inspect.cleandoc(documentation).split("\n\n")[0].split())
            if 20 <= len(answer) <= LONGEST_ANSWER:
                question = QUESTIONS[len(rows) % len(QUESTIONS)].format(name=f"`{name}`")
                rows.append(
                    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
                )
    random.Random(0).shuffle(rows)  # neighbours in a file resemble each other; a batch should not be one file
    return rows[:limit]


def _documented(tree: ast.AST, prefix: str):
    """(dotted name, docstring) of the public functions and classes below `tree`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            name = f"{prefix}.{node.name}"
            if documentation := ast.get_docstring(node, clean=False):
                yield name, documentation
            if isinstance(node, ast.ClassDef):
                yield from _documented(node, name)
