"""Channels of a block that are made in one place and read in others, found by running the block.

Three kinds are looked for: what a norm gives to linear layers, and what one linear layer gives to another
elementwise (`up` to `down` behind a gate, values to the output of attention). Nothing is taken from names. A
link counts if the block gives the same after its channels were divided where they are made and multiplied
where they are read, so whoever else reads a norm (a router, say) rules it out, and so does whatever might
read it but did not run, such as experts for images while there is text only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from auto_round.facts.tensor import MATRIX
from auto_round.numerics.smoothing import LARGEST, Rescaling

SAME = 1e-3
"""Largest error of what a block adds to its input, over all tokens, by which it still gives the same: float32
leaves 1e-6, and a channel that somebody else reads at another size is off by tenths. An error counts beside
what is added to that token, or to the median one where that is more."""
PLUS = (0.0, 1.0)
"""What models add to the weight of a norm before they multiply by it: nothing, or 1 as Gemma does."""
VECTOR = 1
"""Axes of the weight of a norm."""


@dataclass(frozen=True, slots=True)
class Link:
    """Channels that can be rescaled.

    Attributes:
        makers: parameter of the block whose first axis they are -> what the model adds to it (`PLUS`).
        readers: weights of linear layers whose columns they are.
        repeats: how often each is read, as values are by the queries of a group.
        together: neighbouring channels that are repeated as one: the size of a head.
    """

    makers: Mapping[str, float]
    readers: tuple[str, ...]
    repeats: int = 1
    together: int = 1

    def spread(self, made: Tensor) -> Tensor:
        """Numbers of channels as they are read, from those as they are made."""
        return made.view(-1, 1, self.together).expand(-1, self.repeats, self.together).reshape(-1)

    def gathered(self, read: Tensor) -> Tensor:
        """Numbers of channels as they are made: the mean of those as they are read."""
        return read.view(-1, self.repeats, self.together).mean(1).reshape(-1)

    def changes(self, factors: Tensor) -> dict[str, Rescaling]:
        """What becomes of each parameter when channels, as they are made, are divided by factors."""
        made = {name: Rescaling(divided=factors, plus=plus) for name, plus in self.makers.items()}
        return {**made, **{name: Rescaling(multiplied=self.spread(factors)) for name in self.readers}}


Run = Callable[[], tuple[Tensor, ...]]
"""Runs the block on the same row: what it adds to its input, `[tokens, width]` float32, and whatever else it
hands on to later blocks, `[1, numbers]` each, which has to stay as well: later blocks read it."""


def find_links(block: nn.Module, run: Run, usable: Callable[[Link], bool]) -> list[Link]:
    """Every link of a block.

    Args:
        block: with its weights, in float32; they are as before when this returns.
        run: runs it.
        usable: whether a link can be rescaled where it is stored, and something is gained by it.
    """
    seen = _watch(block, run)
    found: list[Link] = []
    for several in (*_norms(block, seen), *_pairs(block, seen.fed)):
        for link in several:
            if usable(link) and _holds(block, link, run, seen.wanted):
                found.append(link)
                break
    return found


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one run of a block shows.

    Attributes:
        fed: linear layer called once -> the norm whose output it reads, None for none.
        wanted: what the block gives.
        idle: weights of modules that were not called.
    """

    fed: Mapping[str, str | None]
    wanted: tuple[Tensor, ...]
    idle: tuple[Tensor, ...]


def _watch(block: nn.Module, run: Run) -> _Seen:
    read: dict[str, list[Tensor]] = {}
    made: dict[str, list[Tensor]] = {}
    called: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: called.add(name)

    def look(name: str, *, linear: bool) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[object, ...], output: object) -> None:
            value = args[0] if linear and args else output
            if isinstance(value, Tensor):
                (read if linear else made).setdefault(name, []).append(value)

        return hook

    hooks = [
        module.register_forward_hook(look(name, linear=type(module) is nn.Linear))
        for name, module in block.named_modules()
        if type(module) is nn.Linear or _is_norm(module)
    ]
    hooks += [module.register_forward_pre_hook(note(name)) for name, module in block.named_modules()]
    try:
        wanted = run()
    finally:
        for each in hooks:
            each.remove()
    norms = {_place(values[0]): name for name, values in made.items() if len(values) == 1}
    fed = {name: norms.get(_place(values[0])) for name, values in read.items() if len(values) == 1}
    left = (module for name, module in block.named_modules() if name not in called)
    return _Seen(fed, wanted, tuple(weight for each in left for weight in each.parameters(recurse=False)))


