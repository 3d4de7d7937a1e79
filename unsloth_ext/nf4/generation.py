"""`generate(model, ...)`: transformers' generate with its decoding step replayed as a CUDA graph.

With the weights read as 4 bits, what a token of an 8B model costs is no longer the card's work, about 2 ms, but Python launching
some thousand kernels, 20 ms. transformers has a static cache and would compile the step, but not for bitsandbytes models
(`hf_quantizer.is_compileable`). A CUDA graph needs no compiler: the step is recorded as it runs eagerly, with every kernel, ours
and others', and its numbers stay what they were.

How: generate asks the model for a callable (`get_compiled_call`) for steps after the prefill. For the length of one call
we give it `CapturedStep`. Its first call is eager (kernels compile, caches are allocated), its second records, every further one
copies its small inputs (a token, a position, a mask) into fixed places and replays. A graph lives for one generate() call, so
an adapter that has been trained or switched since is never replayed. Recording costs about one eager step.

What cannot be recorded runs eagerly: other caches than StaticCache with full layers (a sliding window counts on the host), outputs
that pile up (hidden states, attentions), and whatever raises in the recording, with one warning.

Models under Unsloth's FastLanguageModel have their own decoding, and `patch.py` turns on its graphs.
"""

from __future__ import annotations

import contextlib
import warnings

import torch

__all__ = ["CapturedStep", "generate", "is_plain_search"]


def is_plain_search(model, kwargs) -> bool:
    """Is it greedy search or sampling, one sequence a row, without an assistant? What a step does depends on tensors only then."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)

    def asked(name, default):
        value = kwargs.get(name)
        return value if value is not None else getattr(config, name, None) or default

    return (
        asked("num_beams", 1) == 1
        and kwargs.get("assistant_model") is None
        and not asked("prompt_lookup_num_tokens", 0)
        and not asked("output_hidden_states", False)
        and not asked("output_attentions", False)
    )


def generate(model, *args, **kwargs):
    """`model.generate(*args, **kwargs)` with a static cache, its decoding steps captured in a CUDA graph.

    model: a causal language model of transformers >= 5, with or without peft adapters, all of it on one CUDA device; its weights
        may be bitsandbytes NF4 (then steps of few rows multiply straight from them) or not.
    Everything else is passed on. Returns what `generate` returns: the same tokens as `cache_implementation="static"` gives
    eagerly. Where a step cannot be captured (beams, an assistant, hidden states asked for, a cache of the caller's own, another
    device) this is `model.generate` itself.
    """
    inner = _generating(model)
    if (
        inner is None
        or kwargs.get("past_key_values") is not None
        or kwargs.get("cache_implementation") not in (None, "static")
        or kwargs.get("use_cache") is False
        or not is_plain_search(inner, kwargs)
        or {parameter.device for parameter in inner.parameters()} != {torch.device("cuda", torch.cuda.current_device())}
    ):
        return model.generate(*args, **kwargs)
    with _decoding_by(CapturedStep(inner)):
        return model.generate(*args, **kwargs | {"cache_implementation": "static"})


@contextlib.contextmanager
def _decoding_by(step: CapturedStep):
    model = step.model
    # On the instance, over the class's own: gone afterwards, whatever happens.
    model.get_compiled_call = lambda compile_config=None: step
    model._valid_auto_compile_criteria = lambda model_kwargs, generation_config: True
    try:
        yield step
    finally:
        del model.get_compiled_call, model._valid_auto_compile_criteria


def _generating(model):
    """The transformers model that runs the loop, under any adapter; None if there is none to be captured."""
    if (
        not torch.cuda.is_available() or getattr(model.generate, "__name__", "") != "generate"
    ):  # Unsloth's has another name
        return None
    get_base_model = getattr(model, "get_base_model", None)  # peft
    inner = get_base_model() if get_base_model else model
    known = hasattr(inner, "get_compiled_call") and hasattr(inner, "_valid_auto_compile_criteria")
    return inner if known and not getattr(getattr(inner, "config", None), "is_encoder_decoder", False) else None


class CapturedStep:
    """Called as the model is, for steps of one token: eagerly, then recorded, then replayed.

    The result of a replay lies where the recording put it and is overwritten by the next call: use or copy it before.
    """

    def __init__(self, model):
        self.model, self.graph, self.key, self.seen = model, None, None, None
        self.places: list[torch.Tensor] = []
        self.result = None
        self.failure = ""  # of a recording: there is no second

    def __call__(self, **inputs):
        tensors, structure = _flatten(inputs)
        key = (structure, tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors))
        if self.graph is not None and key == self.key:
            for place, tensor in zip(self.places, tensors, strict=True):
                place.copy_(tensor)
            self.graph.replay()
            return self.result
        if self.failure or torch.is_grad_enabled() or key != self.seen:
            self.graph = None
            result = self.model(**inputs)
            self.seen = None if _why_not(inputs, result) else key
            return result
        return self._record(key, inputs, tensors)

    def _record(self, key, inputs, tensors):
        self.places = [tensor.clone() for tensor in tensors]
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                result = self.model(**_replaced(inputs, iter(self.places)))
        except Exception as error:
            self.failure, self.places = f"{type(error).__name__}: {error}", []
            warnings.warn(
                f"unsloth_ext: decoding steps of {type(self.model).__name__} are not captured: {self.failure[:300]}",
                RuntimeWarning,
                stacklevel=2,
            )
            return self.model(**inputs)
        self.graph, self.key, self.result = graph, key, result
        graph.replay()  # recording has computed nothing
        return result


def _why_not(inputs, result) -> str:
    """Why a step that has just run cannot be recorded; empty where it can."""
    from transformers.cache_utils import StaticCache, StaticLayer

    cache = inputs.get("past_key_values")
    if type(cache) is not StaticCache or any(type(layer) is not StaticLayer for layer in cache.layers):
        return "the cache counts on the host"
    if getattr(inputs.get("input_ids"), "shape", (0, 0))[-1] != 1:
        return "it is not a step of one token"
    if getattr(result, "hidden_states", None) is not None or getattr(result, "attentions", None) is not None:
        return "outputs besides the logits are kept from step to step"
    return ""


def _flatten(value):
    """([tensors], what holds them): dictionaries, lists and tuples are gone into, anything else is itself."""
    if isinstance(value, torch.Tensor):
        return [value], None
    if isinstance(value, dict):
        parts = [(key, _flatten(entry)) for key, entry in value.items()]
        return [t for _, (found, _) in parts for t in found], ("dict", tuple((k, shape) for k, (_, shape) in parts))
    if isinstance(value, (list, tuple)):
        parts = [_flatten(entry) for entry in value]
        return [t for found, _ in parts for t in found], (type(value).__name__, tuple(shape for _, shape in parts))
    # A cache is the one object that matters: it must be the one whose tensors were recorded.
    return [], ("value", value if isinstance(value, (bool, int, float, str, type(None))) else id(value))


def _replaced(value, tensors):
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {key: _replaced(entry, tensors) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(entry, tensors) for entry in value)
    return value
