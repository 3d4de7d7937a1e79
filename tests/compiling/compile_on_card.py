"""Training steps of a small Llama on a card, uncompiled and compiled: `compile_on_card.py KIND SCOPE CHECKPOINTING`.

The last line is JSON: graphs, breaks, and the difference of losses and gradients between the two.
"""

import argparse
import json
import os

os.environ.setdefault("UNSLOTH_EXT_PACKED", "1")

import unsloth_ext  # noqa: F401  # isort: skip  (before unsloth)
from unsloth import FastLanguageModel  # isort: skip  (before transformers)

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from unsloth_ext.compiling import compile_model, keep_dense_weights

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def checkpoint():
    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=2048,
        max_position_embeddings=4096,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained("model")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3} | {f"w{n}": n for n in range(4, 2048)}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    ).save_pretrained("model")


def load(kind, checkpointing):
    torch.manual_seed(11)
    if kind == "unsloth":
        model, _ = FastLanguageModel.from_pretrained(
            "model", max_seq_length=2048, load_in_4bit=True, dtype=torch.bfloat16
        )
        model = FastLanguageModel.get_peft_model(
            model, r=8, target_modules=TARGETS, use_gradient_checkpointing=checkpointing, random_state=11
        )
    else:
        import peft

        quantized = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            "model", dtype=torch.bfloat16, quantization_config=quantized, device_map="cuda"
        )
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=TARGETS, task_type="CAUSAL_LM"))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.train()


def batches(packed):
    made = []
    for _ in range(4):
        if packed:
            lengths = torch.randint(20, 300, (5,))
            ids = torch.randint(0, 2048, (1, int(lengths.sum()))).cuda()
            positions = torch.cat([torch.arange(n) for n in lengths.tolist()])[None].cuda()
            made.append(
                {"input_ids": ids, "labels": ids, "position_ids": positions, "packed_seq_lengths": lengths.int()}
            )
        else:
            ids = torch.randint(0, 2048, (2, int(torch.randint(100, 700, ())))).cuda()
            made.append({"input_ids": ids, "labels": ids})
    return made


def step(model, made):
    model.zero_grad(set_to_none=True)
    losses = []
    for batch in made:
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach().double().cpu())
    return torch.stack(losses), {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}


def differences(found, wanted):
    """(largest of the losses, of all gradients as one vector: relative)."""
    loss = (found[0] - wanted[0]).abs().max().item()
    off = sum((found[1][name] - g).square().sum() for name, g in wanted[1].items()).sqrt()
    return loss, (off / sum(g.square().sum() for g in wanted[1].values()).sqrt()).item()


def dequantised(run):
    """(what `run` gives, how many kernels that dequantise it launched)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        result = run()
        torch.cuda.synchronize()
    names = [event.name.lower() for event in found.events()]
    return result, sum("dequant" in name or "pitched" in name for name in names)


def with_dense_weights(model, made, eager, compiled):
    """The same steps with the weights kept dense, and once more without."""
    _, before = dequantised(lambda: step(model, made))
    kept = keep_dense_weights(model)
    step(model, made)  # traced anew
    found, during = dequantised(lambda: step(model, made))
    loss, gradients = differences(found, eager)
    kept.remove()
    graphs = compiled.report().graphs
    _, after = dequantised(lambda: step(model, made))
    return {
        "dense": {"loss_difference": loss, "gradient_difference": gradients, "dequantised": [before, during, after]},
        "graphs_with_dense": [graphs, compiled.report().graphs],
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("unsloth", "plain"))
    parser.add_argument("scope", choices=("step", "block"))
    parser.add_argument("checkpointing", choices=("False", "True", "unsloth"))
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--dense", action="store_true", help="then with keep_dense_weights")
    options = parser.parse_args()
    checkpointing = {"True": True, "False": False}.get(options.checkpointing, options.checkpointing)
    checkpoint()
    made = batches(options.packed)
    model = load(options.kind, checkpointing)
    eager = step(model, made)
    compiled = compile_model(model, options.scope)
    loss, gradients = differences(step(model, made), eager)
    report = compiled.report()
    print(report)
    dense = with_dense_weights(model, made, eager, compiled) if options.dense else {}
    print(
        json.dumps(
            {
                "graphs": report.graphs,
                "breaks": report.breaks,
                "compile_seconds": report.compile_seconds,
                "graphs_of_the_step": report.graphs_by_region.get(type(model).__name__, 0),
                "shared_layers": report.shared_layers,
                "not_shared": report.not_shared,
                "loss_difference": loss,
                "gradient_difference": gradients,
            }
            | dense
        )
    )


if __name__ == "__main__":
    main()
