"""Packed attention by cuDNN's ragged kernels, through NVIDIA's cudnn-frontend: `unsloth_ext::cudnn_attention`.

On a Hopper card they take two thirds of the time of flash attention 2's variable-length kernels (benchmarks/NOTES.md). aten reaches
them too (`_cudnn_attention_forward`), but up to torch 2.13 it builds their graph anew at each call (pytorch/pytorch#191576). Here a
graph is kept for each kind of call. A graph takes up to a second to build, so kinds are few: the number of documents and the longest
of them are rounded up to a power of two, the tokens to a sixteenth of one. Documents that are not there have no tokens and cost next to
nothing; tokens that are not there cost memory, 12 bytes for each element of such a query while the backward runs.

Where algorithms are to be deterministic cuDNN's backward keeps a number for every pair of tokens: it is not used then.

Where a document begins in a tensor (cuDNN's ragged offsets, in elements) differs with what a token of it takes: one small kernel
writes them for all tensors, in the forward and again in the backward.

cuDNN Frontend: https://github.com/NVIDIA/cudnn-frontend, "Scaled Dot Product Attention", packed layout (THD).
"""

# no `from __future__ import annotations`: torch.library reads these annotations
import functools
import logging
import threading
from typing import NamedTuple

import torch

from .attention_gradients import differentiable

_DOCUMENTS, _LONGEST, _TOKENS = 16, 1024, 1024  # the least that a graph is built for
_UIDS = {
    name: number
    for number, name in enumerate(
        ("q", "k", "v", "o", "stats", "do", "dq", "dk", "dv", "lengths", "q_at", "k_at", "stats_at"), start=1
    )
}
_log = logging.getLogger(__name__)
_lock = threading.Lock()  # one handle and one set of graphs for all threads: autograd has its own
_handles: dict = {}
_graphs: dict = {}


class Kind(NamedTuple):
    """What a graph is built for."""

    dtype: torch.dtype
    heads: int
    kv_heads: int
    width: int
    documents: int
    longest: int
    tokens: int  # 0 in a forward, which does not ask
    scale: float
    window: int | None

    def token(self, name: str) -> int:
        """Elements of one token of a tensor."""
        if name == "stats":
            return self.heads
        return self.width * (self.kv_heads if name in ("k", "v", "dk", "dv") else self.heads)


@functools.cache
def lacking(index: int | None) -> str:
    """Why cuDNN cannot be had on card `index`; "" where it can. It is asked by building a forward and a backward, once a process; where it is
    installed and does not do that, the log says so."""
    if torch.cuda.device_count() == 0 or torch.version.hip is not None:
        return "there is no NVIDIA card"
    if torch.cuda.get_device_capability(index)[0] not in (9, 10):
        return "it is for Hopper and data-center Blackwell"  # flash attention 2 is at home on the others
    try:
        import cudnn

        cudnn.pygraph  # noqa: B018  (any folder of that name would be imported)
    except Exception as error:  # an assertion where two libraries are installed, an OSError where none is, ...
        return f"it needs nvidia-cudnn-frontend ({error})"
    device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
    kind = Kind(torch.bfloat16, 32, 8, 128, _DOCUMENTS, _LONGEST, _TOKENS, 128**-0.5, None)
    try:
        with _lock, torch.cuda.device(device):
            _graph("forward", kind._replace(tokens=0), device)
            _graph("backward", kind, device)
    except Exception as error:
        why = f"cuDNN refuses it ({' '.join(str(error).split())[:200]})"
        _log.warning("unsloth_ext: packed attention is left to other kernels: %s", why)
        return why
    return ""


@torch.library.custom_op("unsloth_ext::cudnn_attention", mutates_args=(), device_types="cuda")
def cudnn_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [T, H, D], key and value [T, H_kv, D], cu_seqlens [n + 1] int32 from 0 to T -> [T, H, D] and the log-sum-exp [T, H] in
    fp32."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    out, stats = torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)
    tensors = {"q": query, "k": key, "v": value, "o": out, "stats": stats}
    _run("forward", tensors, cu_seqlens, max_seqlen, scale, window)
    return out, stats


@cudnn_attention.register_fake
def _(query, key, value, cu_seqlens, max_seqlen, scale, window):
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)


