"""From what people have (.jsonl, .txt, a folder, a hub id) to token rows that every trainer treats alike.

Rows are rendered and tokenized here rather than inside trl. trl and Unsloth each have their own ideas about the second BOS, the closing EOS
and the text column, and those differ between a GPU, a CPU and releases; a row that already is `input_ids` is left alone by all of them. It
also makes a comparison exact: both sides get the same numbers, and each step's record carries a fingerprint of them.

Four kinds of row: `messages` (rendered by the chat template, every token learned), `prompt` with `completion` (only the completion learned),
`text` (cut at the maximum length), and `document` (a text file: continued in the next row instead of being cut).
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import UsageError
from . import standard_library
from .options import EMBEDDED_DATA, HUB_ID

SHAPES = "Rows hold `messages` (a list of role and content), `text`, or `prompt` and `completion`."
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")


def read_rows(dataset: str) -> list[dict] | None:
    """The rows of a local or the embedded dataset, checked one by one; None if `dataset` is a hub id, which takes `hub_rows`.

    Raises UsageError that names the file and line. Only the standard library is used, so it can run before the slow imports.
    """
    if dataset == EMBEDDED_DATA:
        return standard_library.docstring_rows()
    path = Path(dataset).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
        rows = [{"document": _read(file)} for file in files]
        if not rows:
            raise UsageError(
                f"--dataset {dataset}: no text file in that folder.", f"Looked for {', '.join(TEXT_SUFFIXES)}."
            )
    elif path.is_file():
        rows = list(_jsonl_rows(path)) if path.suffix in (".jsonl", ".json") else [{"document": _read(path)}]
    elif HUB_ID.fullmatch(dataset) and "/" in dataset:
        return None
    else:
        raise UsageError(f"--dataset {dataset!r} is neither a file, a folder nor a hub id such as owner/name.")
    if not any(any(row.values()) for row in rows):
        raise UsageError(f"--dataset {dataset}: it is empty.")
    return rows


def hub_rows(dataset: str) -> list[dict]:
    """The `train` split of a hub dataset, downloaded or from the local cache."""
    from datasets import load_dataset

    try:
        split = load_dataset(dataset, split="train")
    except Exception as error:
        raise UsageError(
            f"--dataset {dataset}: could not be loaded from the hub: {error}",
            "Check the id, the network and HF_HUB_OFFLINE.",
        ) from error
    for number, row in enumerate(split, 1):
        check_row(row, f"{dataset}, row {number}")
    return list(split)


def check_row(row: object, where: str) -> dict:
    """`row` if it has one of the known shapes, else UsageError naming `where`."""
    if not isinstance(row, dict):
        raise UsageError(f"{where}: a row must be an object, got {type(row).__name__}.", SHAPES)
    if "messages" in row:
        _check_messages(row["messages"], where)
    elif "prompt" in row and "completion" in row:
        for key in ("prompt", "completion"):
            if not isinstance(row[key], str):
                raise UsageError(f"{where}: `{key}` must be a string, got {type(row[key]).__name__}.", SHAPES)
    elif not isinstance(row.get("text"), str):
        raise UsageError(f"{where}: no known field among {', '.join(map(str, row)) or 'none'}.", SHAPES)
    return row


def _check_messages(messages: object, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"{where}: `messages` must be a list with at least one message.", SHAPES)
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UsageError(f"{where}: message {number} has no `role`.", SHAPES)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} could not be read as UTF-8 text: {error}") from error


def _jsonl_rows(path: Path) -> Iterator[dict]:
    for number, line in enumerate(_read(path).splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(f"{path}, line {number}: not JSON: {error}", "One JSON object a line.") from error
            yield check_row(row, f"{path}, line {number}")


def needs_chat_template(rows: list[dict]) -> bool:
    return any("messages" in row for row in rows)


def tokenize(rows: list[dict], tokenizer, max_seq_length: int) -> list[dict]:
    """Rows as `{"input_ids": [...], "labels": [...]}`, none longer than `max_seq_length`; a label of -100 is not learned."""
    result = []
    for number, row in enumerate(rows, 1):
        try:
            ids, prompt_length = _encode(row, tokenizer)
        except Exception as error:  # a template raises whatever its author chose
            raise UsageError(
                f"Row {number} of the dataset does not render with this chat template: {error}",
                "Mend the row or choose another --chat-template.",
            ) from error
        window = max_seq_length if "document" in row else len(ids) or 1
        for start in range(0, len(ids), window):
            piece = ids[start : start + window][:max_seq_length]
            labels = [-100] * min(prompt_length, len(piece)) + piece[prompt_length:]
            if len(piece) > 1 and any(label != -100 for label in labels):
                result.append({"input_ids": piece, "labels": labels})
    if not result:
        raise UsageError(
            f"No row has anything to learn within --max-seq-length {max_seq_length} tokens.",
            "Raise it, or shorten the prompts.",
        )
    return result


def _encode(row: dict, tokenizer) -> tuple[list[int], int]:
    """(token ids, how many of them are prompt) of a whole row."""
    eos = tokenizer.eos_token or ""
    encode: Callable[[str], list[int]] = lambda text: list(tokenizer(text, add_special_tokens=False).input_ids)  # noqa: E731
    if "messages" in row:
        # The template writes its own BOS and end of turn.
        text = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools") or None, tokenize=False)
        return encode(text), 0
    if "prompt" in row:
        # Encoded apart: a token that straddled the border would be half prompt, half answer.
        prompt = list(tokenizer(row["prompt"]).input_ids)
        if prompt and prompt[-1] == tokenizer.eos_token_id:  # some tokenizers close every text
            prompt.pop()
        return prompt + encode(row["completion"].removesuffix(eos) + eos), len(prompt)
    text = row["document"] if "document" in row else row["text"]
    ids = list(tokenizer(text.removesuffix(eos)).input_ids)
    return ids + [tokenizer.eos_token_id] * (ids[-1:] != [tokenizer.eos_token_id]), 0
