"""Other readers of Llama 3.x calls, each after the documented format of its original, in the standard library's terms.

vLLM `llama3_json`: every JSON object in the text, with "name" and "arguments" or "parameters"; what stands around it is dropped.
vLLM `pythonic`: the text is one Python list of calls with literal keyword arguments.
SGLang `llama3`: after <|python_tag|>, or where the text begins with { or [: JSON, a list, or several with one character between.

Sources: vllm/tool_parsers/llama_tool_parser.py, vllm/tool_parsers/pythonic_tool_parser.py,
sglang/srt/function_call/llama32_detector.py. Servers strip the stop token before they parse.
"""

import ast
import json

from parser_texts import TAG


def _objects(text):
    decoder, values, at = json.JSONDecoder(), [], 0
    while at < len(text):
        try:
            value, length = decoder.raw_decode(text[at:])
        except ValueError:
            at = text.find('{"name":', at + 1)
            if at < 0:
                break
            continue
        values.append(value)
        at += length + 1  # the separator
    return values


def _named(objects):
    try:
        return [(o["name"], o["arguments"] if "arguments" in o else o["parameters"]) for o in objects]
    except (KeyError, TypeError):
        return None


def vllm_llama3_json(text):
    decoder, found, at = json.JSONDecoder(), [], text.find("{")
    while at >= 0:
        try:
            value, length = decoder.raw_decode(text[at:])
        except ValueError:
            return None
        found.append(value)
        at = text.find("{", at + length)
    return _named(found)


def vllm_pythonic(text):
    try:
        (statement,) = ast.parse(text).body
        return [
            (call.func.id, {word.arg: ast.literal_eval(word.value) for word in call.keywords})
            for call in statement.value.elts
        ]
    except (SyntaxError, ValueError, AttributeError):
        return None


def sglang_llama3(text):
    if TAG in text:
        text = text.partition(TAG)[2]
    elif not text.startswith(("{", "[")):
        return None
    try:
        value = json.loads(text)
        return _named(value if isinstance(value, list) else [value])
    except ValueError:
        return _named(_objects(text))
