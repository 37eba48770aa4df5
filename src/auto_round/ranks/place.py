"""Which of the processes of a run this one is, as torchrun, Slurm or Kubernetes say in the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from auto_round.config.env import process_variables
from auto_round.errors import ConfigError

_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Place:
    """A process among those that were started together.

    Attributes:
        rank: its number, from 0; the first writes the output.
        size: how many there are.
        local: its number among those of this machine, which is that of its accelerators.
        beside: how many there are on this machine; 0 where that is not said.
    """

    rank: int
    size: int
    local: int
    beside: int = 0


def place(environment: Mapping[str, str] | None = None) -> Place | None:
    """This process among several; None where it is alone.

    Names of the variables: https://docs.pytorch.org/docs/stable/elastic/run.html

    Args:
        environment: variables; None for those of the process.

    Raises:
        ConfigError: the variables contradict each other, or say too little.
    """
    env = process_variables() if environment is None else environment
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return None
    rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    local = _number(env, "LOCAL_RANK") if "LOCAL_RANK" in env else 0
    if not 0 <= rank < size:
        raise ConfigError(
            f"RANK is {rank} and WORLD_SIZE is {size} in the environment; expected 0 <= RANK < WORLD_SIZE: "
            "start all processes with torchrun"
        )
    beside = _number(env, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in env else 0
    missing = [name for name in _ADDRESS if not env.get(name)]
    if size == 1:
        return None
    if missing:
        raise ConfigError(
            f"the environment names {size} processes (WORLD_SIZE), but not where they meet "
            f"({', '.join(missing)}): start them with torchrun, or remove RANK and WORLD_SIZE"
        )
    return Place(rank, size, local, beside)


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise ConfigError(f'{name} is "{env[name]}" in the environment; expected a whole number') from None
