"""What is saved of a template with our generation markers, and that nothing else changes."""

import copy
import pickle
from pathlib import Path

import pytest

from unsloth_ext.tools import chat_template, install_guard, is_guarded, remove_guard
from unsloth_ext.tools.llama_template import as_exported
from unsloth_ext.tools.saved_template import (
    SavesPlainTemplate,
    has_markers,
    mended_template,
    save_plain_template,
    save_template_as_it_is,
)

OWN = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"


def saved(thing, folder):
    getattr(thing, "save_pretrained", thing)(folder)
    return {path.name: path.read_text(encoding="utf-8") for path in Path(folder).glob("**/*.jinja")}


@pytest.fixture()
def tokenizer(llama3_tokenizer, llama31_template):
    tokenizer = copy.copy(llama3_tokenizer)
    tokenizer.chat_template = chat_template("hf", llama31_template)
    return tokenizer


def test_the_file_is_plain_and_the_object_keeps_its_markers(tokenizer, tmp_path):
    own, before = type(tokenizer), tokenizer.chat_template
    kept = tokenizer.save_pretrained  # as Unsloth's saving functions keep it
    assert has_markers(tokenizer)
    save_plain_template(save_plain_template(tokenizer))
    for name, thing in (("method", tokenizer), ("kept", kept)):
        files = saved(thing, tmp_path / name)
        assert files == {"chat_template.jinja": as_exported(before)} and "generation %}" not in str(files)
        assert tokenizer.chat_template == before
    assert mended_template(files["chat_template.jinja"]) == before
    save_template_as_it_is(tokenizer)
    assert type(tokenizer) is own and saved(tokenizer, tmp_path / "off") == {"chat_template.jinja": before}


def test_several_templates_and_those_of_the_user(tokenizer, tmp_path):
    ours = tokenizer.chat_template
    tokenizer.chat_template = {"default": OWN, "tool_use": ours}
    assert saved(save_plain_template(tokenizer), tmp_path) == {
        "chat_template.jinja": OWN,
        "tool_use.jinja": as_exported(ours),
    }
    assert tokenizer.chat_template == {"default": OWN, "tool_use": ours}
    tokenizer.chat_template = None
    assert not has_markers(tokenizer) and saved(tokenizer, tmp_path / "none") == {}


def test_beside_the_guard_in_any_order_and_in_copies(tokenizer):
    own = type(tokenizer)
    save_plain_template(install_guard(tokenizer))
    one = type(tokenizer)
    install_guard(save_plain_template(save_template_as_it_is(remove_guard(tokenizer))))
    assert type(tokenizer) is one and one.__name__ == own.__name__
    for other in (copy.copy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert type(other) is one
        assert isinstance(remove_guard(other), SavesPlainTemplate) and not is_guarded(other)
        assert type(save_template_as_it_is(other)) is own


def test_a_processor_and_its_tokenizer(tokenizer, tmp_path):
    pytest.importorskip("PIL")
    from transformers import CLIPImageProcessor, LlavaProcessor

    template = tokenizer.chat_template
    processor = LlavaProcessor(CLIPImageProcessor(), tokenizer, chat_template=template)
    files = saved(save_plain_template(processor), tmp_path)
    assert set(files.values()) == {as_exported(template)}
    assert processor.chat_template == template == processor.tokenizer.chat_template
    assert "LlavaProcessor" in (tmp_path / "processor_config.json").read_text()
