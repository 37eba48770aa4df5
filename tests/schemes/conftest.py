"""A small made-up model: twelve blocks, every second one with routed experts; a tower and a head."""

from __future__ import annotations

import pytest
import torch

from auto_round.facts.layer import Block, Layer, Role

BLOCKS = 12
EXPERTS = 4


def layer(name: str, shape: tuple[int, int], block: int | None, role: Role = Role.LINEAR) -> Layer:
    return Layer(name, f"{name}.weight", f"{name}.weight", shape, torch.bfloat16, block, role)


def _dense(prefix: str, block: int) -> list[Layer]:
    shapes = {"gate_proj": (768, 256), "up_proj": (768, 256), "down_proj": (256, 768)}
    return [layer(f"{prefix}.mlp.{name}", shape, block) for name, shape in shapes.items()]


def _sparse(prefix: str, block: int) -> list[Layer]:
    shapes = {"gate_proj": (128, 256), "up_proj": (128, 256), "down_proj": (256, 128)}
    layers = [layer(f"{prefix}.mlp.gate", (EXPERTS, 256), block, Role.ROUTER)]
    for e in range(EXPERTS):
        layers += [
            layer(f"{prefix}.mlp.experts.{e}.{n}", shape, block, Role.EXPERT) for n, shape in shapes.items()
        ]
    layers.append(layer(f"{prefix}.mlp.shared_expert.down_proj", (256, 768), block, Role.SHARED_EXPERT))
    return layers


@pytest.fixture(scope="session")
def layers() -> tuple[Layer, ...]:
    made: list[Layer] = []
    for block in range(BLOCKS):
        prefix = f"model.layers.{block}"
        made += [layer(f"{prefix}.self_attn.{n}_proj", (256, 256), block) for n in "qkvo"]
        made += _sparse(prefix, block) if block % 2 else _dense(prefix, block)
    made.append(layer("visual.merger.fc", (256, 256), None, Role.OUTSIDE))
    made.append(layer("lm_head", (3200, 256), None, Role.HEAD))
    return tuple(made)


@pytest.fixture(scope="session")
def blocks() -> tuple[Block, ...]:
    return tuple(Block(b, f"language.layers.{b}", f"model.layers.{b}") for b in range(BLOCKS))
