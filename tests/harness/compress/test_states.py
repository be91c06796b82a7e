import os

import pytest
import torch

from harness.compress.states import States


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_in_a_file_are_those_in_memory(tmp_path, dtype):
    states_NTH = torch.randn(5, 4, 3).to(dtype)
    held, filed = (States((5, 4, 3), dtype, states_NTH.device, folder) for folder in (None, tmp_path / "new"))
    assert not os.listdir(tmp_path / "new"), "the file has a name that a kill would leave"
    for states in (held, filed):
        states.replace(states_NTH.split(2))
        assert torch.equal(states.whole(), states_NTH) and states.tokens == 20
        states.replace(2 * part_NTH for part_NTH in states.split(3))
        states.write(1, states_NTH[:2])
        assert torch.equal(states.read(1, 3), states_NTH[:2])
        assert torch.equal(states.read(3, 9), 2 * states_NTH[3:])
        assert torch.equal(states.copy().whole(), states.whole())


def test_a_full_disk_is_told_by_name(tmp_path):
    states = States((2, 4, 3), torch.float32, torch.device("cpu"), tmp_path)
    states._file.close()
    states._file = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match=f"No space left.*{tmp_path}"):
        states.write(0, torch.zeros(1, 4, 3))
