"""The special tokens of the Llama 3 vocabulary that tool calling lives on, by name and by id, and how to get them back.

All Llama 3 vocabularies have 128,000 text tokens and then 256 special ones in a fixed order. Llama 3.1 gave two of the reserved
ones a meaning: `<|eom_id|>` (128008) ends a turn that waits for a tool, `<|python_tag|>` (128010) opens a builtin call. Where a
tokenizer still calls them `<|reserved_special_token_N|>`, as those of Llama 3.0 and tunes of it do, `<|eom_id|>` in a prompt
becomes six or seven pieces of text, and the model is neither trained on it nor stops at it. The slot is there, with its rows in
both embeddings, so it is renamed where it stands; a vocabulary never grows.

Source: `llama_models/llama3/tokenizer.py` of Meta's `llama-models` package.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, field

VOCABULARY_SIZE = 128256
SPECIAL_TOKENS = {
    "<|begin_of_text|>": 128000,
    "<|end_of_text|>": 128001,
    "<|finetune_right_pad_id|>": 128004,
    "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007,
    "<|eom_id|>": 128008,
    "<|eot_id|>": 128009,
    "<|python_tag|>": 128010,
}
STOP_TOKENS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
TOOL_TOKENS = ("<|eom_id|>", "<|python_tag|>")

# What no other family has at these ids. eom and python_tag are left out: they are what may be missing.
_FINGERPRINT = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_RESERVED = re.compile(r"<\|reserved_special_token_\d+\|>")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What `restore_special_tokens` found and did.

    state: "not llama 3", "present" (nothing to do), "restored" or "refused".
    renamed: old name -> new name of the slots that were renamed.
    reason: why it was refused, else "".
    """

    state: str
    renamed: dict[str, str] = field(default_factory=dict)
    reason: str = ""


def text_tokenizer(tokenizer):
    """A processor's text tokenizer, or the tokenizer itself."""
    inner = getattr(tokenizer, "tokenizer", None)
    return tokenizer if inner is None else inner


def is_llama3(tokenizer) -> bool:
    """Whether this is a Llama 3.x vocabulary: five of its control tokens at their ids, and the vocabulary at least full.

    Asks for five names, so it costs microseconds. A processor is asked for its text tokenizer; None is not Llama 3.
    """
    tokenizer = text_tokenizer(tokenizer)
    backend = getattr(tokenizer, "_tokenizer", None)
    lookup = getattr(backend, "token_to_id", None)
    if not callable(lookup):
        return False
    return all(lookup(name) == SPECIAL_TOKENS[name] for name in _FINGERPRINT)


def restore_special_tokens(tokenizer, model=None) -> Report:
    """Give `<|eom_id|>` and `<|python_tag|>` their names back where a Llama 3 vocabulary holds reserved tokens in their slots.

    The tokenizer is changed in place: its length, all ids and all other tokens stay, and the names survive save_pretrained and
    pickling. All slots are renamed or none. Calling it again changes nothing, and so does calling it on another family's.

    Args:
        tokenizer: a fast tokenizer of transformers, or a processor that has one.
        model: if given, its input embedding must have a row for each of the ids.

    It is refused, with the reason in the report and in the log, where a name is at another id, where the slot is empty or holds
    a token that is not a reserved one, where that reserved token is in use (as pad, for example), or where the model is smaller.
    """
    tokenizer = text_tokenizer(tokenizer)
    if not is_llama3(tokenizer):
        return Report("not llama 3")
    backend, renamed = tokenizer._tokenizer, {}
    for name in TOOL_TOKENS:
        wanted, found = SPECIAL_TOKENS[name], backend.token_to_id(name)
        if found == wanted:
            continue
        slot = backend.id_to_token(wanted)
        if found is not None:
            return _refused(f"{name} is at id {found}; Llama 3 has it at {wanted}")
        if slot is None:
            return _refused(f"the vocabulary has no id {wanted} for {name}, and it must not grow")
        if not _RESERVED.fullmatch(slot):
            return _refused(f"id {wanted}, where {name} belongs, holds {slot}")
        if used_as := _use_of(tokenizer, slot):
            return _refused(f"{slot}, in the slot of {name}, is used as {used_as}")
        renamed[slot] = name
    if not renamed:
        return Report("present")
    rows = _embedding_rows(model)
    if rows is not None and rows <= max(SPECIAL_TOKENS[name] for name in renamed.values()):
        return _refused(f"the model's embedding has {rows} rows, none for {', '.join(renamed.values())}")
    _rename(tokenizer, renamed)
    logger.info("renamed %s", ", ".join(f"{old} to {new}" for old, new in renamed.items()))
    return Report("restored", renamed)


def _refused(reason: str) -> Report:
    logger.warning("cannot restore Llama 3's tool tokens: %s", reason)
    return Report("refused", reason=reason)


def _use_of(tokenizer, token: str) -> str | None:
    """The special-token attribute that holds `token`, or None. The list of all extra special tokens is no use of it."""
    for attribute, value in tokenizer.special_tokens_map.items():
        if isinstance(value, (list, tuple)):
            continue
        if str(value) == token:
            return attribute
    return None


def _embedding_rows(model) -> int | None:
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    rows = getattr(embedding, "num_embeddings", None)
    return rows if isinstance(rows, int) else None


def _rename(tokenizer, renamed: dict[str, str]) -> None:
    # The Rust object has no renaming; its JSON is all of it (added tokens, model, post-processor, truncation, padding).
    backend = tokenizer._tokenizer
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    vocabulary = state["model"].get("vocab")
    if isinstance(vocabulary, dict):
        for old in vocabulary.keys() & renamed.keys():
            vocabulary[renamed[old]] = vocabulary.pop(old)
    fresh = type(backend).from_str(json.dumps(state, ensure_ascii=False))
    # What transformers keeps of them in Python: the list of extra special tokens, and the arguments that it saves.
    kept = ("_special_tokens_map", "_extra_special_tokens", "init_kwargs")
    values = {name: _renamed_in(vars(tokenizer)[name], renamed) for name in kept if name in vars(tokenizer)}
    tokenizer._tokenizer = fresh
    vars(tokenizer).update(values)


def _renamed_in(value, renamed: dict[str, str]):
    """`value`, a string, added token, list or dict of such, with the names changed; what holds none of them stays itself."""
    if isinstance(value, dict):
        return {key: _renamed_in(item, renamed) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_renamed_in(item, renamed) for item in value)
    if isinstance(value, str):
        return renamed.get(value, value)
    if getattr(value, "content", None) in renamed:  # an AddedToken
        return type(value)(**{**value.__getstate__(), "content": renamed[value.content]})
    return value
