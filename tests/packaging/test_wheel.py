"""The wheel in a fresh environment, from another folder, beside the package of Hugging Face that is called `kernels`.

Its dependencies are those of the environment that runs the tests: a path file leads there. It does not lead to the
editable install of the checkout, for that is a path file itself, and of what a path file leads to none is read."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.cli import main
from kernels.cpu.build import library

ROOT = Path(__file__).parents[2]
PACKAGES = ("harness", "kernels", "methods")
THEIRS = "0.17.2"

QUIET = ("--disable-pip-version-check", "-q")
PLAN = ("--model", "smollm2-135m", "--methods", "gptq,reallm,clipped", "--bits", "3.25")

BOTH = """
import transformers, kernels, harness, methods, harness_kernels
from transformers import AutoModelForCausalLM
assert kernels.get_kernel and not hasattr(harness_kernels, "get_kernel")
for name in methods.METHODS: methods.METHODS.get(name)
print(*(module.__file__ for module in (kernels, harness, methods, harness_kernels)), sep="\\n")
"""
FUSED = """
import torch
from harness_kernels.dispatch import kind
from harness_kernels.synthetic import TYPICAL, random_layer
layer, x = random_layer(TYPICAL["4-bit"], 64, 256), torch.ones(2, 256)
torch.testing.assert_close(layer(x), x @ layer.decode().T)
print(kind(layer, "cpu"))
"""
OURS_ALONE = (
    """
from importlib.util import find_spec
assert find_spec("kernels") is None, find_spec("kernels")
"""
    + FUSED
)
THEIRS_ALONE = """
from importlib.util import find_spec
import transformers, kernels
assert kernels.get_kernel and not any(map(find_spec, ("harness", "methods", "harness_kernels")))
print(kernels.__file__)
"""


@dataclass(frozen=True)
class Environment:
    """A virtual environment: `pip` sees what is installed in it alone, `run` the dependencies as well."""

    folder: Path

    @property
    def link(self) -> Path:
        return next(self.folder.glob("lib/python*/site-packages")) / "dependencies.pth"

    def pip(self, *arguments: str | Path) -> None:
        self.link.unlink(missing_ok=True)
        python = self.folder / "bin" / "python"
        subprocess.run([sys.executable, "-m", "pip", *QUIET, "--isolated", "--python", python, *arguments], check=True)
        self.link.write_text("".join(f"{path}\n" for path in sys.path if path.endswith("-packages")))

    def install(self, wheel: Path) -> None:
        self.pip("install", "--no-deps", "--no-index", "--no-compile", wheel)

    def run(self, program: str, *arguments: str) -> str:
        """What it prints; it runs in an empty folder."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHONPATH")}
        cwd = self.folder / "elsewhere"
        cwd.mkdir(exist_ok=True)
        command = [self.folder / "bin" / program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the checkout, in which a build may leave what it likes."""
    source = tmp_path_factory.mktemp("checkout")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    target = tmp_path_factory.mktemp("sdist")
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(target)!r})"
    subprocess.run([sys.executable, "-c", build], check=True, capture_output=True, cwd=source)
    return next(target.glob("ptq_harness-*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    options = [*QUIET, "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, sdist, "-w", target], check=True)
    return next(target.glob("ptq_harness-*.whl"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of Hugging Face; without a package index, one with files of the same names."""
    target = tmp_path_factory.mktemp("theirs")
    options = [*QUIET, "--no-deps", "--only-binary=:all:", "--timeout", "15", "--retries", "1"]
    command = [sys.executable, "-m", "pip", "download", *options, f"kernels=={THEIRS}", "-d", target]
    if subprocess.run(command, capture_output=True).returncode == 0:
        return next(target.glob("kernels-*.whl"))
    warnings.warn("no package index: a stand-in takes the place of the package `kernels`", stacklevel=1)
    files = {
        "kernels/__init__.py": "def get_kernel(): ...\n",
        "kernels/py.typed": "",
        f"kernels-{THEIRS}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: kernels\nVersion: {THEIRS}\n",
        f"kernels-{THEIRS}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"kernels-{THEIRS}.dist-info/RECORD"
    files[record] = "".join(f"{name},,\n" for name in (*files, record))
    path = target / f"kernels-{THEIRS}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    return Environment(folder)


def _sources() -> set[str]:
    """Everything that runs, or is read when something runs, by its path in the checkout."""
    kinds = {".py", ".cpp", ".h", ".json", ".html", ".css", ".js", ".typed"}
    paths = [path for name in PACKAGES for path in (ROOT / name).rglob("*")]
    return {str(path.relative_to(ROOT)) for path in paths if path.suffix in kinds}


def test_the_sdist_has_the_sources_as_they_are(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        files = {member.name.partition("/")[2]: member for member in archive.getmembers() if member.isfile()}
        assert _sources() | {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= set(files)
        dispatch = archive.extractfile(files["kernels/dispatch.py"])
        assert dispatch is not None and dispatch.read() == (ROOT / "kernels" / "dispatch.py").read_bytes()


def test_the_wheel_has_every_source_and_claims_no_name_of_others(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = {name.partition(".dist-info/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
        assert archive.read(metadata["top_level.txt"]).split() == [b"harness", b"harness_kernels", b"methods"]
        assert "licenses/LICENSE" in metadata
    assert names == {f"harness_{name}" if name.startswith("kernels/") else name for name in _sources()}


def test_both_packages_called_kernels(environment: Environment, wheel: Path, theirs: Path, example: Path) -> None:
    """Installed in either order; each works when the other is gone, and ours with a method of a third."""
    environment.install(theirs)
    environment.install(wheel)
    packages = environment.link.parent
    installed = [str(packages / name / "__init__.py") for name in ("kernels", "harness", "methods", "harness_kernels")]
    assert environment.run("python", "-c", BOTH).split() == installed

    environment.pip("uninstall", "-y", "kernels")
    kind = environment.run("python", "-c", OURS_ALONE).strip()
    assert kind == ("fused" if library() is not None else "decode-per-call")
    shutil.copytree(example, packages, dirs_exist_ok=True)
    planned = environment.run("ptq-harness", "plan", *PLAN)
    assert all(f"\n{method} under 3.25" in planned for method in ("gptq", "reallm", "clipped"))

    environment.install(theirs)
    assert environment.run("python", "-c", BOTH).split() == installed

    environment.pip("uninstall", "-y", "ptq-harness")
    assert environment.run("python", "-c", THEIRS_ALONE).split() == installed[:1]


@pytest.mark.parametrize(
    ("file", "command"),
    [("/usr/bin/ptq-harness", "ptq-harness"), ("/checkout/harness/__main__.py", "python -m harness")],
)
def test_usage_names_the_command_that_was_typed(
    file: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [file])
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert capsys.readouterr().out.startswith(f"usage: {command} plan ")
