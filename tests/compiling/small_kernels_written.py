"""What Inductor writes for a card that is not there, with and without `small_kernels.together`: `small_kernels_written.py`. The last line is
JSON: for a graph of fixed and one of dynamic shapes, how many kernels each launched kernel holds, and the operators. For a process of its
own: nothing is put back."""

import json
import re

import compile_fake_card as card  # before torch is used
import torch
import torch._inductor.config as config
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._inductor import compile_fx, graph
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from unsloth_ext.compiling import graph_passes

H, R = 1024, 16
_aten = torch.ops.aten


class Written(Exception):
    pass


def step(x, outer, *adapters):
    """Four matrices cast, products with them, one small thing between two products, gradients of the four; and one large kernel."""
    a, b, c, d = (one.to(torch.bfloat16) * (i + 1) for i, one in enumerate(adapters))
    low = _aten.mm(x, a.t())
    y = _aten.mm(low, b.t())
    between = _aten.mm(c, d.t()).sin()  # [R, R]: read by a product
    z = _aten.mm(_aten.mm(y, c.t()), between)
    back = _aten.mm(outer.t(), z)  # [H, R]
    grads = [_aten.mm(x.t(), low), back, _aten.mm(y.t(), z), _aten.mm(outer.t(), low)]
    return (_aten.mm(z, d) * 2 + x, *(grad.t().float().contiguous() * (i + 2) for i, grad in enumerate(grads)))


def on_two_cards(x, outer, *adapters):
    a, b, c, d = (one.to(torch.bfloat16) * (i + 1) for i, one in enumerate(adapters))
    return _aten.mm(x, a.t()), _aten.mm(x, b), _aten.mm(outer, c.t()), _aten.mm(outer, d.t())


def write_to(x, outer, *adapters):
    """What is read at the end was written to by an operator."""
    whole = _aten.mm(x.t(), outer)
    torch.ops.small_kernels.write_(whole)
    return whole[:R].sin(), _aten.mm(x, whole)[:R].cos()


library = torch.library.Library("small_kernels", "FRAGMENT")
library.define("write_(Tensor(a!) x) -> ()")
torch.library.register_fake("small_kernels::write_", lambda x: None, lib=library)


def stop(self):
    code, _ = self.codegen()
    raise Written(getattr(code, "value", code))


def written(rows, options, step=step, cards=(0, 0, 0, 0, 0, 0)):
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    if rows is None:
        symbol = env.create_symbol(8192, ConstantSource("rows"), dynamic_dim=DimDynamic.DYNAMIC)
        rows = env.create_symintnode(symbol, hint=8192)
    with mode:
        shapes = (rows, H), (rows, H), (R, H), (H, R), (R, H), (R, H)
        given = [torch.empty(*shape, device=f"cuda:{card}") for shape, card in zip(shapes, cards, strict=True)]
        given[:2] = [one.to(torch.bfloat16) for one in given[:2]]
        with tracing(TracingContext(mode)), torch.no_grad():
            module = make_fx(step, decomposition_table=select_decomp_table())(*given)
    graph.GraphLowering.compile_to_module = stop
    torch._dynamo.reset()
    with tracing(TracingContext(mode)), mode, config.patch(force_disable_caches=True, compile_threads=1, **options):
        try:
            compile_fx.compile_fx_inner(module, [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"])
        except Exception as error:
            while not isinstance(error, Written):
                error = getattr(error, "inner_exception", None) or error.__cause__
                if error is None:
                    raise
            return read(error.args[0])


def read(code):
    held = {}
    for name, source in re.findall(r"(triton_\w+) = async_compile\.triton\('\w+', '''(.*?)'''", code, re.DOTALL):
        several = re.search(r"'num_kernels': (\d+)", source)
        held[name] = int(several[1]) if several else 1
    body = code[code.index("def call(") :]
    return {
        "kernels": [held[name] for name in re.findall(r"(triton_\w+)\.run\(", body)],
        "operators": len(re.findall(r"extern_kernels\.\w+\(", body)),
        "blocks of their own": "XBLOCK_0" in code,
    }


def main():
    torch.utils._triton.triton_hash_with_backend = lambda: "0"
    ours = {name: value for name, value in graph_passes.options().items() if name != graph_passes.ENTRY}
    assert len(ours) == 2, ours
    found = {
        kind: {which: written(rows, options) for which, options in (("plain", {}), ("together", ours))}
        for kind, rows in (("fixed", 8192), ("dynamic", None))
    }
    card.torch.cuda.device_count = lambda: 2
    for kind, step, cards in (("two cards", on_two_cards, (0, 1, 0, 0, 1, 1)), ("written to", write_to, (0,) * 6)):
        found[kind] = {
            which: written(64, options, step, cards) for which, options in (("plain", {}), ("together", ours))
        }
    print(json.dumps(found))


if __name__ == "__main__":
    assert card.MODE is not None
    main()
