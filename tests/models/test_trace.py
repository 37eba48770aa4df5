"""What the stub trace notices, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from auto_round.errors import UnsupportedError
from auto_round.facts.flow import HIDDEN_STATES, BlockCall
from auto_round.models.earlier_results import check_no_containers
from auto_round.models.folder import FolderSource
from auto_round.models.live import LiveSource
from auto_round.models.recorder import Recorder
from auto_round.testing.tiny_models import tiny_config, tiny_model
from sweep.configurations import known_families
from sweep.outcome import save_family

IDS = torch.arange(3, 15).reshape(2, 6)
NAMES = ("hidden_states", "second", "mask")


def test_masks_differ_from_block_to_block(saved):
    """Capturing the first block's inputs only would be wrong here."""
    with FolderSource.open(saved("gemma3_text")) as source, source.stem() as stem:
        ids = torch.arange(3, 35).reshape(1, 32)
        sliding, full = (call.kwargs for call in stem.trace({"input_ids": ids}).calls)
    assert sliding["attention_mask"] is not None
    assert full["attention_mask"] is None
    assert not torch.equal(sliding["position_embeddings"][0], full["position_embeddings"][0])


def test_caches_are_left_out(saved):
    with FolderSource.open(saved("llama")) as source, source.stem() as stem:
        calls = stem.trace({"input_ids": IDS}).calls
    assert all(not {"past_key_values", "use_cache"} & call.kwargs.keys() for call in calls)


def test_a_trace_is_repeatable(saved):
    with FolderSource.open(saved("gemma2")) as source, source.stem() as stem:
        mask = torch.ones(2, 6)
        mask[0, 0] = 0
        first, _, third = (
            stem.trace({"input_ids": IDS, "attention_mask": mask}),
            stem.trace({"input_ids": IDS}),
            stem.trace({"input_ids": IDS, "attention_mask": mask}),
        )
    assert torch.equal(first.states[0], third.states[0])
    pairs = zip(first.calls, third.calls, strict=True)
    assert all(torch.equal(a.kwargs["attention_mask"], b.kwargs["attention_mask"]) for a, b in pairs)


def played(*hiddens: torch.Tensor, order: tuple[int, ...] | None = None, count: int | None = None):
    """Trace of a model that hands these tensors to its blocks."""
    recorder = Recorder([HIDDEN_STATES] * (len(hiddens) if count is None else count))
    recorder.start()
    for index, hidden in zip(order or range(len(hiddens)), hiddens, strict=True):
        assert recorder.receive(index, NAMES, hidden, 5, mask=None, use_cache=False) is hidden
    return recorder.trace()


def test_what_the_model_adds_between_blocks():
    x, extra = torch.zeros(1, 2, 3), torch.arange(6.0).reshape(1, 2, 3)
    trace = played(x, x + extra, x + extra)
    assert trace.calls[0] == BlockCall((None, 5), {"mask": None})
    assert (trace.edits[0], trace.edits[2]) == ((None,), (None,))
    assert torch.equal(trace.edits[1][0], extra)


def test_a_skipped_block():
    x = torch.zeros(1, 2, 3)
    trace = played(x, x, order=(0, 2), count=3)
    assert [call is None for call in trace.calls] == [False, True, False]


def test_another_order_is_refused():
    x = torch.zeros(1, 2, 3)
    with pytest.raises(UnsupportedError, match="order"):
        played(x, x, order=(1, 0))
    with pytest.raises(UnsupportedError, match="order"):
        played(x, x, order=(0, 0))


def test_another_width_is_refused():
    with pytest.raises(UnsupportedError, match="shape"):
        played(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))


def test_changes_in_place_are_refused():
    """They would be lost: the stub returns the very tensor that is changed."""
    recorder, x = Recorder([HIDDEN_STATES] * 2), torch.zeros(1, 2, 3)
    recorder.receive(0, NAMES, x)
    x += 1
    with pytest.raises(UnsupportedError, match="in place"):
        recorder.receive(1, NAMES, x)


def test_hidden_state_may_come_by_name():
    recorder = Recorder([HIDDEN_STATES])
    recorder.returned = 1
    x = torch.zeros(1, 2, 3)
    assert recorder.receive(0, NAMES, hidden_states=x) == (x,)
    assert recorder.trace().states[0] is x


def test_carried_state_is_refused():
    shared: dict[str, torch.Tensor] = {}
    calls = [BlockCall((), {"shared_kv_states": shared})] * 2
    with pytest.raises(UnsupportedError, match="shared_kv_states"):
        check_no_containers(calls)
    check_no_containers([BlockCall((), {"x": {}}), BlockCall((), {"x": {}})])


def test_a_second_output_goes_to_the_next_block():
    """GLM's sparse attention hands token indices from block to block."""
    source = LiveSource(tiny_model(tiny_config("glm_moe_dsa")))
    with source.stem() as stem:
        traced = stem.trace({"input_ids": torch.zeros(3, 8, dtype=torch.int64)})
    hidden, chosen = traced.states
    assert hidden.dtype == torch.float32
    assert not chosen.is_floating_point()
    assert chosen.shape == (3, 1, 8 * 4)  # 4 tokens of 8 for each of 8
    assert [call.carried[0].present for call in traced.calls] == [frozenset(), {()}]


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("dory", r"in the order \[0, 1, 0, 1\]"),
        ("cpmant", "shape"),
        ("hrm_text", "in the order"),
        ("inkling2_text", "behind its last block"),
        ("inkling2_loop_text", "behind its last block"),
    ],
)
def test_the_true_reason_is_said_before_weights_are_read(tmp_path, monkeypatch, family, reason):
    if family not in known_families():
        pytest.skip("this Transformers has no such family")
    with FolderSource.open(save_family(family, tmp_path)) as source:
        monkeypatch.setattr(FolderSource, "read_tensor", None)
        monkeypatch.setattr(FolderSource, "_fetch", None)
        with pytest.raises(UnsupportedError, match=reason):
            source.refuse_untraceable()
