"""Throughput in vLLM by its own benchmarks: output tokens a second of a dense model, and of the same shapes packed.

Models of the registry's shapes, whose weights vLLM makes up (``--load-format dummy``) and the plugin packs as they
load, under random uneven masks. The dense and the packed engine of a precision run on one GPU, in processes of their
own, as ``vllm serve`` runs them (CUDA graphs, ``torch.compile``), and take every load in turns. A load is what one of
vLLM's benchmarks does::

    latency@8x32+128       vllm bench latency: 8 sequences of 32 tokens at once, 128 more of each
    throughput@64x512+128  vllm bench throughput: 64 requests of 512 tokens of text, 128 more of each

Facts: ``output_tokens_per_second``, and of each engine ``weights`` in bytes.
"""

import copy
import json
import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from analysis.rows.format import Fact, digest
from experiments.bench import harness
from experiments.bench.harness import Lab, Labels, Verified
from experiments.bench.kernels import Variant, random_mask
from experiments.bench.model import config_of
from experiments.data.registry import REGISTRY
from experiments.embedded import MODEL
from experiments.studies.trial import definition
from patch import compressed
from patch.checkpoint import save_weightless
from patch.errors import UserError, check_name
from patch.quantise import precisions
from patch.tiles import TileShape, check_sparsity
from stoicc.format import SCALE_GROUP
from stoicc.timing import timing

# What vLLM calls dense weights of a precision, of as many scales as ours have, and what the plugin calls packed ones.
PRECISIONS: Mapping[str, Mapping[str, str | None]] = {
    "bf16": {"dense": None, "hybrid": "stoicc"},
    "fp8": {"dense": "fp8_per_channel", "hybrid": "stoicc-fp8"},
    "int4": {"dense": compressed.METHOD, "hybrid": "stoicc-int4"},
}
# Checkpoints: what vLLM quantises by itself it reads from a configuration, and the other has masks.
MASKED, QUANTISED = "masked", "quantised"
# Text that is split into tokens again may have some more.
MARGIN = 64
# Of the GPU that has to be free as an engine starts; its cache of keys and values is as large as the loads need.
SHARE = 0.3


@dataclass(frozen=True)
class Load:
    """What an engine is given, and asked for.

    Attributes:
        kind: the benchmark of vLLM.
        sequences: given together.
        inputs, outputs: tokens of each.
    """

    kind: str
    sequences: int
    inputs: int
    outputs: int

    def __str__(self) -> str:
        return f"{self.kind}@{self.sequences}x{self.inputs}+{self.outputs}"

    @classmethod
    def named(cls, text: str) -> "Load":
        """The load that reads so.

        Raises:
            UserError: if it is none.
        """
        found = re.fullmatch(r"(latency|throughput)@([1-9]\d*)x([1-9]\d*)\+([1-9]\d*)", text)
        if not found:
            raise UserError(f"load '{text}': give KIND@SEQUENCESxINPUTS+OUTPUTS, such as latency@8x32+128")
        return cls(found[1], int(found[2]), int(found[3]), int(found[4]))


LOADS = (
    Load("latency", 1, 128, 128),
    Load("latency", 8, 32, 128),
    Load("throughput", 64, 128, 128),
    Load("throughput", 64, 512, 128),
    Load("throughput", 16, 1024, 256),
)


@dataclass(frozen=True)
class Bench:
    """What is measured; its hash names the rows."""

    model: str
    blocks: int
    sparsity: float
    tile: TileShape
    precisions: tuple[str, ...]
    loads: tuple[Load, ...]
    rounds: int


def bench_of(
    model: str,
    blocks: int | None,
    sparsity: float,
    precisions: Sequence[str],
    loads: Sequence[str],
    rounds: int,
    tile: TileShape = (128, 128),
) -> Bench:
    """What is measured.

    Raises:
        UserError: if the model is not of the registry, tiles do not reach the sparsity, a precision is not served, or
            a load is none.
    """
    check_name("model", model, REGISTRY)
    check_sparsity(sparsity)
    for precision in precisions:
        check_name("precision", precision, PRECISIONS)
    if rounds < 2:
        raise UserError(f"rounds {rounds}: the spread needs two or more")
    chosen = tuple(map(Load.named, loads)) or LOADS
    return Bench(model, blocks or REGISTRY[model].blocks, sparsity, tile, tuple(precisions), chosen, rounds)


