"""What a real Slurm refuses, what a cluster without accounting still tells, and the development cluster itself."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from dev_cluster import DEVCLUSTER, DevCluster, Forty, wait_until

from experiments.run.store import Store

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture
def forty(cluster: DevCluster, text: Path, tmp_path: Path) -> Forty:
    return Forty(cluster, tmp_path / "runs", text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["--partition", "nowhere"], r"invalid partition specified: nowhere", id="partition"),
        pytest.param(["--account", "nobody"], r"Invalid account or account/partition combination", id="account"),
        pytest.param(["--gpus", "prune=3"], r"stage prune asks for 3 GPUs, and uses one", id="gpus"),
        pytest.param(["--nodes", "prune=2"], r"stage prune asks for 2 nodes, and uses one", id="nodes"),
        pytest.param(["--mem", "500"], r"mem=512000M.*node configuration is not available", id="memory"),
        pytest.param(["--cpus", "64"], r"cpus-per-task=64.*(not available|More processors)", id="cores"),
        pytest.param(["--partition", "main", "--time", "9-0"], r"partition's limit of 1440 minutes", id="time"),
        pytest.param(["--constraint", "h100"], r"[Ii]nvalid feature", id="constraint"),
        pytest.param(["--partition", "wide"], r"own disk .* jobs would run on elsewhere,", id="results-not-shared"),
    ],
)
def test_what_slurm_would_refuse_is_said_before_submission(
    forty: Forty, tmp_path: Path, options: list[str], message: str
) -> None:
    file = forty.cluster.file(tmp_path / "test.toml")
    out, err, code = forty.outcome("sweep", "forty", "--where", "method=magnitude", "--cluster", file, *options)
    lines = [line for line in err.splitlines() if line.startswith("hts: error")]
    assert code == 1 and len(lines) == 1 and re.search(message, lines[0]), (out, err)
    assert "Traceback" not in err and "submitted" not in out
    assert not forty.results.exists()


def test_nodes_that_do_see_the_results_are_believed(forty: Forty, tmp_path: Path) -> None:
    file = forty.cluster.file(tmp_path / "test.toml", partition="wide", shared_results=True)
    out = forty.hts("sweep", "forty", "--where", "method=dense", "--cluster", file, "--dry-run")
    assert "1 tasks for 1 trials" in out


def test_the_cap_on_parallel_tasks_holds_across_arrays(forty: Forty, tmp_path: Path) -> None:
    file = forty.cluster.file(tmp_path / "test.toml", parallel=1)
    forty.hts("sweep", "forty", "--cluster", file)
    out = forty.cluster.run("squeue", "-h", "-o", "%i %j %E")
    # What runs already is a line of its own, without brackets.
    prunings = [line for line in out.splitlines() if "forty-prune" in line and "[" in line]
    assert len(prunings) == 2 and all("%1]" in line for line in prunings), out
    # The second array, of what does not fit into one, waits for the first.
    assert ["afterany" in line for line in prunings] == [False, True], out
    assert "cancelled" in forty.hts("cancel", "forty")
    wait_until("the queue is empty", lambda: not forty.cluster.run("squeue", "-h"))
    assert "missing" in forty.hts("status", "forty")


def test_two_processes_learn_in_one_allocation(forty: Forty, tmp_path: Path) -> None:
    """Told to stop, both save and end; requeued, they go on."""
    file = forty.cluster.file(tmp_path / "test.toml")
    chosen = ("--where", "method=patch-joint", "--where", "target=0.15")
    forty.hts("sweep", "forty", *chosen, "--cluster", file, "--gpus", "learn=2")

    def learning() -> list[psutil.Process]:
        found = [each for each in psutil.process_iter(["cmdline"]) if "slurm.torchrun" in (each.info["cmdline"] or [])]
        # Of this cluster: other tests may start such processes at the same time.
        conf = str(forty.cluster.folder)
        here = [each for each in found if each.environ().get("SLURM_CONF", "").startswith(conf)]
        return [each for each in here if "torch.distributed.run" not in each.info["cmdline"]]

    def log() -> str:
        return "".join(path.read_text() for path in forty.results.glob("sweeps/forty/*/*_0_log.out"))

    wait_until("two processes learn", lambda: len(learning()) == 2 and re.search(r"patch-joint.*: \d+/200", log()))
    first = learning()
    [job] = [
        line.split()[0]
        for line in forty.cluster.run("squeue", "-h", "-t", "R", "-o", "%i %j").splitlines()
        if "forty-learn" in line
    ]
    # As before a time limit: to all processes of the step, and not to the script around it.
    forty.cluster.run("scancel", "--signal=USR2", job)
    wait_until("both have ended", lambda: not any(each.is_running() for each in first))
    wait_until("it is done", lambda: not forty.cluster.run("squeue", "-h"))
    assert "1 done" in forty.hts("status", "forty", *chosen)
    steps = [int(step) for step in re.findall(r"patch-joint.*: (\d+)/200", log())]
    assert steps[-1] == 200 and steps.count(1) <= 1, "it began anew"
    assert Store(forty.results).leased() == {} and not learning()


def test_a_cluster_without_accounting(start_cluster: Callable[..., DevCluster], text: Path, tmp_path: Path) -> None:
    cluster = start_cluster("--no-accounting")
    forty = Forty(cluster, tmp_path / "runs", text)
    file = cluster.file(tmp_path / "test.toml")
    options = ("forty", "--where", "method=sparsegpt", "--cluster", file)
    forty.hts("sweep", *options)
    assert "pending" in forty.hts("status", "forty", "--where", "method=sparsegpt")
    job = cluster.run("squeue", "-hr", "-t", "R,PD", "-o", "%i %j").split()[0]
    cluster.run("scancel", job)
    forty.hts("sweep", *options)
    wait_until("the queue is empty", lambda: not cluster.run("squeue", "-h"))
    forty.hts("sweep", *options)
    wait_until("the queue is empty", lambda: not cluster.run("squeue", "-h"))
    assert "6 done" in forty.hts("status", "forty", "--where", "method=sparsegpt")


def test_the_cluster_comes_up_once_and_listens_on_loopback_only(cluster: DevCluster) -> None:
    pids = {int(path.read_text()) for path in (cluster.folder / "run").glob("*.pid")}
    subprocess.run([DEVCLUSTER, "up"], env=cluster.environment, check=True)
    assert {int(path.read_text()) for path in (cluster.folder / "run").glob("*.pid")} == pids
    listening = [
        connection.laddr.ip
        for pid in pids
        for connection in psutil.Process(pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) == 3 and set(listening) == {"127.0.0.1"}
