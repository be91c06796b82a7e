"""The constants that predictions of memory are made with, against the memory that is taken."""

import subprocess
import sys

import pytest

from harness.plan.memory import FACTORING, PACKING, TURNING

WIDTH = 2048

# In a process of its own, for the most memory of a process can be asked for, not that of a call.
MEASURE = """
import sys
import torch
from harness.compress.statistics import add_gram, complete
from harness.engine.meter import _forget_peak
from harness.measure.machine import peak_process_bytes, return_what_is_freed
from harness.plan.pivots import pivots
from kernels.formats.layer import LayerSpec
from methods import parse_method
from methods.base import LayerData

def held():
    _forget_peak()
    return peak_process_bytes()

text, width = sys.argv[1], int(sys.argv[2])
return_what_is_freed()
torch.set_num_threads(1)
matrix = 4 * width * width
x_NI = torch.randn(width + 64, width, generator=torch.Generator().manual_seed(0))
method = None if text == "pivots" else parse_method(text)

def run(size):
    gram_II = torch.zeros(size, size)
    add_gram(gram_II, x_NI[:, :size])
    complete(gram_II)
    if method is None:
        return lambda: pivots(gram_II, len(x_NI), 0.01)
    layer = LayerSpec("layer", "layer", 64, size, False)
    data = LayerData(
        torch.randn(64, size), 0, gram_II, 0.01 * gram_II.flip(0) if method.needs.drift else None
    )
    fit = [config for config in method.candidates(layer) if not config.table_key]
    config = min(fit, key=lambda c: abs(c.stored_bits(layer).total / layer.weights - 3.25))
    return lambda: method.compress(data, layer, config)

run(128)()  # what a first call makes for good
before = held()
call = run(width)
_forget_peak()
call()
print((peak_process_bytes() - before) / matrix)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the most memory of a process")
@pytest.mark.parametrize(
    ("text", "at_most"),
    [
        ("pivots", 1 + FACTORING),
        ("gptq", PACKING),
        ("gptq:rotated", PACKING + TURNING),
        ("gptvq", PACKING + 1),
        ("awq", PACKING),
    ],
)
def test_no_more_matrices_than_predicted(text, at_most):
    done = subprocess.run([sys.executable, "-c", MEASURE, text, str(WIDTH)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < at_most + 0.5
