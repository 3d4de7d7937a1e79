"""On a card: adapters and `out` with the kernels, the routes into Unsloth and bitsandbytes, and captured generation."""

import copy
import os
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from nf4_llama import small_llama
from nf4_states import Spec

from unsloth_ext.nf4 import dequantize, matmul_plan
from unsloth_ext.nf4.matmul import linear

pytestmark = pytest.mark.gpu
# What this process was started with, too: Unsloth may be found by PYTHONPATH alone.
HERE = [Path(__file__).parents[2], *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield
    assert matmul_plan._given_up == {}


def draw(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, dtype=dtype, device="cuda")


def off(y, reference):
    return ((y.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters(dtype):
    packed, state = Spec(rows=1024, columns=2048, dtype=dtype).make("cuda")
    exact, dense = (dequantize(packed, state, dtype=d) for d in (torch.float32, dtype))
    for rows, rank in ((1, 16), (3, 1), (16, 64), (40, 16), (300, 8)):
        x, a, b = draw(rows, 2048, dtype=dtype), draw(rank, 2048, dtype=torch.float32), draw(1024, rank, dtype=dtype)
        reference = x.double() @ exact.double().t() + 0.5 * (x.double() @ a.to(dtype).double().t()) @ b.double().t()
        plain = x @ dense.t() + 0.5 * (x @ a.to(dtype).t()) @ b.t()
        for _ in range(2):
            y = linear(x, packed, state, lora=(a, b, 0.5))
            assert off(y, reference) <= 1.1 * off(plain, reference) + 1e-5
        assert torch.equal(linear(x, packed, state, lora=(a, b, 0.5), out=torch.full_like(y, float("nan"))), y)


def test_out():
    packed, state = Spec(rows=1024, columns=2048).make("cuda")
    for rows in (1, 16, 40):
        x = draw(rows, 2048)
        y = linear(x, packed, state)
        whole = torch.full((rows, 2050), float("nan"), dtype=y.dtype, device="cuda")
        spare = torch.full((rows * 1024 + 1,), float("nan"), dtype=y.dtype, device="cuda")
        for out in (torch.empty_like(y), whole[:, :1024], whole[:, 1:1025], spare[1:].view(rows, 1024)):
            for _ in range(2):
                assert linear(x, packed, state, out=out) is out and torch.equal(out, y)
        assert whole[:, 1025:].isnan().all() and spare[0].isnan()


def test_what_lies_past_the_end_of_a_row_does_not_count():
    """K is no multiple of what the warps take together; a codebook that begins with a NaN must not spoil the rows without it."""
    for first in (float("nan"), float("inf")):
        packed, state = Spec(rows=64, columns=1088).make("cuda")
        code2 = state.state2.code.clone()
        code2[0] = first
        state.state2 = copy.copy(state.state2)
        state.state2.code = code2
        state.absmax.clamp_(min=1)
        exact = dequantize(packed, state, dtype=torch.float32).double()
        for rows in (1, 5, 16, 40):
            x = draw(rows, 1088)
            assert off(linear(x, packed, state), x.double() @ exact.t()) < 5e-3
        state.absmax[0] = 0  # a block of row 0
        for rows in (1, 5, 16, 40):
            y = linear(draw(rows, 1088), packed, state)
            assert not y[:, 0].isfinite().any() and y[:, 1:].isfinite().all()


def test_the_switch(monkeypatch):
    from unsloth_ext.nf4 import matmul_table

    packed, state = Spec(rows=1024, columns=2048).make("cuda")
    x = draw(3, 2048)
    measured = torch.cuda.get_device_capability() in matmul_table.CARDS
    try:
        for wanted, expected in (("0", False), ("all", True), ("1", measured), ("", measured)):
            monkeypatch.setenv("UNSLOTH_EXT_NF4_MATMUL", wanted)
            matmul_table.enabled.cache_clear()
            matmul_table.processors.cache_clear()
            matmul_plan.forget()
            assert matmul_table.may_take(x) == expected
            y = linear(x, packed, state)
            assert (id(state) in matmul_plan.plans) == expected
            assert off(y, x.double() @ dequantize(packed, state, dtype=torch.float32).double().t()) < 1e-2
    finally:
        matmul_table.enabled.cache_clear()
        matmul_table.processors.cache_clear()


ROUTES = """
import inspect, torch, unsloth_ext, unsloth, bitsandbytes, peft
from unsloth.kernels import utils
from unsloth_ext.nf4 import matmul_plan, matmul_table
states = {row.id: row.state for row in unsloth_ext.status()}
assert states["nf4.matmul"] == states["nf4.linear4bit"] == "applied", unsloth_ext.status()
torch.manual_seed(0)

def projection(n, k, bias, rank):
    layer = bitsandbytes.nn.Linear4bit(k, n, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer = layer.to(torch.bfloat16).cuda().requires_grad_(False)
    model = torch.nn.ModuleDict({"proj": layer})
    if rank:
        config = peft.LoraConfig(r=rank, target_modules=["proj"], init_lora_weights=False, lora_dropout=0.0)
        model = peft.inject_adapter_in_model(config, model)
    return model["proj"].eval()

off = lambda a, b: ((a.double() - b.double()).norm() / b.double().norm()).item()
names = ("fast_linear_forward", "matmul_lora", "fast_gemv")
pristine = {name: inspect.unwrap(getattr(utils, name)) for name in names}
with torch.inference_mode():
    for n, k in ((2048, 4096), (4096, 2048)):
        for bias, rank in ((False, 0), (True, 0), (False, 16), (True, 8)):
            proj = projection(n, k, bias, rank)
            for rows in (1, 2, 7, 16, 33, 64, 300):
                x = torch.randn(rows, 1, k, dtype=torch.bfloat16, device="cuda")
                for _ in range(2):
                    y, z = utils.fast_linear_forward(proj, x), pristine["fast_linear_forward"](proj, x)
                    assert y.shape == z.shape and y.dtype == z.dtype and off(y, z) < 1e-2, (rows, off(y, z))
                W, q, A, B, s, b = utils.get_lora_parameters_bias(proj)
                y, z = (call(x, W, q, A, B, s) for call in (utils.matmul_lora, pristine["matmul_lora"]))
                assert y.shape == z.shape and off(y, z) < 1e-2
                back = torch.randn(rows, n, dtype=torch.bfloat16, device="cuda")
                y, z = (call(back, W.t(), q, None, None, None) for call in (utils.matmul_lora, pristine["matmul_lora"]))
                assert torch.equal(y, z)
                base = getattr(proj, "base_layer", proj)
                y, z = base(x), inspect.unwrap(bitsandbytes.matmul_4bit)(x, base.weight, q, bias=base.bias)
                assert y.shape == z.shape and off(y, z) < 1e-2
            if matmul_table.enabled(0):
                assert id(q) in matmul_plan.plans
# A gradient through bitsandbytes' layer, and a traced one.
proj = projection(2048, 2048, True, 0)
x = torch.randn(4, 2048, dtype=torch.bfloat16, device="cuda", requires_grad=True)
right = inspect.unwrap(bitsandbytes.matmul_4bit)(x, proj.weight, proj.weight.quant_state, bias=proj.bias)
y = proj(x)
for a, b in ((y, right), *zip(*(torch.autograd.grad(t.sum(), x) for t in (y, right)))):
    assert off(a, b) < 1e-2
with torch.no_grad():
    compiled = torch.compile(proj, fullgraph=True)
    for rows in (4, 9):
        x = torch.randn(rows, 2048, dtype=torch.bfloat16, device="cuda")
        assert off(compiled(x), proj(x)) < 1e-2
assert not matmul_plan._given_up
"""


@pytest.mark.skipif(find_spec("unsloth") is None, reason="Unsloth is not installed: make setup")
def test_the_routes_with_the_real_unsloth(python):
    python(ROUTES, path=HERE, UNSLOTH_EXT_QUIET="1")  # by default


@pytest.mark.parametrize("four_bit", [False, True])
def test_captured_generation(four_bit):
    from unsloth_ext.nf4 import generate
    from unsloth_ext.nf4.generation import CapturedStep

    model = small_llama("cuda", four_bit)
    replays = []
    record = CapturedStep._record

    def counted(self, *arguments):
        result = record(self, *arguments)
        replays.append(self.failure)
        return result

    CapturedStep._record = counted
    try:
        for batch in (1, 3):
            ids = torch.randint(1, 512, (batch, 9), device="cuda")
            mask = torch.ones_like(ids)
            mask[0, :2] = 0
            arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 40, "do_sample": False}
            eager = model.generate(**arguments, cache_implementation="static", disable_compile=True, output_logits=True,
                                   return_dict_in_generate=True)  # fmt: skip
            ours = generate(model, **arguments, output_logits=True, return_dict_in_generate=True)
            assert torch.equal(ours.sequences, eager.sequences)
            for one, other in zip(ours.logits, eager.logits, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-2)
            assert replays.pop() == ""
        generate(model, input_ids=ids, max_new_tokens=20, do_sample=True, temperature=0.9)
        assert replays.pop() == "" and "get_compiled_call" not in vars(model)
        # What cannot be captured is generate itself.
        beams = generate(model, input_ids=ids, max_new_tokens=8, num_beams=3, do_sample=False)
        assert torch.equal(beams, model.generate(input_ids=ids, max_new_tokens=8, num_beams=3, do_sample=False))
        hidden = generate(
            model, input_ids=ids, max_new_tokens=8, output_hidden_states=True, return_dict_in_generate=True
        )
        assert len(hidden.hidden_states) == 8 and replays == []
    finally:
        CapturedStep._record = record


def test_captured_generation_follows_an_adapter():
    import peft

    from unsloth_ext.nf4 import generate

    config = peft.LoraConfig(
        r=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(small_llama("cuda"), config).eval()
    ids = torch.randint(1, 512, (2, 9), device="cuda")
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False}
    static = {"cache_implementation": "static", "disable_compile": True}
    for _ in range(3):
        assert torch.equal(generate(model, **arguments), model.generate(**arguments, **static))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
    with model.disable_adapter():
        assert torch.equal(generate(model, **arguments), model.generate(**arguments, **static))


DECODING = """
import os, torch, unsloth_ext, unsloth
from unsloth.models import llama, _decode_graphs
assert {row.id: row.state for row in unsloth_ext.status()}["nf4.decode_graphs"] == "applied"
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained(os.environ["MODEL"], load_in_4bit=True, dtype=torch.bfloat16, max_seq_length=256)
FastLanguageModel.for_inference(model)
torch.manual_seed(0)
for batch in (1, 3):
    ids = torch.randint(1, 400, (batch, 12), device="cuda")
    arguments = dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=96, do_sample=False, pad_token_id=0, eos_token_id=None)
    replays = _decode_graphs.stats(model).get("replays", 0)
    ours = model.generate(**arguments)
    assert _decode_graphs.stats(model)["replays"] - replays >= 90, _decode_graphs.stats(model)
    os.environ["UNSLOTH_DECODE_CUDA_GRAPHS"] = "0"
    eager = model.generate(**arguments)
    del os.environ["UNSLOTH_DECODE_CUDA_GRAPHS"]
    assert torch.equal(ours, eager)
    short = _decode_graphs.stats(model)["replays"]
    model.generate(**arguments | {"max_new_tokens": 8})
    assert _decode_graphs.stats(model)["replays"] == short  # not worth capturing
"""


@pytest.mark.skipif(find_spec("unsloth") is None, reason="Unsloth is not installed: make setup")
def test_unsloths_decoding_replays_graphs(python, tmp_path):
    model = small_llama("cuda")
    model.save_pretrained(tmp_path / "model")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(512)}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        unk_token="w0",
        pad_token="w1",
        eos_token="w2",
    )
    made.save_pretrained(tmp_path / "model")
    python(DECODING, path=HERE, MODEL=str(tmp_path / "model"), UNSLOTH_EXT_QUIET="1")
