"""Damages files in every way and says what came of it: refused in one line, the same, another result, or a traceback.

    python tests/fuzz.py [--mutations 1000] [--seed 0] [target ...]

A target makes its files once and says what reading them gives. A mutation changes one file: bits, bytes, pieces cut
out, doubled or exchanged; of JSON also single values. A `UserError` of one line *refuses* it, some of them *by
checksum*. Whatever then reads otherwise without an error is *silent*; what raises anything else is a *traceback*; what
takes over ten seconds of a core is *slow*. Exits with 1 if there is any of these.
"""

import argparse
import dataclasses
import io
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patch.errors import UserError

SLOW = 10
JUNK: list[Any] = [None, True, -1, 0, 1 << 80, 1e300, float("nan"), float("inf"), "", "[/x]", "\x00", [], {}, [[]] * 3]


@dataclass(frozen=True)
class Target:
    """Files that are damaged.

    Attributes:
        make: writes them to a folder.
        read: what they give; plain data that can be compared.
        means: whether another result without an error is a fault; not where every file means something.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    means: bool = True


def mutate(content: bytes, random_: random.Random) -> bytes:
    """One piece of damage to a file."""
    kind = random_.choice(("bit", "byte", "cut", "double", "exchange", "truncate", "insert", "zero"))
    data, at = bytearray(content), random_.randrange(max(1, len(content)))
    size = random_.choice((1, 8, 64, 4096))
    if not data:
        return b"\x00"
    if kind == "bit":
        data[at] ^= 1 << random_.randrange(8)
    elif kind == "byte":
        data[at] = random_.randrange(256)
    elif kind == "cut":
        del data[at : at + size]
    elif kind == "double":
        data[at:at] = data[at : at + size]
    elif kind == "exchange":
        other = random_.randrange(len(data))
        data[at : at + size], data[other : other + size] = data[other : other + size], data[at : at + size]
    elif kind == "truncate":
        del data[at:]
    elif kind == "insert":
        data[at:at] = random_.randbytes(size)
    else:
        data[at : at + size] = bytes(len(data[at : at + size]))
    return bytes(data)


def mutate_json(content: bytes, random_: random.Random) -> bytes:
    """One value of a JSON file becomes another, goes, or is nested deeply."""
    try:
        whole = json.loads(content)
    except ValueError:
        # Lines of JSON, one of which is changed; or none.
        lines = content.splitlines(keepends=True)
        if len(lines) < 2:
            return mutate(content, random_)
        place = random_.randrange(len(lines))
        lines[place] = mutate_json(lines[place], random_) + b"\n"
        return b"".join(lines)
    places: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, part in items:
            places.append((value, key))
            collect(part)

    collect(whole)
    if not places:
        return mutate(content, random_)
    holder, key = random_.choice(places)
    action = random_.choice(("junk", "junk", "junk", "delete", "rename", "deep"))
    if action == "delete":
        del holder[key]
    elif action == "rename" and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif action == "deep":
        holder[key] = "@deep@"
        return json.dumps(whole).replace('"@deep@"', "[" * 20_000 + "]" * 20_000).encode()
    else:
        holder[key] = random_.choice(JUNK)
    return json.dumps(whole).encode()


def outcome(target: Target, folder: Path, expected: Any) -> tuple[str, str]:
    """What reading the damaged files comes to, and its message."""

    def late(*_: Any) -> None:
        raise TimeoutError

    # Seconds of the processor, so that other work on the machine is no fault; and some more of a clock, for waiting.
    signal.signal(signal.SIGPROF, late)
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_PROF, SLOW)
    signal.alarm(10 * SLOW)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            found = target.read(folder)
    except UserError as error:
        if "\n" in str(error):
            return "traceback", f"several lines: {error}"
        return "by checksum" if re.search("SHA-256|digest|rows above are not", str(error)) else "refused", ""
    except TimeoutError:
        return "slow", ""
    except BaseException:
        return "traceback", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    return ("same", "") if found == expected else ("silent" if target.means else "other", "")


def fuzz(name: str, target: Target, mutations: int, seed: int, keep: Path | None) -> Counter[str]:
    """Damage a target's files so often; prints what is a fault the first time that it comes up."""
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole"
        whole.mkdir()
        target.make(whole)
        files = sorted(file for file in whole.rglob("*") if file.is_file() and not file.name.endswith(".lock"))
        expected = target.read(_copied(whole, Path(temporary)))
        started = time.monotonic()
        for number in range(mutations):
            random_ = random.Random(f"{name} {seed} {number}")
            folder = _copied(whole, Path(temporary))
            file = folder / random_.choice(files).relative_to(whole)
            structured = file.suffix in (".json", ".jsonl") and random_.random() < 0.7
            file.write_bytes((mutate_json if structured else mutate)(file.read_bytes(), random_))
            what, message = outcome(target, folder, expected)
            counts[what] += 1
            fault = f"{what} {message.strip().rpartition(chr(10))[2][:160]}"
            if what in ("silent", "traceback", "slow") and fault not in seen:
                seen.add(fault)
                print(f"  {name} mutation {number} of {file.name}: {fault}", flush=True)
                if keep:
                    shutil.copytree(folder, keep / f"{name}-{number}", dirs_exist_ok=True)
        seconds = time.monotonic() - started
    print(f"{name:<10} {mutations} mutations in {seconds:.0f} s: {dict(counts)}", flush=True)
    return counts


