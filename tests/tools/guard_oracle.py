"""What the guard must give, from `segments` and `encode_segments`, which are tested against Meta's ChatFormat.

Control tokens in the assistant's own content that do not open a turn stay tokens: a private-use character stands for each while
the conversation is taken apart.
"""

from unsloth_ext.tools.encoding import encode_segments
from unsloth_ext.tools.reference import Segment, segments

ALLOWED = ("<|end_of_text|>", "<|finetune_right_pad_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>")
STANDS_FOR = {chr(0xE000 + number): name for number, name in enumerate(ALLOWED)}


def expected_segments(messages, **options):
    hidden = []
    for message in messages:
        if message["role"] == "assistant" and isinstance(message.get("content"), str):
            content = message["content"]
            for character, name in STANDS_FOR.items():
                content = content.replace(name, character)
            message = {**message, "content": content}
        hidden.append(message)
    parts = []
    for part in segments(hidden, **options):
        begun = ""
        for character in part.text:
            if character in STANDS_FOR:
                parts += [
                    Segment(begun, part.kind, part.trained),
                    Segment(STANDS_FOR[character], "control", part.trained),
                ]
                begun = ""
            else:
                begun += character
        parts.append(Segment(begun, part.kind, part.trained))
    return [part for part in parts if part.text]


def expected(tokenizer, messages, **options):
    return encode_segments(tokenizer, expected_segments(messages, **options))
