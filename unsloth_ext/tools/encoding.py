"""A conversation as token ids, with the assistant's mask, the way Meta's `ChatFormat` encodes: control tokens by their id, and
everything that people, tools or the model wrote as plain text, whatever it spells.

Plain text that the rendered string would hold in one stretch is encoded in one stretch (only a control token ends it), so where
nothing spells a control token the ids are those of tokenizing the rendered string. `chatformat` encodes piece by piece, as its
source does: a text that begins with a line break is then not merged with the header's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from .profiles import DateString, profile_named
from .reference import Segment, segments


@dataclass(frozen=True)
class Encoded:
    """One conversation. The first two have one entry a token."""

    input_ids: list[int]
    assistant_mask: list[int]  # 1: the assistant must produce this token
    text: str  # what was encoded, whole even where `max_length` cut the ids
    spans: list[tuple[int, int]]  # start and end of each token in `text`


def encode(
    tokenizer,
    messages: Sequence[dict],
    *,
    profile: str = "hf",
    tools: Sequence | None = None,
    builtin_tools: Sequence[str] | None = None,
    date_string: DateString = None,
    add_generation_prompt: bool = False,
    max_length: int | None = None,
    tools_in_user_message: bool | None = None,
    base_template: str | None = None,
    preamble: str | None = None,
) -> Encoded:
    """Encode with a fast tokenizer of the Llama 3 vocabulary; the other arguments are those of `profiles.render`.

    The first `max_length` tokens are kept. Raises MessageError as `render` does, and ValueError for a tokenizer that lacks a
    control token.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be positive, got {max_length}")
    parts = segments(
        messages,
        profile=profile,
        tools=tools,
        builtin_tools=builtin_tools,
        date_string=date_string,
        add_generation_prompt=add_generation_prompt,
        tools_in_user_message=tools_in_user_message,
        base_template=base_template,
        preamble=preamble,
    )
    encoded = encode_segments(tokenizer, parts, piecewise=profile_named(profile).piecewise)
    if max_length is None or max_length >= len(encoded.input_ids):
        return encoded
    cut = (encoded.input_ids[:max_length], encoded.assistant_mask[:max_length])
    return Encoded(*cut, encoded.text, encoded.spans[:max_length])


def encode_segments(tokenizer, parts: Sequence[Segment], *, piecewise: bool = False) -> Encoded:
    """Encode segments. `piecewise`: each by itself; else adjacent plain text is one stretch.

    A token is trained if any of its characters is.
    """
    ids, mask, spans, text = [], [], [], "".join(part.text for part in parts)
    start = 0
    for is_control, group in groupby(parts, lambda part: part.kind == "control"):
        group = list(group)
        for stretch in ([part] for part in group) if is_control or piecewise else (group,):
            written = "".join(part.text for part in stretch)
            if is_control:
                new_ids, offsets = [control_id(tokenizer, written)], [(0, len(written))]
            else:
                new_ids, offsets = plain_text_ids(tokenizer, written)
            trained, end = [], 0
            for part in stretch:
                trained.append((end, end + len(part.text), part.trained))
                end += len(part.text)
            ids += new_ids
            mask += [
                int(any(on and first < last_of and of < last for first, last, on in trained)) for of, last_of in offsets
            ]
            spans += [(start + of, start + last_of) for of, last_of in offsets]
            start += len(written)
    return Encoded(ids, mask, text, spans)


def plain_text_ids(tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a text in which nothing is a special token, and where each token stands in it."""
    if not text:
        return [], []
    encoding = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,  # longer than the model is no news here: the caller cuts
    )
    return list(encoding["input_ids"]), [tuple(offset) for offset in encoding["offset_mapping"]]


def control_id(tokenizer, name: str) -> int:
    """The id of a control token. Raises ValueError where the vocabulary has no such token."""
    token_id = tokenizer.convert_tokens_to_ids(name)
    if token_id is None or token_id == tokenizer.unk_token_id or tokenizer.convert_ids_to_tokens(token_id) != name:
        raise ValueError(
            f"the tokenizer has no token {name}; it needs the Llama 3.1 vocabulary, or that token restored in it"
        )
    return token_id
