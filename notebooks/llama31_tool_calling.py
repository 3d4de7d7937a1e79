"""The source of llama31_tool_calling.ipynb; `python notebooks/build.py` makes it. Cells are marked by percent signs."""
# ruff: noqa: E402

# %% [markdown]
# # Llama 3.x tool calling with Unsloth: train it, run it, measure it
#
# A small Llama learns to call three tools. The conversations are made by code, so every call has one right answer, and the
# notebook ends with a number: how many calls are exactly right before and after training.
#
# What to look at:
# - **what the model sees**: the prompt, the call and the token that ends it, as one of four named profiles;
# - **what it is trained on**: only the assistant's own tokens, which the template marks (`assistant_only_loss=True`);
# - **where it stops**: at end of text, eom and eot, which the loader has put into the generation config;
# - **what comes back**: model text is parsed without `eval`, and only functions on a list can run.
#
# Runs on a free Colab T4. Without a GPU it runs too, with the tiny model of `unsloth_ext` (set `TOOL_MODEL=embedded-tiny`).

# %% [markdown]
# ## Install
# On Colab, `pip` installs `unsloth` and this package. Two steps, once a session:
# 1. put the address from which you cloned or opened this repository into `REPOSITORY`, for example
#    `git+https://github.com/<owner>/<repository>` (add `@<branch>` for a branch), or a folder you have uploaded;
# 2. run the cell. Elsewhere it installs nothing: follow the README.

# %%
import importlib.util
import os
import subprocess
import sys

REPOSITORY = os.environ.get("UNSLOTH_EXT", "")  # git+https://github.com/<owner>/<repository>

if "google.colab" in sys.modules and importlib.util.find_spec("unsloth_ext") is None:
    if not REPOSITORY:
        raise ValueError("Put the address of this repository into REPOSITORY in this cell, then run it again.")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "unsloth", REPOSITORY], check=True)

# %%
import random

MODEL = os.environ.get("TOOL_MODEL", "unsloth/Llama-3.2-3B-Instruct")  # or a folder, or embedded-tiny
STEPS = int(os.environ.get("TOOL_STEPS", "60"))
EXAMPLES = int(os.environ.get("TOOL_EXAMPLES", "400"))
TESTS = int(os.environ.get("TOOL_TESTS", "40"))
PROFILE = "hf"  # or "meta-3.1", "chatformat", "pythonic-3.2"
SEED = 3407
random.seed(SEED)

# %% [markdown]
# ## Load
# `unsloth_ext` is imported first: it installs its fixes when Unsloth is imported, and says in one line which.

# %%
import unsloth_ext  # isort: skip
from unsloth import FastLanguageModel  # isort: skip

if MODEL.startswith("embedded"):
    from unsloth_ext.training.embedded import ensure_base

    MODEL = str(ensure_base(MODEL))

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=MODEL, max_seq_length=2048, load_in_4bit=True, random_state=SEED
)
print(unsloth_ext.status())

# %% [markdown]
# A model of the Llama 3 vocabulary now stops at all three of its stop tokens, also once it is saved: the loader has widened its
# generation config. (`embedded-tiny` has a vocabulary of its own and keeps what its checkpoint says.)

# %%
print("Stops at:", tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id))

# %% [markdown]
# ## Tools, and conversations whose answers are known
# The functions are ordinary Python. Their schemas are what the model is shown.

# %%
FACTORS = {("km", "mile"): 0.621371, ("kg", "pound"): 2.204623, ("litre", "gallon"): 0.264172}


def convert(value: float, unit: str, to: str) -> dict:
    """Convert a value between units."""
    return {"result": round(value * FACTORS[unit, to], 3)}


def calculate(operation: str, a: int, b: int) -> dict:
    """Add, subtract or multiply two integers."""
    return {"result": {"add": a + b, "subtract": a - b, "multiply": a * b}[operation]}


def add_event(day: str, hour: int, title: str) -> dict:
    """Put an event into the calendar."""
    if not 0 <= hour <= 23:
        raise ValueError(f"hour must be from 0 to 23, got {hour}")
    return {"booked": f"{title} on {day} at {hour}"}


FUNCTIONS = {"convert": convert, "calculate": calculate, "add_event": add_event}  # nothing else can run


def schema(name, description, **properties):
    parameters = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in properties.items()},
        "required": list(properties),
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [
    schema("convert", convert.__doc__, value="number", unit="string", to="string"),
    schema("calculate", calculate.__doc__, operation="string", a="integer", b="integer"),
    schema("add_event", add_event.__doc__, day="string", hour="integer", title="string"),
]

# %%
import json


def example(rng: random.Random) -> list[dict]:
    kind = rng.choice(list(FUNCTIONS))
    if kind == "convert":
        unit, to = rng.choice(list(FACTORS))
        arguments = {"value": rng.randrange(1, 500), "unit": unit, "to": to}
        question = f"How much is {arguments['value']} {unit} in {to}?"
        answer = "It is {result}."
    elif kind == "calculate":
        operation, sign = rng.choice([("add", "+"), ("subtract", "-"), ("multiply", "*")])
        arguments = {"operation": operation, "a": rng.randrange(1000), "b": rng.randrange(1000)}
        question = f"What is {arguments['a']} {sign} {arguments['b']}?"
        answer = "It is {result}."
    else:
        arguments = {
            "day": rng.choice(["Monday", "Tuesday", "Friday", "Sunday"]),
            "hour": rng.randrange(24),
            "title": rng.choice(["dentist", "dinner", "team meeting", "football"]),
        }
        question = f"Put {arguments['title']} into my calendar for {arguments['day']} at {arguments['hour']}."
        answer = "Done: {booked}."
    result = FUNCTIONS[kind](**arguments)
    return [
        {"role": "user", "content": question},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": kind, "arguments": arguments}}],
        },
        {"role": "tool", "name": kind, "content": json.dumps(result)},
        {"role": "assistant", "content": answer.format(**result)},
    ]


