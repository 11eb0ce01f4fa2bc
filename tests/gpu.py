"""Runs the tests that need a GPU, in several processes beside each other, and writes down what came of them.

    python tests/gpu.py --out runs/bench/nvidia-h200/tests.jsonl

Needs no more than pytest and what the tests import; where pytest-xdist is not to be had, this deals the tests out. Rows
(`analysis.rows.format`) say of each test file how many passed, failed and were skipped, and the seconds that they took;
``hts publish`` takes them into the committed tables. What failed is printed in full.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

# Files of tests that run kernels, or the same computation on both devices.
FILES = (
    "tests/stoicc/test_gpu.py",
    "tests/stoicc/test_unstructured.py",
    "tests/stoicc/test_format.py",
    "tests/patch/learn/test_soft_mask_triton.py",
    "tests/patch/learn/test_distributed.py",
    "tests/patch/recover/test_recovery.py",
    "tests/patch/recover/test_distributed_recovery.py",
    "tests/patch/oneshot/test_calibration.py",
    "tests/patch/oneshot/test_prune_model.py",
    "tests/patch/oneshot/test_sparsegpt_triton.py",
    "tests/patch/oneshot/test_refit.py",
)
OUTCOMES = ("passed", "failed", "skipped")


def collected(files: tuple[str, ...]) -> list[str]:
    """The ids of all tests in some files."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"cannot collect the tests:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
    return [line for line in done.stdout.splitlines() if "::" in line]


def run(shares: list[list[str]], folder: Path) -> list[subprocess.Popen[bytes]]:
    """One process a share; each leaves ``<number>.xml`` and what it prints, ``<number>.log``, in ``folder``."""
    processes = []
    # Each would otherwise have as many threads as there are cores, which wait for each other more than they compute.
    threads = str(max(1, (os.cpu_count() or 1) // len(shares)))
    environment = {"OMP_NUM_THREADS": threads} | os.environ
    for number, ids in enumerate(shares):
        listed = folder / f"{number}.txt"
        listed.write_text("\n".join(ids) + "\n")
        quiet = ["-q", "-p", "no:cacheprovider", f"--junitxml={folder / str(number)}.xml"]
        # To a file: one that fails much must not wait until its pipe is read.
        with open(folder / f"{number}.log", "w", encoding="utf-8") as log:
            command = [sys.executable, "-m", "pytest", *quiet, f"@{listed}"]
            processes.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment))
    return processes


def outcomes(folder: Path) -> dict[str, Counter[str]]:
    """By test file what its tests came to, and the seconds that they took together."""
    found: dict[str, Counter[str]] = {}
    for file in folder.glob("*.xml"):
        for case in ElementTree.parse(file).iter("testcase"):
            kinds = {child.tag for child in case}
            outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            name = case.get("classname", "").replace(".", "/") + ".py"
            found.setdefault(name, Counter()).update(
                {outcome: 1, "milliseconds": round(1e3 * float(case.get("time", 0)))}
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the rows")
    parser.add_argument("--processes", type=int, default=8, help="that run tests at a time, on one GPU or several")
    parser.add_argument("files", nargs="*", default=FILES, help="test files; all that need a GPU by default")
    options = parser.parse_args()

    import torch

    from analysis.rows.format import Fact, as_rows, digest
    from analysis.rows.jsonl import to_lines
    from experiments.run.provenance import provenance, revision
    from patch.files import write_atomic

    if not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use: `make test` runs what needs none")
    if options.out:
        # Where rows cannot say what they are of, before the minutes that they take.
        revision()
    started = time.time()
    ids = collected(tuple(options.files))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # In turns, so that no process has all of the slow ones.
        processes = run([ids[first :: options.processes] for first in range(options.processes)], folder)
        failed = any([process.wait() for process in processes])
        found = outcomes(folder)
        if failed:
            print("\n".join(log.read_text() for log in sorted(folder.glob("*.log"))))
    seconds = time.time() - started
    total = sum((counts for counts in found.values()), Counter())
    about = {"bench": "tests", "gpus": torch.cuda.device_count()}
    facts = [
        Fact(metric, value, unit, {"file": name})
        for name, counts in sorted(found.items())
        for metric, value, unit in (
            *((outcome, counts[outcome], "1") for outcome in OUTCOMES),
            ("seconds", counts["milliseconds"] / 1e3, "s"),
        )
    ]
    if options.out:
        write_atomic(options.out, to_lines(as_rows(digest(about), about, "tests", facts, provenance(seconds))))
    print(", ".join(f"{total[outcome]} {outcome}" for outcome in OUTCOMES), f"in {seconds:.0f} s")
    # A process that died left no list of what it ran.
    if total["failed"] or sum(total[outcome] for outcome in OUTCOMES) < len(ids):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
