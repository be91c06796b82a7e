"""Ray's engine on a real cluster of three nodes of this machine, one of which is killed in the middle of a cell."""

import signal
import threading
import time

import pytest

from harness.report.baseline import read_rows
from tests.helpers import SMALL, run_harness, steady

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    before = signal.getsignal(signal.SIGTERM)  # Ray sets one of its own
    small = dict(object_store_memory=80 << 20, num_cpus=1, memory=8 << 30)
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_worker_niceness", "0")  # its own is 15: beside the other tests its cells would hardly run
    cluster = Cluster(initialize_head=True, head_node_args=small | {"num_cpus": 0, "include_dashboard": False})
    cluster.doomed = [cluster.add_node(**small), cluster.add_node(**small)]
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    patch.undo()
    signal.signal(signal.SIGTERM, before)


def test_a_node_that_is_lost_changes_no_number(truncated, finished, cache, cluster, tmp_path):
    run = ("run", "--model", str(truncated.path), "--methods", "rtn,gptq", "--bits", "2.25,3.25", *SMALL, "--jobs", "2")
    engine = ("--engine", "ray", "--address", cluster.address)
    lost = []

    def lose():
        """The first node on which a cell other than the reference has finished a block."""
        while not lost:
            time.sleep(0.05)
            for block in cache.glob("cells/*/blocks/block_0000.safetensors"):
                if list((block.parents[1]).glob("allocation.json")):
                    cluster.remove_node(cluster.doomed[0], allow_graceful=False)
                    lost.append(block)
                    return

    watcher = threading.Thread(target=lose, daemon=True)
    watcher.start()
    done = run_harness(*run, *engine, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert lost and len([node for node in ray_nodes(cluster) if node["Alive"]]) == 2
    assert steady(read_rows(tmp_path / "out")) == steady(read_rows(finished / "out"))
    again = run_harness(*run, *engine, "--out", str(tmp_path / "out"))
    assert again.stderr.count("found, not repeated") == 5


def ray_nodes(cluster):
    ray.init(address=cluster.address, ignore_reinit_error=True, log_to_driver=False)
    try:
        return ray.nodes()
    finally:
        ray.shutdown()


def test_no_cluster_is_one_line(truncated, cache, tmp_path):
    run = ("run", "--model", str(truncated.path), "--methods", "rtn", *SMALL, "--out", str(tmp_path), "--engine", "ray")
    done = run_harness(*run, "--address", "127.0.0.1:1")
    assert done.returncode == 2 and "start one with `ray start --head`" in done.stderr.splitlines()[-1]
