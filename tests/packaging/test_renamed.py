"""setup.py renames our package `kernels`, and nothing else of that name, when it builds a wheel."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = ("cpu", "formats", "triton", "views")


@pytest.fixture(scope="module")
def renamed() -> Callable[[str], str]:
    """`renamed` of setup.py, told that these are the modules of the package."""
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda source: module.renamed(source, MODULES)


@pytest.mark.parametrize(
    "source",
    [  # @ stands for our package
        "import @\n@.cpu.product(x)\n",
        "import os, @.cpu, sys\n",
        "import @.views as kernels\nkernels.readable(x)\n",
        "from @ import views\n",
        "from @.formats.packed import (\n    A,\n    kernels,\n)\n",
        "if é():\n    a = 'é'; from @ import views\n",
        "'é'; import @.cpu; é = [@.cpu.é, a.kernels.cpu]\n",
        "import @\n\n\ndef f(x=@.cpu, *, kernels_=1): ...\n\n\nf(kernels=@.cpu)\n",
        "import @.cpu\nf'{@.cpu} kernels.csv'\n",
        "A = '@.formats.dense:DenseLinear', 'integrations.kernels.formats'\n",
        '"""python -m @.triton.tune\n\n(@.views.View), `@.cpu`, kernels.csv\n"""\n',
        "A = 1  # see @.views, kernels/views.py\n",
    ],
)
def test_our_package_is_renamed(renamed: Callable[[str], str], source: str) -> None:
    assert renamed(source.replace("@", "kernels")) == source.replace("@", "harness_kernels")


@pytest.mark.parametrize(
    "source",
    [
        "from transformers.integrations.gguf.kernels import get_gguf_kernel\n",
        "from .kernels import views\n",
        "from . import kernels\n",
        "import mykernels.cpu, kernels_data\n",
        "kernels = [1]\nkernels += [2]\nprint(kernels[0].cpu, row.kernels.cpu)\n",
        "write(folder / 'kernels.csv', found['kernels'], 'results/kernels', kernels=1)\n",
        "'in kernels/cpu/build.py, kernels/formats, -kernels.cpu, integrations.kernels.cpu, other/kernels.cpu/x'\n",
        "def f():\n    yield from kernels\n",
    ],
)
def test_what_only_has_the_name_is_not(renamed: Callable[[str], str], source: str) -> None:
    assert renamed(source) == source


@pytest.mark.parametrize(
    "source",
    [
        "import kernels\nkernels = 3\n",
        "import kernels\nfor kernels in []: ...\n",
        "from importlib import import_module\nimport_module('kernels')\n",
        "import importlib\nimportlib.util.find_spec('kernels.elsewhere')\n",
        "A = {'cpu': 'kernels.elsewhere:BACKEND'}\n",
    ],
)
def test_a_name_that_cannot_be_renamed_fails_the_build(renamed: Callable[[str], str], source: str) -> None:
    with pytest.raises(ValueError, match="line [12]: .*kernels"):
        renamed(source)
