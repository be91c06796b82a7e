"""What a user mistypes is one line and a non-zero exit."""

import re

import pytest

from harness.cli import main


@pytest.mark.parametrize(
    "arguments, hint",
    [
        (["--methods", "gtpq"], "did you mean 'gptq'"),
        (["--methods", ""], "--methods reallm,gptq"),
        (["--bits", "3,25x"], "not a number of bits"),
        (["--model", "./nowhere"], "no folder"),
        (["--protocols", "wikitext103@512"], "TEXT@CONTEXT"),
        (["--calibration", "pile@512x4"], "TEXT@CONTEXTxSEQUENCES"),
        (["--device", "cuda:7"], "try --device cpu"),
        (["--device", "meta"], "try --device cpu"),
        (["--dtype", "bfloat16", "--model", "MODEL"], "use float16 or float32"),
        (["--seeds", "a"], "--seeds 0,1,2"),
        (["--act-bits", "8,1"], "widths from 2 to 16: write for example 16,8,4"),
        (["--act-bits", ""], "write for example 16,8,4"),
        (["--jobs", "0"], "at least 1"),
        (["--methods", "fp16:dtype=bfloat16", "--model", "MODEL"], "takes its type from the checkpoint"),
        (["--calibration", "c4-mini@2048x500", "--model", "MODEL", "--methods", "gptq"], "holds 9[0-9] windows"),
        (["--protocols", "wikitext2@512", "--data", "/nowhere", "--model", "MODEL"], "no wiki.test.raw"),
    ],
)
def test_bad_input_is_one_line_and_a_non_zero_exit(arguments, hint, truncated, cache, tmp_path, capsys):
    arguments = [str(truncated.path) if a == "MODEL" else a for a in arguments]
    assert main(["run", *arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(hint, error.splitlines()[-1]), error
    assert not list(tmp_path.glob("*.csv"))


def test_an_unknown_verb_or_option_is_refused(capsys):
    for arguments in (["rum"], ["run", "--bitz", "3"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