@dataclass(frozen=True)
class Case:
    """The engines of one precision."""

    bench: Bench
    precision: str
    folder: Path
    device: str


def cases(bench: Bench, parts: Sequence[str], lab: Lab) -> Iterator[tuple[str, Iterator[Case]]]:
    """Every precision, of the same checkpoints."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write_checkpoints(folder, bench, lab.device)
        for precision in bench.precisions:
            if (part := part_of(precision)) in parts:
                yield part, iter([Case(bench, precision, folder, lab.device)])


def part_of(precision: str) -> str:
    return f"serving:{precision}"


def write_checkpoints(folder: Path, bench: Bench, device: str) -> None:
    """Configuration and masks of a model whose weights the server makes up, and a configuration that says INT4."""
    config = config_of(bench.model, bench.blocks)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.max_position_embeddings = max(config.max_position_embeddings, longest(bench))
    generator = torch.Generator(device).manual_seed(0)
    variant, masks = Variant(bench.sparsity, bench.tile, "uneven"), {}
    for block in range(bench.blocks):
        for kind, (n, k) in REGISTRY[bench.model].linear_shapes().items():
            parent = "self_attn" if kind in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            scores = torch.rand(n, k, device=device, generator=generator)
            mask = random_mask(n, k, variant, scores, generator).to("cpu")
            masks[f"model.layers.{block}.{parent}.{kind}"] = mask
    save_weightless(folder / MASKED, config, masks, {"structure": "hybrid"})
    of_few_bits = copy.deepcopy(config)
    of_few_bits.quantization_config = compressed.quantisation_config(
        precisions.PRECISIONS["int4"], SCALE_GROUP, ["lm_head"]
    )
    of_few_bits.save_pretrained(folder / QUANTISED)


def longest(bench: Bench) -> int:
    return max(load.inputs + load.outputs for load in bench.loads)


def options(case: Case, quantization: str | None) -> dict[str, Any]:
    """Of an engine, beyond what vLLM takes by itself."""
    bench, spec = case.bench, REGISTRY[case.bench.model]
    found: dict[str, Any] = {
        "model": str(case.folder / (QUANTISED if quantization == compressed.METHOD else MASKED)),
        "tokenizer": str(MODEL),
        "load_format": "dummy",
        "dtype": "bfloat16",
        "quantization": quantization,
        "max_model_len": longest(bench) + MARGIN,
        "max_num_seqs": max(load.sequences for load in bench.loads),
        "enable_prefix_caching": False,
        "gpu_memory_utilization": SHARE,
        # Tests of this on a CPU wait for no compiler.
        "enforce_eager": case.device == "cpu",
    }
    if case.device != "cpu":
        tokens = max(load.sequences * (load.inputs + load.outputs + MARGIN) for load in bench.loads)
        cache = 2 * 2 * spec.kv_heads * spec.head_dim * bench.blocks * tokens
        found["kv_cache_memory_bytes"] = cache
    return found


def serve(given: Mapping[str, Any], pipe: Connection) -> None:
    """Be an engine: answer how many layers are packed, in how many bytes, and then each load with its seconds."""
    # Settings of vLLM are read as it is imported.
    os.environ |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_NO_USAGE_STATS": "1"}
    import vllm

    engine = vllm.LLM(**given)
    # Benchmarks make an engine; this one serves all.
    vllm.LLM.from_engine_args = lambda *_: engine
    try:
        pipe.send((*engine.apply_model(weights_of)[0], vllm.__version__))
        while True:
            pipe.send(seconds_of(pipe.recv(), given))
    except EOFError:
        pass
    finally:
        # Its process would be waited for.
        engine.llm_engine.engine_core.shutdown()


def weights_of(model: nn.Module) -> tuple[int, int]:
    """How many layers of a model are packed, and the bytes of all its tensors."""
    tensors = {id(part): part.numel() * part.element_size() for part in (*model.parameters(), *model.buffers())}
    return sum(hasattr(module, "hybrid_kinds") for module in model.modules()), sum(tensors.values())


def seconds_of(load: Load, given: Mapping[str, Any]) -> float:
    """How long a load takes, as vLLM's benchmark of its kind says, once."""
    from vllm.benchmarks import latency, throughput
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    with tempfile.NamedTemporaryFile("r", encoding="utf-8", suffix=".json") as report:
        about = ["--model", given["model"], "--tokenizer", given["tokenizer"], "--output-json", report.name]
        about += ["--max-model-len", str(given["max_model_len"]), "--disable-detokenize"]
        if load.kind == "latency":
            tool, key = latency, "avg_latency"
            about += ["--input-len", str(load.inputs), "--output-len", str(load.outputs)]
            about += ["--batch-size", str(load.sequences), "--num-iters-warmup", "0", "--num-iters", "1"]
        else:
            tool, key = throughput, "elapsed_time"
            about += ["--random-input-len", str(load.inputs), "--random-output-len", str(load.outputs)]
            about += ["--dataset-name", "random", "--num-prompts", str(load.sequences)]
        parser = FlexibleArgumentParser()
        tool.add_cli_args(parser)
        tool.main(parser.parse_args(about))
        return float(json.load(report)[key])


