"""What is saved of a chat template with our generation markers is the template without them: llama.cpp, Ollama, vLLM and plain
Jinja do not know transformers' `{% generation %}` tag, and a model that is exported with it cannot be served there.

The tokenizer object keeps its markers, since trl reads them; `load_checkpoint_template` puts them back after a reload. A template
with markers of the user's own is saved as it is: nothing could put those back.
"""

from __future__ import annotations

from contextlib import contextmanager

from .llama_template import apply_edits, as_exported, put_generation_markers_back
from .special_tokens import text_tokenizer
from .tokenizer_class import Extension, extend, take_off


class SavesPlainTemplate(Extension):
    """A tokenizer or processor whose `save_pretrained` writes the chat template without our markers."""

    def save_pretrained(self, *args, **kwargs):
        with exported_template(self):
            return super().save_pretrained(*args, **kwargs)

    def save_chat_templates(self, *args, **kwargs):
        # A tokenizer's save_pretrained calls it, also one that Unsloth's saving functions have kept from before we came.
        with exported_template(self):
            return super().save_chat_templates(*args, **kwargs)


def save_plain_template(tokenizer):
    """Let `save_pretrained` of a tokenizer, or of a processor and its tokenizer, leave our markers out. Gives what was passed."""
    for thing in _things(tokenizer):
        if callable(getattr(type(thing), "save_pretrained", None)):
            extend(thing, SavesPlainTemplate)
    return tokenizer


def save_template_as_it_is(tokenizer):
    """Take that out again."""
    for thing in _things(tokenizer):
        take_off(thing, SavesPlainTemplate)
    return tokenizer


def _things(tokenizer) -> list:
    inner = text_tokenizer(tokenizer)
    return [tokenizer] if inner is tokenizer else [tokenizer, inner]


@contextmanager
def exported_template(tokenizer):
    """The chat templates of a tokenizer or processor without our markers, for as long as files are written from it."""
    before = [(thing, getattr(thing, "chat_template", None)) for thing in _things(tokenizer)]
    for thing, template in before:
        if isinstance(template, str):
            thing.chat_template = as_exported(template)
        elif isinstance(template, dict):
            thing.chat_template = {name: as_exported(text) for name, text in template.items()}
    try:
        yield
    finally:
        for thing, template in before:
            if template is not None:
                thing.chat_template = template


def has_markers(tokenizer) -> bool:
    """Has it a template that would be saved as another text?"""
    templates = [getattr(thing, "chat_template", None) for thing in _things(tokenizer)]
    return any(isinstance(template, str) and as_exported(template) != template for template in templates)


def load_checkpoint_template(tokenizer):
    """Mend the chat template that came with a checkpoint, where it is one that we know letter by letter; gives the tokenizer.

    Llama 3.1's own (that of Meta's Instruct checkpoints) gets the edits of llama_template.py, one that was saved without its
    markers gets them back. Any other stays as it is.
    """
    for thing in _things(tokenizer):
        template = getattr(thing, "chat_template", None)
        if isinstance(template, str):
            mended = mended_template(template)
            if mended != template:
                thing.chat_template = mended
    return tokenizer


def mended_template(template: str) -> str:
    if (marked := put_generation_markers_back(template)) is not None:
        return marked
    try:
        return apply_edits(template)
    except ValueError:  # it is another template, which is left to its author
        return template
