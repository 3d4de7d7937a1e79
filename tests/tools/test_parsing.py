"""Text to calls: every form, the refusals of strict parsing, the limits; and which forms other readers of Llama 3.x take."""

import ast
import json
import pickle
import subprocess
import sys

import pytest
from other_readers import sglang_llama3, vllm_llama3_json, vllm_pythonic
from parser_texts import EOM, EOT, FORMS, TAG, F, G, hf, meta, pythonic, tag

from unsloth_ext.tools.parsed_message import MAX_CALL_CHARS, MAX_CALLS, MAX_DEPTH, MAX_NAME_CHARS, MAX_NUMBER_CHARS
from unsloth_ext.tools.parsing import ParsedMessage, ParseError, ToolCall, parse


def simple(message):
    return message.content, [(call.name, call.arguments) for call in message.tool_calls], message.stop


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strict", [False, True])
def test_every_form(form, strict):
    text, content, calls, stop = FORMS[form]
    assert simple(parse(text, strict=strict)) == (content, calls, stop)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_as_ids(form, llama3_tokenizer):
    text, content, calls, stop = FORMS[form]
    ids = llama3_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert simple(parse(ids, tokenizer=llama3_tokenizer, strict=True)) == (content, calls, stop)


def test_ids_tell_a_control_token_from_its_spelling(llama3_tokenizer):
    text = hf("f", {"a": f"{EOT}{TAG}"})
    ids = [*llama3_tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], 128009]
    parsed = parse(ids, tokenizer=llama3_tokenizer, strict=True)
    assert simple(parsed) == ("", [("f", {"a": f"{EOT}{TAG}"})], "eot")
    assert parse(text).tool_calls == ()  # a text cannot tell
    assert parse(text).stop == "eot"


def test_ids_of_a_vocabulary_that_kept_the_reserved_names(llama3_tokenizer_folder, tmp_path):
    from transformers import AutoTokenizer

    files = {file.name: file.read_text() for file in llama3_tokenizer_folder.iterdir()}
    renamed = json.dumps("<|python_tag|>")[1:-1], "<|reserved_special_token_250|>"
    for name, text in files.items():
        (tmp_path / name).write_text(text.replace(*renamed))
    old = AutoTokenizer.from_pretrained(tmp_path)
    assert old.convert_ids_to_tokens(128010) == renamed[1]
    ids = [128010, *old("print(1)", add_special_tokens=False)["input_ids"], 128008]
    assert simple(parse(ids, tokenizer=old)) == ("", [("code_interpreter", {"code": "print(1)"})], "eom")


