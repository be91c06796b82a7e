"""Devices of a machine that has three accelerators, which this one need not have."""

from types import SimpleNamespace

import pytest
import torch

from harness.cli.engines import Loads
from harness.engine.places import devices_of, places, room_bytes
from harness.model.described import describe
from tests.helpers import planned_cell


@pytest.fixture
def three(monkeypatch):
    """With 8, 6 and 9 GiB free."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    free = {"cuda:0": 8, "cuda:1": 6, "cuda:2": 9}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device] << 30, 80 << 30))


def test_cells_have_devices_of_their_own(three):
    assert places("cuda", 4) == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    assert places("cuda:1", 2) == ["cuda:1", "cuda:1"] and places("cpu", 2) == ["cpu", "cpu"]
    assert devices_of("cuda:2") == ["cuda:2"]


def test_a_model_that_a_device_has_no_room_for_is_read_by_blocks(three, two_blocks):
    assert room_bytes("cuda", 3) == 6 << 30 and room_bytes("cuda", 4) == 3 << 30
    stock = describe(two_blocks.path).stock
    cell = planned_cell("rtn", "4", "cuda", model=two_blocks)
    asked = SimpleNamespace(load="auto", engine="local", device="cuda")
    for jobs, paged in ((3, False), (60, True)):
        assert bool(Loads.of([cell], stock, two_blocks.path, asked, jobs).by_blocks) == paged
