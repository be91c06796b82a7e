"""What a plan needs to know of a model, from its configuration alone. For a preset neither transformers nor its modules
are needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.model.shapes import PRESETS, Inventory, laid_out


@dataclass(frozen=True)
class Description:
    stock: Inventory
    model_type: str
    half: str  # 16-bit type of what is not packed (harness.model.half_dtype)
    positions: int | None  # tokens a window may hold; None where no end is set, or known
    hidden: int
    vocabulary: int


def describe(source: str | Path, revision: str | None = None) -> Description:
    """Of a preset, a folder or a hub id. Raises ValueError as `read_config` and `skeleton` do."""
    if preset := PRESETS.get(str(source)):
        return Description(
            laid_out(str(source)),
            preset["model_type"],
            "float16",  # none of them says
            None,
            preset["hidden_size"],
            preset["vocab_size"],
        )
    from harness.model.families import known_positions
    from harness.model.network import half_dtype, inventory, read_config, skeleton

    config = read_config(source, revision)
    stock, text = inventory(skeleton(config)), config.get_text_config()
    return Description(
        stock, config.model_type, half_dtype(config), known_positions(config), text.hidden_size, text.vocab_size
    )