@dataclass(frozen=True)
class Engine:
    """A running engine, and what it said of itself."""

    pipe: Connection
    packed: int
    bytes: int
    version: str


@contextmanager
def engines(case: Case) -> Iterator[dict[str, Engine]]:
    """The dense and the packed engine of a precision, which start at the same time.

    Raises:
        UserError: if one of them ends instead.
    """
    spawned = multiprocessing.get_context("spawn")
    started = {}
    with ExitStack() as stack:
        for name, quantization in PRECISIONS[case.precision].items():
            ours, theirs = spawned.Pipe()
            process = spawned.Process(target=serve, args=(options(case, quantization), theirs))
            process.start()
            theirs.close()
            stack.callback(process.join)
            # What ends an engine.
            stack.callback(ours.close)
            started[name] = ours
        found = {name: Engine(pipe, *answer(name, pipe)) for name, pipe in started.items()}
        wanted = 4 * case.bench.blocks
        if found["dense"].packed or found["hybrid"].packed != wanted:
            raise UserError(f"vLLM packed {found['hybrid'].packed} layers of {wanted}: not timed")
        yield found


def answer(name: str, pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise UserError(f"the {name} engine ended: vLLM says above why") from None


def time_case(case: Case, verified: Verified, lab: Lab) -> list[Fact]:
    """Every load, of both engines in turns; the first round of each is not counted."""
    bench, facts = case.bench, list[Fact]()
    with engines(case) as running:
        about: dict[str, Labels] = {}
        for name, engine in running.items():
            about[name] = {"implementation": name, "precision": case.precision, "server": f"vllm {engine.version}"}
            if name == "hybrid":
                about[name] |= {"sparsity": bench.sparsity, "tile": list(bench.tile), "tiles": "uneven"}
            facts.append(Fact("weights", engine.bytes, "B", about[name]))
        for done, load in enumerate(bench.loads):
            lab.progress(f"{bench.model} {case.precision}", done, len(bench.loads))
            taken: dict[str, list[float]] = {name: [] for name in running}
            for _ in range(bench.rounds + 1):
                for name, engine in running.items():
                    engine.pipe.send(load)
                    taken[name].append(answer(name, engine.pipe))
            facts += (rate(load, taken[name][1:], about[name]) for name in running)
    return facts


def rate(load: Load, seconds: Sequence[float], about: Labels) -> Fact:
    """The median of output tokens a second, and its percentiles."""
    spread = timing([load.sequences * load.outputs / each for each in seconds])
    labels = about | {"kind": load.kind, "batch": load.sequences, "length": load.inputs, "outputs": load.outputs}
    median, p20, p80 = (round(number, 1) for number in (spread.median, spread.p20, spread.p80))
    return Fact("output_tokens_per_second", median, "1/s", labels, p20=p20, p80=p80, runs=spread.runs)


def identity(bench: Bench) -> str:
    return digest(definition(bench))


BENCH = harness.Bench(
    title="a server",
    parts=lambda bench: [part_of(precision) for precision in bench.precisions],
    cases=cases,
    file=lambda bench, part: f"serving/{bench.model}-{identity(bench)}.jsonl",
    verify=lambda case: Verified([]),
    time=time_case,
    identity=identity,
    roof=False,
)
