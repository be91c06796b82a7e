"""`recommend` on tables of real cells with memory and speed of our choosing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from harness.cli import main
from harness.cli.recommend import memory_gib
from harness.report.leaderboard import write_leaderboard
from harness.store.results import Memory
from tests.harness.report.boards import bench, stored

P = "wiki-mini@128/4"
GIB = {"fp16": 1.0, "gptq 4.25": 0.4, "nf 4.25": 0.5, "reallm 3.25": 0.3, "gptq 3.25": 0.3, "qlora 3.25": 0.2}


def write(folder: Path, alter=None) -> Path:
    """The six cells with these sizes; `alter` changes a report by its name."""
    board = stored()
    reports = {}
    for key, report in board.reports.items():
        name = f"{report.row['method']} {report.row['budget_bpw']}".strip()
        measured = replace(bench(), memory=Memory(int(GIB[name] * 2**30), 2**31, 2**28))
        report = replace(report, bench=measured)
        reports[key] = alter(name, report) if alter else report
    write_leaderboard(replace(board, reports=reports), folder)
    return folder


def ask(folder: Path, capsys, *limits: str) -> dict:
    code = main(["recommend", "--folder", str(folder), *limits, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == (0 if found["rows"] else 1)
    return found


def test_rows_that_others_beat_in_everything_are_not_named(tmp_path, capsys):
    found = ask(write(tmp_path), capsys, "--memory", "0.9GiB")
    names = [row["row"] for row in found["rows"]]
    # nf is worse than gptq at its bits, and larger; gptq 3.25 diverges more than reallm in as much memory.
    assert names == ["gptq 4.25", "reallm:latent=vectors 3.25", "qlora 3.25"]
    best, second, _ = found["rows"]
    assert best["low"] < best["kld"] < best["high"] and second["tie_with_best"] is False
    assert found["sentence"].startswith("gptq 4.25 (0.400 GiB resident, 4.249 bits") and found["measure"] == "kld"
    assert found["beyond"] == ["fp16 (1.000 GiB resident, 16 bits, 100 tokens/s)"]


def test_a_tie_with_the_best_is_said_even_where_it_is_dominated(tmp_path, capsys):
    best = next(r for r in stored().reports.values() if r.row["method"] == "gptq" and r.row["budget_bpw"] == "4.25")

    def nearly_the_best(name, report):
        if name != "nf 4.25":
            return report
        kld = tuple(x * f for x, f in zip(best.scores[P].divergence.window_kld, (1.1, 0.95, 1.02, 0.97), strict=True))
        divergence = replace(report.scores[P].divergence, window_kld=kld)
        return replace(report, scores={**report.scores, P: replace(report.scores[P], divergence=divergence)})

    found = ask(write(tmp_path, nearly_the_best), capsys, "--memory", "0.9GiB")
    tie = next(row for row in found["rows"] if row["row"] == "nf 4.25")
    assert tie["tie_with_best"] is True and tie["dominated_by"] == "gptq 4.25"
    assert "nf 4.25 cannot be told from it (tie)" in found["sentence"]


def test_the_uncompressed_model_is_named_beside_the_best_compressed_row(tmp_path, capsys):
    assert main(["recommend", "--folder", str(write(tmp_path)), "--memory", "4GiB"]) == 0
    first, *table = capsys.readouterr().out.splitlines()
    assert first.startswith("gptq 4.25") and "uncompressed, fp16 is within them too" in first
    assert table[1].startswith("row") and any(line.startswith("fp16") for line in table)


def test_where_nothing_fits_the_smallest_is_named(tmp_path, capsys):
    found = ask(write(tmp_path), capsys, "--memory", "100MB", "--tokens-per-second", "500")
    assert (
        "No row is within 0.09313 GiB, at least 500 tokens/s: the smallest is qlora 3.25 (0.200 GiB"
        in found["sentence"]
    )
    assert "the fastest" in found["sentence"] and len(found["beyond"]) == 6


def test_what_is_not_good_or_not_measured_is_said(tmp_path, capsys):
    def spoilt(name, report):
        if name == "gptq 4.25":
            return replace(report, row=report.row | {"status": "failed", "reason": "out of luck"})
        if name == "nf 4.25":
            return replace(report, bench=None, row=report.row | {"status": "underspent"})
        if name == "gptq 3.25":
            return replace(report, bench=replace(report.bench, kind="decode-on-load"))
        return report

    found = ask(write(tmp_path, spoilt), capsys, "--by", "ppl")
    assert found["left_out"] == ["gptq 4.25 (failed, out of luck)"]
    remarks = {row["row"]: " ".join(row["remarks"]) for row in found["rows"]}
    assert "underspent" in remarks["nf 4.25"] and "memory not measured" in remarks["nf 4.25"]
    found = ask(tmp_path, capsys, "--tokens-per-second", "1")
    assert any("nf 4.25" in text and "no tokens/s measured" in text for text in found["beyond"])
    kept = ask(write(tmp_path / "b", lambda n, r: spoilt(n, r) if n == "gptq 3.25" else r), capsys, "--bits", "3.25")
    decoded = [row for row in kept["rows"] if row["row"] == "gptq 3.25"]
    assert all("decoded when loaded" in " ".join(row["remarks"]) for row in decoded)
    assert all("provisional" in " ".join(row["remarks"]) for row in kept["rows"])  # eight items of every task


def test_the_newest_run_is_the_one_that_is_meant(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["recommend"]) == 2 and "`run` first" in capsys.readouterr().err
    write(tmp_path / "results" / "abc")
    assert main(["recommend", "--bits", "3.3"]) == 0 and "reallm:latent=vectors 3.25" in capsys.readouterr().out


@pytest.mark.parametrize("text, gib", [("4GiB", 4), ("4 gib", 4), ("512MiB", 0.5), ("1e9", None), ("2GB", 2e9 / 2**30)])
def test_sizes(text, gib):
    if gib is None:
        with pytest.raises(ValueError, match="--memory 4GiB"):
            memory_gib(text)
    else:
        assert memory_gib(text) == pytest.approx(gib)


@pytest.mark.parametrize(
    "typed, say",
    [
        (["--memory", "4"], "--memory 4GiB"),
        (["--memory", "0GiB"], "--memory 4GiB"),
        (["--bits", "few"], "--bits 3.25"),
        (["--bits", "nan"], "--bits 3.25"),
        (["--tokens-per-second", "-1"], "--tokens-per-second 20"),
        (["--folder", "nowhere"], "give the one a run wrote"),
        (["--folder", "here", "--protocol", "x"], f"--protocol with one of {P}"),
    ],
)
def test_bad_input_is_one_line(typed, say, tmp_path, capsys):
    if "here" in typed:
        typed[typed.index("here")] = str(write(tmp_path))
    assert main(["recommend", *typed]) == 2
    error = capsys.readouterr().err
    assert say in error and error.count("\n") == 1
