"""What a run shows on a terminal, and what it prints in the end."""

import io
import json
import math

import pytest
from rich.console import Console

from harness.cli import main, progress
from harness.cli.progress import Display
from harness.cli.sheets import print_json
from harness.engine.process import INTERRUPTED, Ended, Note, Phase
from harness.report.sheet import WIDTH, decisive_sheet, notes_below, short_names
from harness.store.records import Ending
from tests.helpers import SMALL, run_harness

NAMES = ["wiki-mini@512", "c4-mini@512"]


def row(method, **values):
    columns = {f"{what}_{name}": value for name in NAMES for what, value in (("ppl", 37.42), ("kld", 0.5321))}
    columns |= {f"rank_{name}": 1 for name in NAMES} | {f"tie_{name}": "tie" for name in NAMES}
    return {
        "method": method,
        "variant": "",
        "seed": 0,
        "budget_bpw": "3.25",
        "stored_bpw": 3.2487,
        **columns,
        "decode_ms_b1": 21.3,
        "kind": "decode-per-call",
        "track": "calibrated",
        "status": "ok",
        "reason": "",
        **values,
    }


def test_the_columns_that_decide_fit_a_line():
    wrong = "killed by the kernel, which was out of memory; log: /some/where/log.txt"
    rows = [row("gptq"), row("reallm", variant="blockwise"), row("rtn", status="out-of-memory", reason=wrong)]
    sheet = decisive_sheet(rows, NAMES)
    lines = sheet.plain().splitlines()
    assert max(map(len, lines)) <= WIDTH
    titles = "method bits stored ppl wiki kld wiki ppl c4 kld c4 ms/tok kind track status"
    assert " ".join(lines[0].split()) == titles
    assert "37.42 #1=" in lines[1] and lines[3].endswith("memory")
    assert notes_below(rows, NAMES) == [
        "wiki: wiki-mini@512, c4: c4-mini@512",
        f"rtn 3.25: out-of-memory: {wrong}",
    ]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_long_name_is_cut_and_columns_are_left_out(count):
    names = [*NAMES, "wikitext2@2048"][:count]
    columns = {f"{what}_wikitext2@2048": 5.47 for what in ("ppl", "kld")}
    rows = [row("gptq:group=128,act_order=false,static_groups=false,damp=0.01", **columns, **{"ppl_c4-mini@512": 5e7})]
    sheet = decisive_sheet(rows, names)
    assert max(map(len, sheet.plain().splitlines())) <= WIDTH
    assert sheet.lines[0][0].startswith("gptq:group") and sheet.lines[0][0].endswith("…")
    assert [title for title in sheet.header if title.startswith("ppl")] == ["ppl wiki", "ppl c4", "ppl wiki2"][:count]


def test_short_names_tell_protocols_apart():
    assert short_names(["wiki-mini@512", "c4@2048"]) == {"wiki-mini@512": "wiki", "c4@2048": "c4"}
    assert set(short_names(["wiki-mini@512", "wiki-mini@128/4"]).values()) == {"wiki@512", "wiki@128"}
    alike = ["wiki-mini@128", "wiki-mini@128/4"]
    assert short_names(alike) == {name: name for name in alike}


def shown(labels, messages, **options):
    """What is on a terminal of 100 columns after these messages, and what was printed above."""
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None, highlight=False)
    display = Display(console, labels, **options)
    for key, message in messages:
        display.message(key, message)
    above = console.file.getvalue()
    assert display._live is not None
    console.print(display._live.renderable)
    return console.file.getvalue().removeprefix(above), above


