"""`unsloth-ext tools parse` and the tool loop."""

import argparse
import io
import json

import pytest
from parser_texts import EOM, EOT, TAG, F, hf

from unsloth_ext.errors import UsageError
from unsloth_ext.tools.parse_command import add_parse_arguments, run_parse
from unsloth_ext.tools.tool_loop import run_tool_loop


def run(*arguments):
    parser = argparse.ArgumentParser()
    add_parse_arguments(parser)
    return run_parse(parser.parse_args([str(argument) for argument in arguments]))


def test_text(tmp_path, capsys, monkeypatch):
    file = tmp_path / "turn.txt"
    file.write_text(f"I look.\n{hf(*F)}{EOT}\n")
    assert run(file) == 0
    assert capsys.readouterr().out == (
        'content "I look.\\n"\ncall get_weather {"city": "San Francisco", "days": 3}\nstop eot\n'
    )
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{TAG}print('\x1b[2J'){EOM}"))
    assert run("-", "--json") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and json.loads(out)["tool_calls"][0]["name"] == "code_interpreter"


def test_lines_ids_strict_and_tools(tmp_path, capsys, llama3_tokenizer, llama3_tokenizer_folder):
    ids = llama3_tokenizer(hf(*F) + EOT, add_special_tokens=False)["input_ids"]
    rows = [{"text": hf("g", {}) + EOT}, {"ids": ids}, hf("f", {"a": 1})[:-3]]
    file, tools = tmp_path / "turns.jsonl", tmp_path / "tools.json"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    tools.write_text('["get_weather"]')
    assert run(file, "--tokenizer", llama3_tokenizer_folder, "--tools", tools, "--json") == 0
    first, second, third = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["tool_calls"] == [{"name": "g", "arguments": {}, "known": False}]
    assert second["tool_calls"] == [{"name": F[0], "arguments": F[1]}] and second["line"] == 2
    assert third["tool_calls"] == [] and third["stop"] is None


def test_refused_turns_do_not_hide_the_others(tmp_path, capsys, monkeypatch, llama3_tokenizer):
    """Malformed for --strict, or ids that the tokenizer does not have: an error of that line, and no traceback."""
    monkeypatch.setattr("unsloth_ext.tools.parse_command._tokenizer", lambda *_: llama3_tokenizer)  # loaded above
    file = tmp_path / "turns.jsonl"
    rows = [[1, 10**9], {"ids": [-5]}, hf("f", {"a": 1})[:-3], hf("f", {})]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    assert run(file, "--strict") == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("1: refused: text_or_ids[1] is 1000000000; ") and said[1].startswith(
        "2: refused: text_or_ids[0] is -5"
    )
    assert said[2].startswith("3: refused at character") and said[3:] == ["4: call f {}", "4: stop none: cut off"]
    assert run(file, "--json") == 1
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "error" in found[0] and "position" not in found[0] and found[2]["tool_calls"] == []


def test_names_do_not_drive_the_terminal_and_quoted_calls_can_be_ruled_out(tmp_path, capsys):
    file = tmp_path / "turn.txt"
    file.write_text(json.dumps({"name": "a\u202eb\u200b\x9b", "parameters": {}}, ensure_ascii=False))
    assert run(file) == 0
    assert capsys.readouterr().out.splitlines()[0] == 'call "a\\u202eb\\u200b\\u009b" {}'
    file.write_text("You asked about " + hf("rm", {}))
    assert run(file, "--no-calls-after-content") == 0
    assert "call rm" not in capsys.readouterr().out
    assert run(file) == 0
    assert "call rm" in capsys.readouterr().out


def test_clear_errors(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        run(tmp_path / "none")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UsageError, match="is empty"):
        run(tmp_path / "empty")
    (tmp_path / "latin").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="UTF-8"):
        run(tmp_path / "latin")
    (tmp_path / "ids").write_text("[1, 2]")
    with pytest.raises(UsageError, match="--tokenizer"):
        run(tmp_path / "ids")
    with pytest.raises(UsageError, match="no list of tools"):
        run(tmp_path / "ids", "--tools", tmp_path / "ids")


def test_tool_loop():
    said = iter(
        [hf("add", {"a": 2, "b": 3}), "[add(a=1), open_file(path='x'), fail()]", hf("add", {"a": 1}) + " x", "5"]
    )

    def add(a, b):
        return {"sum": a + b}

    def fail():
        raise RuntimeError("no")

    seen = []
    talk = run_tool_loop(
        lambda messages: seen.append(len(messages)) or next(said) + EOT,
        [{"role": "user", "content": "2 + 3?"}],
        {"add": add, "fail": fail},
    )
    results = [json.loads(message["content"]) for message in talk if message["role"] == "tool"]
    assert results[0] == {"sum": 5}
    assert "TypeError" in results[1]["error"] and "no tool is called open_file" in results[2]["error"]
    assert results[3] == {"error": "RuntimeError: no"}
    assert talk[-1] == {"role": "assistant", "content": "5"} and seen == [1, 3, 7, 9]
    quoted = "You said " + hf("add", {"a": 1, "b": 1}) + EOT
    assert len(run_tool_loop(lambda _: quoted, [], {"add": add})) == 1  # it is said, not run
    assert len(run_tool_loop(lambda _: quoted, [], {"add": add}, max_turns=1, calls_after_content=True)) == 2
    endless = run_tool_loop(lambda _: hf("fail", {}), [], {"fail": fail}, max_turns=3)
    assert len(endless) == 6
    with pytest.raises(ValueError, match="max_turns"):
        run_tool_loop(lambda _: "", [], {}, max_turns=0)
