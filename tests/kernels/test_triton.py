"""The Triton kernels: the correctness grid in Triton's interpreter on any machine, and on a GPU with `pytest -m
gpu`."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.synthetic import random_layer
from tests.kernels.served import ADDED, VECTOR

triton_installed = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install '.[gpu]'"
)
on_a_gpu = [
    pytest.mark.gpu,
    triton_installed,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def answer(module: str, *words: str, **environment: str) -> str:
    """Output of a module in a process of its own: triton asks for its interpreter once, when it is imported."""
    asked = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"} | environment
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, env=asked, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


@triton_installed
def test_every_format_is_right_in_the_interpreter():
    right, every = re.search(
        r"(\d+) of (\d+) correct, interpreter", answer("tests.kernels.triton_grid", "half", TRITON_INTERPRET="1")
    ).groups()
    assert right == every


@triton_installed
def test_every_program_compiles_for_a_gpu_that_is_not_here():
    """What the interpreter takes the compiler may refuse."""
    assert "compiled" in answer("tests.kernels.triton_compile")


@triton_installed
def test_launch_configurations_are_filed_by_gpu_and_found_again(monkeypatch, tmp_path):
    from kernels.triton import launch
    from kernels.triton.view import view

    form = view(random_layer(VECTOR[-2], 64, 64, bias=False)).form
    monkeypatch.setattr(launch, "FILE", tmp_path / "launch.json")
    monkeypatch.setattr(launch, "_device", lambda index: ("a GPU", 10))
    launch.FILE.write_text("{}")
    launch.tuned_launches.cache_clear()
    inputs = torch.float16, torch.device("cuda", 0)
    try:
        assert launch.choose(form, 3, *inputs) == launch.default(form, 3, 10)
        found = launch.Launch("gemm", 4, 8, warps=8, stages=2, splits=3)
        launch.save("a GPU", {launch.key(form, 3): found})
        launch.save("a GPU", {launch.key(form, 1): launch.Launch("gemv", 1, 32)})
        assert (
            launch.choose(form, 4, *inputs) == found
            and launch.choose(form, 1, *inputs).program == "gemv"
            and launch.choose(form, 9, *inputs) != found
        )
    finally:
        launch.tuned_launches.cache_clear()


def test_a_machine_without_a_gpu_does_not_import_triton():
    code = (
        "import sys, torch; from kernels.dispatch import kind; from kernels.synthetic import TYPICAL, random_layer; "
        "torch.cuda.is_available = lambda: False; layer = random_layer(TYPICAL['4-bit'], 64, 64); "
        "print(kind(layer, 'cuda'), 'kernels.triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["decode-per-call", "False"]


class TestOnAGpu:
    pytestmark = on_a_gpu

    def test_every_format(self):
        answer("tests.kernels.triton_grid")

    @pytest.mark.parametrize("batch", [1, 16, 48])
    @pytest.mark.parametrize("spec", [*ADDED, VECTOR[-2]])
    def test_products_are_captured_in_a_graph(self, spec, batch):
        from kernels.dispatch import kind, linear

        layer = random_layer(spec, 192, 320, bias=True).to("cuda")
        assert kind(layer, "cuda") == "fused"
        x = torch.randn(batch, 320, device="cuda", dtype=torch.bfloat16)
        expected = linear(layer, x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = linear(layer, x)
        x.mul_(-1)
        graph.replay()
        bias = layer.bias.to(x.dtype)
        assert torch.allclose(found - bias, bias - expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())

    def test_a_layer_that_was_written_to_is_read_again(self):
        from kernels.dispatch import linear

        layer, x = random_layer(VECTOR[-2], 64, 64, bias=False).to("cuda"), torch.randn(1, 64, device="cuda")
        first = linear(layer, x)
        layer.codebook.mul_(2)
        assert torch.allclose(linear(layer, x), 2 * first, rtol=1e-5)
