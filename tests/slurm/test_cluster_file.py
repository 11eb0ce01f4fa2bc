"""The cluster file and what overrides it: defaults, units, and one line for each mistake."""

from pathlib import Path

import pytest

from patch.errors import UserError
from slurm.cluster import Cluster, load, override, parse, parse_time

WRITTEN = """
executor = "slurm"
partition = "gpu"
parallel = 8
setup = ["module load cuda"]
gpu_memory = 80
[stages.learn]
gpus = 4
memory = 200
time = "2-00:00:00"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "hts").mkdir()
    return tmp_path / "hts"


def test_a_file_is_found_by_name_and_by_path(folder: Path) -> None:
    (folder / "big.toml").write_text(WRITTEN)
    cluster = load("big")
    assert cluster == load(str(folder / "big.toml"))
    assert (cluster.partition, cluster.parallel, cluster.setup) == ("gpu", 8, ("module load cuda",))
    assert (cluster.stages["learn"].gpus, cluster.stages["learn"].minutes) == (4, 2880)
    assert cluster.stages["evaluate"] == Cluster().stages["evaluate"]


def test_the_executors_need_no_file(folder: Path) -> None:
    assert [load(name).executor for name in ("slurm", "local", "debug")] == ["slurm", "local", "debug"]


def test_the_command_line_wins() -> None:
    cluster = override(
        parse({"partition": "gpu", "account": "lab"}),
        {"partition": "debug", "account": None, "setup": ()},
        {"gpus": ["2", "learn=8"], "time": ["evaluate=30"], "memory": [], "cpus": []},
    )
    assert (cluster.partition, cluster.account) == ("debug", "lab")
    assert [cluster.stages[name].gpus for name in ("prune", "learn", "evaluate", "report")] == [2, 8, 2, 0]
    assert cluster.stages["evaluate"].minutes == 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partion = 'gpu'", "unknown key 'partion': did you mean partition"),
        ("[stages.learn]\ngpu = 1", "unknown key 'gpu': did you mean gpus"),
        ("[stages.lern]\ngpus = 1", "unknown stage 'lern': did you mean learn"),
        ("executor = 'slrum'", "did you mean slurm"),
        ("parallel = 'many'", "parallel is 'many': give int"),
        ("parallel = true", "parallel is True: give int"),
        ("setup = 'module load cuda'", "setup is 'module load cuda': give a list of strings"),
        ("[stages.learn]\ntime = 'soon'", "time 'soon'"),
        ("[stages.learn]\ngpus = -1", "stages.learn.gpus is -1"),
        ("stages = 3", "unknown stage"),
        ("parallel = 0", "parallel is 0: give a number above 0"),
        ("gpu_tflops = 0", "gpu_tflops is 0: give a number above 0"),
        ("signal = 0", "signal is 0"),
        ("[stages.learn]\ncpus = 0", "stages.learn.cpus is 0"),
        ("[stages.learn]\nmemory = 0.0", "stages.learn.memory is 0"),
        ("[stages.learn]\ntime = 0", "stages.learn.time is '0': give a time above 0"),
        ("gpu_memory = nan", "gpu_memory is nan: give a finite number"),
        ("[stages.learn]\nmemory = inf", "stages.learn.memory is inf: give a finite number"),
        ('partition = "gpu\\n#SBATCH --uid=0"', "partition is .*: give one line without control characters"),
        ('account = "lab\\u0000"', "account is .*: give one line"),
        pytest.param("a = " + 5000 * "[", "test.toml", id="deeply-nested"),
        ("partition = ", "test.toml"),
    ],
)
def test_a_mistake_is_named_with_the_file(folder: Path, text: str, message: str) -> None:
    (folder / "test.toml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load("test")
    assert "test.toml" in str(caught.value)


def test_a_file_that_is_no_text_is_named(folder: Path) -> None:
    (folder / "test.toml").write_bytes(b'partition = "gpu\xff"')
    with pytest.raises(UserError, match=r"test\.toml: is not UTF-8 \(byte 16\)"):
        load("test")


def test_zero_gpus_and_timeouts_are_numbers_too() -> None:
    cluster = parse({"timeouts": 0, "stages": {"evaluate": {"gpus": 0}}})
    assert (cluster.timeouts, cluster.stages["evaluate"].gpus) == (0, 0)


def test_an_unknown_cluster_lists_the_known_ones(folder: Path) -> None:
    (folder / "big.toml").write_text("")
    with pytest.raises(UserError, match=r"no cluster 'bog'.*known: big, debug, local, slurm"):
        load("bog")


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("1:30", 2),
        ("1:00:00", 60),
        ("0:00:30", 1),
        ("2-00", 2880),
        ("1-12:30", 2190),
        ("infinite", 525600),
    ],
)
def test_times_are_slurms(text: str, minutes: int) -> None:
    assert parse_time(text) == minutes
