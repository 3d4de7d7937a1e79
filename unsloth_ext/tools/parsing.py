"""The text of a Llama 3.x assistant turn, or its tokens, becomes content and tool calls.

| form | example |
| --- | --- |
| JSON, as Hugging Face's template writes it | `{"name": "f", "parameters": {"a": 1}}` (or "arguments") |
| JSON, as Meta writes it | `<|python_tag|>{"type": "function", "name": "f", "parameters": {"a": 1}}<|eom_id|>` |
| JSON, as OpenAI writes it | `{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}` |
| several | one after the other, with `;`, spaces, line breaks or nothing between them; or a JSON list |
| pythonic (3.2) | `[f(a=1), g(b="x")]` |
| function tag | `<function=f>{"a": 1}</function>` |
| builtin | `<|python_tag|>brave_search.call(query="x")`, with or without the tag |
| code | `<|python_tag|>` and anything else: a call of code_interpreter(code) |

A call that is cut off is content. Code is a call however far it goes: with `stop` None, it may be cut off.
JSON without a name and arguments is content. A call without arguments (`{"name": "f"}`) is one only after `<|python_tag|>`
or with "type": "function". Where calls may stand, and what no rule can tell: `streaming`. How values are read: `scanning`. Limits: `parsed_message`.

Sources: the `llama-models` package (`llama3/tool_utils.py`, `llama3/chat_format.py`, the prompt-format documents of 3.1 and
3.2); compared with vLLM's `llama3_json` and `pythonic` parsers, SGLang's `llama3` and `pythonic` detectors and trl's response
template for Llama 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .parsed_message import ParsedMessage, ParseError, ToolCall
from .special_tokens import SPECIAL_TOKENS
from .streaming import Delta, StreamingParser

__all__ = ["Delta", "ParseError", "ParsedMessage", "StreamingParser", "ToolCall", "parse"]


def parse(
    text_or_ids: str | Sequence[int],
    *,
    tokenizer: Any = None,
    tools: Sequence | None = None,
    strict: bool = False,
    calls_after_content: bool = True,
) -> ParsedMessage:
    """One assistant turn.

    text_or_ids: what the model wrote, special tokens kept (`skip_special_tokens=False`); or its token ids (a list, an array
        or a tensor of one dimension), for which `tokenizer` is needed. Only ids tell a control token from text that spells
        one: a string argument that holds `<|eot_id|>` survives as ids, and ends the turn as text.
    tools: JSON schemas, functions or names. A call of another tool has `known=False`; after content it is content; strict
        refuses it. Their names may also be called as builtin tools are (`name.call(...)`).
    strict: raises ParseError for a call that is malformed, cut off, unknown or followed by text, and for what `scanning`
        lists. Otherwise nothing that the model writes raises: what is no call is content, and what comes after the stop
        token is ignored.
    calls_after_content: whether calls may follow content without `<|python_tag|>`, as the templates write them. With False a
        call that the model only quotes at the end of its answer stays content.

    Raises ValueError for what is neither a text nor ids of this tokenizer.
    """
    parser = StreamingParser(tools, strict=strict, calls_after_content=calls_after_content)
    if isinstance(text_or_ids, str):
        parser.feed(text_or_ids)
        return parser.finish()
    if isinstance(text_or_ids, (bytes, bytearray, memoryview)):
        raise ValueError(f"text_or_ids must be a text or token ids, got {type(text_or_ids).__name__}; decode it first")
    if tokenizer is None:
        raise ValueError("tokenizer is needed to parse token ids; pass the model's, or pass text")
    parse_ids(parser, text_or_ids, tokenizer)
    return parser.finish()


def parse_ids(parser: StreamingParser, ids: Sequence[int], tokenizer: Any) -> None:
    """Feed token ids to a parser: control tokens as such, what is between them as plain text."""
    for text, is_control in _pieces(ids, tokenizer):
        if is_control:
            parser.feed_control(text)
        else:
            parser.feed_plain(text)


def _pieces(ids: Sequence[int], tokenizer: Any) -> list[tuple[str, bool]]:
    """The ids as text between control tokens."""
    ids = _checked(ids, tokenizer)
    names = control_ids(tokenizer)
    pieces: list[tuple[str, bool]] = []
    run: list[int] = []
    for token_id in (*ids, None):
        if token_id is not None and token_id not in names:
            run.append(token_id)
            continue
        if run:
            # No clean-up of spaces: it would change the arguments.
            text = tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            pieces.append((text, False))
            run = []
        if token_id is not None:
            pieces.append((names[token_id], True))
    return pieces


def _checked(ids: Any, tokenizer: Any) -> list[int]:
    wanted = "text_or_ids must be a text or one sequence of token ids"
    try:
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    except TypeError:
        raise ValueError(f"{wanted}, got {type(ids).__name__}") from None
    if not isinstance(ids, list):  # an array without dimensions
        raise ValueError(f"{wanted}, got the number {ids!r}")
    size = len(tokenizer)
    for place, token_id in enumerate(ids):
        if hasattr(token_id, "item") and getattr(token_id, "ndim", None) == 0:  # a list of numbers of NumPy or torch
            ids[place] = token_id = token_id.item()
        if type(token_id) is not int:
            raise ValueError(f"{wanted}, got {token_id!r:.80} at place {place}; parse a batch one by one")
        if not 0 <= token_id < size and not (size <= token_id < 2**31 and tokenizer.convert_ids_to_tokens(token_id)):
            raise ValueError(f"text_or_ids[{place}] is {token_id}; the tokenizer has the ids 0 to {size - 1}")
    return ids


def control_ids(tokenizer: Any) -> dict[int, str]:
    """The control tokens of this tokenizer by id: by name, or, where a slot of Llama 3's has kept a reserved name, by its id."""
    names: dict[int, str] = {}
    for name, llama3_id in SPECIAL_TOKENS.items():
        token_id = tokenizer.convert_tokens_to_ids(name)
        if token_id is not None and tokenizer.convert_ids_to_tokens(token_id) == name:
            names[token_id] = name
        elif llama3_id < len(tokenizer):
            if str(tokenizer.convert_ids_to_tokens(llama3_id)).startswith("<|reserved_special_token_"):
                names[llama3_id] = name
    return names