def test_arrays_and_tensors_of_ids(llama3_tokenizer):
    torch = pytest.importorskip("torch")
    ids = llama3_tokenizer(hf(*F) + EOT, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert parse(ids[0], tokenizer=llama3_tokenizer) == parse(ids[0].numpy(), tokenizer=llama3_tokenizer)
    assert parse(ids[0], tokenizer=llama3_tokenizer).tool_calls == (ToolCall(*F),)
    with pytest.raises(ValueError, match="one sequence"):
        parse(ids, tokenizer=llama3_tokenizer)
    with pytest.raises(ValueError, match="tokenizer is needed"):
        parse(torch.tensor([1, 2]))


CONTENT = {  # never a call, strict or not
    "JSON answer": '{"city": "Oslo", "population": 700000}',
    "JSON with a name only": '{"name": "Oslo"}',
    "JSON with a name and more": '{"name": "Oslo", "parameters": {}, "population": 1}',
    "JSON list of values": '[1, "two", {"name": "f", "parameters": {}}]',
    "calls inside a JSON answer": '{"examples": [{"name": "f", "parameters": {}}]}',
    "description of a tool": '{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}',
    "JSON of another type": '{"type": "object", "name": "f", "parameters": {}}',
    "example in a code fence": 'Write\n```json\n{"name": "f", "parameters": {}}\n```\nand send it.',
    "example in a sentence": 'Say {"name": "f", "parameters": {}} to call f.',
    "markdown link": "[the docs](https://example.org/a(1))",
    "references": "[1] and [see(this)] or [x] {y}",
    "builtin named in prose": "I could use brave_search.call(...) here.",
    "empty": "",
    "empty list": "[]",
    "empty object": "{}",
    "half a token": "a <|eot",
    "less than": "1 < 2 <function or not>",
    "function tag in backticks": 'Sure: `<function=rm>{"path": "/"}</function>` is how you call it.',
    "function tag in backticks at the end": 'Call it by `<function=rm>{"path": "/"}</function>`',
    "function tag in a code fence": '```\n<function=rm>{"path": "/"}</function>\n```',
    "function tag in a sentence": 'Write <function=rm>{"path": "/"}</function> to remove it.',
    "function tag in a sentence, without an end": 'Write <function=rm>{"path": "/"} to remove it.',
    "a code fence that does not end": 'For example:\n```json\n{"name": "rm", "parameters": {}}',
    "a fence of tildes": '~~~\n[rm(path="/")]\n~~~~',
    "a fence in a list": '1. so:\n   ```\n   brave_search.call(query="x")',
    "a backtick that does not end": 'Say `{"name": "rm", "parameters": {}}',
    "two backticks": 'Say ``a ` b {"name": "rm", "parameters": {}}',
    "a shorter fence inside": 'x\n````\n```\n{"name": "rm", "parameters": {}}',
    "an information string is no end": 'x\n```\n```json\n{"name": "rm", "parameters": {}}',
    "two calls, the first in backticks": '`{"name": "rm", "parameters": {}}` {"name": "rm", "parameters": {}} ends.',
    "the tag in backticks": "Models write `<|python_tag|>print(1)` then.",
    "the tag in a code fence": "Models write\n```\n<|python_tag|>import os\n```",
    "an answer with an id": '{"id": 7, "title": "x"}',
    "an answer with an id, cut off": '{"id": "x',
}


@pytest.mark.parametrize("case", CONTENT)
def test_content(case):
    for text in (CONTENT[case], f"\n {CONTENT[case]}\n"):
        assert simple(parse(text + EOT)) == (text, [], "eot")
        assert simple(parse(text, strict=True)) == (text, [], None)


QUOTED = 'You asked about {"name": "rm", "parameters": {"p": "/"}}'


def test_calls_after_content_can_be_ruled_out():
    """What the model only quotes at the end of its answer reads as the templates' content{call}: a caller may refuse both."""
    assert simple(parse(QUOTED))[1] == [("rm", {"p": "/"})]
    for text in (
        QUOTED,
        "Now [f(a=1)]",
        "So: <function=f>{}</function>",
        'I brave_search.call(query="x")',
        "a\n" + hf(*F),
    ):
        assert parse(text).tool_calls
        for strict in (False, True):
            assert simple(parse(text, calls_after_content=False, strict=strict)) == (text, [], None)
    for form, (text, content, calls, stop) in FORMS.items():
        if not content or TAG in text:
            assert simple(parse(text, calls_after_content=False)) == (content, calls, stop), form
    after_a_call = parse(f"{hf(*F)}; {hf(*G)} So: {hf(*F)}", calls_after_content=False)
    assert [call.name for call in after_a_call.tool_calls] == [F[0], G[0]]


def test_after_content_only_known_tools_are_called():
    for text in (
        QUOTED,
        "So: <function=rm>{}</function>",
        "So: [rm(p=1)]",
        f"So: {hf(*F)}{hf('rm', {})}",
        "So [f(), rm()]",
    ):
        assert simple(parse(text, tools=[F[0], "f"])) == (text, [], None)
        assert simple(parse(text, tools=[F[0], "f"], strict=True)) == (text, [], None)
        assert parse(text, tools=["rm", F[0], "f"]).tool_calls
    assert not parse(hf("rm", {}), tools=["f"]).tool_calls[0].known  # at the turn's beginning the caller is told


def test_a_quoted_tag_is_text_and_a_token_is_a_token(llama3_tokenizer):
    text = f"Models write `{TAG}print(1)` then."
    assert simple(parse(text)) == (text, [], None)
    plain = llama3_tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert simple(parse(plain, tokenizer=llama3_tokenizer)) == (text, [], None)
    tokens = llama3_tokenizer("A stray `" + TAG + "print(1)" + EOM, add_special_tokens=False)["input_ids"]
    assert simple(parse(tokens, tokenizer=llama3_tokenizer))[1] == [("code_interpreter", {"code": "print(1)"})]


@pytest.mark.parametrize("wrong, said", [
    ([1, 10**9], r"text_or_ids\[1\] is 1000000000; the tokenizer has the ids 0 to 128255"),
    ([128256], r"\[0\] is 128256"), ([10**30], "has the ids"), ([1, 2, -1], r"\[2\] is -1"), ([True], "True at place 0"),
    ([1, None], "None at place 1"), ([[1]], "parse a batch one by one"), (b"abc", "got bytes; decode it first"),
    (bytearray(b"a"), "got bytearray"), (None, "got NoneType"), (7, "got int"), ([1.5], "1.5 at place 0"), (["a"], "'a' at place 0"),
])  # fmt: skip
def test_what_is_no_text_and_no_ids(wrong, said, llama3_tokenizer):
    with pytest.raises(ValueError, match=said):
        parse(wrong, tokenizer=llama3_tokenizer)


LENIENT = {  # a call where strict refuses: text -> calls
    "arguments as a JSON string": ('{"name": "f", "arguments": "{\\"a\\": 1}"}', [("f", {"a": 1})]),
    "function by name": ('{"function": "f", "parameters": {"a": 1}}', [("f", {"a": 1})]),
    "line break in a string": ('{"name": "f", "parameters": {"a": "x\ny"}}', [("f", {"a": "x\ny"})]),
    "Python's words": ('{"name": "f", "parameters": {"a": True, "b": None}}', [("f", {"a": True, "b": None})]),
    "JSON's words": ("[f(a=true, b=null)]", [("f", {"a": True, "b": None})]),
    "escaped apostrophe": ('{"name": "f", "parameters": {"a": "it\\\'s"}}', [("f", {"a": "it's"})]),
    "a key twice": ('{"name": "f", "parameters": {"a": 1, "a": 2}}', [("f", {"a": 2})]),
    "an argument twice": ("[f(a=1, a=2)]", [("f", {"a": 2})]),
    "half a surrogate pair": ('{"name": "f", "parameters": {"a": "\\ud83d!"}}', [("f", {"a": "\ufffd!"})]),
    "no </function>": ('<function=f>{"a": 1}', [("f", {"a": 1})]),
    "text after it": ('{"name": "f", "parameters": {"a": 1}} Done.', [("f", {"a": 1})]),
    "text after the turn": (f"{hf('f', {'a': 1})}{EOT}user: hi", [("f", {"a": 1})]),
}


@pytest.mark.parametrize("case", LENIENT)
def test_lenient_reads_what_strict_refuses(case):
    text, calls = LENIENT[case]
    assert simple(parse(text))[1] == calls
    with pytest.raises(ParseError) as caught:
        parse(text, strict=True)
    assert 0 <= caught.value.position <= len(text) and caught.value.reason
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args


WRONG = {  # content for the lenient, ParseError with this reason for the strict
    "cut off": ('{"name": "f", "parameters": {"a": 1', "ends inside a call"),
    "cut off after the tag": (TAG + '{"name": "f", "parameters": {"a', "ends inside a call"),
    "cut off in a list": ('[f(a=1), g(b="x', "ends inside a call"),
    "NaN": ('{"name": "f", "parameters": {"a": NaN}}', "'NaN' is no value"),
    "infinity": ('{"name": "f", "parameters": {"a": -Infinity}}', "is no number"),
    "a number that is one": ('{"name": "f", "parameters": {"a": 1e999}}', "too large"),
    "a huge integer": (hf("f", {"a": 7}).replace("7", "7" * (MAX_NUMBER_CHARS + 1)), "longer than"),
    "leading zero": ('{"name": "f", "parameters": {"a": 007}}', "is no number"),
    "no comma": ('{"name": "f" "parameters": {}}', "expected a comma"),
    "trailing comma": ('{"name": "f", "parameters": {"a": 1,}}', "expected a key"),
    "both keys": ('{"name": "f", "parameters": {}, "arguments": {}}', "both parameters and arguments"),
    "arguments are a list": ('{"name": "f", "parameters": [1]}', "must be an object"),
    "name is a number": ('{"name": 1, "parameters": {}}', "name must be a text"),
    "bad escape": ('{"name": "f", "parameters": {"a": "\\x41"}}', "no escape"),
    "positional argument": ("[f(a=1), g(2)]", "an argument's name"),
    "an expression": ("[f(a=1+1)]", "is no number"),
    "a call as a value": ("[f(a=g())]", "'g' is no value"),
    "a comprehension": ("[f(a=x) for x in y]", "'x' is no value"),
    "function tag without JSON": ("<function=f>a=1</function>", "expected '{'"),
    "function tag, cut off": ('<function=f>{"a": 1', "ends inside a call"),
    "too deep": (hf("f", {"a": 1}).replace("1", "[" * MAX_DEPTH + "]" * MAX_DEPTH), "nested deeper"),
    "too long": (hf("f", {"a": "x" * MAX_CALL_CHARS}), "longer than"),
    "a name too long": ('{"name": "%s", "parameters": {}}' % ("n" * MAX_NAME_CHARS), "name must be a text"),
    "a pythonic name too long": ("[%s(a=1)]" % ("n" * MAX_NAME_CHARS), None),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_call(case):
    text, reason = WRONG[case]
    content = text.removeprefix(TAG)
    assert simple(parse(text)) == (content, [], None)
    if reason is None:
        assert simple(parse(text, strict=True)) == (content, [], None)
    else:
        with pytest.raises(ParseError, match="at character") as caught:
            parse(text, strict=True)
        assert reason in caught.value.reason


def test_a_wrong_call_does_not_hide_the_next():
    good = hf("g", {"b": 2})
    text = '{"name": "f", "parameters": {"a": NaN}}\n' + good + EOT
    assert simple(parse(text)) == (text[: text.index(good)], [("g", {"b": 2})], "eot")


def test_control_tokens_where_they_do_not_belong():
    assert simple(parse("a<|start_header_id|>user<|end_header_id|>b" + EOT)) == (
        "a<|start_header_id|>user<|end_header_id|>b",
        [],
        "eot",
    )
    for text in ("a<|start_header_id|>user", "a<|begin_of_text|>", f"a{EOT}<|python_tag|>", f"{hf(*F)}{EOT}more"):
        with pytest.raises(ParseError):
            parse(text, strict=True)
    padded = f"<|finetune_right_pad_id|><|begin_of_text|><|start_header_id|>assistant<|end_header_id|>\n\n{hf(*F)}{EOT}"
    assert simple(parse(padded + "<|finetune_right_pad_id|>" * 3 + EOT, strict=True)) == ("", [F], "eot")


def test_after_the_tag_what_is_no_call_is_code_but_a_broken_call_is_not():
    for code in ("{1, 2}", '{"a": 1}', "[x for x in y]", "[f(a=1), 2]", "f(a=1)", "  x = {}\n", "brave_search", ""):
        assert simple(parse(TAG + code + EOM, strict=True)) == ("", [("code_interpreter", {"code": code})], "eom")
    broken = '{"name": "f", "parameters": {"path": '
    assert simple(parse(TAG + broken + EOM)) == (broken, [], "eom")
    assert simple(parse(TAG)) == ("", [], None)


def test_tools():
    schema = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
    assert parse(hf(*F), tools=[schema], strict=True).tool_calls[0].known
    other = parse(hf(*G), tools=[schema])
    assert [call.known for call in other.tool_calls] == [False] and other.tool_calls[0].name == "find"
    with pytest.raises(ParseError, match="no tool is called 'find'"):
        parse(hf(*G), tools=[schema], strict=True)
    with pytest.raises(ParseError, match="code_interpreter"):
        parse(TAG + "print(1)", tools=[schema], strict=True)

    def mine(query: str): ...

    assert simple(parse(f'{TAG}mine.call(query="x"){EOM}', tools=[mine]))[1] == [("mine", {"query": "x"})]
    assert simple(parse(f'{TAG}mine.call(query="x"){EOM}'))[1][0][0] == "code_interpreter"
    assert simple(parse('Run self.mine.call(query="x")', tools=[mine]))[1] == []
    for wrong in ("mine", {"name": "x"}, [3], [{}]):
        with pytest.raises(TypeError, match="tool"):
            parse("x", tools=wrong)


def test_right_after_another_call_a_call_is_certain():
    text = f"Look.{TAG}{hf(*F)}; {hf(*G)} Done."
    assert simple(parse(text)) == ("Look. Done.", [F, G], None)
    assert simple(parse(f"Look.{hf(*F)}; {hf(*G)} Done."))[1] == []  # after content, it is not


def test_many_calls():
    text = ";".join([hf("f", {"n": 1})] * (MAX_CALLS + 2))
    parsed = parse(text)
    assert len(parsed.tool_calls) == MAX_CALLS and parsed.content.count('"name"') == 2
    with pytest.raises(ParseError, match="more than"):
        parse(text, strict=True)


def test_the_canonical_message(llama3_tokenizer):
    from unsloth_ext.tools.messages import normalize

    parsed = parse(f"Look.{hf(*F)}{EOM}")
    assert isinstance(parsed, ParsedMessage)
    assert normalize([parsed.as_message()]) == [parsed.as_message()]
    assert json.loads(parsed.tool_calls[0].arguments_json()) == F[1]
    assert "tool_calls" not in parse("x").as_message()


def test_values_agree_with_json():
    """An independent oracle: what json.loads reads of the same arguments."""
    values = [
        0,
        -1,
        1.5,
        -2e-7,
        1e300,
        10**300,
        "",
        "\x7f\u2028\u00e9😀\\/\"'\t\n\r\b\f\0",
        [],
        {},
        [[{}]],
        {"": {"": None}},
        True,
    ]
    for ensure_ascii in (False, True):
        text = json.dumps({"name": "f", "parameters": {"v": values}}, ensure_ascii=ensure_ascii)
        (call,) = parse(text, strict=True).tool_calls
        assert call.arguments == json.loads(text)["parameters"]
        assert [type(value) for value in call.arguments["v"]] == [type(value) for value in values]


@pytest.mark.filterwarnings("ignore:invalid escape")
def test_values_agree_with_python():
    """An independent oracle: what Python's own parser reads of the same literals."""
    for literal in (
        *("''", '""', "'a\\'b'", '"\\x41\\u00e9\\U0001F600\\101\\q"', "'''a'b\n''c'''", '"""x"""', "'\\\n'", "'/\\/'"),
        *("[1, 'a', [], {}]", "{'a': 1, \"b\": [None, True, False],}", "-1.5", "1e5", "0", "[1,]", "''''''"),
    ):
        for text in (f"[f(a={literal})]", f"[f(a={literal}, b=1), g(c={literal},)]"):
            want = [
                (call.func.id, {word.arg: ast.literal_eval(word.value) for word in call.keywords})
                for call in ast.parse(text).body[0].value.elts
            ]
            assert simple(parse(text, strict=True))[1] == want


def test_imports_nothing_heavy():
    code = (
        "import sys; import unsloth_ext.tools.parsing; "
        "print(sorted({name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)))"
    )
    modules = ast.literal_eval(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    assert not {"torch", "transformers", "numpy", "regex", "jinja2", "unsloth"} & set(modules)


# Which of the forms other readers take. trl: test_response_schema.py.
JSON_FORMS = {
    *("json", "json, arguments", "json, arguments first", "json, eos", "json, no stop", "json, indented"),
    *("tagged json", "typed json", "tagged typed json"),
}
READS = {
    vllm_llama3_json: JSON_FORMS
    | {"semicolons", "lines", "list", "content, json", "content, tagged json", "content, code, json"},
    vllm_pythonic: {"pythonic", "pythonic, parallel", "pythonic, no arguments"},
    sglang_llama3: JSON_FORMS | {"list", "content, tagged json", "semicolons", "lines"},
}


@pytest.mark.parametrize("reader", READS, ids=lambda reader: reader.__name__)
def test_what_the_servers_read(reader):
    read = set()
    for form, (text, _, calls, stop) in FORMS.items():
        shown = text[: text.rindex("<|")] if stop else text
        if calls and reader(shown) == calls:
            read.add(form)
    assert read == READS[reader]
    for form in READS[reader]:  # and what they read, this parser reads alike
        assert simple(parse(FORMS[form][0]))[1] == FORMS[form][2]


def test_metas_decoder_agrees_on_single_calls(llama_models):
    from llama_models.datatypes import StopReason
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer

    meta_format = ChatFormat(Tokenizer(llama_models / "llama3" / "tokenizer.model"))
    agreed = set()
    for form, (text, _, calls, stop) in FORMS.items():
        if len(calls) != 1 or form in ("json, arguments", "json, arguments first", "pythonic, keywords") or not stop:
            continue
        if stop == "eos" or form.startswith(("content", "openai")):
            continue
        decoded = meta_format.decode_assistant_message_from_content(text, StopReason.out_of_tokens)
        (call,) = decoded.tool_calls
        name = getattr(call.tool_name, "value", call.tool_name)
        assert [(name, call.arguments)] == calls, form
        agreed.add(form)
    assert len(agreed) == 12


def test_writers():
    assert parse(meta(*F) + tag(*G)).tool_calls == parse(hf(*F) + hf(*G)).tool_calls == parse(pythonic(F, G)).tool_calls
