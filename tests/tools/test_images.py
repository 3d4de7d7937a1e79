"""The vision collator's two changes, on functions alone; on the collator itself they run in upstream_tests/unsloth-zoo/tests/."""

import copy

import pytest

from unsloth_ext.tools.collator import _copied_messages, copy_prompt_and_completion, copy_selected
from unsloth_ext.tools.image_size import bound_by_longer_side


class Collator:
    def __init__(self, model, resize="min", resize_dimension=0, snap=False):
        self.given = resize, resize_dimension, snap


@pytest.mark.parametrize(
    "args, kwargs, wanted",
    [
        ((), {}, ("min", "max", False)),
        ((), {"snap": True}, ("min", "max", True)),
        (("max",), {}, ("max", "max", False)),
        (("min", 0), {}, ("min", 0, False)),
        ((), {"resize_dimension": 1}, ("min", 1, False)),
        (("min", "min", True), {}, ("min", "min", True)),
    ],
)
def test_only_a_dimension_that_is_not_given_becomes_the_longer_side(args, kwargs, wanted):
    wrapped = type("Wrapped", (Collator,), {"__init__": bound_by_longer_side(Collator.__init__)})
    assert wrapped("model", *args, **kwargs).given == wanted


def test_wrong_arguments_are_pythons_own_error():
    wrapped = type("Wrapped", (Collator,), {"__init__": bound_by_longer_side(Collator.__init__)})
    with pytest.raises(TypeError, match="size"):
        wrapped("model", size=3)
    with pytest.raises(ValueError, match="no parameter resize_dimension"):
        bound_by_longer_side(lambda self: None)


def test_a_copy_is_deep_enough_to_edit_and_keeps_the_images():
    image = object()
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image}, "text"]},
        {"role": "assistant", "content": "Hi"},
        "raw",
    ]
    before = copy.copy(messages[0]), list(messages[0]["content"])
    copied = _copied_messages(messages)
    assert copied == messages and copied[0]["content"][0]["image"] is image
    copied[1]["content"] = [{"type": "text", "text": "Hi"}]
    del copied[0]["content"][0]["image"]
    copied[0]["content"].append("more")
    copied.pop()
    assert messages[1]["content"] == "Hi" and len(messages) == 3
    assert (messages[0], messages[0]["content"]) == before and messages[0]["content"][0]["image"] is image


@pytest.mark.parametrize("value", ["a text", None, {"role": "user"}, ()])
def test_what_is_no_list_of_messages_stays(value):
    assert _copied_messages(value) == (list(value) if isinstance(value, tuple) else value)


def test_the_wrapped_methods_see_copies():
    def edits(self, examples):
        for example in examples:
            example["prompt"][0]["content"] = example["completion"][0]["content"] = "edited"
        return examples

    row = {"prompt": [{"content": "p"}], "completion": [{"content": "c"}], "other": object()}
    (seen,) = copy_prompt_and_completion(edits)(None, [row])
    assert (row["prompt"], row["completion"]) == ([{"content": "p"}], [{"content": "c"}])
    assert seen["other"] is row["other"] and seen["prompt"] == [{"content": "edited"}]
    messages = [{"content": "m"}]
    selected = copy_selected(lambda self, example: example["messages"])(None, {"messages": messages})
    assert selected == messages and selected[0] is not messages[0]
