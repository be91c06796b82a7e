"""Cells in TensorBoard and MLflow, offline; and sinks that cannot be had or that fail."""

import logging
import math

import pytest

from harness.report.sinks import Entry, Sinks, open_sinks

ROW = {
    "model": "m",
    "method": "gptq",
    "variant": "group=128",
    "budget_bpw": "13/4",
    "seed": 1,
    "cell": "0123abcd",
    "status": "ok",
    "reason": "",
    "stored_bpw": 3.25,
    "ppl_wiki-mini@64/5": 30.5,
    "kld_wiki-mini@64/5": math.nan,
    "rank_wiki-mini@64/5": "",
}
ENTRY = Entry.of(ROW, {"act_order": "True"})
LATER = Entry.of(ROW | {"decode_ms_b1": 7.0, "status": "failed", "reason": "no luck"}, {"act_order": "True"})


def test_an_entry_has_a_configuration_and_finite_numbers():
    assert ENTRY.name == "gptq:group=128 13/4 seed 1"
    assert ENTRY.numbers == {"stored_bpw": 3.25, "ppl_wiki-mini@64/5": 30.5}
    assert ENTRY.config["act_order"] == "True" and ENTRY.config["budget_bpw"] == "13/4" and ENTRY.config["seed"] == 1


def test_tensorboard_has_a_folder_for_every_cell(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sinks = open_sinks(f"tensorboard:{tmp_path / 'runs'}")
    for entry in (ENTRY, LATER):
        sinks.put(entry)
    assert sinks
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == "gptq_group=128_13_4_seed_1-0123abcd"
    events = EventAccumulator(str(folder)).Reload()
    for column, number in LATER.numbers.items():
        (scalar,) = events.Scalars(column)  # once: the later entry replaces the first
        assert scalar.value == pytest.approx(number)
    assert "_hparams_/session_start_info" in events.Tags()["scalars"] or events.summary_metadata


def test_mlflow_has_a_run_for_every_cell(tmp_path):
    for package in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'runs.db'}"
    for entry in (ENTRY, LATER):  # two runs of the harness
        sinks = open_sinks(f"mlflow:{uri}")
        sinks.put(entry)
        assert sinks
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("ptq-harness")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == ENTRY.name and run.info.status == "FAILED"
    assert run.data.metrics == {"stored_bpw": 3.25, "ppl_wiki-mini_64/5": 30.5, "decode_ms_b1": 7.0}
    assert run.data.params["budget_bpw"] == "13/4" and run.data.tags["reason"] == "no luck"


@pytest.mark.parametrize("text", ["floppy:a", "tensorboard", "tensorboard:", ":x"])
def test_a_place_nobody_knows_is_refused(text):
    with pytest.raises(ValueError, match="write for example --log tensorboard:runs"):
        open_sinks(text)


@pytest.mark.parametrize(
    "kind, module", [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow"), ("wandb", "wandb")]
)
def test_a_missing_package_is_told_with_its_extra(kind, module, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ValueError, match=rf"needs {kind}: pip install '\.\[{kind}\]'"):
        open_sinks(f"{kind}:{tmp_path / 'x'}")


def test_no_sinks_are_no_sinks():
    assert not open_sinks("") and not open_sinks(" , ")


def test_a_sink_that_fails_costs_nothing(caplog):
    heard = []

    def fails(entry: Entry) -> None:
        raise OSError("disk full\nand more")

    sinks = Sinks({"a": fails, "b": heard.append})
    with caplog.at_level(logging.WARNING, logger="harness"):
        sinks.put(ENTRY)
        sinks.put(LATER)
    assert heard == [ENTRY, LATER] and caplog.messages == ["nothing more is logged to a (disk full)"]
