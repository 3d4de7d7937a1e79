"""Whether a text has come to stand in Markdown's code, however it is cut."""

import pytest

from unsloth_ext.tools.code_spans import CodeSpans

INSIDE = (
    *("`", "a `b", "``a ` b", "```", "```json", "```json\n{", "x\n   ```\ny", "- ```\n", "> ~~~ py\n", "1. ```sh\n"),
    *(
        "```\na\n``",
        "````\n```\n",
        "```\n```json\n",
        "```\na ```\n",
        "```\n``` {",
        "```\n~~~\n",
        "so: ```\n",
        "it`s {",
        "`a ```\n",
    ),
)
OUTSIDE = (
    *(
        "",
        "a",
        "`a`",
        "``a ` b``",
        "`a\n",
        "```a```",
        "```\na\n```\n",
        "```\na\n  ``` \nb",
        "~~~\n~~~~\n",
        "a ~~~",
        "`` `a` ``",
    ),
    *("````\n```\n````\n", "```\na\n```\r\n", "`a` and `b` {", "~~ a", "x ```y``` {"),
)


@pytest.mark.parametrize("text, inside", [*((text, True) for text in INSIDE), *((text, False) for text in OUTSIDE)])
def test_texts(text, inside):
    for pieces in ([text], text, [text[:2], text[2:]]):
        spans = CodeSpans()
        for piece in pieces:
            spans.feed(piece)
        assert spans.inside is inside and spans.inside is inside, pieces


def test_any_cut(fuzz):
    for _ in range(3_000):
        text = "".join(fuzz.choices(["`", "``", "```", "~~~", "\n", " ", "a", "- "], k=fuzz.randrange(12)))
        whole, cut = CodeSpans(), CodeSpans()
        whole.feed(text)
        position = 0
        while position < len(text):
            end = position + fuzz.randrange(1, 4)
            cut.feed(text[position:end])
            position = end
        assert whole.inside is cut.inside, text