def test_a_terminal_shows_the_cells_at_work_and_no_other():
    labels = {str(i): f"cell {i}" for i in range(40)}
    messages = [
        ("0", Phase("compress", 1, 30)),
        ("0", Phase("compress", 30, 30)),
        ("0", Ended()),
        ("1", Phase("compress", 12, 30)),
        ("2", Phase("piqa (tokens)", 0, 1)),
        ("2", Phase("piqa (tokens)", 700, 7000)),
        ("3", Ended("no matrix", Ending.FAILED)),
    ]
    live, above = shown(labels, messages, done=2)
    assert len(live.splitlines()) == 3
    assert "cell 1" in live and "compress" in live and "block 12 of 30" in live
    assert "cell 2" in live and "tokens/s" in live and "of 7000" not in live
    assert "4/42" in live and "1 without a result" in live
    assert above.splitlines()[0].startswith("cell 0: done") and "cell 3: failed: no matrix" in above


def test_cells_that_never_began_say_nothing_when_a_run_is_stopped():
    labels = {str(i): f"cell {i}" for i in range(40)}
    messages = [("0", Phase("compress", 1, 30)), *((key, INTERRUPTED) for key in labels)]
    assert shown(labels, messages)[1].count("interrupted") == 1


def test_a_quiet_display_says_what_failed_and_nothing_else(capsys):
    display = Display(progress.open_console(quiet=True), {"a": "gptq 3.25", "b": "rtn 3.25"})
    for message in (Phase("load", 0, 1), Note("something", warning=True), Ended("no matrix", Ending.FAILED)):
        display.message("a", message)
    display.message("b", Ended())
    assert capsys.readouterr().err == "gptq 3.25: failed: no matrix\n"


def test_json_is_standard_and_numbers_that_are_none_are_null(capsys):
    print_json({"ppl": math.inf, "rows": [{"kld": math.nan, "bits": 3}], 7: None})
    assert json.loads(capsys.readouterr().out) == {"ppl": None, "rows": [{"kld": None, "bits": 3}], "7": None}


def test_a_run_prints_what_decides_all_or_one_document(truncated, finished, finished_cache, tmp_path):
    arguments = ("run", "--model", str(truncated.path), "--methods", "rtn,gptq", "--bits", "2.25,3.25", *SMALL)
    short = run_harness(*arguments, "-q", "--out", str(tmp_path / "a"))
    assert short.stderr == "" and max(map(len, short.stdout.splitlines())) <= WIDTH
    wide = run_harness(*arguments, "--wide", "-v", "--out", str(tmp_path / "b"))
    assert "ppl wiki-mini@128/4" in wide.stdout and "self_attn.q_proj" in wide.stdout
    assert "transformers" in wide.stderr and str(finished_cache) in wide.stderr
    document = run_harness(*arguments, "--json", "--out", str(tmp_path / "c"))
    rows = json.loads(document.stdout)["rows"]
    assert [r["method"] for r in rows].count("gptq") == 2 and rows[0]["budget_bpw"] is None
    written = {(tmp_path / name / "leaderboard.md").read_text() for name in "abc"}
    assert written == {(finished / "out" / "leaderboard.md").read_text()}


@pytest.mark.parametrize(
    "arguments",
    [
        ["ls", "methods"],
        ["ls", "models"],
        ["ls", "protocols"],
        ["ls", "tasks"],
        ["ls", "runs"],
        ["clean", "--older-than", "0"],
        ["plan", "--model", "smollm2-135m", "--methods", "gptq"],
        ["plan", "--model", "smollm2-135m", "--methods", "lq-lora", "--bits", "2.75", "--scope", "paper"],
        ["check", "OUT", "OUT"],
        ["compare", "OUT", "--to", "gptq"],
    ],
    ids=" ".join,
)
def test_a_verb_prints_one_document(arguments, finished, finished_cache, capsys):
    arguments = [str(finished / "out") if word == "OUT" else word for word in arguments]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_verify_prints_one_document(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    assert main(["verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "folder": str(tmp_path),
        "files": 0,
        "damaged": [],
        "without_checksums": [],
    }


def test_a_refusal_is_a_line_and_no_document(capsys):
    assert main(["plan", "--methods", "gtpq", "--json"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
