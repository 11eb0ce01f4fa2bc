"""The wheel and the source archive: they hold what runs, and run outside a clone."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("patch", "stoicc", "experiments", "analysis", "slurm")

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `make dist` made, or one made now."""
    if named := os.environ.get("DIST"):
        return Path(named)
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True)
    return folder


def shipped() -> set[str]:
    """The committed files of the packages."""
    listed = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.splitlines())


def test_both_hold_every_file_of_the_packages_and_no_results(built: Path) -> None:
    (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(source) as archive:
        in_source = {name.partition("/")[2] for name in archive.getnames()}
    for held in (in_wheel, in_source):
        assert shipped() <= held
        assert not any(name.startswith(("results/", "tests/", "docs/")) for name in held)
    assert wheel.stat().st_size < 20e6 and source.stat().st_size < 20e6


def test_a_wheel_runs_outside_a_clone(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    work = tmp_path / "work"
    work.mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed"), "OMP_NUM_THREADS": "1"}

    def hts(*words: str) -> str:
        ran = subprocess.run(
            [sys.executable, "-m", "slurm.cli", *words], cwd=work, env=environment, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    assert "embedded" in hts("models")
    hts("run", "demo", "--where", "method=magnitude")
    assert "Magnitude" in hts("table", "demo", "--results", "runs", "--format", "md")
    found = subprocess.run(
        [sys.executable, "-c", "import patch; print(patch.__file__)"], cwd=work, env=environment, capture_output=True
    )
    assert str(tmp_path).encode() in found.stdout