@torch.library.custom_op("unsloth_ext::cudnn_attention_backward", mutates_args=(), device_types="cuda")
def cudnn_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value, in their dtypes and contiguous."""
    names = {"do": grad, "q": query, "k": key, "v": value, "o": out, "stats": stats}
    tensors = {name: tensor.contiguous() for name, tensor in names.items()}
    grads = {f"d{name}": torch.empty_like(tensors[name]) for name in "qkv"}
    _run("backward", tensors | grads, cu_seqlens, max_seqlen, scale, window)
    return tuple(grads.values())


differentiable(cudnn_attention, cudnn_attention_backward)


# -- graphs ------------------------------------------------------------------------------------------------------------------


def _up(number: int, least: int) -> int:
    """`least` times a power of two, and no less than `number`."""
    while least < number:
        least *= 2
    return least


def _room(tokens: int) -> int:
    """`tokens` and up to an eighth more."""
    step = max(_TOKENS, _up(tokens, _TOKENS) // 16)
    return -(-tokens // step) * step


@functools.cache
def _write_places():
    from .attention_cudnn_places import write_places

    return write_places


def _run(what, tensors, cu_seqlens, max_seqlen, scale, window) -> None:
    query = tensors["q"]
    (tokens, heads, width), kv_heads, device = query.shape, tensors["k"].shape[1], query.device
    if tokens == 0:
        return
    longest = min(max_seqlen, tokens)
    kind = Kind(
        query.dtype, heads, kv_heads, width, _up(cu_seqlens.shape[0] - 1, _DOCUMENTS), _up(longest, _LONGEST),
        _room(tokens) if what == "backward" else 0, scale, None if window is not None and window >= longest else window,
    )  # fmt: skip
    with torch.cuda.device(device):
        # Rows of whole cache lines: cuDNN reads offsets from aligned addresses.
        places = cu_seqlens.new_empty((4, kind.documents + 32))
        _write_places()(cu_seqlens.contiguous(), places, kind.documents, tuple(map(kind.token, ("q", "k", "stats"))))
        buffers = {_UIDS[name]: tensor.data_ptr() for name, tensor in tensors.items()}
        buffers |= {
            _UIDS[name]: row.data_ptr()
            for name, row in zip(("lengths", "q_at", "k_at", "stats_at"), places, strict=True)
        }
        with _lock:
            try:
                graph, size = _graph(what, kind, device)
            except Exception as error:
                raise RuntimeError(
                    f"cuDNN refuses the {what} of packed attention for {kind}: {error}\nbackend='flash' may do it; for every model "
                    "of a process: UNSLOTH_EXT_PACKED_ATTENTION=flash"
                ) from error
            workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
            graph.execute(buffers, workspace.data_ptr(), handle=_handle(device))


def _handle(device: torch.device):
    """The card's handle, on the current stream."""
    import cudnn

    if device.index not in _handles:
        _handles[device.index] = cudnn.create_handle()
    handle = _handles[device.index]
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    return handle


def _graph(what: str, kind: Kind, device: torch.device):
    """(graph, bytes of its workspace)."""
    key = what, kind, device.index
    if key not in _graphs:
        _graphs[key] = _built(what, kind, _handle(device))
    return _graphs[key]


def _built(what: str, kind: Kind, handle):
    import cudnn

    float32, int32 = cudnn.data_type.FLOAT, cudnn.data_type.INT32
    half = {torch.float16: cudnn.data_type.HALF, torch.bfloat16: cudnn.data_type.BFLOAT16}[kind.dtype]
    graph = cudnn.pygraph(
        io_data_type=half, intermediate_data_type=float32, compute_data_type=float32, handle=handle,
        name=f"packed attention, {what}",
    )  # fmt: skip

    def flat(name, length):
        shape, stride = [length, 1, 1, 1], [1, 1, 1, 1]
        return graph.tensor(name=name, dim=shape, stride=stride, data_type=int32, uid=_UIDS[name])

    places = {name: flat(f"{name}_at", kind.documents + 1) for name in ("q", "k", "stats")}
    lengths = flat("lengths", kind.documents)

    def layout(name):
        """(shape, strides, where its documents begin) of a packed tensor as cuDNN sees it."""
        token = kind.token(name)
        width = 1 if name == "stats" else kind.width
        shape = [kind.documents, token // width, kind.longest, width]
        at = places["stats" if name == "stats" else "k" if name in ("k", "v", "dk", "dv") else "q"]
        return shape, [kind.longest * token, width, token, 1], at

    def read(name):
        shape, strides, at = layout(name)
        dtype = float32 if name == "stats" else half
        tensor = graph.tensor(name=name, dim=shape, stride=strides, data_type=dtype, uid=_UIDS[name])
        tensor.set_ragged_offset(at)
        return tensor

    def written(tensor, name):
        shape, strides, at = layout(name)
        tensor.set_output(True).set_uid(_UIDS[name]).set_dim(shape).set_stride(strides).set_ragged_offset(at)
        tensor.set_data_type(float32 if name == "stats" else half)

    options = {
        "attn_scale": kind.scale, "seq_len_q": lengths, "seq_len_kv": lengths, "use_padding_mask": True, "name": "attention",
        "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT, "diagonal_band_right_bound": 0,
    }  # fmt: skip
    if kind.window is not None:
        options["diagonal_band_left_bound"] = kind.window
    if what == "forward":
        out, stats = graph.sdpa(q=read("q"), k=read("k"), v=read("v"), generate_stats=True, **options)
        written(out, "o")
        written(stats, "stats")
    else:
        grads = graph.sdpa_backward(
            q=read("q"), k=read("k"), v=read("v"), o=read("o"), dO=read("do"), stats=read("stats"),
            max_total_seq_len_q=kind.tokens, max_total_seq_len_kv=kind.tokens,
            use_deterministic_algorithm=False, **options,
        )  # fmt: skip
        for grad, name in zip(grads, ("dq", "dk", "dv"), strict=True):
            written(grad, name)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    return graph, graph.get_workspace_size()
