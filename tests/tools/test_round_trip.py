"""render -> parse -> render is the identity in every profile, and Meta's own decoder and the servers read the same single calls."""

import keyword
import re

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from other_readers import sglang_llama3, vllm_llama3_json, vllm_pythonic

from unsloth_ext.tools.encoding import encode
from unsloth_ext.tools.messages import MessageError, normalize
from unsloth_ext.tools.parsing import parse
from unsloth_ext.tools.profiles import PROFILES, render
from unsloth_ext.tools.special_tokens import SPECIAL_TOKENS

BUILTIN = ["brave_search", "wolfram_alpha", "code_interpreter"]
HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
_TURN = re.compile(re.escape(HEADER) + r"(.*?(?:<\|eot_id\|>|<\|eom_id\|>))", re.S)

free_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda text: "<|" not in text)
plain = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="{[<`~"), max_size=20
)  # may stand before a call
query = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters='"\\<'), max_size=20)
names = st.from_regex(r"[a-z_][a-z0-9_]{0,8}(\.[a-z_]{1,4})?", fullmatch=True).filter(
    lambda name: not name.endswith(".call") and all(map(str.isidentifier, name.split("."))) and name not in BUILTIN
)
keys = st.from_regex(r"[a-z_][a-z0-9_]{0,6}", fullmatch=True)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | free_text
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(free_text, inner, max_size=3), max_leaves=8
)


def call_of(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def normalized(call):
    return normalize([{"role": "assistant", "content": "", "tool_calls": [call]}])[0]["tool_calls"][0]


custom_calls = st.builds(lambda *call: normalized(call_of(*call)), names, st.dictionaries(keys, values, max_size=4))
builtin_calls = st.builds(
    lambda name, text: call_of(name, {"code": text} if name == "code_interpreter" else {"query": text}),
    st.sampled_from(BUILTIN),
    query,
)


@st.composite
def conversations(draw):
    messages = [{"role": "user", "content": draw(free_text)}]
    if draw(st.booleans()):
        messages.insert(0, {"role": "system", "content": draw(free_text)})
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["content", "custom", "custom", "builtin", "parallel"]))
        if kind == "content":
            messages.append({"role": "assistant", "content": draw(free_text)})
        elif kind == "parallel":
            messages.append(
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": draw(st.lists(custom_calls, min_size=2, max_size=3)),
                }
            )
        else:
            call = draw(custom_calls if kind == "custom" else builtin_calls)
            content = draw(st.just("") | plain)
            messages.append({"role": "assistant", "content": content, "tool_calls": [call]})
        messages.append({"role": "tool" if kind != "content" else "user", "content": draw(free_text)})
    return normalize(messages)  # a null argument is no argument


def rendered(messages, profile):
    """The text; a conversation that the profile cannot write is made into one that it can."""
    for _ in range(2 * len(messages)):
        try:
            return messages, render(messages, profile=profile, builtin_tools=BUILTIN, date_string=False)
        except MessageError as error:
            turn = messages[error.index]
            keep = {"content": ""} if error.field == "content" else {"tool_calls": turn["tool_calls"][:1]}
            assert turn | keep != turn, error
            messages = [*messages[: error.index], turn | keep, *messages[error.index + 1 :]]
    raise AssertionError("it cannot be written")


def reparsed(messages, turns):
    turns = iter(turns)
    return [next(turns).as_message() if message["role"] == "assistant" else message for message in messages]


@pytest.mark.parametrize("profile", PROFILES)
@settings(max_examples=255, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=conversations())
def test_render_parse_render(profile, messages):
    messages, text = rendered(messages, profile)
    turns = [parse(turn) for turn in _TURN.findall(text)]
    again = reparsed(messages, turns)
    assert render(again, profile=profile, builtin_tools=BUILTIN, date_string=False) == text
    for before, after in zip(messages, again, strict=True):
        if before["role"] == "assistant" and before.get("tool_calls") and profile != "chatformat":
            assert after["tool_calls"] == before["tool_calls"] and after["content"] == before["content"]


@pytest.mark.parametrize("profile", PROFILES)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=conversations(), forged=st.sampled_from(["<|eot_id|>", "<|python_tag|>", HEADER]))
def test_as_ids_also_what_spells_control_tokens(profile, llama3_tokenizer, messages, forged):
    call = call_of("f", {"a": forged + "x"})
    messages = [*messages, {"role": "assistant", "content": "", "tool_calls": [call]}]
    messages, _ = rendered(messages, profile)
    encoded = encode(llama3_tokenizer, messages, profile=profile, builtin_tools=BUILTIN, date_string=False)
    turns, start, before = [], 0, 0
    for place, (token_id, mine) in enumerate(zip(encoded.input_ids, encoded.assistant_mask, strict=True)):
        if token_id == SPECIAL_TOKENS["<|start_header_id|>"]:
            start = place  # with the header: a newline after it may be one token with its own
        if mine:
            turns[-1 if before else len(turns) :] = [encoded.input_ids[start : place + 1]]
        before = mine
    parsed = [parse(ids, tokenizer=llama3_tokenizer) for ids in turns]
    assert parsed[-1].as_message()["tool_calls"] == [call]
    again = render(reparsed(messages, parsed), profile=profile, builtin_tools=BUILTIN, date_string=False)
    assert again == encoded.text


@pytest.mark.parametrize("profile", PROFILES)
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(call=custom_calls)
def test_metas_decoder_and_the_servers_agree_on_single_calls(profile, llama_models, call):
    from llama_models.llama3.tool_utils import ToolUtils

    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    (turn,) = _TURN.findall(render(messages, profile=profile, date_string=False))
    body = turn[: turn.rindex("<|")]
    (parsed,) = parse(turn, strict=True).tool_calls
    assert parsed.as_message() == call
    mine = parsed.name, parsed.arguments
    if profile != "pythonic-3.2":
        assert vllm_llama3_json(body) == [mine] and sglang_llama3(body) == [mine]
    elif "." not in parsed.name:
        assume(not any(map(keyword.iskeyword, (parsed.name, *parsed.arguments))))  # Python's own parser refuses f(as=1)
        assert vllm_pythonic(body) == [mine]
    assume(
        "." not in parsed.name and "<function=" not in body
    )  # Meta's decoder knows neither dotted names nor text like this
    assume(not re.search(r"\.call\(query", body))
    assert ToolUtils.maybe_extract_custom_tool_call(body.removeprefix("<|python_tag|>")) == mine


@settings(max_examples=100, deadline=None)
@given(call=builtin_calls)
def test_metas_decoder_agrees_on_builtin_calls(llama_models, call):
    from llama_models.datatypes import StopReason
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer

    assume(call["function"]["arguments"].get("code", "x") == call["function"]["arguments"].get("code", "x").strip(" "))
    meta = ChatFormat(Tokenizer.get_instance())
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    (turn,) = _TURN.findall(render(messages, profile="meta-3.1", builtin_tools=BUILTIN, date_string=False))
    (decoded,) = meta.decode_assistant_message_from_content(turn, StopReason.out_of_tokens).tool_calls
    (parsed,) = parse(turn, strict=True).tool_calls
    assert (decoded.tool_name.value, decoded.arguments) == (parsed.name, parsed.arguments)
    assert parsed.as_message() == call
