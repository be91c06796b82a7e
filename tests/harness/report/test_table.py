"""Tables of numbers survive pandas: the bytes that were written, and what they mean."""

import csv
import io
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pandas as pd
import pytest

from harness.report.frame import Leaderboard
from harness.report.table import frame, read_csv, write_csv

ROOT = Path(__file__).parents[3]
OURS = [path for path in ROOT.glob("results/**/*.csv") if "llama-cpp" not in str(path)]


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT / "results")))
def test_committed_tables_are_written_again_byte_for_byte(path, tmp_path):
    rows = read_csv(path)
    write_csv(tmp_path / "again.csv", list(rows[0]), rows)
    assert (tmp_path / "again.csv").read_bytes() == path.read_bytes()
    for row in rows:  # a budget is its number in a frame: "1" is 1.0, and a fraction its value
        if row.get("budget_bpw"):
            row["budget_bpw"] = str(float(Fraction(row["budget_bpw"])))
    write_csv(tmp_path / "numbers.csv", list(rows[0]), rows)
    assert frame(path).to_csv(index=False, lineterminator="\n").encode() == (tmp_path / "numbers.csv").read_bytes()


def test_numbers_are_written_as_python_writes_them(tmp_path):
    values = [0.1 + 0.2, 1e-7, 1.0, 3, math.inf, math.nan, "", 2**60, "a,b", 'a"b', "a\nb", "=1+1", "-x", "nan"]
    write_csv(tmp_path / "t.csv", ["n", "value"], [{"n": n, "value": value} for n, value in enumerate(values)])
    plain = io.StringIO()
    writer = csv.writer(plain, lineterminator="\n")
    writer.writerow(["n", "value"])
    writer.writerows((n, f"'{v}" if v in ("=1+1", "-x") else v) for n, v in enumerate(values))
    assert (tmp_path / "t.csv").read_bytes() == plain.getvalue().encode()


def test_dtypes_follow_from_names_and_missing_is_not_nan(tmp_path):
    columns = ["method", "variant", "budget_bpw", "stored_bpw", "seed", "rank_w@8", "tie_w@8", "ppl_w@8", "reason"]
    lines = ["fp16,,,16.0,0,,,20.0,", "nf,,13/4,3.25,0,1,tie,nan,too 'far'", "nf,,3,3.0,1,,,,"]
    (tmp_path / "t.csv").write_text("\n".join([",".join(columns), *lines]) + "\n")
    table = frame(tmp_path / "t.csv")
    kinds = ["category", "category", "Float64", "Float64", "Int64", "Int64", "category", "Float64", "string"]
    assert [str(table[name].dtype) for name in columns] == kinds
    assert table["budget_bpw"].iloc[1] == 3.25 and table["variant"].tolist() == [""] * 3
    assert math.isnan(table["ppl_w@8"].iloc[1]) and table["ppl_w@8"].isna().tolist() == [False, False, True]
    assert table["reason"].isna().tolist() == [True, False, True] and table["rank_w@8"].iloc[0] is pd.NA


@pytest.mark.parametrize("text", ["", "a,b\n1,2,3\n", b"\xff\xfe\x00", "a,b\n1,2\n"])
def test_what_is_no_leaderboard_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "leaderboard.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    for path in (tmp_path, tmp_path / "leaderboard.csv", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="give .*leaderboard.csv") as refused:
            Leaderboard.read(path)
        assert "\n" not in str(refused.value)


def test_a_notebook_shows_ties_and_failures_and_no_markup(tmp_path):
    columns = (
        "model,method,variant,track,kind,status,budget_bpw,stored_bpw,ppl_w@8,ppl_w@8_lo,ppl_w@8_hi,rank_w@8,tie_w@8"
    )
    lines = [
        "m,gptq,,calibrated,fused,ok,3.125,3.1,30.0,28.0,32.0,1,tie,0.1,0,",
        "m,nf,,calibrated,,failed,3.125,,,,,,,,0,<script>alert(1)</script> & more",
    ]
    (tmp_path / "leaderboard.csv").write_text("\n".join([columns + ",kld_w@8,seed,reason", *lines]) + "\n")
    board = Leaderboard.read(tmp_path)
    shown = board._repr_html_()
    for text in ("<td>30.00 [28.0, 32.0]</td>", "<td>1 tie</td>", "<td>3.125</td>", "&lt;script&gt;", "color: #b00"):
        assert text in shown, text
    assert "<script>" not in shown
    worse = board[board["status"] != "ok"]
    assert isinstance(worse, Leaderboard) and worse.folder == tmp_path and "&lt;script&gt;" in worse._repr_html_()
    assert "dataframe" in board[["method"]]._repr_html_()  # pandas' own


def test_pandas_is_imported_where_a_table_is_at_hand():
    code = (
        "import sys, harness\n"
        "assert not {'torch', 'pandas'} & sys.modules.keys()\n"
        "from harness.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'pandas' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)
