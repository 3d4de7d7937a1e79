"""However a text is cut, the deltas make the message of the one-shot parse; and they come as early as they can."""

import json
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parser_texts import EOM, EOT, FORMS, TAG, hf, random_text

from unsloth_ext.tools.parsing import parse
from unsloth_ext.tools.streaming import Delta, StreamingParser


def pieces_of(text, cuts):
    edges = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


def stream(pieces, **options):
    parser = StreamingParser(**options)
    deltas = [delta for piece in pieces for delta in parser.feed(piece)] + parser.flush()
    return deltas, parser.finish()


def assembled(deltas):
    content, calls = "", {}
    for delta in deltas:
        if delta.index is None:
            assert delta.content and delta.name is None and delta.arguments is None
            content += delta.content
            continue
        assert delta.content is None
        name, arguments = calls.get(delta.index, (None, ""))
        assert (delta.name is None) == (name is not None), "the name comes first, and once"
        assert delta.index == max([*calls, delta.index]), "one call after the other"
        calls[delta.index] = (name or delta.name, arguments + (delta.arguments or ""))
    assert list(calls) == list(range(len(calls)))
    return content, [(name, json.loads(arguments)) for name, arguments in calls.values()]


def check(text, pieces, **options):
    deltas, message = stream(pieces, **options)
    assert message == parse(text, **options)
    assert assembled(deltas) == (message.content, [(call.name, call.arguments) for call in message.tool_calls])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_at_every_cut(form):
    text = FORMS[form][0]
    for cut in range(len(text) + 1):
        check(text, pieces_of(text, [cut]))
    check(text, list(text))


OPTIONS = st.sampled_from([{}, {}, {"tools": ["f", "get_weather"]}, {"calls_after_content": False}])


@settings(max_examples=1500, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 200), max_size=30), OPTIONS)
def test_random_texts_at_random_cuts(seed, cuts, options):
    text = random_text(random.Random(seed))
    check(text, pieces_of(text, cuts), **options)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(), max_size=60), st.lists(st.integers(0, 60), max_size=5))
def test_any_text(text, cuts):
    check(text, pieces_of(text, cuts))


def test_content_is_released_at_once():
    parser = StreamingParser()
    assert parser.feed("It is ") == [Delta(content="It is ")]
    assert parser.feed("20 [C") == [Delta(content="20 ")]  # the beginning of [Call(...)], or not
    assert parser.feed("] <") == [Delta(content="[C] ")]
    assert parser.feed("b>") == [Delta(content="<b>")]
    assert parser.feed(" <|eot_") == [Delta(content=" ")]
    assert parser.feed("id|>") == []
    assert parser.finish().stop == "eot"


def test_a_json_answer_is_content_from_its_first_key_on():
    parser = StreamingParser()
    assert parser.feed('{"city"') == [Delta(content='{"city"')]
    assert parser.feed(': {"name": "f"') == [Delta(content=': {"name": "f"')]
    assert parser.finish().tool_calls == ()


def test_a_call_is_released_when_it_is_complete():
    parser = StreamingParser()
    assert parser.feed('{"name": "f", "parameters": {"a": 1}') == []
    assert parser.feed("}") == [Delta(index=0, name="f"), Delta(index=0, arguments='{"a": 1}')]
    assert parser.feed(";" + hf("g", {})) == [Delta(index=1, name="g"), Delta(index=1, arguments="{}")]
    assert parser.flush() == []


def test_a_call_after_content_waits_for_the_end_of_the_turn():
    parser = StreamingParser()
    assert parser.feed("Look: " + hf("f", {})) == [Delta(content="Look: ")]
    assert parser.feed(EOT) == [Delta(index=0, name="f"), Delta(index=0, arguments="{}")]


def test_a_function_tag_after_content_waits_too():
    parser = StreamingParser()
    assert parser.feed("Look: <function=f>{}</function>") == [Delta(content="Look: ")]
    assert parser.feed(" is how.") == [Delta(content="<function=f>{}</function> is how.")]
    assert parser.feed("`{") == [Delta(content="`{")]  # quoted: content at once


def test_code_is_released_at_once():
    parser = StreamingParser()
    assert parser.feed(TAG + "pri") == [
        Delta(index=0, name="code_interpreter"),
        Delta(index=0, arguments='{"code": "'),
        Delta(index=0, arguments="pri"),
    ]
    assert parser.feed('nt("x")\n') == [Delta(index=0, arguments='nt(\\"x\\")\\n')]
    assert parser.feed(EOM) == [Delta(index=0, arguments='"}')]


def test_misuse():
    parser = StreamingParser()
    parser.feed("x")
    assert parser.finish() == parser.finish()
    with pytest.raises(RuntimeError, match="after flush or finish"):
        parser.feed("y")