rng = random.Random(SEED)
conversations = [example(rng) for _ in range(EXAMPLES)]
questions = {conversation[0]["content"] for conversation in conversations}
tests = []
while len(tests) < TESTS:  # none that was trained on
    conversation = example(rng)
    if conversation[0]["content"] not in questions:
        tests.append(conversation)

# %% [markdown]
# ## What the model sees, and what it is trained on
# The template of the profile, with marks around what the assistant says: the mask is read from them. For `hf` it is Unsloth's own
# `llama-3.1` template with the fixes of `unsloth_ext`. The tokenizer of a Llama 3 model encodes text that only spells a special
# token as text.

# %%
from unsloth_ext.tools import chat_template, install_response_schema, parse, render, run_tool_loop

tokenizer.chat_template = chat_template(PROFILE)
DATE = "26 Jul 2024"  # or False, for none
options = dict(tools=TOOLS, date_string=DATE)
encoded = tokenizer.apply_chat_template(
    conversations[0], tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
)
print(tokenizer.decode(encoded["input_ids"]))
masked = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
trained = tokenizer.decode([token_id for token_id, mine in masked if mine])
print("\nTrained on:", repr(trained))

# %% [markdown]
# ## How good is it before training?
# A test counts if the first turn is exactly one call, of the right function, with the right arguments.

# %%
import torch


def generate(messages: list[dict], max_new_tokens: int = 96) -> str:
    """The next turn, greedy, special tokens kept. Where it stops is in the generation config."""
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
    ).to(model.device)
    with torch.inference_mode():
        output = model.generate(
            **prompt, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=False)


def exact_calls() -> float:
    right = 0
    for conversation in tests:
        wanted = conversation[1]["tool_calls"]
        turn = parse(generate(conversation[:1]), tools=TOOLS)
        right += [call.as_message() for call in turn.tool_calls] == wanted
    return right / len(tests)


FastLanguageModel.for_inference(model)
before = exact_calls()
print(f"Exactly right before training: {before:.0%} of {len(tests)}")

# %% [markdown]
# ## Train
# LoRA on the 4-bit model. The rows are conversations and their tools; `assistant_only_loss=True` trains on what the template
# marks and on nothing else. The tools are JSON text: Arrow would give each schema the keys of every other.

# %%
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

rows = [
    {"messages": messages, "tools": json.dumps(TOOLS), "chat_template_kwargs": {"date_string": DATE}}
    for messages in conversations
]
FastLanguageModel.for_training(model)
model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth" if torch.cuda.is_available() else False,
    random_state=SEED,
)
OUTPUT = os.environ.get("TOOL_OUTPUT", "tool_calling")
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=Dataset.from_list(rows),
    args=SFTConfig(
        output_dir=OUTPUT,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=2e-4,
        warmup_steps=5,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        seed=SEED,
        max_length=2048,
        assistant_only_loss=True,
        use_cpu=not torch.cuda.is_available(),
    ),
)
history = trainer.train()

# %% [markdown]
# ## And after?

# %%
FastLanguageModel.for_inference(model)
after = exact_calls()
print(f"Exactly right: {before:.0%} before, {after:.0%} after training ({len(tests)} questions it has not seen)")

# %% [markdown]
# ## A whole conversation
# Generate, read the calls, run the functions of `FUNCTIONS`, tell the model, until it answers. A call of anything else, or one
# that fails, is answered with an error that the model can read. This model calls without a word before it, so a call after
# content is not run (`calls_after_content=False`, the default of the loop): it may be one that the model only quotes.

# %%
conversation = run_tool_loop(generate, tests[0][:1], FUNCTIONS, max_turns=3)
for message in conversation:
    print(f"{message['role']:>9}: {message['content']} {message.get('tool_calls', '')}")

# %% [markdown]
# ## Reading a stream
# Content comes at once; a call comes when it is complete, so half a call never runs.

# %%
from unsloth_ext.tools import StreamingParser

parser = StreamingParser(tools=TOOLS)
text = render(tests[0][:2], profile=PROFILE, **options).rpartition("<|end_header_id|>\n\n")[2]
for start in range(0, len(text), 8):
    for delta in parser.feed(text[start : start + 8]):
        print(delta)
print(parser.finish())

# %% [markdown]
# ## Save
# The adapter and the tokenizer, with the template of this profile and what trl and transformers need to parse its calls.

# %%
tokenizer.chat_template = chat_template(PROFILE, generation=False)  # without markers: servers and GGUF do not know them
install_response_schema(tokenizer, PROFILE)
model.save_pretrained(os.path.join(OUTPUT, "adapter"))
tokenizer.save_pretrained(os.path.join(OUTPUT, "adapter"))
