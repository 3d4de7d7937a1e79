"""trl and transformers read the calls of a Llama 3.x tokenizer, whatever its chat template is."""

import copy
import json
import pickle

import pytest
from parser_texts import EOT, FORMS, F, G

from unsloth_ext.tools.profiles import render
from unsloth_ext.tools.response_schema import (
    ParseResponse,
    follow_chat_template,
    follow_no_longer,
    install_response_schema,
    profile_of,
    remove_response_schema,
    response_template,
)

trl = pytest.importorskip("trl.chat_template_utils")
pytest.importorskip("transformers.utils.chat_parsing")

HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
PROMPT = f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi{EOT}{HEADER}"

# What a declarative template reads, by transformers' own parser.
TRL_READS = {"content", "content, cut off", "json", "content, json", "content, code, json"}
OURS_READS = TRL_READS | {
    *("json, arguments", "json, eos", "json, indented", "tagged json", "typed json", "tagged typed json"),
    *("semicolons", "content, tagged json"),
}


@pytest.fixture()
def tokenizer(llama3_tokenizer):
    return copy.copy(llama3_tokenizer)


def simple(message):
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])]
    return message.get("content", ""), calls


def read_by_transformers(tokenizer, template):
    read = set()
    for form, (text, content, calls, _) in FORMS.items():
        try:
            message = type(tokenizer).parse_response(tokenizer, text, template, prefix=PROMPT)
        except ValueError:
            continue
        if simple(message) == (content.strip(), calls):
            read.add(form)
    return read


def test_what_the_templates_read(tokenizer):
    assert read_by_transformers(tokenizer, trl.llama3_template) == TRL_READS
    for profile in ("hf", "meta-3.1", "chatformat"):
        assert read_by_transformers(tokenizer, response_template(profile)) == OURS_READS


@pytest.mark.parametrize("profile", ["hf", "meta-3.1", "chatformat", "pythonic-3.2"])
def test_the_template_reads_its_profile(profile, tokenizer):
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "x, b=1", "n": [1, {"k": "v"}], "e": 2.5}}}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    text = render(messages, profile=profile, date_string=False)
    start = text.rindex(HEADER) + len(HEADER)
    message = type(tokenizer).parse_response(tokenizer, text[start:], response_template(profile), prefix=text[:start])
    assert message == {"role": "assistant", "tool_calls": [call]}


def test_trl_needs_it(tokenizer, llama31_template):
    """trl resolves nothing for Unsloth's template; with the schema installed it resolves and reads every form."""
    tokenizer.chat_template = llama31_template
    assert trl.supports_tool_calling(tokenizer)
    with pytest.raises(ValueError, match="Unrecognized chat template"):
        trl.add_response_schema(tokenizer)
    assert install_response_schema(install_response_schema(tokenizer)) is tokenizer
    prefix = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    for form, (text, content, calls, _) in FORMS.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        message = trl.parse_response(tokenizer, ids, prefix=prefix)
        assert (message["role"], *simple(message)) == ("assistant", content, calls), form


