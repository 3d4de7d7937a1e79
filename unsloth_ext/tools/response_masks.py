"""Train on what the assistant says, also where its answer starts with a newline.

`train_on_responses_only` finds an answer by the tokens of the marker before it, for Llama 3
`<|start_header_id|>assistant<|end_header_id|>\\n\\n`. An answer that starts with a newline gets one token together with the marker's
own ("\\n\\n" + "\\n"), the marker is then not found, and the whole turn is silently left out of the training. A special token ends
the marker well enough, so a newline after it may be missing.

With `{% generation %}` markers in the template (llama_template.py) there is the exact way: `SFTConfig(assistant_only_loss=True)`.
"""

from __future__ import annotations


def without_merging_newline(must: list[int], optional: list[int], tokenizer) -> tuple[list[int], list[int]]:
    """(the tokens of a marker that have to match, those after them that may): newlines after a special token are moved.

    `must` and `optional` come from Unsloth's `_find_common_token_ids`. Where the last token is no newline, or comes after plain
    text as in `<|im_start|>assistant\\n`, both stay as they are: the newline is what ends the word there.
    """
    special = getattr(tokenizer, "added_tokens_decoder", None) or {}
    while len(must) > 1 and must[-1] not in special and must[-2] in special:
        text = tokenizer.decode([must[-1]])
        if not text or text.strip("\r\n"):
            break
        must, optional = must[:-1], [must[-1], *optional]
    return must, optional
