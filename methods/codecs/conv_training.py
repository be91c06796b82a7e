"""Training of convolutional decoders: the numerics behind `ConvLinear`.

As in HNeRV (Chen et al., arXiv 2304.02633), which ReALLM (arXiv 2405.13155) fits to matrices: an encoder of strided
convolutions turns every patch into a small latent image, the decoder draws the patch from it, both are trained on this
one matrix by Adam, and the encoder is thrown away. Everything is trained as it will be stored: latents and decoder
weights are rounded in every step, with straight-through gradients (Bengio et al., arXiv 1308.3432), so the last step's
network is the stored one.

What differs from the paper: errors are weighted by what they cost; the encoder only finds the start, after which the
latents are unknowns of their own that no encoder has to be able to produce; and with `sweeps` they are at last
searched, code by code, on the true error, while the decoder is trained on what the search found."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.formats.bitpack import pack
from kernels.formats.conv import (
    ConvLinear,
    draw,
    exact_convolutions,
    from_patches,
    latent_levels,
    to_patches,
    weight_levels,
)
from kernels.formats.normal_float import nearest
from kernels.formats.order import index_bits
from methods.codecs.vector import TINY, absmax_scales

BATCH = 1 << 17  # weights drawn in a step, at most: whole patches
ENCODER_WIDTH = 32
ENCODER_SHARE, SEARCH_SHARE = 0.3, 0.3  # of all steps: the first with an encoder, the last between sweeps of the search
WARM_UP = 0.1
LIKENESS_ROWS = 1024
RATE, LATENT_RATE = 2e-2, 0.1  # Adam's, of networks and of free latents
SMALLEST = 2.0**-14  # normal fp16

Layer = tuple[Tensor, Tensor]  # weight [out, in, k, k], bias [out]


def fit_conv(
    rest_OI: Tensor,
    layout: ConvLinear,
    *,
    importance_OI: Tensor | None = None,
    steps: int = 300,
    sweeps: int = 0,
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Buffers of `layout`, but for its low-rank branch, that draw `rest_OI`; and {relative_error, seconds}.

    Minimises the sum of importance * error^2 in `steps` steps of Adam; `sweeps` searches of the latents are spread over
    the last of them, and one follows. `relative_error` is ||error|| / ||rest||, unweighted, as other codecs report it.
    """
    start = time.perf_counter()
    tensors: dict[str, Tensor] = {}
    rest_OI, cost_OI = rest_OI.detach(), torch.ones_like(rest_OI) if importance_OI is None else importance_OI
    if layout.reorder:
        row_O, column_I = chain_order(rest_OI), chain_order(rest_OI.t())
        rest_OI, cost_OI = (matrix[row_O][:, column_I] for matrix in (rest_OI, cost_OI))
        for name, order_N in (("row_order", row_O), ("column_order", column_I)):
            tensors[name] = pack(order_N[None], index_bits(len(order_N)))[0]
    if layout.scales is None:
        unit = tensors["gain"] = rest_OI.square().mean().sqrt().clamp_min(TINY).reshape(1)
    else:
        scales = absmax_scales(rest_OI, layout.block, layout.scales.form)
        tensors |= {f"scales.{name}": tensor for name, tensor in scales.stored.items()}
        unit = scales.scale_OI
    target_NYX = to_patches(rest_OI / unit, layout.patch)
    # An error of a scaled entry costs scale^2, one of padding nothing.
    cost_NYX = to_patches(cost_OI * unit.square(), layout.patch)
    cost_NYX /= cost_NYX.mean().clamp_min(torch.finfo(torch.float32).tiny)
    with exact_convolutions():
        code_NCYX, network = _train(target_NYX, cost_NYX, layout, steps, sweeps, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            tensors |= _stored(code_NCYX, network, layout)
            rounded = [round_layer(layer, layout)[0] for layer in network]
            drawn = [draw(latent_values(part, layout), rounded) for part in code_NCYX.split(_per_batch(layout))]
    error_OI = rest_OI - from_patches(torch.cat(drawn), layout.grid, *rest_OI.shape) * unit
    relative = float(error_OI.norm()) / (float(rest_OI.norm()) or 1.0)
    return tensors, {"relative_error": relative, "seconds": time.perf_counter() - start}


def chain_order(matrix_OI: Tensor) -> Tensor:
    """An order of the rows in which neighbours point the same way: from the first, always on to the nearest that is
    left."""
    unit_OI = F.normalize(matrix_OI, dim=1)
    cosine_OO = (unit_OI @ unit_OI.t()).cpu().numpy()
    order = [0]
    for _ in range(len(cosine_OO) - 1):
        cosine_OO[:, order[-1]] = -2  # taken
        order.append(int(cosine_OO[order[-1]].argmax()))
    return torch.tensor(order, device=matrix_OI.device)


def unlikeness(matrix_OI: Tensor) -> float:
    """What is left of a row, on average, when the one before it in `chain_order` is known: 1 where rows have nothing in
    common. Of long matrices, of LIKENESS_ROWS rows: the order takes the square of their number."""
    if len(matrix_OI) > LIKENESS_ROWS:
        matrix_OI = matrix_OI[torch.linspace(0, len(matrix_OI) - 1, LIKENESS_ROWS).long().to(matrix_OI.device)]
    row_NM = matrix_OI[chain_order(matrix_OI)]
    cosine_N = F.cosine_similarity(row_NM[1:], row_NM[:-1], dim=1)
    energy_N = row_NM[1:].square().sum(dim=1)
    left_N = (1 - cosine_N.square()).clamp_min(0).sqrt()
    return float((left_N * energy_N).sum() / energy_N.sum().clamp_min(torch.finfo(torch.float32).tiny))


def round_latents(raw_NCYX: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """What is drawn from, with straight-through gradients, and what is stored: codes, or with 16 bits the values in
    fp16."""
    value_NCYX = torch.tanh(raw_NCYX)
    with torch.no_grad():
        code_NCYX = value_NCYX.half() if bits == 16 else torch.round((value_NCYX + 1) * ((2**bits - 1) / 2)).long()
        rounded_NCYX = code_NCYX.float() if bits == 16 else latent_levels(bits).to(code_NCYX.device)[code_NCYX]
        difference_NCYX = rounded_NCYX - value_NCYX
    return value_NCYX + difference_NCYX, code_NCYX


def latent_values(code_NCYX: Tensor, layout: ConvLinear) -> Tensor:
    return (
        code_NCYX.float()
        if layout.latent_bits == 16
        else latent_levels(layout.latent_bits).to(code_NCYX.device)[code_NCYX]
    )


def round_layer(layer: Layer, layout: ConvLinear) -> tuple[Layer, Tensor, Tensor | None]:
    """What is drawn with, with straight-through gradients, and what is stored of the weight: codes and absmax [out]."""
    weight, bias = layer
    with torch.no_grad():
        if layout.weight_bits == 16:
            codes, absmax = weight.half(), None
            rounded = codes.float()
        else:
            absmax = weight.abs().amax(dim=(1, 2, 3)).clamp_min(SMALLEST).half()
            levels = weight_levels(layout.weight_bits, layout.levels).to(weight.device)
            top = absmax.float()[:, None, None, None]
            codes = nearest(weight / top, levels)
            rounded = levels[codes] * top
        weight_difference, bias_difference = rounded - weight, bias.half().float() - bias
    return (weight + weight_difference, bias + bias_difference), codes, absmax


def search_latents(
    code_NCYX: Tensor, network: list[Layer], target_NYX: Tensor, cost_NYX: Tensor, layout: ConvLinear
) -> Tensor:
    """One sweep over all latents of some patches: each takes the code of least error while the others stand still.

    A latent reaches `extent` weights to a side, so those further apart than that are tried in one drawing, and each is
    judged by the error in its own reach alone. Up to 2 bits every code is tried, beyond that the next higher and lower.
    """
    cell = layout.patch // layout.side
    extent = 1
    for _, _, kernel in layout.shapes[1:-1]:
        extent = 2 * (extent + kernel - 1)
    extent += layout.shapes[-1][2] - 1
    apart, highest = -(-extent // cell), 2**layout.latent_bits - 1
    moves = range(1, highest + 1) if layout.latent_bits <= 2 else (-1, 1)

    def error(codes: Tensor) -> Tensor:
        square_NYX = cost_NYX * (draw(latent_values(codes, layout), network) - target_NYX).square()
        return F.avg_pool2d(square_NYX[:, None], extent, cell, (extent - cell) // 2, divisor_override=1)[:, 0]

    code_NCYX = code_NCYX.clone()
    for channel in range(layout.latent_channels):
        for index in range(apart**2):
            here = (slice(None), slice(index // apart, None, apart), slice(index % apart, None, apart))
            at = (here[0], channel, *here[1:])
            if not code_NCYX[at].numel():
                continue
            old, best, least = code_NCYX[at], code_NCYX[at], error(code_NCYX)[here]
            for move in moves:
                tried = (old + move) % (highest + 1) if layout.latent_bits <= 2 else (old + move).clamp(0, highest)
                trial_NCYX = code_NCYX.clone()
                trial_NCYX[at] = tried
                now = error(trial_NCYX)[here]
                best, least = torch.where(now < least, tried, best), torch.minimum(now, least)
            code_NCYX[at] = best
    return code_NCYX


@torch.enable_grad()
def _train(
    target_NYX: Tensor, cost_NYX: Tensor, layout: ConvLinear, steps: int, sweeps: int, generator: torch.Generator
) -> tuple[Tensor, list[Layer]]:
    """Codes of all latents, and the network before rounding."""
    device, patches, per_batch = target_NYX.device, len(target_NYX), _per_batch(layout)
    stages = len(layout.shapes) - 2
    network = [_layer(*shape, generator, device) for shape in layout.shapes]
    encoder = [_layer(ENCODER_WIDTH, ENCODER_WIDTH if stage else 1, 4, generator, device) for stage in range(stages)]
    encoder.append(
        _layer(layout.latent_channels, ENCODER_WIDTH if stages else 1, 1 if stages else 3, generator, device)
    )
    drawing = torch.optim.Adam([tensor for layer in network for tensor in layer])
    encoding = torch.optim.Adam([tensor for layer in encoder for tensor in layer])
    encoder_steps, sweeps = round(ENCODER_SHARE * steps), sweeps if layout.latent_bits < 16 else 0
    search_at = {steps - round(SEARCH_SHARE * steps * (sweep + 1) / sweeps) for sweep in range(sweeps)}
    free_NCYX: Tensor | None = None  # latents without an encoder
    code_NCYX: Tensor | None = None  # latents that are no longer trained

    def encode_all() -> Tensor:
        with torch.no_grad():
            return torch.cat([_encode(part, encoder) for part in target_NYX.split(per_batch)])

    def searched() -> Tensor:
        with torch.no_grad():
            if code_NCYX is not None:
                start_NCYX = code_NCYX
            else:
                assert free_NCYX is not None  # sweeps come after the encoder's share of the steps
                start_NCYX = round_latents(free_NCYX, layout.latent_bits)[1]
            rounded = [round_layer(layer, layout)[0] for layer in network]
            parts = zip(*(whole.split(per_batch) for whole in (start_NCYX, target_NYX, cost_NYX)), strict=True)
            return torch.cat([search_latents(code, rounded, target, cost, layout) for code, target, cost in parts])

    batches: list[Tensor] = []
    for step in range(steps):
        if step == encoder_steps:
            free_NCYX = encode_all().requires_grad_()
            encoding = torch.optim.Adam([free_NCYX])
        if step in search_at:
            code_NCYX = searched()
        for optimiser, rate in ((drawing, RATE), (encoding, RATE if free_NCYX is None else LATENT_RATE)):
            optimiser.param_groups[0]["lr"] = rate * _decay(step, steps)
            optimiser.zero_grad(set_to_none=True)
        if not batches:
            batches = list(torch.randperm(patches, generator=generator).to(device).split(per_batch))
        picked = batches.pop()
        if code_NCYX is not None:
            latents = latent_values(code_NCYX[picked], layout)
        else:
            raw_NCYX = _encode(target_NYX[picked], encoder) if free_NCYX is None else free_NCYX[picked]
            latents = round_latents(raw_NCYX, layout.latent_bits)[0]
        drawn_NYX = draw(latents, [round_layer(layer, layout)[0] for layer in network])
        (cost_NYX[picked] * (drawn_NYX - target_NYX[picked]).square()).mean().backward()
        drawing.step()
        encoding.step()
    if sweeps:
        code_NCYX = searched()
    if code_NCYX is None:
        code_NCYX = round_latents(encode_all() if free_NCYX is None else free_NCYX.detach(), layout.latent_bits)[1]
    return code_NCYX, [(weight.detach(), bias.detach()) for weight, bias in network]


def _layer(out: int, inputs: int, kernel: int, generator: torch.Generator, device: torch.device) -> Layer:
    """Uniform weights that keep a signal's variance; drawn on the CPU, so that a seed means the same everywhere."""
    reach = math.sqrt(3 / (inputs * kernel**2))
    weight = (2 * torch.rand(out, inputs, kernel, kernel, generator=generator) - 1) * reach
    return weight.to(device).requires_grad_(), torch.zeros(out, device=device, requires_grad=True)


def _encode(patch_NYX: Tensor, encoder: list[Layer]) -> Tensor:
    """Latents before rounding [P, C, side, side]: one strided convolution for every up-stage."""
    (*strided, last), x = encoder, patch_NYX[:, None].contiguous(memory_format=torch.channels_last)
    for weight, bias in strided:
        x = F.gelu(F.conv2d(x, weight, bias, stride=2, padding=1))
    return F.conv2d(x, *last, padding=last[0].shape[-1] // 2)


def _decay(step: int, steps: int) -> float:
    warm = max(1, round(WARM_UP * steps))
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _per_batch(layout: ConvLinear) -> int:
    return max(1, BATCH // layout.patch**2)


def _stored(code_NCYX: Tensor, network: list[Layer], layout: ConvLinear) -> dict[str, Tensor]:
    _, codes, absmax = zip(*(round_layer(layer, layout) for layer in network), strict=True)
    latent_N, weight_N = code_NCYX.flatten(), torch.cat([code.flatten() for code in codes])
    tensors = {
        "latents": latent_N if layout.latent_bits == 16 else pack(latent_N[None], layout.latent_bits)[0],
        "weights": weight_N if layout.weight_bits == 16 else pack(weight_N[None], layout.weight_bits)[0],
        "biases": torch.cat([bias for _, bias in network]).half(),
    }
    return tensors if layout.absmax is None else tensors | {"absmax": torch.cat(absmax)}
