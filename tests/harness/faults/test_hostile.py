"""What a user gets wrong, or is handed broken: one line that says what to type next, a non-zero exit, nothing lost."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.cli import main
from harness.model import load_reference

SHORT = ("--calibration", "c4-mini@64x4", "--protocols", "wiki-mini@64/4", "--no-bench")

OPTIONS = [
    ("--methods gtpq", "did you mean 'gptq'"),
    ("--methods ,", "--methods reallm,gptq"),
    ("--methods gptq:group=x", "group=x is not"),
    ("--methods gptq:colour=1", "no option 'colour'"),
    ("--methods reallm:nope", "no variant 'nope'"),
    ("--methods gptq:damp=nan", "damp"),
    ("--bits ,", "--bits 3.25"),
    ("--bits 3,25x", "not a number of bits"),
    ("--bits 1e-999999999", "not a number of bits"),
    ("--bits 0", r"outside \(0, 16\]"),
    ("--bits 17", r"outside \(0, 16\]"),
    ("--bits nan", "not a number of bits"),
    ("--bits -1", "expected one argument|not a number of bits"),
    ("--bits 1/0", "not a number of bits"),
    ("--bits ٣", "not a number of bits"),
    (f"--bits 3.{'0' * 5000}1", "not a number of bits"),
    ("--protocols ,", "--protocols wiki-mini@512"),
    ("--protocols wikitext103@512", "TEXT@CONTEXT"),
    ("--protocols wiki-mini@1", "holds 2 to"),
    ("--protocols wiki-mini@99999999999999999999", "TEXT@CONTEXT"),
    ("--protocols wiki-mini@512/0", "at least one window"),
    ("--protocols wiki-mini:nope@64", "unknown part"),
    ("--protocols c4-mini:calibration@64/4", "calibrated on"),
    ("--protocols wiki-mini@64/999999", "has only"),
    ("--protocols wikitext2@512 --data /nowhere", "no wiki.test.raw"),
    ("--calibration pile@512x4", "TEXT@CONTEXTxSEQUENCES"),
    ("--calibration c4-mini@64x0", "TEXT@CONTEXTxSEQUENCES"),
    ("--calibration c4-mini@2048x500 --methods gptq", "ask for at most"),
    ("--training c4-mini@64x4/0", "at least 1"),
    ("--training pile@64x4/1", "TEXT@CONTEXTxSEQUENCES/BATCH"),
    ("--seeds a", "--seeds 0,1,2"),
    ("--seeds ,", "--seeds 0,1,2"),
    ("--seeds -1", "expected one argument|--seeds 0,1,2"),
    ("--seeds 4294967297", "below 4294967296"),
    (f"--seeds {'9' * 5000}", "--seeds 0,1,2"),
    ("--jobs 0", "at least 1"),
    ("--jobs -3", "at least 1"),
    ("--device cuda:7", "try --device cpu"),
    ("--device meta", "try --device cpu"),
    ("--device gpu", "try --device cpu"),
    ("--device cpu:x", "try --device cpu"),
    ("--dtype bfloat16", "use float16 or float32"),
    ("--dtype float8", "invalid choice"),
    ("--bench-seconds nan", "write for example 3"),
    ("--bench-seconds inf", "write for example 3"),
    ("--bench-seconds 0", "write for example 3"),
    ("--bench-threads 0", "at least 1"),
    ("--timeout -1", "expected one argument|write for example 3"),
    ("--timeout soon", "write for example 3"),
    ("--tasks hellaswagg", "did you mean 'hellaswag'"),
    ("--tasks piqa --limit 0", "limit"),
    ("--tasks piqa --few-shot -1", "few-shot"),
    ("--tasks piqa --task-source disk", "invalid choice"),
    ("--profile fast", "invalid choice"),
    ("--allocate best", "invalid choice"),
    ("--methods fp16:dtype=bfloat16", "takes its type from the checkpoint"),
    ("--model ./nowhere", "no folder"),
    ("--model a/b/c", "no folder"),
    ("--model smollm2-135m-instruct --revision main", "--revision is for hub ids"),
    ("--rounds 3", "unrecognized arguments"),
]


def _refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line that a call ends with; it must be one, and nothing else is said but how options are used."""
    try:
        code = main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    error = capsys.readouterr().err.strip()
    assert code == 2 and "Traceback" not in error, error
    last = error.splitlines()[-1]
    assert last.startswith(("harness ", "python -m harness")) and last.isprintable(), error
    return last