def _copied(whole: Path, temporary: Path) -> Path:
    folder = temporary / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    return folder


def hybrid() -> Target:
    """A hybrid checkpoint: weights, masks, hybrid.json, configuration."""
    from tiny_learner import tiny_model

    from patch.audit import audit
    from patch.checkpoint import content_hash, load_info, load_masks, save_checkpoint
    from patch.oneshot import prune_model

    def make(folder: Path) -> None:
        model = tiny_model()
        layers = prune_model(model, "magnitude", "hybrid", 0.35, (24, 20), None, "cpu")
        masks = {name: layer.mask for name, layer in layers.items() if layer.mask is not None}
        info = {"structure": "hybrid", "method": "magnitude", "target": 0.35}
        save_checkpoint(folder / "checkpoint", model, None, masks, info)

    def read(folder: Path) -> Any:
        path = folder / "checkpoint"
        info = load_info(path, verify=True)
        rows = [dataclasses.astuple(row) for row in audit(path)]
        masks = {name: mask.keep().sum().item() for name, mask in load_masks(path).items()}
        return content_hash(path), rows, masks, {name: info[name] for name in ("structure", "method", "target")}

    return Target(make, read)


def packed() -> Target:
    """A packed checkpoint: records, schedules, quantization_config."""
    import torch
    from tiny_learner import tiny_model
    from transformers import AutoTokenizer

    import stoicc
    from experiments.data.models import load_model
    from experiments.embedded import MODEL
    from patch.oneshot import prune_model

    tokens = torch.arange(16)[None]

    def make(folder: Path) -> None:
        model = tiny_model(torch.bfloat16, intermediate_size=128, vocab_size=4096)
        layers = prune_model(model, "magnitude", "hybrid", 0.35, (32, 32), None, "cpu")
        masks = {name: layer.mask for name, layer in layers.items() if layer.mask is not None}
        stoicc.compile_model(model, masks)
        stoicc.save_packed(folder / "packed", model, AutoTokenizer.from_pretrained(MODEL))

    def read(folder: Path) -> Any:
        model, tokenizer = load_model(str(folder / "packed"), quantised=True)
        with torch.no_grad():
            return model(tokens).logits.float().tolist(), tokenizer("a river in the north").input_ids

    return Target(make, read)


