# ruff: noqa: E402
"""A CUDA card that is not there: Unsloth's GPU modules, imported and traced on any machine, on fake CUDA tensors.

    import compile_fake_card as card      # before torch is used and before unsloth
    model = card.model(layers=1)          # Unsloth's fast path, LoRA on 4-bit layers, parameters without data on "cuda:0"
    with card.tensors(): ids = card.ids(2, 64)
    with card.MODE: model(input_ids=ids, ...)

What is real: Unsloth's and peft's modules and every line that Dynamo traces. What is not: the tensors' data, and a dozen
questions to the driver, which are answered as an H200 would. Autograd's engine needs a driver, so the gradients of a traced
graph cannot be asked for; Dynamo traces the backward of Unsloth's autograd functions all the same.
For a process of its own: nothing is put back.
"""

import ctypes
import os
import sys
import types

os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")

import torch

H200 = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    total_memory=139 * 2**30,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    L2_cache_size=50 * 2**20,
    shared_memory_per_block_optin=232448,
    regs_per_multiprocessor=65536,
    warp_size=32,
    gcnArchName="",
)


def _answer_as_a_card():
    import torch.utils._triton

    cuda = torch.cuda
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_device_capability = lambda device=None: (H200.major, H200.minor)
    cuda.get_device_properties = lambda device=None: H200
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.is_current_stream_capturing = lambda: False
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    torch._C._cuda_getCurrentRawStream = lambda index=0: 0
    torch.utils._triton.has_triton = lambda: True
    if torch.version.cuda is None:
        # A CPU build has no device guard for CUDA, and indexing or copying even a fake tensor asks for one. The guard of
        # meta tensors does nothing, which is right here too.
        library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libc10.so"))
        guards = (ctypes.c_void_p * 16).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
        cuda_type, meta_type = 1, 14
        guards[cuda_type] = guards[meta_type]


if torch.cuda.is_available():
    raise RuntimeError("compile_fake_card is for machines without a card: this one has one")
_answer_as_a_card()

import unsloth_ext  # noqa: F401  # isort: skip  (before unsloth)
import unsloth  # noqa: F401  # isort: skip  (before transformers)
import bitsandbytes
import peft
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.trainer import Trainer
from unsloth.models import llama as unsloth_llama
from unsloth.utils import attention_dispatch

attention_dispatch._sdpa_choice = lambda *args: attention_dispatch._CUDNN_CHOICE  # as a Hopper card answers
attention_dispatch._sdpa_gqa_choices = lambda *args, **kwargs: (attention_dispatch._CUDNN_CHOICE,) * 2

MODE = FakeTensorMode(allow_non_fake_inputs=True)
MAX_LENGTH = 2048
BUCKET = attention_dispatch._CUDNN_LENGTH_BUCKET


def tensors():
    """The scope in which tensors are made on the card that is not there."""
    from contextlib import ExitStack

    stack = ExitStack()
    stack.enter_context(MODE)
    stack.enter_context(torch.device("cuda"))
    return stack


def ids(batch, length):
    return torch.zeros(batch, length, dtype=torch.long)


def _fake(tensor):
    with MODE:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")


def _fake_state(state):
    for name in ("absmax", "code", "offset"):
        if isinstance(getattr(state, name, None), torch.Tensor):
            setattr(state, name, _fake(getattr(state, name)))
    if state.state2 is not None:
        _fake_state(state.state2)
    return state


def _onto_the_card(model):
    # Params4bit itself cannot be fake; Unsloth reads the tensor and its quant_state, and those are.
    kept = ("quant_type", "bnb_quantized", "blocksize", "compress_statistics", "quant_storage")
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is None:
                continue
            parameter = torch.nn.Parameter(_fake(value), requires_grad=value.requires_grad)
            if getattr(value, "quant_state", None) is not None:
                parameter.quant_state = module.quant_state = _fake_state(value.quant_state)
                for attribute in kept:
                    setattr(parameter, attribute, getattr(value, attribute))
            module._parameters[name] = parameter
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = _fake(value)


def _build_rope_cache(self, device_index):
    # As upstream's, but for torch.device(0), which only an initialised driver understands.
    size = self.current_rope_size
    self._set_cos_sin_cache(
        seq_len=self._rope_cache_rows(), device=torch.device("cuda", device_index), dtype=self._rope_cache_dtype
    )
    self.current_rope_size = size
    self._rope_cache_versions[device_index] = self._rope_cache_version
    self._mark_rope_build(device_index)


FAMILIES = {  # module and class of Unsloth's, class of transformers'
    "llama": ("llama", "FastLlamaModel", "Llama"),
    "mistral": ("mistral", "FastMistralModel", "Mistral"),
    "qwen2": ("qwen2", "FastQwen2Model", "Qwen2"),
    "qwen3": ("qwen3", "FastQwen3Model", "Qwen3"),
    "gemma2": ("gemma2", "FastGemma2Model", "Gemma2"),
    "granite": ("granite", "FastGraniteModel", "Granite"),
    "cohere": ("cohere", "FastCohereModel", "Cohere"),
}


def model(family="llama", layers=1, checkpointing=False, dtype=torch.bfloat16):
    """A small model as FastLanguageModel leaves it after get_peft_model, in training mode: every projection in 4 bits with
    LoRA on it, Unsloth's LoRA functions, norms, rope and attention in place, the layers compiled by class as on a card."""
    from importlib import import_module

    from unsloth.models import _block_compile

    module, fast, name = FAMILIES[family]
    fast = getattr(import_module(f"unsloth.models.{module}"), fast)
    fast.pre_patch()
    config = getattr(transformers, f"{name}Config")(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=1024,
        max_position_embeddings=2 * MAX_LENGTH,
        attn_implementation="sdpa",
        dtype=dtype,
    )
    for loaded in list(sys.modules.values()):
        if getattr(loaded, "__name__", "").startswith("unsloth.models.") and "get_current_device" in vars(loaded):
            loaded.get_current_device = lambda: "cpu"
    torch.set_default_dtype(dtype)
    try:
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    finally:
        torch.set_default_dtype(torch.float32)
    for module in list(model.modules()):
        for child_name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear and child_name != "lm_head":
                packed = bitsandbytes.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=child.bias is not None,
                    compute_dtype=dtype,
                    quant_type="nf4",
                )
                packed.weight = bitsandbytes.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                setattr(module, child_name, packed.to("cpu"))
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = model.model.rotary_emb  # as from_pretrained does
    model.is_loaded_in_4bit = True
    for module in model.modules():
        module.max_seq_length = MAX_LENGTH
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=16, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    )
    Trainer._inner_training_loop.__name__ = "_fast_inner_training_loop"  # what from_pretrained would have patched
    model = fast.patch_peft_model(model, use_gradient_checkpointing=checkpointing)
    available = torch.cuda.is_available
    torch.cuda.is_available = lambda: True
    try:
        _block_compile.patch_block_compile(model)
    finally:
        torch.cuda.is_available = available  # Dynamo saves a real card's random state
    unsloth_llama._PerDeviceRopeCache._build_rope_cache = _build_rope_cache
    _onto_the_card(model)
    return model.train()
