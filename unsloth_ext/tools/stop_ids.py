"""What ends a turn of Llama 3: end of text, eom (a tool is to answer) and eot. A model that knows one of them runs past the others.

Base models stop at `<|end_of_text|>` only, so one tuned on chats never stops; Llama 3.0's stop at that and eot, so a builtin tool
call, which ends with eom, runs on into an invented answer of the tool. Meta's own code stops at all three.

A stop that is there stays, and stays first: some code takes the first id as the eos. Only ids are added, only for a Llama 3
vocabulary, and only when a model is loaded: what a user sets afterwards, or gives to `generate` or to `SamplingParams`, holds.

Sources: `stop_tokens` in `llama_models/llama3/tokenizer.py`; Unsloth's `patch_harmony_tool_call_eos`, which does the like for the
tool calls of gpt-oss.
"""

from __future__ import annotations

import logging

from .special_tokens import SPECIAL_TOKENS, STOP_TOKENS, is_llama3, text_tokenizer

# Where the releases of vLLM keep the fields of generation_config.json that they merge into every request's stop ids.
_VLLM_PROCESSORS = (
    ("llm_engine", "input_processor"),
    ("input_processor",),
    ("llm_engine", "processor"),
    ("processor",),
)
_VLLM_MAX_STOP_IDS = 128  # with min_tokens > 0 vLLM refuses more

logger = logging.getLogger(__name__)


def stop_ids(tokenizer) -> tuple[int, ...]:
    """Llama 3's stop ids that this tokenizer knows by name; () for another family.

    eom is left out where its slot holds something else (see `special_tokens.restore_special_tokens`).
    """
    if not is_llama3(tokenizer):
        return ()
    lookup = text_tokenizer(tokenizer)._tokenizer.token_to_id
    return tuple(SPECIAL_TOKENS[name] for name in STOP_TOKENS if lookup(name) == SPECIAL_TOKENS[name])


def widened(current, ids: tuple[int, ...]) -> int | list[int] | None:
    """`current` (an id, a list of ids or None) with `ids` after it, as a list without doubles; itself where nothing is missing.

    Anything else (a bool, strings, a tensor) is given back as it is: it is not for us to read.
    """
    if current is None:
        known = []
    elif isinstance(current, int):
        known = [current]
    elif isinstance(current, (list, tuple)):
        known = list(current)
    else:
        return current
    if any(isinstance(token, bool) or not isinstance(token, int) for token in known):
        return current
    missing = [token for token in ids if token not in known]
    return known + missing if missing else current


def widen_generation_config(model, tokenizer) -> list[int]:
    """Add the stop ids to `model.generation_config.eos_token_id`, which `generate` reads and save_pretrained writes.

    `model.config` stays: transformers and vLLM read its eos as the one end of text. A PEFT model's base model is the one whose
    config is changed, so the adapter's wrapper sees it too. Gives the ids that were added.
    """
    config = getattr(model, "generation_config", None)
    if config is None or not (ids := stop_ids(tokenizer)):
        return []
    before = getattr(config, "eos_token_id", None)
    after = widened(before, ids)
    if after is before:
        return []
    try:
        config.eos_token_id = after
    except Exception as error:  # a config of remote code may be read-only; loading must not fail over it
        logger.warning("cannot set eos_token_id to %s (%s); give it to generate()", after, error)
        return []
    return _added(before, after, "generate")


def widen_vllm_engine(model, tokenizer) -> list[int]:
    """The same for `model.vllm_engine` (`fast_inference=True`): every request of the engine then stops there, GRPO's included.

    `stop_token_ids` of a request's own SamplingParams are added to these by vLLM. Gives the ids that were added.
    """
    engine = getattr(model, "vllm_engine", None)
    if engine is None or not (ids := stop_ids(tokenizer)):
        return []
    fields = _vllm_fields(engine)
    if fields is None:
        logger.warning(
            "cannot find where this vLLM keeps its stop ids; give stop_token_ids=%s to SamplingParams", list(ids)
        )
        return []
    before = fields.get("eos_token_id")
    after = widened(before, ids)
    if after is before or len(after) > _VLLM_MAX_STOP_IDS:
        return []
    fields["eos_token_id"] = after
    return _added(before, after, "vLLM")


def widen_sampling_params(params, tokenizer):
    """Add the stop ids to the `stop_token_ids` of a vLLM `SamplingParams` or a dict of its arguments; gives `params` back.

    For an engine that Unsloth did not load. vLLM also keeps a request's ids in a set, made when the params are; that is
    brought up to date. `ignore_eos=True` is left alone: the user wants no stop.
    """
    is_dict = isinstance(params, dict)
    read = params.get if is_dict else lambda name: getattr(params, name, None)
    ids = stop_ids(tokenizer)
    if not ids or read("ignore_eos"):
        return params
    before = read("stop_token_ids")
    after = widened(before, ids)
    if after is before or len(after) > _VLLM_MAX_STOP_IDS:
        return params
    if is_dict:
        params["stop_token_ids"] = after
    else:
        params.stop_token_ids = after
        if isinstance(getattr(params, "_all_stop_token_ids", None), set):
            params._all_stop_token_ids.update(after)
    return params


def _vllm_fields(engine) -> dict | None:
    for path in _VLLM_PROCESSORS:
        holder = engine
        for name in path:
            holder = getattr(holder, name, None)
        fields = getattr(holder, "generation_config_fields", None)
        if isinstance(fields, dict):
            return fields
    return None


def _added(before, after: list[int], where: str) -> list[int]:
    known = {before} if isinstance(before, int) else set(before or ())
    added = [token for token in after if token not in known]
    logger.info("%s stops at %s too", where, ", ".join(map(str, added)))
    return added
