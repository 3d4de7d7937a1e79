"""On which machines a patch that was measured on some cards is on by itself."""

import pytest
import torch

from unsloth_ext.compiling.measured_cards import refuse_where_not_measured
from unsloth_ext.patching import NotHere

SWITCH = "UNSLOTH_EXT_A_SWITCH"


@pytest.fixture
def cards(monkeypatch):
    def machine(*capabilities, hip=None):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card=None: capabilities[card])
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.delenv(SWITCH, raising=False)

    return machine


def test_on_measured_cards_it_is_on(cards):
    for number in (1, 2):
        cards(*[(9, 0)] * number)
        refuse_where_not_measured(SWITCH)


@pytest.mark.parametrize(
    "capabilities, hip", [((), None), (((8, 0),), None), (((9, 0), (12, 0)), None), (((9, 0),), "7.1")]
)
def test_elsewhere_it_waits_for_its_switch(cards, monkeypatch, capabilities, hip):
    cards(*capabilities, hip=hip)
    with pytest.raises(NotHere, match=f"not measured on this card: {SWITCH}=1 has it here"):
        refuse_where_not_measured(SWITCH)
    monkeypatch.setenv(SWITCH, "1")
    refuse_where_not_measured(SWITCH)
