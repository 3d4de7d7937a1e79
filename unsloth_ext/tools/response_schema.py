"""Lets transformers and trl read the calls of Llama 3.x: `tokenizer.parse_response`, which trl's GRPO `tools=` stands on.

trl knows the parser of a chat template only if it knows the template letter by letter; with any other it raises
"Unrecognized chat template" unless the tokenizer has a `response_template` (`trl.chat_template_utils.add_response_schema`,
trl 1.15; the format is that of transformers' `utils/chat_parsing`, from 5.13 on). Such a template is declarative and is saved
with the tokenizer, but it can express one way to open a call. So two things are installed:

- a `response_template` for the profile's own form: what a server or another process gets from the saved tokenizer. It reads one
  JSON call (with or without `<|python_tag|>` and "type", "parameters" or "arguments", ended by eot, eom or eos; several if they
  are separated by `;`), or for `pythonic-3.2` one call whose values are JSON. It cannot express parallel pythonic calls,
  Python's True / False / None (they come as text), other orders of the keys, builtin calls, code or `<function=...>`;
- `parse_response` of this tokenizer object, which reads all forms with `parsing.parse`. Copies and pickles keep it;
  `save_pretrained` does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .parsing import parse_ids
from .profiles import profile_named
from .streaming import StreamingParser

_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
_STOP = r"(?:<\|eot_id\|>|<\|eom_id\|>|<\|end_of_text\|>)\s*"
_JSON_CALL = {
    "open_pattern": r'(?:<\|python_tag\|>)?\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?'
    r'"name"\s*:\s*"(?P<name>[^"\\]+)"\s*,\s*"(?:parameters|arguments)"\s*:\s*(?=\{)',
    "close_pattern": r"\}\s*(?:" + _STOP + r"|;\s*(?=\{))",
    "content": "json",
}
_PYTHONIC_CALL = {
    "open_pattern": r"(?:<\|python_tag\|>)?\[\s*(?P<name>[A-Za-z_][\w.]*)\(",
    "close_pattern": r"\)\s*\]\s*" + _STOP,
    "content": "xml-inline",
    "content_args": {
        "tag_pattern": r'(?P<key>[A-Za-z_]\w*)=(?P<value>"(?:[^"\\]|\\.)*+"|(?:(?!,\s*[A-Za-z_]\w*=).)+)',
        "value_parser": {"name": "json", "args": {"allow_non_json": True}},
    },
}


def response_template(profile: str = "hf") -> dict:
    """The `response_template` of a profile, a new dict. What it can and cannot read: see above."""
    call = _PYTHONIC_CALL if profile_named(profile).parallel_calls else _JSON_CALL
    transform = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
    return {
        "defaults": {"role": "assistant"},
        "start_anchor": _HEADER,
        "fields": {
            "tool_calls": {**call, "repeats": True, "transform": transform},
            "content": {"close_pattern": _STOP, "content": "text"},
        },
    }


class ParseResponse:
    """`tokenizer.parse_response` that reads every form. A class, so that a tokenizer that has one can be copied and pickled."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __call__(
        self, response: Any, schema: dict | None = None, *, prefix: Any = None, tools: Sequence | None = None
    ) -> dict | list[dict]:
        """A message {"role", "content", "tool_calls" (if there are any)}; a list of them for a batch.

        response: a text, token ids, or a batch of either. prefix: the prompt (or one for each response), for what it has already
        written of this turn. tools: whose names may be called as builtin tools are. schema: another response template; then
        transformers' own parser reads.
        """
        if schema is not None:
            return type(self.tokenizer).parse_response(
                self.tokenizer, response, schema, prefix="" if prefix is None else prefix, tools=tools
            )
        responses, is_batch = _as_batch(response)
        prefixes, is_prefix_batch = _as_batch("" if prefix is None else prefix)
        if not is_prefix_batch or not prefixes:
            prefixes = (prefixes or [""]) * len(responses)
        if len(prefixes) != len(responses):
            raise ValueError(
                f"prefix has {len(prefixes)} entries for {len(responses)} responses; pass one, or one for each"
            )
        parsed = [self._parse(one, before, tools) for one, before in zip(responses, prefixes, strict=True)]
        return parsed if is_batch else parsed[0]

    def _parse(self, response: str | list[int], prefix: str | list[int], tools: Sequence | None) -> dict:
        text = prefix if isinstance(prefix, str) else self.tokenizer.decode(prefix)
        _, header, begun = text.rpartition(_HEADER)
        parser = StreamingParser(tools)
        parser.feed(begun if header else "")
        if isinstance(response, str):
            parser.feed(response)
        else:
            parse_ids(parser, response, self.tokenizer)
        message = parser.finish().as_message()
        message.pop("stop_reason", None)
        return message


def _as_batch(value: Any) -> tuple[list, bool]:
    """The texts or lists of ids, and whether it was a batch. An empty list is one empty sequence."""
    if isinstance(value, str):
        return [value], False
    value = value.tolist() if hasattr(value, "tolist") else list(value)
    if value and not isinstance(value[0], int):
        return [one.tolist() if hasattr(one, "tolist") else one for one in value], True
    return [value], False


def install_response_schema(tokenizer: Any, profile: str = "hf") -> Any:
    """Give the tokenizer (for a processor: its text tokenizer) the profile's `response_template` and a `parse_response` that
    reads all forms of Llama 3.x. Gives back what was passed. Twice is as once.

    With it `GRPOTrainer(tools=...)` takes a tokenizer of any Llama 3.x template. Raises ValueError for an unknown profile.
    """
    template = response_template(profile)
    inner = getattr(tokenizer, "tokenizer", None) or tokenizer
    inner.response_template = template
    inner.parse_response = ParseResponse(inner)
    return tokenizer


def remove_response_schema(tokenizer: Any) -> Any:
    """Take both out again."""
    inner = getattr(tokenizer, "tokenizer", None) or tokenizer
    if isinstance(vars(inner).get("parse_response"), ParseResponse):
        del inner.parse_response
        inner.response_template = None
    return tokenizer
