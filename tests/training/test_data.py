import json

import pytest

from unsloth_ext.errors import UsageError
from unsloth_ext.training import data, standard_library

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}


class Letters:
    """A tokenizer of one token a character; BOS is 0 and EOS 1."""

    bos_token, eos_token, eos_token_id = "^", "$", 1

    def __call__(self, text, add_special_tokens=True):
        ids = [{"^": 0, "$": 1}.get(letter, ord(letter)) for letter in text]
        return type("Encoding", (), {"input_ids": [0] * add_special_tokens + ids})()

    def apply_chat_template(self, messages, tools=None, tokenize=False):
        return "^" + "".join(message["content"] + "$" for message in messages)


def write(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_jsonl_rows_of_every_shape(tmp_path):
    rows = [CHAT, {"text": "a"}, {"prompt": "a", "completion": "b"}]
    assert data.read_rows(write(tmp_path / "rows.jsonl", *rows)) == rows


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ([], "must be an object"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"content": "x"}]}, "message 1 has no `role`"),
        ({"prompt": "a", "completion": 1}, "`completion` must be a string"),
        ({"question": "a"}, "no known field among question"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, complaint):
    with pytest.raises(UsageError, match=f"rows.jsonl, line 2: .*{complaint}"):
        data.read_rows(write(tmp_path / "rows.jsonl", CHAT, row))


def test_text_files_and_folders(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "sub" / "a.md").write_text("ay")
    (tmp_path / "image.png").write_bytes(b"\xff")
    assert data.read_rows(str(tmp_path)) == [{"document": "bee"}, {"document": "ay"}]
    assert data.read_rows(str(tmp_path / "b.txt")) == [{"document": "bee"}]


@pytest.mark.parametrize("name", ["no/such/file.jsonl", "missing", "rows.jsonl"])
def test_a_missing_or_empty_dataset_is_refused(tmp_path, name):
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(UsageError):
        data.read_rows(str(tmp_path / name))


def test_a_hub_id_is_left_for_later():
    assert data.read_rows("owner/name") is None


def test_one_bos_and_one_eos():
    rows = data.tokenize([{"text": "ab"}, {"text": "ab$"}, CHAT], Letters(), 99)
    assert [row["input_ids"] for row in rows] == [[0, 97, 98, 1], [0, 97, 98, 1], [0, 104, 105, 1, 121, 111, 1]]
    assert all(row["labels"] == row["input_ids"] for row in rows)


def test_only_the_completion_is_learned():
    (row,) = data.tokenize([{"prompt": "ab", "completion": "c"}], Letters(), 99)
    assert row == {"input_ids": [0, 97, 98, 99, 1], "labels": [-100, -100, -100, 99, 1]}


def test_text_is_cut_and_a_document_continues():
    cut, *_ = data.tokenize([{"text": "abcdef"}], Letters(), 4)
    assert cut["input_ids"] == [0, 97, 98, 99]
    pieces = data.tokenize([{"document": "abcdef"}], Letters(), 4)
    assert [piece["input_ids"] for piece in pieces] == [[0, 97, 98, 99], [100, 101, 102, 1]]


def test_rows_without_anything_to_learn_are_an_error():
    with pytest.raises(UsageError, match="--max-seq-length 4"):
        data.tokenize([{"prompt": "abcdef", "completion": "g"}], Letters(), 4)


def test_a_row_that_does_not_render_is_named():
    with pytest.raises(UsageError, match="Row 2 .* KeyError|Row 2 .*content"):
        data.tokenize([CHAT, {"messages": [{"role": "user"}]}], Letters(), 99)


def test_docstring_rows_are_plain_chats():
    rows = standard_library.docstring_rows()
    assert len(rows) == standard_library.ROWS
    assert rows == standard_library.docstring_rows()
    assert all([message.keys() for message in row["messages"]] == [{"role", "content"}] * 2 for row in rows)
