"""Kills, full disks and flipped bytes over one grid: the leaderboard must be that of an undisturbed run.

    python benchmarks/soak.py [--model NAME] [--methods rtn,gptq] [--kills 30] [--fulls 2] [--flips 3] [--seed N]

Two caches with the same assets. In one the grid runs undisturbed. In the other it is started again and again, and at a
random moment killed with SIGKILL: the command itself, one of its cells, or the whole group. In between its disk (a
small tmpfs, where one can be mounted) is full for the length of a run, and one bit of a random file is flipped. At the
end the same command runs to its end: rows, less what is measured with a clock, and the sha256 of every packed model
must be those of the undisturbed run, and `verify` must find no damaged model. Exit status 1 if they are not.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from harness.data.assets import DEFAULT_MODEL, TEXTS, fetch, resolve_model
from harness.data.files import CACHE_VARIABLE, cache_dir
from harness.report.baseline import read_rows
from harness.report.rows import TIME_COLUMNS

ASSETS = ("files", "models", "sha256", "kernels")
TARGETS = ("parent", "cell", "group")
DISK_MIB = 3072


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--methods", default="rtn,gptq")
    parser.add_argument("--bits", default="3.25")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--fulls", type=int, default=2)
    parser.add_argument("--flips", type=int, default=3)
    parser.add_argument("--longest", type=float, default=30.0, help="seconds of a start before it is killed, at most")
    parser.add_argument("--seed", type=int, help="of what is done when (default: another one every time)")
    arguments, options = parser.parse_known_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}, {os.cpu_count()} cores, python {sys.version.split()[0]}", flush=True)
    resolve_model(arguments.model)
    for file in TEXTS.values():
        fetch(file)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        command = [sys.executable, "-m", "harness", "run", "--model", arguments.model]
        command += ["--methods", arguments.methods, "--bits", arguments.bits, *options]
        soak = Soak(folder, command, random.Random(seed))
        try:
            return soak.run(arguments.kills, arguments.fulls, arguments.flips, arguments.longest)
        finally:
            soak.close()


class Soak:
    """The two caches, and what is done to one of them."""

    def __init__(self, folder: Path, command: list[str], draw: random.Random) -> None:
        self.folder, self.command, self.draw = folder, command, draw
        self.calm, self.rough = folder / "calm", folder / "rough"
        self.rough.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m,mode=700", "tmpfs", str(self.rough)], capture_output=True
        )
        self.mounted = mounted.returncode == 0
        assets = cache_dir().resolve()
        for cache in (self.calm, self.rough):
            cache.mkdir(exist_ok=True)
            for name in ASSETS:
                (assets / name).mkdir(parents=True, exist_ok=True)
                (cache / name).symlink_to(assets / name)

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", str(self.rough)], capture_output=True)

    def run(self, kills: int, fulls: int, flips: int, longest: float) -> int:
        start = time.monotonic()
        code, said = self.finish(self.calm, "calm-out")
        assert code == 0, said
        print(f"undisturbed: {time.monotonic() - start:.0f} s", flush=True)
        events = ["kill"] * kills + ["full"] * (fulls if self.mounted else 0) + ["flip"] * flips
        if fulls and not self.mounted:
            print("no tmpfs can be mounted here: the disk is not filled", flush=True)
        self.draw.shuffle(events)
        for index, event in enumerate(events, 1):
            print(f"{index:2}/{len(events)} {getattr(self, event)(longest)}", flush=True)
        code, said = self.finish(self.rough, "rough-out")
        print(f"to the end: exit status {code}, {time.monotonic() - start:.0f} s in all", flush=True)
        problems = [said[-2000:]] if code else list(self.differences())
        for problem in problems:
            print(problem)
        print("NOT as undisturbed" if problems else "rows and stored bytes as undisturbed; verify finds nothing")
        return 1 if problems else 0

    def start(self, cache: Path, out: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command, "--out", str(self.folder / out)],
            env=os.environ | {CACHE_VARIABLE: str(cache)},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, cache: Path, out: str) -> tuple[int, str]:
        process = self.start(cache, out)
        said = process.communicate()[1]
        return process.returncode, said

    def kill(self, longest: float) -> str:
        process, target = self.start(self.rough, "rough-out"), self.draw.choice(TARGETS)
        moment = self.draw.uniform(0.5, longest)
        time.sleep(moment)
        if process.poll() is not None:
            said = process.communicate()[1]
            return f"ended by itself before {moment:.1f} s: {_last(said)}"
        if target == "group":
            os.killpg(process.pid, signal.SIGKILL)
        elif target == "parent":
            process.kill()
        else:
            cells = [p for p in psutil.Process(process.pid).children(recursive=True) if _works(p)]
            if not cells:
                process.kill()
                target = "parent (no cell yet)"
            else:
                self.draw.choice(cells).kill()
        try:
            said = process.communicate(timeout=self.draw.uniform(1.0, longest))[1]
        except subprocess.TimeoutExpired:  # a killed cell is one row: the others go on, until they are killed too
            os.killpg(process.pid, signal.SIGKILL)
            said = process.communicate()[1]
        return f"kill -9 of the {target} after {moment:.1f} s: {_last(said)}"

    def full(self, longest: float) -> str:
        """The disk has no byte left while a run begins, which then fails or does what needs none."""
        filler = self.rough / "filler"
        with open(filler, "wb") as handle:
            try:
                while True:
                    handle.write(bytes(1 << 20))
                    handle.flush()
            except OSError:
                pass
        process = self.start(self.rough, "rough-out")
        try:
            said = process.communicate(timeout=2 * longest)[1]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said = process.communicate()[1]
        finally:
            filler.unlink(missing_ok=True)
        assert "Traceback" not in said, said
        return f"full disk: exit status {process.returncode}: {_last(said)}"

    def flip(self, longest: float) -> str:
        names = (
            "cells/*/*.json",
            "cells/*/*.safetensors",
            "cells/*/blocks/*",
            "streams/*",
            "sensitivities/*",
            "costs/*",
        )
        files = [p for name in names for p in sorted(self.rough.glob(name)) if p.stat().st_size and p.suffix != ".lock"]
        if not files:
            return "nothing to flip a bit of yet"
        path = self.draw.choice(files)
        content = bytearray(path.read_bytes())
        position = self.draw.randrange(len(content))
        content[position] ^= 1 << self.draw.randrange(8)
        path.write_bytes(content)
        return f"flipped a bit of byte {position} of {path.relative_to(self.rough)}"

    def differences(self):
        calm, rough = (_steady(self.folder / out) for out in ("calm-out", "rough-out"))
        for label in calm | rough:
            if calm.get(label) != rough.get(label):
                yield f"{label}: {rough.get(label)} instead of {calm.get(label)}"
        if (tensors := _hashes(self.rough)) != _hashes(self.calm):
            yield f"stored tensors differ: {tensors}"
        environment = os.environ | {CACHE_VARIABLE: str(self.rough)}
        done = subprocess.run(
            [sys.executable, "-m", "harness", "verify"], env=environment, capture_output=True, text=True
        )
        # What no cell needs any more is not looked at again: a flipped estimate of a finished cell, say.
        for line in done.stdout.splitlines():
            if "damaged" in line and "/cells/" in line and "artifact" in line:
                yield line


def _works(process: psutil.Process) -> bool:
    """Whether it is a cell's: started by our engine, and using the processor."""
    try:
        typed = " ".join(process.cmdline())
        return "multiprocessing" in typed and "tracker" not in typed and process.cpu_times().user > 0.2
    except psutil.Error:
        return False


def _last(said: str) -> str:
    lines = [line for line in said.strip().splitlines() if line.strip()]
    return lines[-1][:150] if lines else "(nothing said)"


def _steady(folder: Path) -> dict[str, dict[str, str]]:
    return {
        label: {name: value for name, value in row.items() if name not in TIME_COLUMNS}
        for label, row in read_rows(folder).items()
    }


def _hashes(cache: Path) -> dict[str, str]:
    return {
        str(path.relative_to(cache)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(cache.glob("cells/*/packed.safetensors"))
    }


if __name__ == "__main__":
    sys.exit(main())
