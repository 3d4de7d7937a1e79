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

`install_response_schema` does that for a profile that the caller names. `follow_chat_template` does it for whatever chat template
the tokenizer has when it is asked: one that writes Llama 3.x's calls is answered as above, any other as transformers (and trl)
would, so that a Llama 3 vocabulary with Qwen's template keeps Qwen's parser.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from .parsing import parse_ids
from .profiles import PROFILES, profile_named
from .streaming import StreamingParser
from .tokenizer_class import Extension, extend, take_off

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


class FollowsChatTemplate(Extension):
    """A tokenizer whose `response_template` and `parse_response` are those of the chat template that it has at the moment."""

    @property
    def response_template(self):
        given = vars(self).get("response_template")
        # One that the user or the checkpoint has set holds, unless it is ours that was saved: that may be of another template.
        if given is not None and (isinstance(vars(self).get("parse_response"), ParseResponse) or not _is_ours(given)):
            return given
        profile = profile_of(self.chat_template)
        return None if profile is None else response_template(profile)

    @response_template.setter
    def response_template(self, value):
        vars(self)["response_template"] = value

    def parse_response(self, response, schema=None, **options):
        given = vars(self).get("response_template")
        if schema is None and (given is None or _is_ours(given)) and profile_of(self.chat_template) is not None:
            return ParseResponse(self)(response, **options)
        return super().parse_response(response, schema, **options)


def follow_chat_template(tokenizer: Any) -> Any:
    """Let the tokenizer's responses be read as its chat template writes calls; gives the tokenizer. Twice is as once."""
    return extend(tokenizer, FollowsChatTemplate)


def follow_no_longer(tokenizer: Any) -> Any:
    """Take that out again."""
    return take_off(tokenizer, FollowsChatTemplate)


def _is_ours(template: Any) -> bool:
    return any(template == response_template(profile) for profile in PROFILES)


_CLOSED = r"(?:<\|eot_id\|>|<\|eom_id\|>)"
_WRITTEN = re.compile(r"(?P<tag><\|python_tag\|>)?(?P<call>\{.*\}|\[.*\])" + _CLOSED, re.DOTALL)


def profile_of(chat_template: Any) -> str | None:
    """The profile whose calls a chat template writes, found by rendering one; None for another format or no template.

    chat_template: the text, or a dict of texts by name (then the one that is taken for tools).
    """
    if isinstance(chat_template, dict):
        chat_template = chat_template.get("tool_use", chat_template.get("default"))
    return _profile_of(chat_template) if isinstance(chat_template, str) else None


@lru_cache(maxsize=16)
def _profile_of(chat_template: str) -> str | None:
    from transformers.utils.chat_template_utils import render_jinja_template

    call = {"type": "function", "function": {"name": "probe", "arguments": {"value": 1}}}
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    try:
        (text,), _ = render_jinja_template(
            conversations=[turns], chat_template=chat_template, bos_token="", eos_token=""
        )
    except Exception:  # whatever a template raises, it writes no call then
        return None
    _, header, said = text.rpartition(_HEADER)
    written = _WRITTEN.match(said) if header else None
    if written is None:
        return None
    if written["call"] == "[probe(value=1)]":
        return "pythonic-3.2"
    try:
        found = json.loads(written["call"])
    except ValueError:
        return None
    if not isinstance(found, dict) or found.get("name") != "probe":
        return None
    if found.get("parameters", found.get("arguments")) != {"value": 1}:
        return None
    return "meta-3.1" if written["tag"] else "chatformat" if "type" in found else "hf"