def restore() -> Target:
    """An archive of masks."""
    from tiny_learner import tiny_model
    from transformers import AutoTokenizer

    from experiments.embedded import MODEL
    from experiments.run import mask_archive, pipeline
    from experiments.run.runtime import Machine
    from experiments.run.store import Store
    from experiments.studies.build import one_shot
    from experiments.studies.trial import Calibration
    from patch.checkpoint import content_hash

    machine = Machine("cpu", None, lambda *_: None)
    base = Path(tempfile.mkdtemp())

    def make(folder: Path) -> None:
        tiny_model(vocab_size=4096).save_pretrained(base / "model")
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(base / "model")
        pruning = one_shot(str(base / "model"), "magnitude", "hybrid", 0.35, (24, 20), Calibration("none"))
        path = pipeline.ensure_checkpoint(pruning, Store(base / "runs"), machine)
        assert path is not None
        mask_archive.export(path, folder / "masks.tar.xz")

    def read(folder: Path) -> Any:
        path = mask_archive.restore(folder / "masks.tar.xz", Store(folder / "store"), machine)
        return path.name, content_hash(path)

    return Target(make, read)


def learner() -> Target:
    """The checkpoint of a run, which says what comes of it."""
    from tiny_learner import SHORT, magnitude_prior, tiny_model, words

    from patch.learn.learner import learn

    def run(work: Path) -> Any:
        model = tiny_model()
        return learn(
            model,
            SHORT["joint"],
            words,
            sparsity=0.35,
            tile=(24, 20),
            seed=0,
            prior=magnitude_prior(model),
            work=work,
            device="cpu",
        )

    def make(folder: Path) -> None:
        run(folder)

    def read(folder: Path) -> Any:
        learned = run(folder)
        return {name: mask.keep().sum().item() for name, mask in learned.masks.items()}, learned.history

    return Target(make, read)


def rows() -> Target:
    """What a run has measured: damaged files are left out and named, the others stay."""
    from analysis.rows.load import load_rows
    from experiments.run.store import Fact, Store
    from experiments.studies.build import dense
    from experiments.studies.trial import Evaluation, Perplexity, Trial

    provenance = {"git": "0" * 40, "dirty": False, "time": "2026-01-01T00:00:00Z", "checkpoint": "c"}

    def make(folder: Path) -> None:
        store = Store(folder)
        for text in ("one", "two", "three"):
            trial = Trial(dense("embedded"), Evaluation((Perplexity(text, 256),)))
            facts = [
                Fact("perplexity", 30.0 + step, "ppl", {"source": text, "length": 256, "step": step})
                for step in range(5)
            ]
            store.write_rows(trial, f"perplexity:{text}@256", facts, provenance)

    def read(folder: Path) -> Any:
        frame = load_rows(folder / "rows")
        columns = [column for column in frame.columns if column != "origin"]
        return frame[columns].to_json(orient="records")

    return Target(make, read)


def cluster() -> Target:
    """A cluster's TOML file, of which every value means something."""
    from slurm import cluster as clusters

    def make(folder: Path) -> None:
        (folder / "cluster.toml").write_text(
            'executor = "slurm"\npartition = "gpu"\nparallel = 16\nsetup = ["module load cuda/12"]\ngpu_memory = 80\n'
            '\n[stages.learn]\ngpus = 1\nmemory = 128\ntime = "1-00:00:00"\n'
        )

    return Target(make, lambda folder: repr(clusters.load(str(folder / "cluster.toml"))), means=False)


TARGETS = {"hybrid": hybrid, "packed": packed, "restore": restore, "learner": learner, "rows": rows, "cluster": cluster}


def main() -> int:
    """Run the targets that are named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS], default=[])
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="Folder for the files of each fault.")
    options = parser.parse_args()
    total: Counter[str] = Counter()
    for name in options.targets or TARGETS:
        total += fuzz(name, TARGETS[name](), options.mutations, options.seed, options.keep)
    print(f"in all: {dict(total)}")
    return 1 if total["silent"] + total["traceback"] + total["slow"] else 0


if __name__ == "__main__":
    sys.exit(main())