def _place(value: Tensor) -> int:
    """Where numbers lie: the same for a tensor in another shape. Some devices have no data pointers."""
    return int(value.untyped_storage()._cdata)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    own = isinstance(weight, nn.Parameter) and weight.dim() == VECTOR
    return own and not any(True for _ in module.children())


def _norms(block: nn.Module, seen: _Seen) -> Iterator[list[Link]]:
    """One link for each norm, in the ways in which models multiply by its weight."""
    for norm in dict.fromkeys(name for name in seen.fed.values() if name is not None):
        readers = tuple(f"{name}.weight" for name, source in seen.fed.items() if source == norm)
        width = block.get_parameter(f"{norm}.weight").numel()
        if any(weight.dim() >= MATRIX and width in weight.shape for weight in seen.idle):
            continue
        if all(block.get_parameter(name).shape[1] == width for name in readers):
            bias = {f"{norm}.bias": 0.0} if _has(block, f"{norm}.bias") else {}
            yield [Link({f"{norm}.weight": plus, **bias}, readers) for plus in PLUS]


def _pairs(block: nn.Module, fed: Mapping[str, str | None]) -> Iterator[list[Link]]:
    """For each linear layer that no norm feeds those beside it which may make its channels."""
    for name in (name for name, norm in fed.items() if norm is None):
        parent, _, _ = name.rpartition(".")
        head = getattr(block.get_submodule(parent), "head_dim", None)
        width = block.get_parameter(f"{name}.weight").shape[1]
        several: list[Link] = []
        for other in (each for each in fed if each.rpartition(".")[0] == parent and each != name):
            made = block.get_parameter(f"{other}.weight").shape[0]
            bias = {f"{other}.bias": 0.0} if _has(block, f"{other}.bias") else {}
            link = Link({f"{other}.weight": 0.0, **bias}, (f"{name}.weight",))
            if made == width:
                several.append(link)
            elif isinstance(head, int) and width % made == 0 and made % head == 0:
                several.append(replace(link, repeats=width // made, together=head))
        yield several


def _has(block: nn.Module, parameter: str) -> bool:
    return any(name == parameter for name, _ in block.named_parameters())


def _holds(block: nn.Module, link: Link, run: Run, wanted: tuple[Tensor, ...]) -> bool:
    """Whether the block gives the same with channels as small, and as large, as they may become.

    What clamps its values, say, shows only where they are large. Powers of two leave no error of rounding.
    Where the block gives the same even if only the makers change, the channels do nothing on this row (those
    of a choice of the best 2048 tokens among fewer, say): then nothing is known of who reads them.
    """
    count = block.get_parameter(next(iter(link.makers))).shape[0]
    factors = torch.pow(LARGEST, torch.arange(count, dtype=torch.int64, device=wanted[0].device) % 3 - 1)
    changes = link.changes(factors)
    made = {name: changes[name] for name in link.makers}
    return _error(block, changes, run, wanted) <= SAME < _error(block, made, run, wanted)


def _error(block: nn.Module, changes: Mapping[str, Rescaling], run: Run, wanted: tuple[Tensor, ...]) -> float:
    """Largest error of a token, see `SAME`, with some parameters rescaled."""
    with _rescaled(block, changes):
        found = run()
    return max(_relative(now - before, before) for now, before in zip(found, wanted, strict=True))


def _relative(off: Tensor, wanted: Tensor) -> float:
    """Largest size of a row of errors beside that row, or the median one where that is more."""
    sizes = wanted.norm(dim=-1)
    sizes = torch.maximum(sizes, sizes.median()).clamp_min(torch.finfo(torch.float32).tiny)
    return float((off.norm(dim=-1) / sizes).max())


@contextmanager
def _rescaled(block: nn.Module, changes: Mapping[str, Rescaling]) -> Iterator[None]:
    """Some parameters of a block rescaled for a while."""
    kept = {name: block.get_parameter(name).data for name in changes}
    try:
        for name, change in changes.items():
            block.get_parameter(name).data = change.of(kept[name])
        yield
    finally:
        for name, data in kept.items():
            block.get_parameter(name).data = data
