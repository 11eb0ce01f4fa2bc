"""What is looked at before submission: definitions, memory, and the place of the results."""

import dataclasses
import re
import socket
from pathlib import Path

import pytest

from experiments.data import registry
from experiments.studies import build, cost
from experiments.studies.registry import STUDIES
from experiments.studies.trial import Calibration
from patch.errors import UserError
from slurm import checks, plan, queue
from slurm.cluster import Cluster, override

# On the hub, as far as this machine can tell without asking it; the others are pruned on text of a data directory.
NEED_DATA = {"smollm2-135m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"}
ON_THE_HUB = [
    name for name, study in STUDIES.items() if not NEED_DATA & {trial.pruning.model for trial in study.trials()}
]


@pytest.fixture(autouse=True)
def reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model of the hub is there."""
    monkeypatch.setattr(registry, "fingerprint", lambda name: "commit")


@pytest.mark.parametrize("study", ON_THE_HUB)
def test_every_definition_validates(study: str) -> None:
    checks.check_definitions(STUDIES[study].trials(), None, Cluster())


@pytest.mark.parametrize(("study", "text"), [("smollm2-oneshot", "novels"), ("qwen-coder-0.5b", "python/test")])
def test_a_text_that_only_a_data_directory_has_is_named(study: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTS_RUN_GENERATED_CODE", "1")
    with pytest.raises(UserError, match=text):
        checks.check_definitions(STUDIES[study].trials(), None, Cluster())


def test_what_a_model_writes_runs_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HTS_RUN_GENERATED_CODE", raising=False)
    with pytest.raises(UserError, match="--run-generated-code"):
        checks.check_definitions(STUDIES["qwen-coder-0.5b"].trials(), None, Cluster())


def test_a_model_that_cannot_be_had_is_named_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str) -> str:
        raise UserError(f"{name}: the Hugging Face hub cannot be reached")

    monkeypatch.setattr(registry, "fingerprint", unreachable)
    with pytest.raises(UserError, match=r"qwen2\.5-0\.5b: .* cannot be reached"):
        checks.check_definitions(STUDIES["sparsities"].trials(), None, Cluster())


def test_a_tile_or_a_task_that_does_not_exist_is_named() -> None:
    trial = next(trial for trial in STUDIES["demo"].trials() if trial.pruning.tile)
    large = dataclasses.replace(trial, pruning=dataclasses.replace(trial.pruning, tile=(4096, 64)))
    with pytest.raises(UserError, match="4096x64"):
        checks.check_definitions([trial, large], None, Cluster())
    odd = dataclasses.replace(trial, evaluation=dataclasses.replace(trial.evaluation, tasks=("helaswag",)))
    with pytest.raises(UserError, match=r"helaswag.*did you mean hellaswag"):
        checks.check_definitions([trial, odd], None, Cluster())


@pytest.mark.parametrize("study", list(STUDIES))
def test_every_step_has_an_estimate(study: str) -> None:
    steps = plan.steps(STUDIES[study].trials()).values()
    assert all((checks.memory(step, Cluster()) or 0) > 0 for step in steps)
    hours, unknown = checks.gpu_hours(steps, Cluster())
    assert hours > 0 and unknown == 0


def test_learning_a_7b_model_does_not_fit_one_gpu_of_80_gib() -> None:
    trials = STUDIES["accuracy-large"].trials()
    with pytest.raises(UserError, match=r"maskllm .* needs about 1\d\d GiB of GPU memory"):
        checks.check_definitions(trials, None, Cluster(gpu_memory=80))
    one_shot = [trial for trial in trials if trial.pruning.method == "sparsegpt"]
    checks.check_definitions(one_shot, None, Cluster(gpu_memory=80))


def test_ranking_tiles_over_the_model_takes_the_whole_model() -> None:
    needs = [
        cost.memory(build.one_shot("llama-2-7b", "wanda", "hybrid", 0.35, (128, 128), Calibration(), ranking)) or 0
        for ranking in ("weight", "model")
    ]
    # Weights and gradients of two bytes: 25 GiB of 6.7 thousand million.
    assert needs[0] < 10 and 25 < needs[1] < 45


def test_memory_grows_with_what_is_kept() -> None:
    [pruning] = [trial.pruning for trial in STUDIES["tile-shapes"].trials() if trial.pruning.tile == (64, 64)]
    assert pruning.learning is not None

    def memory(**changes: object) -> float:
        recipe = dataclasses.replace(pruning.learning.recipe, **changes)  # type: ignore[union-attr,arg-type]
        learning = dataclasses.replace(pruning.learning, recipe=recipe)  # type: ignore[type-var]
        return cost.memory(dataclasses.replace(pruning, learning=learning)) or 0

    assert memory() < memory(microbatch=4) < memory(microbatch=4, activation_checkpointing=False)


def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were here, and took any job."""
    monkeypatch.setattr(queue, "require", lambda: None)
    monkeypatch.setattr(queue, "check", lambda *_: None)


