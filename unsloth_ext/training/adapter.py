"""The adapter after training: the dtypes it must keep across a save, and the answer that proves a reloaded one is the trained one."""

import contextlib
import sys

ANSWER_TOKENS = 48


def adapter_dtypes(model) -> dict:
    return {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}


def restore_dtypes(model, dtypes: dict) -> None:
    """Give a loaded adapter the dtypes it was trained in: peft widens bfloat16 to float32 on loading, which rounds differently from then on."""
    for name, parameter in model.named_parameters():  # by name: loading may have replaced the parameters
        if name in dtypes:
            parameter.data = parameter.data.to(dtypes[name])


def first_prompt(rows: list[dict], tokenizer) -> str:
    """The first row without its answer, as text."""
    row = rows[0]
    if "messages" in row:
        question = [message for message in row["messages"] if message["role"] == "user"][:1] or row["messages"][:1]
        return tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    return row["prompt"] if "prompt" in row else next(iter(row.values()))[:200]


def generate(backend, model, tokenizer, prompt: str) -> list[int]:
    """The tokens of a greedy answer to `prompt`, which already holds its special tokens if it is a chat."""
    import torch

    backend.for_inference(model)
    bos = tokenizer.bos_token or "\0"
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not prompt.startswith(bos)).to(model.device)
    stops = {tokenizer.eos_token_id, tokenizer.get_vocab().get("<|eot_id|>")} - {None}
    with torch.inference_mode(), contextlib.redirect_stdout(sys.stderr):
        output = model.generate(
            **inputs,
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(stops),
        )
    return output[0, inputs["input_ids"].shape[1] :].tolist()
