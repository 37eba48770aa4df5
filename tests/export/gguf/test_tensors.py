"""Rows on their way into a GGUF file."""

from __future__ import annotations

import torch

from auto_round.export.gguf.tensors import Change, GgufTensor, GroupsApart, Listed, RotaryPairs, TensorRows


def test_rotary_pairs_interleave_the_halves_of_each_head() -> None:
    rows = 24  # three heads of eight
    order = RotaryPairs(3).indices(rows).tolist()
    for head in range(3):
        for i in range(4):
            assert order[head * 8 + 2 * i] == head * 8 + i
            assert order[head * 8 + 2 * i + 1] == head * 8 + i + 4
    assert sorted(order) == list(range(rows))


def test_rotation_of_neighbours_is_the_rotation_of_halves() -> None:
    """What the order is for: both ways of rotating give the same scores."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 8, generator=generator)
    angle = torch.rand(4, generator=generator)
    cos, sin = angle.cos(), angle.sin()

    def halves(x: torch.Tensor) -> torch.Tensor:
        a, b = x[:4], x[4:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin])

    def neighbours(x: torch.Tensor) -> torch.Tensor:
        a, b = x[0::2], x[1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(-1)

    order = RotaryPairs(1).indices(8)
    torch.testing.assert_close(halves(q) @ k, neighbours(q[order]) @ k[order])


def test_groups_apart() -> None:
    # Two groups, each of two queries, a key and a value of one row.
    stored = ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]
    order = GroupsApart(4, 2).indices(8).tolist()
    assert [stored[i] for i in order] == ["q0", "q1", "q2", "q3", "k0", "k1", "v0", "v1"]


def test_changes() -> None:
    source = torch.arange(6.0).reshape(2, 3)
    piece = TensorRows("w", 0, 3)
    turned = GgufTensor("w", (3, 2), (piece,), Change.TRANSPOSED)
    assert torch.equal(turned.prepare(piece, source), source.T)
    norm = GgufTensor("n", (3,), (piece,), Change.PLUS_ONE)
    half = torch.tensor([0.5, -1.0, 2.0], dtype=torch.bfloat16)
    assert torch.equal(norm.prepare(piece, half), torch.tensor([1.5, 0.0, 3.0]))


def test_listed_takes_some_rows() -> None:
    piece = TensorRows("w", 0, 2, Listed((3, 1)))
    assert piece.arrange(torch.arange(5)).tolist() == [3, 1]
