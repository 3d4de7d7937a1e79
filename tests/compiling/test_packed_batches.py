"""Where documents begin: every way of saying it, what is left over, and what does not fit."""

import random

import pytest
import torch
from packings import boundaries, random_lengths

from unsloth_ext.compiling.packed import (
    LEAST,
    packed_arguments,
    packing_of_lengths,
    packing_of_positions,
    position_ids_of,
    traced_packing,
)


def positions(lengths):
    return torch.cat([torch.arange(n) for n in lengths])[None]


def batch(lengths, rest=0, **description):
    return {"input_ids": torch.randint(9, (1, sum(lengths) + rest)), "use_cache": False, **description}


def descriptions(lengths):
    """The same row, as each collator describes it."""
    return (
        {"packed_seq_lengths": torch.tensor(lengths, dtype=torch.int32)},
        {"packed_seq_lengths": torch.tensor([lengths])},
        {"position_ids": positions(lengths)},
        {"cu_seq_lens_q": boundaries(lengths), "max_length_q": max(lengths)},
        {"cu_seq_lens_q": boundaries(lengths)[None].long()},
    )


def test_every_description_gives_the_same():
    lengths = random_lengths()
    for description in descriptions(lengths):
        given = batch(lengths, **description)
        kept = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
        found = packed_arguments(given)
        assert torch.equal(found["cu_seq_lens_q"], boundaries(lengths))
        assert found["cu_seq_lens_k"] is found["cu_seq_lens_q"]
        assert found["cu_seq_lens_q"].dtype == torch.int32
        assert max(lengths) <= found["max_length_q"] == found["max_length_k"] < max(LEAST + 1, 2 * max(lengths))
        assert found["max_length_q"].bit_count() == 1 and found["max_length_q"] >= LEAST
        assert torch.equal(found["position_ids"], positions(lengths))
        assert found["input_ids"] is given["input_ids"]
        assert given.keys() == kept.keys(), "the caller's batch was changed"
        again = packed_arguments(found)
        assert again["cu_seq_lens_q"] is found["cu_seq_lens_q"]
        assert again["max_length_q"] == found["max_length_q"]


def test_what_is_left_over_is_a_document():
    lengths = random_lengths()
    for description in descriptions(lengths)[:2]:
        found = packed_arguments(batch(lengths, rest=300, **description))
        assert torch.equal(found["cu_seq_lens_q"], boundaries([*lengths, 300]))
        assert found["max_length_q"] >= 300
        assert torch.equal(found["position_ids"], positions([*lengths, 300]))


def test_inside_a_graph():
    """No value is read: the same boundaries, with an empty document where nothing is left over, and the row as the bound."""

    @torch.compile(backend="eager", fullgraph=True, dynamic=True)
    def traced(input_ids, lengths):
        return packed_arguments({"input_ids": input_ids, "packed_seq_lengths": lengths})

    for rest in (0, 7):
        lengths = random_lengths()
        total = sum(lengths) + rest
        found = traced(torch.zeros(1, total, dtype=torch.int64), torch.tensor(lengths))
        assert torch.equal(found["cu_seq_lens_q"], boundaries([*lengths, rest]))
        assert found["max_length_q"] == total
        assert torch.equal(found["position_ids"], positions([*lengths, rest] if rest else lengths))
        assert torch.equal(traced_packing(torch.tensor(lengths), total, "cpu").cu_seqlens, found["cu_seq_lens_q"])


def test_inside_a_graph_a_row_that_was_cut_after_packing():
    """A kernel would write past the row."""
    assert traced_packing(torch.tensor([5, 9, 4]), 10, "cpu").cu_seqlens.tolist() == [0, 5, 10, 10, 10]


def test_batches_left_alone():
    lengths = random_lengths()
    total = sum(lengths)
    for given in (
        batch(lengths),
        batch(lengths, position_ids=torch.arange(total)[None]),
        batch(lengths, position_ids=torch.arange(7, 7 + total)[None]),
        batch(lengths, position_ids=positions(lengths), attention_mask=torch.ones(1, total)),
        batch(lengths, position_ids=positions(lengths), past_key_values=object()),
        {"input_ids": torch.zeros(2, 8, dtype=torch.int64), "position_ids": torch.arange(4).repeat(2, 2)},
        {"position_ids": positions(lengths)},
    ):
        found = packed_arguments(given)
        assert found == given
        assert found is not given


def test_documents_of_no_and_of_one_token():
    found = packing_of_lengths([1, 0, 3, 0, 1], 5)
    assert found.cu_seqlens.tolist() == [0, 1, 4, 5]
    assert packing_of_positions(torch.tensor([[0, 0, 0]])).cu_seqlens.tolist() == [0, 1, 2, 3]
    assert position_ids_of(torch.tensor([0, 1, 1, 3], dtype=torch.int32), 3).tolist() == [[0, 0, 1]]
    assert packing_of_lengths([], 4).cu_seqlens.tolist() == [0, 4]


def test_descriptions_that_do_not_fit():
    lengths = random_lengths()
    with pytest.raises(
        ValueError, match=rf"at most the row's {sum(lengths)} tokens, got 2 that sum to {sum(lengths) + 1}"
    ):
        packed_arguments(batch(lengths, packed_seq_lengths=torch.tensor([sum(lengths), 1])))
    with pytest.raises(ValueError, match="must not be negative"):
        packed_arguments(batch(lengths, packed_seq_lengths=torch.tensor([5, -1])))
    with pytest.raises(ValueError, match=r"must not be negative"):
        packed_arguments(batch(lengths, cu_seq_lens_q=torch.tensor([0, 5, 3])))
    with pytest.raises(ValueError, match=r"cu_seq_lens_q must begin with 0.*\[1, 5\]"):
        packed_arguments(batch(lengths, cu_seq_lens_q=torch.tensor([1, 5])))


def test_inputs_embeds():
    lengths = random_lengths()
    embeds = torch.randn(1, sum(lengths), 4)
    found = packed_arguments({"inputs_embeds": embeds, "packed_seq_lengths": torch.tensor(lengths)})
    assert torch.equal(found["cu_seq_lens_q"], boundaries(lengths))


def test_positions_of_random_boundaries():
    for _ in range(20):
        lengths = random_lengths(random.randint(1, 5), 4)
        assert torch.equal(position_ids_of(boundaries(lengths), sum(lengths)), positions(lengths))
