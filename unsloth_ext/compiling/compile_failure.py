"""What could not be traced, by the path of the module it is in.

Dynamo names the line that it could not trace, not the module: a hook's line reads the same in each of 32 layers. While its
exception still carries Dynamo's own frames, each of them holds the local variables of the function being traced, and a
method's `self` or a hook's first argument is the module.
"""

from __future__ import annotations

import threading
import types
from contextlib import contextmanager

import torch

from ..errors import UnslothExtError


class CompileError(UnslothExtError):
    """A model or a layer could not be compiled. `module` is the path of the module at fault ("" for the model itself) or None
    where it is not known; the compiler's own exception is the cause (`__cause__`)."""

    def __init__(self, message: str, hint: str | None = None, module: str | None = None):
        super().__init__(message, hint)
        self.module = module


def compiler_errors() -> tuple[type[BaseException], ...]:
    """The exceptions that mean that tracing or compiling failed, and not the model itself."""
    exc = torch._dynamo.exc
    found = [exc.TorchDynamoException, getattr(exc, "FailOnRecompileLimitHit", None)]
    return tuple(kind for kind in found if kind is not None)


@contextmanager
def short_operators():
    """In this scope Inductor describes an operator's arguments by dtype and size.

    It would describe each by all that it is computed from, an operator of several arguments by all of them, so that the text grows tenfold
    with each decoder layer whose norms do the residual additions: for the loss at the end it has no end. Inductor writes it when an
    operator cannot be lowered, and until torch 2.13 also when it meets one of somebody else's for the first time, for a log.
    """
    from torch._inductor.exc import OperatorIssue

    with _scopes.lock:
        _scopes.count += 1
        if _scopes.count == 1:
            _scopes.original = vars(OperatorIssue).get("operator_str")
            if isinstance(_scopes.original, staticmethod):  # as in all versions known
                OperatorIssue.operator_str = staticmethod(_in_short)
    try:
        yield
    finally:
        with _scopes.lock:
            _scopes.count -= 1
            if _scopes.count == 0 and isinstance(_scopes.original, staticmethod):
                OperatorIssue.operator_str = _scopes.original


_scopes = types.SimpleNamespace(lock=threading.Lock(), count=0, original=None)  # of all threads


def _in_short(target, args, kwargs) -> str:
    def of(value):
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(of, value[:8]))}{', ...' if len(value) > 8 else ''}]"
        if value is None or isinstance(value, (int, float, bool, str, torch.dtype, torch.device)):
            return repr(value)
        try:
            return f"{type(value).__name__}({value.get_dtype()}, {list(value.get_size())})"
        except Exception:  # no tensor: its own words may be as long
            return type(value).__name__

    lines = [f"target: {target}", *(f"args[{i}]: {of(value)}" for i, value in enumerate(args))]
    return "\n".join(f"  {line}" for line in [*lines, *(f"{name}: {of(value)}" for name, value in kwargs.items())])


def explain(error: BaseException, root: torch.nn.Module, limit: int) -> CompileError:
    """The `CompileError` for what a compiler raised while it traced `root` or something inside it."""
    if type(error).__name__ == "FailOnRecompileLimitHit":
        return CompileError(
            f"{type(root).__name__} was compiled for {limit} kinds of batches and met another one",
            "CompiledModel.report() says what made each new graph necessary; pad batches or keep their kinds apart.",
        )
    path, place = _place(error, root)
    lines = [line.strip() for line in str(error).splitlines()]
    first = " ".join([line for line in lines if line][:2]) or type(error).__name__
    first = first if "raised: " in first else next((line for line in lines if line), type(error).__name__)
    explanation = " ".join(
        line
        for line in lines
        if line.startswith(("Explanation:", "Developer debug context:")) and not line.endswith("context:")
    )
    where = f"{path or type(root).__name__}" if path is not None else type(root).__name__
    hint = "Take the hook or adapter out before compile_model, or leave its layers out with scope='block'."
    if "unsloth/utils/packing.py" in place.replace("\\", "/"):
        hint = "Packed batches need UNSLOTH_EXT_PACKED=1, set before unsloth_ext is imported; it is on by itself where all cards are Hopper."
    return CompileError(
        f"{where} cannot be traced: {first}{'. ' + explanation if explanation else ''}{place}",
        f"{hint} Nothing was run uncompiled; CompiledModel.restore() gives the model back as it was.",
        module=path,
    )


def _place(error, root):
    """(path of the innermost module whose code was being traced, " (function, file:line)")."""
    names = {id(module): name for name, module in root.named_modules()}
    path, place = None, ""
    traceback = error.__traceback__
    while traceback is not None:
        translator = traceback.tb_frame.f_locals.get("self")
        # Only of a translator: asked for an attribute, a lazy variable would begin to trace, and the trace is over.
        if isinstance(translator, torch._dynamo.symbolic_convert.InstructionTranslatorBase):
            for variable in getattr(translator, "symbolic_locals", {}).values():
                module = _module(variable)
                if id(module) in names:
                    path = names[id(module)]
                    break
        traceback = traceback.tb_next
    stack = getattr(error, "real_stack", None)
    if stack:
        frame = list(stack)[-1]
        place = f" ({frame.name}, {frame.filename}:{frame.lineno})"
    return path, place


def _module(variable):
    for get in (lambda: variable.peek_value(), lambda: variable.value):  # a variable not looked at yet, or one that was
        try:
            value = get()
        except Exception:
            continue
        if isinstance(value, torch.nn.Module):
            return value
    return None
