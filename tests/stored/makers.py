"""What different tools store of a matrix, made with plain PyTorch, and the weight that it stands for."""

from __future__ import annotations

import torch

from stored.twins import fp8, nibbles, powers, spread

BLOCK = (48, 32)
"""Rows and columns of FP8 blocks; 64 x 64 and 96 x 64 end in partial ones."""


def fp8_blocks(name, weight):
    rows, columns = (-(-n // b) for n, b in zip(weight.shape, BLOCK, strict=True))
    scale = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            tile = weight[i * BLOCK[0] : (i + 1) * BLOCK[0], j * BLOCK[1] : (j + 1) * BLOCK[1]]
            scale[i, j] = tile.float().abs().max() / 448
    each = spread(scale, BLOCK, tuple(weight.shape))
    codes = fp8(weight, each)
    return {name: codes, f"{name}_scale_inv": scale}, codes.float() * each


def fp8_powers(name, weight):
    scale = torch.full((1, 1), 2.0**-9)
    codes = fp8(weight, scale)
    stored = {name: codes, f"{name}_scale_inv": scale.to(torch.float8_e8m0fnu)}
    return stored, codes.float() * scale


def fp8_tensor(name, weight):
    scale = weight.float().abs().max() / 448
    codes = fp8(weight, scale)
    stored = {
        name: codes,
        f"{name}_scale": scale,
        f"{name.removesuffix('weight')}input_scale": torch.ones(()),
    }
    return stored, codes.float() * scale


def mx_experts(name, weight):
    """Stacks `[experts, in, out]` as `[experts, out, groups, 16]`."""
    matrices = weight.transpose(1, 2)
    scales, step = powers(matrices, 32, 6.0)
    codes, numbers = nibbles(matrices, step)
    stored = {f"{name}_blocks": codes.unflatten(-1, (-1, 16)), f"{name}_scales": scales}
    return stored, numbers.transpose(1, 2)


def layer_of(name):
    return name.removesuffix(".weight")


def fp8_rows(name, weight):
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
    codes = fp8(weight, scale.float())
    return {name: codes, f"{name}_scale": scale}, codes.float() * scale.float()


def fp8_whole(name, weight):
    """One scale without axes, and one of the inputs, as older releases wrote them."""
    scale = weight.float().abs().max() / 448
    codes = fp8(weight, scale)
    return {
        name: codes,
        f"{name}_scale": scale,
        f"{layer_of(name)}.input_scale": torch.ones(1),
    }, codes.float() * scale


def fp8_tiles(name, weight):
    """Tiles of 64 x 32, which no preset has."""
    tiles = weight.float().unflatten(0, (-1, 32)).unflatten(-1, (-1, 32))
    scale = tiles.abs().amax((1, 3)) / 448
    each = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
    codes = fp8(weight, each)
    return {name: codes, f"{name}_scale": scale}, codes.float() * each


def int8_rows(name, weight):
    scale = (weight.float().abs().amax(1, keepdim=True) / 127.5).to(torch.bfloat16)
    codes = (weight.float() / scale.float()).round().clamp(-128, 127)
    return {name: codes.to(torch.int8), f"{name}_scale": scale}, codes * scale.float()


def words(codes, bits=4):
    """Codes of 4 bits from -8 on, eight in a word, the first in the lowest bits."""
    lanes = (codes + 8).to(torch.int64).unflatten(-1, (-1, 32 // bits))
    packed = sum(lanes[..., i] << (bits * i) for i in range(32 // bits))
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def int4_groups(name, weight):
    """Beside symmetric weights older releases wrote zero points of 0."""
    grouped = weight.float().unflatten(-1, (-1, 32))
    scale = (grouped.abs().amax(-1) / 7.5).to(torch.bfloat16)
    codes = (grouped / scale.float().unsqueeze(-1)).round().clamp(-8, 7)
    stored = {
        "weight_packed": words(codes.flatten(1)),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
        "weight_zero_point": torch.zeros(weight.shape[0], weight.shape[1] // 32, dtype=torch.int8),
    }
    return named(name, stored), (codes * scale.float().unsqueeze(-1)).flatten(1)


def int4_reordered(name, weight):
    """Groups of inputs that are not neighbours."""
    generator = torch.Generator().manual_seed(weight.shape[1])
    order = torch.randperm(weight.shape[1], generator=generator)
    stored, dequantized = int4_groups(name, weight[:, order])
    back = torch.argsort(order)
    codes = stored[f"{layer_of(name)}.weight_packed"]
    lanes = torch.stack([(codes >> (4 * i)) & 15 for i in range(8)], -1).flatten(1)[:, back] - 8
    stored |= named(name, {"weight_packed": words(lanes), "weight_g_idx": (back // 32).to(torch.int32)})
    return stored, dequantized[:, back]


def gptq_reordered(name, weight):
    """Version 1, with groups of inputs that are not neighbours."""
    generator = torch.Generator().manual_seed(weight.shape[1])
    group_of = torch.randperm(weight.shape[1], generator=generator) // 32
    codes = torch.empty(weight.shape, dtype=torch.int64)
    scales = torch.empty(weight.shape[1] // 32, weight.shape[0], dtype=torch.float16)
    for group in range(len(scales)):
        columns = weight[:, group_of == group].float()
        scales[group] = columns.abs().amax(1) / 7.5
        codes[:, group_of == group] = (columns / scales[group].float()[:, None]).round().clamp(-8, 7).long()
    stored = {
        "qweight": words(codes).t(),
        "qzeros": torch.full((len(scales), weight.shape[0] // 8), 0x77777777, dtype=torch.int32),
        "scales": scales,
        "g_idx": group_of.to(torch.int32),
    }
    return named(name, stored), codes * scales[group_of].t().float()


def mxfp4(name, weight):
    scale, step = powers(weight, 32, 6.0)
    codes, numbers = nibbles(weight, step)
    return named(name, {"weight_packed": codes, "weight_scale": scale}), numbers


def nvfp4(name, weight):
    over = 448 * 6 / weight.float().abs().max()
    scale = (weight.float().unflatten(-1, (-1, 16)).abs().amax(-1) / 6 * over).to(torch.float8_e4m3fn)
    step = (scale.float() / over).repeat_interleave(16, -1)
    codes, numbers = nibbles(weight, step)
    stored = {"weight_packed": codes, "weight_scale": scale, "weight_global_scale": over.reshape(1)}
    return named(name, {**stored, "input_global_scale": torch.ones(1)}), numbers


def named(name, stored):
    return {f"{layer_of(name)}.{suffix}": tensor for suffix, tensor in stored.items()}
