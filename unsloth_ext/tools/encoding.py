"""A conversation as token ids, with the assistant's mask, the way Meta's `ChatFormat` encodes: control tokens by their id, and
everything that people, tools or the model wrote as plain text, even where it spells one. Tokens that are no control tokens of
Llama 3, such as a `<think>` that you added, are tokens in it as they are everywhere.

Plain text that the rendered string would hold in one stretch is encoded in one stretch (only a control token ends it), so where
nothing spells a control token the ids are those of tokenizing the rendered string. `chatformat` encodes piece by piece, as its
source does: a text that begins with a line break is then not merged with the header's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from weakref import WeakKeyDictionary

from .profiles import DateString, profile_named
from .reference import Segment, segments
from .special_tokens import SPECIAL_TOKENS

# Control tokens that only some of the vocabularies have, at ids of their own.
_SOMETIMES = ("<|step_id|>", "<|image|>")
CONTROL_NAMES = (*SPECIAL_TOKENS, *_SOMETIMES)


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
    plain_text_ids = plain_text_encoder(tokenizer)
    start = 0
    for is_control, group in groupby(parts, lambda part: part.kind == "control"):
        group = list(group)
        for stretch in ([part] for part in group) if is_control or piecewise else (group,):
            written = "".join(part.text for part in stretch)
            if is_control:
                new_ids, offsets = [control_id(tokenizer, written)], [(0, len(written))]
            else:
                new_ids, offsets = plain_text_ids(written)
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


def control_tokens(tokenizer) -> frozenset[str]:
    """The names of Llama 3's control tokens that the tokenizer has, at their ids. Neither reserved slots nor added tokens are."""
    lookup = tokenizer._tokenizer.token_to_id
    here = [name for name, token_id in SPECIAL_TOKENS.items() if lookup(name) == token_id]
    return frozenset((*here, *(name for name in _SOMETIMES if lookup(name) is not None)))


def plain_text_encoder(tokenizer) -> Callable[[str], tuple[list[int], list[tuple[int, int]]]]:
    """A function from a text to its ids, none of them a control token, and to where each token stands in the text.

    Tokens that are no control tokens of Llama 3 (those that the user added, reserved slots) are found as ever. The function
    works on a tokenizer of its own, so that it can be called from threads and leaves the user's as it is.
    """
    backend = tokenizer._tokenizer
    control = control_tokens(tokenizer)
    added = sorted(backend.get_added_tokens_decoder().items())
    state = (control, tuple((token_id, repr(token)) for token_id, token in added))
    with _LOCK:
        known = _ENCODERS.get(tokenizer)
        if known is None or known[0] is not backend or known[1] != state:
            known = _ENCODERS[tokenizer] = (backend, state, _plain_text_backend(backend, control, added))
    encode = known[2].encode

    def plain_text_ids(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        if not text:
            return [], []
        encoding = encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    return plain_text_ids


# By tokenizer, not as an attribute of it: pickles and the hashes that `datasets` takes of them stay the same.
_ENCODERS: WeakKeyDictionary = WeakKeyDictionary()
_LOCK = threading.Lock()


def _plain_text_backend(backend, control: Collection[str], added):
    """A Rust tokenizer that shares the model with `backend` (it is only read), but takes control tokens for text.

    The library leaves out the tokens that are marked special, or none: so here only the control tokens are.
    """
    from tokenizers import AddedToken

    private = type(backend)(backend.model)
    private.normalizer, private.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    private.post_processor = backend.post_processor  # adds nothing here, but trims the offsets
    kept = ("single_word", "lstrip", "rstrip", "normalized")
    private.add_tokens(
        [
            AddedToken(token.content, special=token.content in control, **{name: getattr(token, name) for name in kept})
            for _, token in added
        ]
    )
    private.encode_special_tokens = True
    names = {token_id: token.content for token_id, token in private.get_added_tokens_decoder().items()}
    if names != {token_id: token.content for token_id, token in added}:
        raise ValueError(
            "the tokenizer's added tokens do not follow its vocabulary without a gap; they cannot be copied"
        )
    return private


def control_id(tokenizer, name: str) -> int:
    """The id of a control token. Raises ValueError where the vocabulary has no such token."""
    token_id = tokenizer.convert_tokens_to_ids(name)
    if token_id is None or token_id == tokenizer.unk_token_id or tokenizer.convert_ids_to_tokens(token_id) != name:
        raise ValueError(
            f"the tokenizer has no token {name}; it needs the Llama 3.1 vocabulary, or that token restored in it"
        )
    return token_id
