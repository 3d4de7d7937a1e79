import argparse

import pytest

from unsloth_ext.errors import UsageError
from unsloth_ext.training.options import Options, add_options


def parsed(*words):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return Options.from_args(parser.parse_args(words))


def test_defaults_follow_the_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    embedded, real = parsed(), parsed("--model", str(tmp_path))
    assert (embedded.max_seq_length, embedded.chat_template) == (256, "llama-3.1")
    assert (real.max_seq_length, real.chat_template, real.model) == (2048, None, str(tmp_path))
    assert parsed("--epochs", "2").steps is None


def test_argv_asks_for_the_same_job():
    options = parsed(
        "--steps", "7", "--packing", "--no-load-in-4bit", "--chat-template", "chatml", "--learning-rate", "1e-5"
    )
    assert parsed(*options.argv()) == options


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"lora_rank": -1}, "--lora-rank"),
        ({"save_steps": 0}, "--save-steps"),
        ({"steps": 3, "epochs": 1.0}, "--epochs"),
        ({"epochs": float("nan")}, "--epochs"),
        ({"max_seq_length": 3}, "--max-seq-length"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"seed": -1}, "--seed"),
        ({"dtype": "int3"}, "--dtype"),
        ({"gradient_checkpointing": "maybe"}, "--gradient-checkpointing"),
        ({"model": "/no/such/folder"}, "--model"),
    ],
)
def test_a_bad_value_is_named(changes, named):
    with pytest.raises(UsageError, match=named):
        Options(**changes).resolve()


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no config.json"):
        Options(model=str(tmp_path)).resolve()
