"""A module of fused experts cut into pieces, each with some of the experts, on any devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.errors import InternalError, UnsupportedError
from auto_round.models.experts import Multiply, between, multiply_by, read_call
from auto_round.models.matrix_experts import MatrixExperts


class DividedExperts(nn.Module):
    """Computes what the whole module does, bit by bit.

    Tokens are sorted by expert as there, and each piece multiplies those of its experts. Outputs are weighed
    and added up here, in the order of the whole module.

    Attributes:
        parts: of the whole module.
        shares: the experts of each piece, ascending.
        pieces: the modules that hold them.
    """

    def __init__(self, whole: MatrixExperts, shares: Sequence[Sequence[int]]) -> None:
        """Cut a module; it is not changed, and weights are copied.

        Args:
            whole: the module.
            shares: the experts of each piece; each expert is in one of them.

        Raises:
            InternalError: an expert is missing, or there twice.
        """
        super().__init__()
        self.parts, self.shares = whole.parts, tuple(map(tuple, shares))
        if sorted(e for share in shares for e in share) != list(range(self.parts.count)):
            raise InternalError(f"{self.parts.count} experts cannot be cut into {self.shares}")
        self.pieces = nn.ModuleList(whole.part(share) for share in shares)
        self.has_post_expert_norm = bool(vars(whole).get("has_post_expert_norm"))
        if self.has_post_expert_norm:
            self.post_expert_norm = whole.post_expert_norm
        at = {e: (i, n) for i, share in enumerate(shares) for n, e in enumerate(share)}
        # A number behind the last expert stands for none: no piece has it.
        self._piece = [*(at[e][0] for e in range(len(at))), -1]
        self._number = [*(at[e][1] for e in range(len(at))), 0]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Output of the experts, `[tokens, width]`; arguments of the whole module.

        Raises:
            UnsupportedError: it is called in an unusual way.
        """
        call = read_call(args, kwargs)
        if call is None:
            raise UnsupportedError("experts on several devices take hidden states, indices and weights")
        k, device = call.chosen.shape[-1], call.hidden.device
        chosen, order = torch.sort(call.chosen.reshape(-1))
        spread, known = call.hidden[order // k], chosen.clamp(max=self.parts.count)
        owner = torch.tensor(self._piece, dtype=torch.int64, device=device)[known]
        number = torch.tensor(self._number, dtype=torch.int64, device=device)[known].unsqueeze(-1)
        found = torch.zeros_like(spread)
        for i, piece in enumerate(self.pieces):
            at = (owner == i).nonzero().squeeze(-1)
            found = found.index_copy(0, at, piece(spread[at], number[at], spread.new_ones(len(at), 1)))
        if self.has_post_expert_norm:
            found = self.post_expert_norm(found)
        found = found * call.weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=device)
        return found[back].view(len(call.hidden), k, -1).sum(dim=1).to(call.hidden.dtype)

    def multiply_by(self, name: str) -> Multiply:
        """The products with a parameter, as `models.experts.multiply_by` for the whole module."""
        products = [multiply_by(piece, name) for piece in self.pieces]
        devices = [piece.get_parameter(name).device for piece in self.pieces]

        def multiply(expert: int, x: Tensor) -> Tensor:
            piece = self._piece[expert]
            return products[piece](self._number[expert], x.to(devices[piece])).to(x.device)

        return multiply

    def between(self, first: Tensor) -> Tensor:
        """What flows into the second matrices, as `models.experts.between`."""
        return between(self.pieces[0], first)


def path_of_piece(module: str, piece: int) -> str:
    """Path of one of the pieces into which a module was cut."""
    return f"{module}.pieces.{piece}" if module else f"pieces.{piece}"


def name_in_piece(parameter: str, piece: int) -> str:
    """Name of a parameter in one of the pieces into which its module was cut."""
    module, _, own = parameter.rpartition(".")
    return f"{path_of_piece(module, piece)}.{own}"


def whole_names(root: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Parameter of a piece -> its name before the module was cut, and the piece's experts."""
    return {
        f"{path_of_piece(path, i)}.{own}": (f"{path}.{own}", module.shares[i])
        for path, module in root.named_modules()
        if isinstance(module, DividedExperts)
        for i, piece in enumerate(module.pieces)
        for own, _ in piece.named_parameters()
    }
