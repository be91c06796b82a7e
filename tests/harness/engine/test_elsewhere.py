"""Cells handed to other machines: what crosses, what is said on the way, and what becomes of a worker that is unlike or
dies. The machines are processes of this one."""

import json
import threading
from dataclasses import replace

import pytest

from harness.engine import elsewhere
from harness.engine.elsewhere import Order, perform, versions
from harness.engine.process import Ended, Phase
from harness.report.baseline import read_rows
from tests.helpers import run_harness


@pytest.fixture
def spec(finished):
    from harness.store.cells import CellStore

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARNESS_CACHE", str(finished / "cache"))
        (rtn,) = (row["cell"] for label, row in read_rows(finished / "out").items() if label == "rtn 3.25")
        return CellStore(rtn).spec()


def order_of(spec, where, **changed) -> Order:
    values = dict(cache=str(where), folder=str(where), versions=versions(), timeout_s=None, memory_gib=1.0)
    return replace(Order(spec.key, json.dumps(spec.to_json()), **values), **changed)


def heard(order) -> list:
    return elsewhere._Heard(order).new()


def test_an_order_crosses_as_text(spec, tmp_path):
    order = order_of(spec, tmp_path)
    assert order.cell == spec and all(isinstance(v, str | dict | float | None) for v in vars(order).values())


def test_a_machine_that_is_unlike_says_what_to_install(spec, tmp_path):
    order = order_of(spec, tmp_path, versions=versions() | {"torch": "1.0"})
    perform(order)
    (ended,) = heard(order)
    assert ended.ending == "failed" and "and not 1.0: install the same on every machine" in ended.error


def test_a_machine_without_the_shared_folder_says_so(spec, tmp_path):
    with pytest.raises(RuntimeError, match="put HARNESS_CACHE on storage that all machines share"):
        perform(order_of(spec, tmp_path, folder=str(tmp_path / "nowhere")))


def test_half_a_line_of_a_killed_worker_spoils_no_other(spec, tmp_path):
    order = order_of(spec, tmp_path)
    order.said.write_bytes(b'\n{"Phase": {"phase": "compress", "done": 3, "to')
    said = elsewhere._Heard(order)
    assert said.new() == []
    with open(order.said, "a") as out:
        elsewhere._say(out, order.key, Phase("load", 0, 1))
        elsewhere._say(out, order.key, Ended())
    assert said.new() == [Phase("load", 0, 1), Ended()] and said.new() == []


class Local:
    """An engine of threads; the first try of a cell may be taken off."""

    def __init__(self, order, lose=False):
        self.order, self.error, self.lose = order, "", lose
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def work(self):
        if self.lose:
            self.error = "the machine went away"
            return
        try:
            perform(self.order)
        except RuntimeError as error:
            self.error = str(error)

    def done(self):
        return not self.thread.is_alive()

    def failure(self):
        return self.error

    def cancel(self):
        pass


def test_a_worker_that_goes_without_a_word_is_one_failed_row(spec, cache, monkeypatch):
    monkeypatch.setattr(elsewhere, "POLL_S", 0.01)
    said = []
    outcomes = elsewhere.run_cells(
        [spec], lambda orders: [Local(o, lose=True) for o in orders], lambda k, m: said.append(m)
    )
    assert outcomes[spec.key].error == "the machine went away" and outcomes[spec.key].ending == "crashed"
    assert [type(message) for message in said] == [Ended]
    assert not list((cache / "engine").iterdir())  # nothing is left behind


def test_options_of_another_engine_are_refused():
    for words, hint in (
        (("--address", "auto"), "--address is for --engine ray"),
        (("--engine", "slurm", "--slurm", "minutes"), "write for example minutes=240"),
    ):
        done = run_harness("run", *words)
        assert done.returncode == 2 and hint in done.stderr.splitlines()[-1]
