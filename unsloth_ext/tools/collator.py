"""The vision collator works on a copy of the messages.

It rewrites them for the processor: a first message's text becomes a list of parts, parts lose the keys that Arrow filled with
None, an assistant's parts become one text. Done in place, that changes the caller's rows: a list held in memory is another one in
the second epoch, and what is printed after a batch is not what was put in.
"""

from __future__ import annotations


def _copied_messages(messages):
    """Messages that may be edited: the list, each message and each content part are new, the images in them are not."""
    if not isinstance(messages, (list, tuple)):
        return messages

    def copied(message):
        if not isinstance(message, dict):
            return message
        message = dict(message)
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            message["content"] = type(content)(dict(part) if isinstance(part, dict) else part for part in content)
        return message

    return [copied(message) for message in messages]


def copy_selected(select_messages_or_raw):
    """`_select_messages_or_raw`, giving a copy."""
    import functools

    @functools.wraps(select_messages_or_raw)
    def _select_messages_or_raw(self, example):
        return _copied_messages(select_messages_or_raw(self, example))

    return _select_messages_or_raw


def copy_prompt_and_completion(collate_prompt_completion):
    """`_collate_prompt_completion`, getting rows whose prompt and completion are copies."""
    import functools

    @functools.wraps(collate_prompt_completion)
    def _collate_prompt_completion(self, examples):
        copies = [
            {**row, "prompt": _copied_messages(row["prompt"]), "completion": _copied_messages(row["completion"])}
            for row in examples
        ]
        return collate_prompt_completion(self, copies)

    return _collate_prompt_completion
