"""What a job does before anything heavy is imported: the folder, the base, and whether the stack is there."""

import sys

import pytest

from unsloth_ext.__main__ import main
from unsloth_ext.errors import Refused, UnslothExtError
from unsloth_ext.training import compare, embedded, job
from unsloth_ext.training.options import Options


@pytest.fixture
def no_base(monkeypatch):
    def fail(model):
        raise UnslothExtError("no base today")

    monkeypatch.setattr(embedded, "ensure_base", fail)


def test_a_base_that_could_not_be_built_leaves_no_run_behind(no_base, tmp_path):
    for _ in range(2):  # the second time it must not be refused
        with pytest.raises(UnslothExtError, match="no base today"):
            job.run_job(Options().resolve(), tmp_path / "run")


def test_a_folder_with_a_run_is_refused_before_a_base_is_built(no_base, tmp_path):
    (tmp_path / job.REQUEST).write_text("{}")
    with pytest.raises(Refused, match="already holds a run"):
        job.run_job(Options().resolve(), tmp_path)


@pytest.mark.parametrize("run", [job.run_job, compare.run_sides])
@pytest.mark.parametrize("inner", ["", "inner"])
def test_a_file_is_no_output_folder(no_base, tmp_path, run, inner):
    (tmp_path / "file").write_text("")
    with pytest.raises(UnslothExtError, match="--output .*file.* cannot be used as a folder") as raised:
        run(Options().resolve(), tmp_path / "file" / inner, False)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("name", ["torch", "unsloth"])
def test_a_missing_stack_is_named_before_the_slow_part(no_base, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    assert main(["train", f"--output={tmp_path / 'run'}"]) == 2
    message = capsys.readouterr().err
    assert name in message and "make setup" in message
    assert not (tmp_path / "run").exists()
