from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from auto_round.calibration.observe import InputMoments, observe_inputs
from auto_round.errors import ConfigError, NumericsError
from auto_round.numerics.importance import TILE
from auto_round.numerics.token_weights import CAP, token_energy, token_weights


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.mlp = nn.ModuleDict({"down": nn.Linear(12, 8)})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp["down"](input=self.up(x).relu())
        return y


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_mean_squares_equal_those_of_all_inputs_at_once() -> None:
    block, batches = Block(), [nn.functional.normalize(draw(2, 5, 8, seed=i), dim=-1) for i in range(3)]
    with torch.no_grad(), observe_inputs(block, ["up", "mlp.down"]) as seen:
        for x in batches:
            block(x)
    x = torch.cat(batches).reshape(-1, 8)
    assert seen["up"].count == len(x) == 30
    torch.testing.assert_close(seen["up"].importance().squares, x.double().square().mean(0).float())
    inner = block.up(torch.cat(batches)).relu().detach()
    weights = token_weights(token_energy(inner)).reshape(-1, 1)
    expected = (inner.reshape(-1, 12).square() * weights).mean(0)
    torch.testing.assert_close(seen["mlp.down"].importance().squares, expected)


def test_a_massive_token_does_not_hide_the_others() -> None:
    x = draw(4, 50, 8)
    massive = x.clone()
    massive[:, 0] = torch.tensor([3000.0] + [0.0] * 7)
    found = []
    for rows in (x, massive):
        moments = InputMoments()
        moments.add(rows)
        importance = moments.importance()
        assert importance is not None
        found.append(importance.squares)
    median = token_energy(massive).median(dim=-1).values.mean()
    # One token of 50 counts as four of them do, all in the first channel (mean square times 8).
    assert found[1][0] < found[0][0] + 1.1 * 8 * CAP * median / 50
    torch.testing.assert_close(found[1][1:], found[0][1:], rtol=0.1, atol=0)


def test_rows_do_not_know_each_other() -> None:
    rows = draw(6, 20, 8) * torch.logspace(-3, 3, 6)[:, None, None]
    together, apart = InputMoments(), InputMoments()
    together.add(rows)
    for row in rows.split(1):
        apart.add(row)
    torch.testing.assert_close(together.importance().squares, apart.importance().squares)


def test_products_of_neighbours_are_shrunk_and_end_with_the_squares() -> None:
    moments, x = InputMoments(), draw(1000, 300) + draw(1000, 1, seed=1).clamp(-1, 1)
    for part in x.split(300):
        moments.add(part)
    found = moments.importance()
    assert found is not None
    assert found.products is not None
    assert found.products.shape == (3, TILE, TILE)
    padded = torch.nn.functional.pad(x, (0, 3 * TILE - 300))
    for i, tile in enumerate(found.products):
        part = padded[:, i * TILE : (i + 1) * TILE]
        want = part.T @ part / (1000 + TILE)
        want.diagonal().copy_(part.square().mean(0))
        torch.testing.assert_close(tile, want)


def test_padding_does_not_count() -> None:
    block, x = Block(), nn.functional.normalize(draw(2, 5, 8), dim=-1)
    mask = torch.tensor([[True, True, False, False, False], [True] * 5])
    with torch.no_grad(), observe_inputs(block, ["up"], mask_of=lambda: mask) as seen:
        block(torch.where(mask[..., None], x, torch.inf))
    assert seen["up"].count == 7
    torch.testing.assert_close(seen["up"].importance().squares, x[mask].square().mean(0))


def test_a_mask_of_another_shape_is_left_aside() -> None:
    moments = InputMoments()
    moments.add(draw(6, 4), mask=torch.zeros(2, 3, dtype=torch.bool))
    assert moments.count == 6


def test_the_block_is_left_as_it_was() -> None:
    block = Block()
    with pytest.raises(RuntimeError, match="stop"), observe_inputs(block, ["up"]):
        raise RuntimeError("stop")
    assert not block.up._forward_pre_hooks


def test_bfloat16_squares_do_not_saturate_the_sum() -> None:
    moments = InputMoments()
    for _ in range(64):
        moments.add(torch.full((4096, 3), 1.5, dtype=torch.bfloat16))
    importance = moments.importance()
    assert importance is not None
    assert importance.squares.tolist() == [2.25, 2.25, 2.25]
    assert importance.squares.dtype == torch.float32


def test_nothing_seen_is_none() -> None:
    moments = InputMoments()
    assert moments.importance() is None
    moments.add(torch.zeros(0, 4))
    assert moments.importance() is None


def test_values_that_are_not_finite_are_counted() -> None:
    moments = InputMoments()
    moments.add(torch.tensor([[1.0, torch.nan, torch.inf]]))
    with pytest.raises(NumericsError, match="2 of 3"):
        moments.importance()


def test_unknown_modules_are_named() -> None:
    with (
        pytest.raises(ConfigError, match='no module "upp"; did you mean "up"'),
        observe_inputs(Block(), ["upp"]),
    ):
        pass
