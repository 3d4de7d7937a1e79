"""TRL's packing, padding-free batches and DPO in Unsloth, nothing compiled by us: the same training with the patches for packed batches as without."""

import pytest
from on_card import NEEDS, on_card

pytestmark = NEEDS


@pytest.mark.parametrize("layers", ["kept", "checkpointed"])
@pytest.mark.parametrize("kind", ["packing", "padding_free", "dpo"])
def test_the_training_of_unsloth(tmp_path, kind, layers):
    theirs, ours = (on_card("packed_trainers_on_card.py", tmp_path, kind, packed, layers) for packed in "01")
    print(theirs, ours, sep="\n")
    assert len(ours["losses"]) == 6 and theirs["calls"] == 0
    if kind == "dpo" and not ours["calls"]:
        pytest.skip("DPO pads its batches here: nothing of ours was called")
    assert ours["calls"], ours
    assert kind == "dpo" or 1 <= ours["graphs"] <= 4, ours  # packings make no graphs of their own
    for name, near in (("losses", 0.01), ("norms", 0.05)):  # two kernels of attention in bf16
        for found, wanted in zip(ours[name], theirs[name], strict=True):
            assert abs(found - wanted) <= near * max(abs(wanted), 0.1), (ours, theirs)
