"""The learning rate of whatever is trained here."""

from __future__ import annotations

import torch

WARM_UP = 0.1  # share of the steps


def warm_cosine(step: int, steps: int) -> float:
    """Factor of the rate at `step` of `steps`: linear warm-up, then a cosine to zero."""
    warm = max(1, round(WARM_UP * steps))
    angle = torch.pi * max(0, step - warm) / max(1, steps - warm)
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + torch.tensor(angle).cos().item())