def test_copies_pickles_and_saved_tokenizers(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    install_response_schema(tokenizer)
    text, _, calls, _ = FORMS["pythonic, parallel"]
    for other in (copy.copy(tokenizer), copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert simple(other.parse_response(text, prefix=PROMPT)) == ("", calls)
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["response_template"] == response_template("hf")
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert simple(loaded.parse_response(FORMS["json"][0], prefix=PROMPT)) == ("", [F])
    assert "parse_response" not in vars(remove_response_schema(tokenizer)) and tokenizer.response_template is None


def test_batches_prefixes_and_processors(tokenizer):
    class Processor:
        def __init__(self):
            self.tokenizer = tokenizer

    processor = Processor()
    assert install_response_schema(processor) is processor and isinstance(tokenizer.parse_response, ParseResponse)
    parse = tokenizer.parse_response
    texts = [FORMS["json"][0], FORMS["content"][0]]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    want = [("", [F]), ("It is 20 C.", [])]
    assert [simple(one) for one in parse(texts)] == [simple(one) for one in parse(ids, prefix=PROMPT)] == want
    assert simple(parse(ids[0], prefix=[])) == want[0] and parse([]) == {"role": "assistant", "content": ""}
    begun = '{"name": "find", "para'  # the prompt has begun the answer
    rest = json.dumps({"name": G[0], "parameters": G[1]})[len(begun) :]
    assert simple(parse(rest, prefix=PROMPT + begun)) == ("", [G])
    assert [simple(one) for one in parse([rest, "x"], prefix=[PROMPT + begun, PROMPT])] == [("", [G]), ("x", [])]
    with pytest.raises(ValueError, match="prefix has 2 entries for 1"):
        parse(["x"], prefix=["a", "b"])
    by_trl = parse(FORMS["json"][0], trl.llama3_template)
    assert simple(by_trl) == ("", [F])


def test_unknown_profile(tokenizer):
    with pytest.raises(ValueError, match="pythonic-3.2"):
        install_response_schema(tokenizer, "llama")
    assert getattr(tokenizer, "response_template", None) is None


def test_grpo_trainer_takes_the_tools(tokenizer, llama31_template, tmp_path):
    """The whole constructor, and one rollout that calls a tool: the model is made to say the call."""
    torch = pytest.importorskip("torch")
    datasets = pytest.importorskip("datasets")
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    said = []

    def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: The first number.
            b: The second number.
        """
        said.append((a, b))
        return a + b

    tokenizer.chat_template = llama31_template
    install_response_schema(tokenizer)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(config).to(torch.float32)
    arguments = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=40,
        max_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
    )
    rows = datasets.Dataset.from_list([{"prompt": [{"role": "user", "content": "2 + 3?"}]}] * 2)

    trainer = GRPOTrainer(
        model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=arguments,
        train_dataset=rows, processing_class=tokenizer, tools=[add],
    )  # fmt: skip
    call = tokenizer(f"[add(a=2, b=3)]{EOT}", add_special_tokens=False)["input_ids"]
    answer = tokenizer(f"5{EOT}", add_special_tokens=False)["input_ids"]
    turns = iter([[call, call], [answer, answer]])
    trainer._generate_single_turn = lambda *_, **__: (next(turns), None)
    trainer.model.train()
    # The rollout, without the loss, whose kernel needs a GPU.
    scored = trainer._generate_and_score_completions(list(rows))
    assert said == [(2, 3), (2, 3)]
    assert scored["tool_mask"].sum() == 2 * (len(call) + len(answer))  # the tool's own text is not trained on


# ---- by the chat template that the tokenizer has


@pytest.mark.parametrize("profile", ["hf", "meta-3.1", "chatformat", "pythonic-3.2"])
def test_it_follows_the_chat_template(tokenizer, llama31_template, profile, tmp_path):
    from transformers import AutoTokenizer

    from unsloth_ext.tools import chat_template

    follow_chat_template(tokenizer)
    assert tokenizer.response_template is None  # no template, no calls
    tokenizer.chat_template = chat_template(profile, llama31_template)
    assert profile_of(tokenizer.chat_template) == profile
    assert tokenizer.response_template == response_template(profile)
    assert simple(tokenizer.parse_response(f"[f(a=1), g()]{EOT}", prefix=PROMPT)) == ("", [("f", {"a": 1}), ("g", {})])
    other = copy.copy(tokenizer)
    other.chat_template = trl.qwen3_chat_template
    assert other.response_template is None and tokenizer.response_template is not None
    with pytest.raises(AttributeError, match="does not have a `response_template`"):
        other.parse_response("x")
    if profile != "hf":
        return
    # What is saved is of that template, and gives way where the reloaded tokenizer gets another.
    tokenizer.save_pretrained(tmp_path)
    again = follow_chat_template(AutoTokenizer.from_pretrained(tmp_path))
    assert again.response_template == response_template(profile)
    again.chat_template = trl.qwen3_chat_template
    assert again.response_template is None
    assert follow_no_longer(tokenizer) is tokenizer and tokenizer.response_template is None


def test_what_the_user_has_set_holds(tokenizer, llama31_template):
    mine = {"defaults": {"role": "assistant"}, "fields": {"content": {"content": "text"}}}
    tokenizer.chat_template = llama31_template
    tokenizer.response_template = mine
    follow_chat_template(tokenizer)
    assert tokenizer.response_template == mine
    tokenizer.chat_template = trl.qwen3_chat_template
    tokenizer.response_template = None
    install_response_schema(tokenizer, "pythonic-3.2")  # as asked for, whatever the template
    assert tokenizer.response_template == response_template("pythonic-3.2")
    assert simple(tokenizer.parse_response(f"[f(a=1)]{EOT}", prefix=PROMPT)) == ("", [("f", {"a": 1})])
    assert remove_response_schema(tokenizer).response_template is None


@pytest.mark.parametrize("name", ["llama3_1", "llama3_2", "llama3", "qwen3", "qwen2_5"])
def test_which_templates_write_llama_3s_calls(name):
    from pathlib import Path

    file = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not file.is_file():
        pytest.skip(f"this trl has no {file.name}")
    text = file.read_text(encoding="utf-8")
    assert profile_of(text) == ("hf" if name in ("llama3_1", "llama3_2") else None)
    assert profile_of({"default": "{{ messages }}", "tool_use": text}) == profile_of(text)
    assert (
        profile_of(None) is None and profile_of("{{ nothing.here.at.all }}") is None and profile_of("{% broken") is None
    )