@pytest.mark.parametrize(
    ("kind", "others", "told", "refused"),
    [
        ("ext2/ext3", None, False, False),
        ("ext2/ext3", "node[1-4]", False, True),
        ("ext2/ext3", "node[1-4]", True, False),
        ("tmpfs", "node[1-4]", False, True),
        ("nfs", "node[1-4]", False, False),
        ("lustre", "node[1-4]", False, False),
    ],
)
def test_results_must_be_where_the_nodes_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, others: str | None, told: bool, refused: bool
) -> None:
    monkeypatch.setattr(checks, "_file_system", lambda path: kind)
    no_slurm(monkeypatch)
    here = socket.gethostname().partition(".")[0]
    monkeypatch.setattr(queue, "partition", lambda cluster: [queue.Part(60, others or here, "idle")])
    cluster = Cluster(shared_results=told)
    if refused:
        with pytest.raises(UserError, match=r"shared_results = true"):
            checks.check_cluster(cluster, ["prune"], tmp_path / "runs")
    else:
        checks.check_cluster(cluster, ["prune"], tmp_path / "runs")


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"gpus": ["evaluate=8"]}, "stage evaluate asks for 8 GPUs, and uses one: give --gpus evaluate=1"),
        ({"nodes": ["prune=2"]}, "stage prune asks for 2 nodes, and uses one: give --nodes prune=1"),
        ({"nodes": ["learn=0"]}, "stage learn asks for no node"),
    ],
)
def test_what_would_idle_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resources: dict[str, list[str]], message: str
) -> None:
    no_slurm(monkeypatch)
    with pytest.raises(UserError, match=message):
        checks.check_cluster(override(Cluster(), {}, resources), ["prune", "learn", "evaluate"], tmp_path)


def test_a_time_limit_within_the_signals_lead_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_slurm(monkeypatch)
    monkeypatch.setattr(queue, "partition", lambda cluster: [queue.Part(60, "node1", "idle")])
    cluster = override(Cluster(shared_results=True), {}, {"time": ["learn=2"]})
    with pytest.raises(UserError, match=r"stage learn has a time limit of 2 minutes.* 120 seconds .*--time learn="):
        checks.check_cluster(cluster, ["learn"], tmp_path)
    checks.check_cluster(override(cluster, {}, {"time": ["learn=3"]}), ["learn"], tmp_path)


def test_a_path_that_slurm_would_expand_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_slurm(monkeypatch)
    with pytest.raises(UserError, match=r"100%j has a % in its path"):
        checks.check_cluster(Cluster(), ["learn"], tmp_path / "100%j")


@pytest.mark.parametrize(
    ("sinfo", "warning"),
    [
        pytest.param("gpu*|1:00:00|node[1-2]|idle\n", "", id="idle"),
        pytest.param("gpu*|1:00:00|node1|drained*\ngpu*|1:00:00|node2|mixed\n", "", id="one-of-two-drained"),
        pytest.param("gpu*|1:00:00|node1|idle~\n", "", id="powered-down-until-needed"),
        pytest.param(
            "gpu*|1:00:00|node1|drained\n", "no node of .* is in service (node1 drained): jobs will wait", id="drained"
        ),
        pytest.param("gpu*|1:00:00|node1|down*\n", "no node of .* (node1 down*)", id="down"),
        pytest.param("gpu*|1:00:00||n/a\n", "no node of .* (it has none)", id="no-nodes"),
        pytest.param("", "no node of .* (it has none)", id="no-answer"),
    ],
)
def test_a_partition_out_of_service_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, sinfo: str, warning: str
) -> None:
    no_slurm(monkeypatch)
    monkeypatch.setattr(queue, "_ask", lambda *command: sinfo)
    checks.check_cluster(Cluster(shared_results=True), ["learn"], tmp_path)
    assert [re.search(re.escape(warning).replace(r"\.\*", ".*"), line) is not None for line in caplog.messages] == (
        [True] if warning else []
    )


@pytest.mark.parametrize("executor", ["slurm", "local", "debug"])
@pytest.mark.parametrize(("place", "mode"), [("", 0o777), ("sweeps", 0o777), ("sweeps/demo", 0o757)])
def test_folders_whose_pickles_others_can_write_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: str, place: str, mode: int
) -> None:
    no_slurm(monkeypatch)
    monkeypatch.setattr(queue, "_ask", lambda *command: "")
    (tmp_path / "sweeps" / "demo").mkdir(parents=True)
    (tmp_path / place).chmod(mode)
    cluster = Cluster(executor=executor, shared_results=True)
    if executor == "debug":
        checks.check_cluster(cluster, [], tmp_path)
    else:
        with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path / place))} can be written by others"):
            checks.check_cluster(cluster, [], tmp_path)
    checks.check_cluster(dataclasses.replace(cluster, trust_writers=True), [], tmp_path)


def test_processes_that_cannot_share_a_microbatch_are_refused() -> None:
    trials = STUDIES["sparsities"].trials()
    with pytest.raises(UserError, match=r"cannot divide its microbatch of .* among 14 processes"):
        checks.check_definitions(trials, None, override(Cluster(), {}, {"gpus": ["learn=7"], "nodes": ["learn=2"]}))


def test_several_gpus_divide_the_memory_of_learning() -> None:
    [step] = [s for s in plan.steps(STUDIES["tile-shapes"].trials()).values() if s.pruning.tile == (64, 64)][-2:-1]
    assert step.kind == "learn"
    one, two, four = (checks.memory(step, override(Cluster(), {}, {"gpus": [f"learn={n}"]})) or 0 for n in (1, 2, 4))
    assert one > two > four > 0