@pytest.mark.parametrize("typed, hint", OPTIONS, ids=[typed[:40] for typed, _ in OPTIONS])
def test_wrong_options(typed, hint, tiny, cache, tmp_path, capsys):
    arguments = ["run", "--methods", "rtn", "--model", str(tiny), *SHORT, *typed.split(" ")]
    assert re.search(hint, _refused([*arguments, "--out", str(tmp_path / "out")], capsys))
    assert not list((tmp_path / "out").glob("*.csv")) and not (cache / "cells").exists()


def _edit(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def _text(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def _without(*patterns: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return remove


def _index(**shards: str) -> Callable[[Path], None]:
    """The weights under another name, and an index that names `shards`."""

    def write(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        shutil.copy(folder / "part.safetensors", folder.parent / "outside.safetensors")
        names = {"model.embed_tokens.weight": "part.safetensors", **shards}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

    return write


def _only_pickled(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


FOLDERS = {
    "empty": (_without("*"), "no config.json"),
    "config is no JSON": (_text("config.json", "{"), "no configuration"),
    "config is a list": (_text("config.json", "[]"), "no configuration"),
    "unknown type": (_edit(model_type="llamma"), "no configuration"),
    "negative size": (_edit(hidden_size=-64), "check its sizes|no configuration"),
    "textual size": (_edit(hidden_size="wide"), "check its sizes|no configuration"),
    "blocks without end": (_edit(num_hidden_layers=10**12), "more than any model has"),
    "no blocks": (_edit(num_hidden_layers=0), "check its sizes|decoder blocks"),
    "already quantised": (_edit(quantization_config={"quant_method": "gptq", "bits": 4}), "unquantised model"),
    "code of its own": (
        _edit(model_type="mine", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}),
        "never run here",
    ),
    "no weights": (_without("*.safetensors"), "holds no model.safetensors"),
    "only pickled weights": (_only_pickled, "holds no model.safetensors"),
    "weights of another name": (
        lambda folder: (folder / "model.safetensors").rename(folder / "weights.safetensors") and None,
        "holds no model.safetensors",
    ),
    "index to outside": (_index(**{"lm_head.weight": "../outside.safetensors"}), "its own folder"),
    "index to an absolute path": (_index(**{"lm_head.weight": "/etc/passwd"}), "its own folder"),
    "index to a missing shard": (_index(**{"lm_head.weight": "other.safetensors"}), "lacks other.safetensors"),
    "index of nothing": (
        lambda folder: (_without("*.safetensors")(folder), _text("model.safetensors.index.json", "{}")(folder)),
        "no index of shards",
    ),
    "no tokenizer": (_without("token*"), "holds no tokenizer"),
    "broken tokenizer": (_text("tokenizer.json", "{"), "holds no tokenizer"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_wrong_folders(name, tiny, cache, tmp_path, capsys):
    spoil, hint = FOLDERS[name]
    folder = shutil.copytree(tiny, tmp_path / "model")
    spoil(folder)
    arguments = ["run", "--methods", "rtn", "--model", str(folder), *SHORT, "--out", str(tmp_path / "out")]
    assert re.search(hint, _refused(arguments, capsys))
    assert not (cache / "cells").exists()


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def _truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


DOWN = "model.layers.1.mlp.down_proj.weight"
WEIGHTS = {
    "truncated": (_truncated, "cannot be read"),
    "no safetensors": (_text("model.safetensors", "what?" * 100), "cannot be read"),
    "fewer layers than the file": (_edit(num_hidden_layers=1), "has no place for"),
    "more layers than the file": (_edit(num_hidden_layers=3), "its weights are incomplete"),
    "an extra tensor": (_tensors(lambda t: t.update(extra=torch.ones(3))), "extra"),
    "a missing tensor": (_tensors(lambda t: t.pop(DOWN)), DOWN),
    "a wrong shape": (_tensors(lambda t: t.update({DOWN: torch.ones(64, 127)})), "of other sizes"),
    "not a number": (_tensors(lambda t: t[DOWN].fill_(torch.nan)), "no finite numbers"),
    "all zero": (_tensors(lambda t: [w.zero_() for w in t.values()]), "is zero"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_wrong_weights(name, tiny, tmp_path):
    spoil, hint = WEIGHTS[name]
    folder = shutil.copytree(tiny, tmp_path / "model")
    spoil(folder)
    with pytest.raises(ValueError, match=hint) as caught:
        load_reference(folder, "cpu", torch.float32)
    assert len(str(caught.value).splitlines()) == 1


def test_wrong_weights_are_failed_rows(tiny, cache, tmp_path, capsys):
    folder = shutil.copytree(tiny, tmp_path / "model")
    WEIGHTS["not a number"][0](folder)
    out = tmp_path / "out"
    assert main(["run", "--methods", "rtn", "--model", str(folder), *SHORT, "--out", str(out)]) == 1
    table = (out / "leaderboard.csv").read_text()
    assert table.count("no finite numbers") == 2 and table.count(",failed,") == 2


def _board(folder: Path, **values: str) -> str:
    row = {"method": "rtn", "variant": "", "budget_bpw": "3.25", "seed": "0", "stored_bpw": "3.25", "status": "ok"}
    row |= {"ppl_wiki-mini@64/4": "9.5", "cell": "abc", **values}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "leaderboard.csv").write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    return str(folder)


def _with_cell(folder: Path, text: str) -> str:
    _board(folder)
    (folder / "cells").mkdir()
    (folder / "cells" / "abc.json").write_text(text)
    return str(folder)


OTHER_VERBS = {
    "check a binary": (lambda p: ["check", _file(p / "a.csv", b"\xff\x00\xfe"), str(p)], "no table of text"),
    "check zeros": (lambda p: ["check", _file(p / "a.csv", b"\0" * 99), str(p)], "no table|no leaderboard"),
    "check nothing": (lambda p: ["check", str(p / "nowhere"), str(p)], "give a leaderboard.csv"),
    "check another table": (lambda p: ["check", _file(p / "a.csv", b"a,b\n1,2\n"), str(p)], "no leaderboard"),
    "check with no tolerance": (
        lambda p: ["check", _board(p), _board(p / "b"), "--tolerance", "nan"],
        "--tolerance 0.05",
    ),
    "update from failed rows": (
        lambda p: ["check", _board(p, status="crashed"), _file(p / "base.csv", b"kept"), "--update"],
        "stays as it was",
    ),
    "compare an empty cell": (lambda p: ["compare", _with_cell(p, "{}"), "--to", "rtn"], "abc.json"),
    "compare a broken cell": (lambda p: ["compare", _with_cell(p, "{"), "--to", "rtn"], "abc.json"),
    "compare a list": (lambda p: ["compare", _with_cell(p, "[]"), "--to", "rtn"], "abc.json"),
    "compare no cell": (lambda p: ["compare", _board(p), "--to", "rtn"], "abc.json"),
    "compare no folder": (lambda p: ["compare", str(p / "nowhere"), "--to", "rtn"], "give the one a run wrote"),
    "compare two empty cells": (lambda p: ["compare", _with_cell(p, "{}"), str(p)], "abc.json"),
    "compare nothing to nothing": (lambda p: ["compare", _board(p)], "compare A B"),
    "recommend of an empty cell": (lambda p: ["recommend", "--folder", _with_cell(p, "{}")], "abc.json"),
    "recommend of an empty row": (
        lambda p: ["recommend", "--folder", _with_cell(p, '{"row": {}, "scores": {}, "tasks": {}}')],
        "abc.json",
    ),
    "recommend of a broken cell": (lambda p: ["recommend", "--folder", _with_cell(p, "{")], "abc.json"),
    "recommend of no cell": (lambda p: ["recommend", "--folder", _board(p)], "abc.json"),
    "recommend in no unit": (lambda p: ["recommend", "--memory", "4"], "--memory 4GiB"),
    "bench unknown shapes": (lambda p: ["bench", "--shapes", "/nowhere", "--out", str(p)], "presets are"),
    "bench no shapes": (lambda p: ["bench", "--shapes", ",", "--out", str(p)], "--shapes llama3.2-1b"),
    "bench end to end of nothing": (lambda p: ["bench", "--end-to-end", "--out", str(p)], "of which shapes"),
    "plan no bits": (lambda p: ["plan", "--bits", "x"], "not a number of bits"),
    "clean nothing": (lambda p: ["clean"], "say what may go"),
    "clean soon": (lambda p: ["clean", "--older-than", "soon"], "write for example 30"),
    "clean 5Q": (lambda p: ["clean", "--larger-than", "5Q"], "write for example 20G"),
    "clean without boards": (lambda p: ["clean", "--keep", str(p)], "everything would go"),
    "a file for --out": (
        lambda p: ["run", "--methods", "rtn", *SHORT, "--out", _file(p / "out", b"kept")],
        "give another path",
    ),
    "no place for --out": (
        lambda p: ["run", "--methods", "rtn", *SHORT, "--out", "/proc/nowhere"],
        "give a path|may write",
    ),
    "list of nothing": (lambda p: ["ls", "everything"], "invalid choice"),
    "no verb": (lambda p: ["rum"], "invalid choice"),
}


def _file(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("name", OTHER_VERBS)
def test_other_verbs(name, cache, tmp_path, capsys):
    arguments, hint = OTHER_VERBS[name]
    typed = arguments(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and cache not in path.parents}
    assert re.search(hint, _refused(typed, capsys))
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize(
    "variable, value, hint",
    [
        ("HARNESS_CPU_KERNELS", "foo", "write avx512, avx2, none"),
        ("HARNESS_CACHE", "/dev/null", "something else has that name|HARNESS_CACHE"),
        ("HARNESS_CACHE", "/proc/nowhere", "give a path|may write"),
    ],
)
def test_wrong_variables(variable, value, hint, tiny, cache, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(variable, value)
    arguments = ["run", "--methods", "rtn", "--model", str(tiny), *SHORT, "--out", str(tmp_path / "out")]
    assert re.search(hint, _refused(arguments, capsys))


def test_another_run_s_table_is_not_overwritten(tiny, cache, tmp_path, capsys):
    out = tmp_path / "out"
    board = Path(_board(out)) / "leaderboard.csv"
    before = board.read_text()
    arguments = ["run", "--methods", "rtn", "--model", str(tiny), *SHORT, "--out", str(out)]
    assert re.search("holds the table of another run", _refused(arguments, capsys))
    assert board.read_text() == before


def test_names_from_outside_are_text(tiny, cache, tmp_path, capsys):
    """A model's name that is a formula, markup of two kinds and an escape sequence."""
    folder = tmp_path / "=HYPERLINK(1)|[b]<x>\x1b[31m"
    shutil.copytree(tiny, folder)
    out = tmp_path / "[/b]"
    assert main(["run", "--methods", "fp16", "--model", str(folder), *SHORT, "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    text = (out / "leaderboard.csv").read_text() + (out / "leaderboard.md").read_text()
    assert "\x1b" not in text and "<x>" not in (out / "leaderboard.md").read_text()
    assert (out / "leaderboard.csv").read_text().splitlines()[1].startswith("'=")
    assert not [path for path in tmp_path.rglob("*.csv") if path.parent != out]
