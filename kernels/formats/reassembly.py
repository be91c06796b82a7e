"""Channels taken apart and put together: what is packed belongs to inputs A x, of which there are as many as of x.

Channel reassembly of QLLM (Liu, Gong, Wei, Dong, Cai, Zhuang; ICLR 2024, arXiv 2310.08041, sec. 4.1):

    disassembly   an outlier x_c stands as T_c channels of x_c / T_c each, with the weights of c every time
    assembly      channels that are much alike stand as one, their mean, with the sum of their weights

Stored and counted, of every original channel: the first place it stands at (int16), and in how many (uint8)."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from kernels.formats.stored import StoredModule

MOST_COPIES = 255
Links = tuple[Tensor, Tensor, Tensor]


class Reassembly(StoredModule):
    """A of `columns` channels."""

    part_of: ClassVar[dict[str, str]] = {"place": "tables", "copies": "tables"}
    place: Tensor  # int16 [I], two's complement of numbers below 2**16
    copies: Tensor  # uint8 [I]

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns
        self.register_buffer("place", torch.empty(columns, dtype=torch.int16))
        self.register_buffer("copies", torch.empty(columns, dtype=torch.uint8))

    @classmethod
    def of(cls, place_I: Tensor, copies_I: Tensor) -> Self:
        """The one of these integers [I]."""
        made = cls(len(place_I)).to(place_I.device)
        made.load_state_dict(cls.tensors(place_I, copies_I), assign=True)
        return made

    @staticmethod
    def tensors(place_I: Tensor, copies_I: Tensor) -> dict[str, Tensor]:
        """The buffers by name, of integers [I]."""
        place_I = torch.where(place_I >= 2**15, place_I - 2**16, place_I)
        return {"place": place_I.to(torch.int16), "copies": copies_I.to(torch.uint8)}

    def links(self) -> Links:
        """A's entries: (channel, place, share), each [L], channel by channel."""
        place_I, copies_I = self.place.long() & 0xFFFF, self.copies.long()
        channel_L = torch.repeat_interleave(copies_I)
        start_I = copies_I.cumsum(0) - copies_I
        place_L = place_I[channel_L] + torch.arange(len(channel_L), device=channel_L.device) - start_I[channel_L]
        members_I = torch.bincount(place_L, minlength=self.columns)
        return channel_L, place_L, 1.0 / (copies_I[channel_L] * members_I[place_L])

    def turn(self, x: Tensor) -> Tensor:
        """A x for inputs x [..., I]; differentiable."""
        return reassembled(x, self.links())

    def turn_both(self, matrix_II: Tensor) -> Tensor:
        """A M A^T of a matrix of inputs by inputs."""
        return self.turn(self.turn(matrix_II).t()).t()

    def gather(self, weight_OI: Tensor) -> Tensor:
        """The weight [O, I] of A x that stands for this one of x."""
        channel_L, place_L, _ = self.links()
        return torch.zeros_like(weight_OI).index_add(1, place_L, weight_OI[:, channel_L])

    def back(self, weight_OI: Tensor) -> Tensor:
        """W A: the weight of x that one of A x stands for."""
        channel_L, place_L, share_L = self.links()
        return torch.zeros_like(weight_OI).index_add(1, channel_L, weight_OI[:, place_L] * share_L.to(weight_OI.dtype))


def reassembled(x: Tensor, links: Links) -> Tensor:
    """A x for x [..., I]; differentiable."""
    channel_L, place_L, share_L = links
    return torch.zeros_like(x).index_add(-1, place_L, x[..., channel_L] * share_L.to(x.dtype))
