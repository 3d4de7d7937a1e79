"""`patches fingerprint`: what a run-time patch has to name, from the base or another release."""

import pytest
from made_up import BASE

from unsloth_ext.patching.fingerprint import of_definition
from unsloth_ext.series.base import pristine_tree


def test_the_fingerprint_is_that_of_the_release(world, capsys):
    printed = []
    for version, words in ((BASE, []), ("2026.1.4", ["--release", "2026.1.4"])):
        code, said = world.run("fingerprint", "unsloth.loss", "loss", *words, capsys=capsys)
        assert (code, said) == (
            0,
            of_definition(pristine_tree("unsloth", version) / "unsloth" / "loss.py", "loss") + "\n",
        )
        printed.append(said)
    assert printed[0] != printed[1]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["numpy.linalg", "norm"], "no series is made on 'numpy'"),
        (["unsloth.los", "loss"], f"unsloth {BASE} has no module unsloth.los\n"),
        (["unsloth.loss", "gain"], f"unsloth.loss of unsloth {BASE} defines no gain\n"),
        (["unsloth", "gain"], f"unsloth of unsloth {BASE} defines no gain\n"),
        (["unsloth.loss", "loss", "--release", "abc"], "'abc' is not a version"),
        (["unsloth.loss", "loss", "--release", "2099.1"], "no release 2099.1 of unsloth"),
    ],
)
def test_what_is_not_there_is_named(world, words, complaint):
    code, said = world.run("fingerprint", *words)
    assert code == 2 and complaint in said
