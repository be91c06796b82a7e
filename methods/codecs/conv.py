"""Training of convolutional decoders: the numerics behind `ConvLinear`.

As in HNeRV (Chen et al., arXiv 2304.02633), which ReALLM (arXiv 2405.13155) fits to matrices: an encoder of strided convolutions
turns every patch into a small latent image, the decoder draws the patch from it, both are trained on this one matrix by Adam, and
the encoder is thrown away. Everything is trained as it will be stored: latents and decoder weights are rounded in every step,
with straight-through gradients (Bengio et al., arXiv 1308.3432), so the last step's network is the stored one.

Two things differ from the paper. Errors are weighted by what they cost. And the encoder only finds the start: for the last steps
the latents are unknowns of their own, which no encoder has to be able to produce.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.bitpack import pack
from kernels.conv import ConvLinear, draw, exact_convolutions, from_patches, latent_levels, to_patches, weight_levels
from methods.codecs.vector import TINY, absmax_scales

BATCH = 1 << 17  # weights drawn in a step, at most: whole patches
ENCODER_WIDTH = 32
ENCODER_SHARE = 0.4  # of all steps
WARM_UP = 0.1
RATE, LATENT_RATE = 5e-3, 2e-2  # Adam's, of networks and of free latents


def fit_conv(
    rest_OI: Tensor, layout: ConvLinear, *, importance_OI: Tensor | None = None, steps: int = 400, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Buffers of `layout` (but for its low-rank branch) that draw `rest_OI`, and {relative_error, seconds}.

    Minimises the sum of importance * error^2. `relative_error` is ||error|| / ||rest||, as for every codec.
    """
    start = time.perf_counter()
    device = rest_OI.device
    importance_OI = torch.ones_like(rest_OI) if importance_OI is None else importance_OI
    stored: dict[str, Tensor] = {}
    if layout.scales is None:
        unit = rest_OI.square().mean().sqrt().clamp_min(TINY).reshape(1)
        stored["gain"] = unit
    else:
        scales = absmax_scales(rest_OI, layout.block, layout.scales.kind)
        stored |= {f"scales.{name}": tensor for name, tensor in scales.stored.items()}
        unit = scales.scale_OI
    cost_OI = importance_OI * unit.square()
    target_PHW = to_patches(rest_OI / unit, layout.patch)
    cost_PHW = to_patches(cost_OI / cost_OI.mean().clamp_min(torch.finfo(torch.float32).tiny), layout.patch)
    with exact_convolutions(), torch.enable_grad():
        latent_PCHW, network = _train(target_PHW, cost_PHW, layout, steps, torch.Generator().manual_seed(seed))
    with torch.no_grad(), exact_convolutions():
        stored |= _stored(latent_PCHW, network, layout)
        rounded = [round_layer(weight, bias, layout)[:2] for weight, bias in network]
        latents = round_latents(latent_PCHW, layout.latent_bits)[0]
        drawn = torch.cat([draw(part, rounded) for part in latents.split(max(1, BATCH // layout.patch**2))])
        error_OI = rest_OI - from_patches(drawn, layout.grid, *rest_OI.shape) * unit
    relative = float(error_OI.norm()) / (float(rest_OI.norm()) or 1.0)
    return {n: t.to(device) for n, t in stored.items()}, {"relative_error": relative, "seconds": time.perf_counter() - start}


def _train(target_PHW, cost_PHW, layout, steps, generator):
    device = target_PHW.device
    per_batch = max(1, BATCH // layout.patch**2)
    stages = (layout.patch // layout.side).bit_length() - 1
    network = [_layer(*shape, generator, device) for shape in layout.shapes]
    shapes = [(ENCODER_WIDTH if s else ENCODER_WIDTH, ENCODER_WIDTH if s else 1, 4) for s in range(stages)]
    encoder = [_layer(*s, generator, device) for s in shapes] + [
        _layer(layout.latent_channels, ENCODER_WIDTH if stages else 1, 3 if not stages else 1, generator, device)
    ]
    encoder_steps = round(ENCODER_SHARE * steps)
    optimiser = torch.optim.Adam(
        [{"params": [t for layer in network for t in layer], "lr": RATE}, {"params": [t for layer in encoder for t in layer], "lr": RATE}]
    )
    free = None
    batches = []
    for step in range(steps):
        if step == encoder_steps:
            with torch.no_grad():
                free = torch.cat([encode(part, encoder) for part in target_PHW.split(per_batch)]).requires_grad_()
            optimiser.param_groups.pop()
            optimiser.add_param_group({"params": [free], "lr": LATENT_RATE})
        factor = _factor(step, steps)
        for group, rate in zip(optimiser.param_groups, (RATE, RATE if free is None else LATENT_RATE), strict=True):
            group["lr"] = rate * factor
        if not batches:
            batches = list(torch.randperm(len(target_PHW), generator=generator).to(device).split(per_batch))
        picked = batches.pop() if per_batch < len(target_PHW) else slice(None)
        raw = encode(target_PHW[picked], encoder) if free is None else free[picked]
        drawn = draw(round_latents(raw, layout.latent_bits)[0], [round_layer(*layer, layout)[:2] for layer in network])
        loss = (cost_PHW[picked] * (drawn - target_PHW[picked]).square()).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    if free is None:
        with torch.no_grad():
            free = torch.cat([encode(part, encoder) for part in target_PHW.split(per_batch)])
    return free.detach(), [(w.detach(), b.detach()) for w, b in network]


def encode(patch_PHW: Tensor, encoder) -> Tensor:
    *stages, last = encoder
    x = patch_PHW[:, None]
    for weight, bias in stages:
        x = F.gelu(F.conv2d(x, weight, bias, stride=2, padding=1))
    return F.conv2d(x, *last, padding=last[0].shape[-1] // 2)


def _layer(out: int, inputs: int, kernel: int, generator, device) -> tuple[Tensor, Tensor]:
    spread = math.sqrt(3.0 / (inputs * kernel**2))
    weight = (torch.rand(out, inputs, kernel, kernel, generator=generator) * 2 - 1) * spread
    return weight.to(device).requires_grad_(), torch.zeros(out, device=device, requires_grad=True)


def _factor(step: int, steps: int) -> float:
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def round_latents(raw_PCHW: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(value with straight-through gradient, codes or fp16 values)."""
    value = torch.tanh(raw_PCHW)
    with torch.no_grad():
        if bits == 16:
            codes = value.half()
            rounded = codes.float()
        else:
            codes = torch.round((value + 1) * ((2**bits - 1) / 2)).long()
            rounded = latent_levels(bits).to(value.device)[codes]
        difference = rounded - value
    return value + difference, codes


def round_layer(weight: Tensor, bias: Tensor, layout: ConvLinear):
    with torch.no_grad():
        bias_difference = bias.half().float() - bias
        if layout.weight_bits == 16:
            codes, absmax = weight.half(), None
            rounded = codes.float()
        else:
            absmax = weight.abs().amax(dim=(1, 2, 3)).clamp_min(2.0**-14).half()
            top = absmax.float()[:, None, None, None]
            levels = weight_levels(layout.weight_bits, layout.levels).to(weight.device)
            codes = torch.bucketize(weight / top, (levels[1:] + levels[:-1]) / 2)
            rounded = levels[codes] * top
        difference = rounded - weight
    return weight + difference, bias + bias_difference, codes, absmax


def _stored(latent_PCHW, network, layout):
    layers = [round_layer(*layer, layout) for layer in network]
    latents = round_latents(latent_PCHW, layout.latent_bits)[1].flatten()
    codes = torch.cat([layer[2].flatten() for layer in layers])
    out = {"biases": torch.cat([bias.half() for _, bias in network])}
    out["latents"] = latents if layout.latent_bits == 16 else pack(latents[None], layout.latent_bits)[0]
    out["weights"] = codes if layout.weight_bits == 16 else pack(codes[None], layout.weight_bits)[0]
    if layout.absmax is not None:
        out["absmax"] = torch.cat([layer[3] for layer in layers])
    return out
