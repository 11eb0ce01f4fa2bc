"""The packed half of a trial: its checkpoint is packed, measured again, and timed; stage by stage, as `pipeline` asks.

    pack                     what packing saves, and that unpacking gives every weight back
    packed:SOURCE@LENGTH     perplexity through the packed kernels, and whether it agrees with that of the same weights
                             in the same dtype unpacked
    speed:KIND@BATCHxLENGTH  time of a pass, packed against the dense model, and memory
    carried:SHAPE            the same on a larger model's shapes with random weights (`experiments.run.projected`)

Facts are ``packed_bytes``, ``masked_bytes`` (of the prunable linears packed and dense), ``disk_bytes`` and
``packed_agreement`` (the share of their elements that unpack as they were); ``packed_perplexity``,
``unpacked_perplexity``, ``logit_disagreement``, ``logit_rounding`` and ``greedy_agreement``, ``greedy_same`` and
``greedy_decided`` (`experiments.run.greedy`); ``dense_time``, ``packed_time``, ``speedup`` and ``peak_memory`` and
``energy`` (label ``implementation``). What should agree has the label ``agrees``.

2:4 and hybrid checkpoints are packed into `stoicc`'s format, written as a packed checkpoint, and loaded from there:
what is measured is what a user would load. Unstructured ones, for contrast, go through `stoicc.unstructured`.
A dense model has nothing to pack, with fewer blocks either; of fewer bits, it is timed by the product that people
deploy (`experiments.bench.baselines`), from the checkpoint's own values. Beside a dense model in FP8, whose activations
have a scale a token, one with single scales is timed (``fp8_tensorwise_time``), which is faster where quantising on the
fly is what takes long. Nothing else is measured of it: it stands for how fast dense FP8 can be, at what perplexity is
not known.

Checkpoints of 8 bits are packed as they are: the values that were evaluated are those that are timed.

**When packed and unpacked agree.** Kernels sum in another order, so logits differ by rounding. How much rounding of
this dtype changes this model's logits is measured on one window: the relative distance between the unpacked model's
logits and those of the same weights in float32. Two models that are each that far from float32 are at most twice as far
from each other. So they agree if the packed logits are at most `LOGIT_BOUND` = 2 times that distance from the unpacked
ones and perplexities differ by at most `PERPLEXITY_BOUND` = 0.5%.

On a CPU, where the packed product is unpacked weights times activations, everything but time is measured. A stage that
is about time leaves one row of metric ``skipped`` with its reason, and is run once there is a GPU.
"""

import math
import time
from collections.abc import Callable, Collection
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from analysis.rows.format import Fact
from experiments.data import models, text
from experiments.data.registry import REGISTRY
from experiments.eval import perplexity
from experiments.run import greedy, projected
from experiments.run.provenance import provenance
from experiments.run.runtime import Machine
from experiments.run.store import SKIPPED, Store
from experiments.studies.trial import Packed, Perplexity, Pruning, Trial, Workload
from patch.checkpoint import load_masks
from patch.compressed import tensors_of
from patch.contexts import evaluating
from patch.layers import prunable_linears
from patch.quantise.linear import QuantisedLinear
from patch.quantise.precisions import PRECISIONS
from patch.structures import TILED

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from experiments.bench.model import Speed

# The label ``dense`` of speeds whose dense model computes query, key and value, and gate and up, as one; older rows
# have none, and are over a dense model with separate projections.
FUSED = "fused"
# Of `experiments.bench.baselines.WAYS`, beside a dense model in FP8.
SINGLE_SCALES = "fp8_tensorwise"
LOGIT_BOUND = 2.0
PERPLEXITY_BOUND = 0.005

# stoicc imports Triton, which a trial that is not packed does not need: it is imported where it is used.


class Artefact:
    """What the packed stages of one trial measure; each of its models is loaded when the first stage asks for it.

    Args:
        source: directory of the checkpoint, or the dense model's name.
        content: its content hash, which names the packed checkpoint.
    """

    def __init__(self, pruning: Pruning, source: str, content: str, store: Store, machine: Machine) -> None:
        self.pruning, self.source, self.content = pruning, source, content
        self.store, self.machine = store, machine
        self._commit = machine.sources.commit(source)

    def load(self, dtype: torch.dtype) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """The unpacked model, in a dtype."""
        return models.load_model(
            self.source,
            device=self.machine.device,
            dtype=dtype,
            data=self.machine.data,
            quantised=True,
            commit=self._commit,
        )

    @cached_property
    def _unpacked(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        return models.load_packable(
            self.source, device=self.machine.device, data=self.machine.data, commit=self._commit
        )

    @property
    def unpacked(self) -> "PreTrainedModel":
        """The checkpoint's weights in the dtype that they are packed in: their own, or bfloat16."""
        return self._unpacked[0]

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return self._unpacked[1]

    @cached_property
    def dense(self) -> "PreTrainedModel":
        """The model before pruning and quantising, in the same dtype."""
        if self.pruning.as_it_is:
            return self.unpacked
        return models.load_model(
            self.pruning.model,
            device=self.machine.device,
            dtype=self.unpacked.dtype,
            data=self.machine.data,
            commit=self.machine.sources.commit(self.pruning.model),
        )[0]

    @torch.no_grad()
    def exact(self) -> "PreTrainedModel":
        """A model of the same weights, as they are packed, that computes in float32."""
        model, _ = self.load(torch.float32)
        for weight, rounded in zip(model.parameters(), self.unpacked.parameters(), strict=True):
            weight.copy_(rounded)
        return model

    @cached_property
    def packed(self) -> "PreTrainedModel":
        """The packed model: of 2:4 and hybrid checkpoints, as it loads from the packed checkpoint; see the top."""
        if self.pruning.structure in TILED:
            return self._load_packed()
        model, _ = self.load(self.unpacked.dtype)
        if self.pruning.structure == "unstructured":
            from stoicc.unstructured import compile_unstructured

            compile_unstructured(model, prunable_linears(model))
        elif self.machine.can_time:
            from experiments.bench import baselines

            (baselines.deployed if self.pruning.quantisation else baselines.fused)(model)
        return model

    def _load_packed(self) -> "PreTrainedModel":
        from stoicc.linear import compile_model
        from stoicc.quantizer import save_packed

        path = self.store.packed_path(self.content)
        with self.store.lease(f"packed-{self.content}"):
            if not path.exists():
                model, tokenizer = self.load(self.unpacked.dtype)
                compile_model(model, load_masks(self.source))
                beside = models.processor_files(self.source, self.machine.data)
                save_packed(path, model, tokenizer, beside=beside)
        return models.load_model(str(path), device=self.machine.device, quantised=True)[0]

    def disk_bytes(self) -> int:
        """Bytes of the packed checkpoint's weight files; of what has no packed checkpoint, of its tensors."""
        if self.pruning.structure in TILED:
            self.packed  # noqa: B018  # written by now
            return sum(file.stat().st_size for file in self.store.packed_path(self.content).glob("*.safetensors"))
        if self.pruning.keeps_all and not self.pruning.as_it_is:
            return sum(file.stat().st_size for file in Path(self.source).glob("*.safetensors"))
        model = self.dense if self.pruning.as_it_is else self.packed
        persistent = {part.data_ptr(): part.nbytes for part in model.state_dict().values()}
        return sum(persistent.values())


Measurement = Callable[[Artefact], tuple[list[Fact], dict[str, str]]]


def measurements(trial: Trial) -> dict[str, Measurement]:
    """The packed stages of a trial by name, in the order in which they run, and what runs each.

    A measurement returns facts, and the SHA-256 of each text that it read.
    """
    about = trial.evaluation.packed
    if about is None:
        return {}
    found: dict[str, Measurement] = {"pack": _pack}
    if not trial.pruning.keeps_all:
        for item in trial.evaluation.perplexity:
            found[f"packed:{item}"] = partial(_perplexity, trial, item)
    quantisation = trial.pruning.quantisation
    # Nobody deploys a dense product of INT8 values with scales that torch has: there is nothing to time.
    deployed = not trial.pruning.keeps_all or quantisation is None or quantisation.precision != "int8"
    for work in about.workloads if deployed else ():
        found[f"speed:{work}"] = partial(_speed, about, work)
    if trial.pruning.structure == "hybrid":
        for shape in about.carried:
            found[f"carried:{shape}"] = partial(_projected, about, shape)
    return found


def run_stages(
    trial: Trial, missing: Collection[str], source: str, content: str, store: Store, machine: Machine
) -> None:
    """Run those packed stages of a trial that are missing.

    Args:
        source: directory of the checkpoint, or the dense model's name.
        content: its content hash.

    Raises:
        UserError: if a model cannot be packed, or cannot be timed.
    """
    wanted = {name: measure for name, measure in measurements(trial).items() if name in missing}
    if not wanted:
        return
    artefact = Artefact(trial.pruning, source, content, store, machine)
    for done, (name, measure) in enumerate(wanted.items()):
        machine.progress(f"{trial.label}: packed", done, len(wanted))
        started = time.monotonic()
        facts, sources = measure(artefact)
        store.write_rows(trial, name, facts, provenance(time.monotonic() - started, sources, content))
    machine.progress(f"{trial.label}: packed", len(wanted), len(wanted))
    if machine.can_time:
        from experiments.bench.model import forget_compiled

        del artefact
        forget_compiled()


def _pack(artefact: Artefact) -> tuple[list[Fact], dict[str, str]]:
    linears = prunable_linears(artefact.unpacked)
    before = sum(linear.weight.nbytes for linear in prunable_linears(artefact.dense).values())
    about = {"dtype": _name(artefact.unpacked.dtype), "device": artefact.machine.device}
    if artefact.pruning.keeps_all:
        after = sum(_stored_bytes(linear) for linear in linears.values())
        facts = []
    else:
        packed = packed_weights(artefact.packed)
        sizes = {name: size for name, (size, _) in packed.items()}
        left = prunable_linears(artefact.packed)
        after = sum(sizes.values()) + sum(linear.weight.nbytes for linear in left.values())
        same = 0
        for _, parts in packed.values():
            for name, weight in parts().items():
                own = linears[name]
                kept = own.values if isinstance(own, QuantisedLinear) else own.weight
                # By value, so that zeros of both signs are one; torch compares no float8.
                same += int((weight.float() == kept.float()).sum())
        same += sum(int((linear.weight == linears[name].weight).sum()) for name, linear in left.items())
        elements = sum(linear.weight.numel() for linear in linears.values())
        labels = about | {"elements": elements, "agrees": same == elements}
        facts = [Fact("packed_agreement", same / elements, "1", labels)]
    written = about | {"files": artefact.pruning.structure in TILED}
    return [
        Fact("packed_bytes", after, "B", about),
        Fact("masked_bytes", before, "B", about),
        Fact("disk_bytes", artefact.disk_bytes(), "B", written),
        *facts,
    ], {}


def _stored_bytes(linear: nn.Linear) -> int:
    """Bytes of a dense weight, of fewer bits its values and scales as they lie on disk."""
    if isinstance(linear, QuantisedLinear):
        return sum(part.nbytes for part in tensors_of("", linear.quantised, linear.precision).values())
    return linear.weight.nbytes


def packed_weights(model: nn.Module) -> dict[str, tuple[int, Callable[[], dict[str, Tensor]]]]:
    """Of each packed module of a model its bytes, and a call that unpacks it: weights by the linears' full names."""
    from stoicc.format import unpack
    from stoicc.kernels.unstructured import unpack_unstructured
    from stoicc.linear import HybridLinear
    from stoicc.unstructured import UnstructuredLinear

    def hybrid_parts(module: HybridLinear) -> dict[str, Tensor]:
        sizes = [rows for _, rows in module.spec.parts]
        weights = unpack(module.checked()).split(sizes)
        return {name: weight for (name, _), weight in zip(module.spec.parts, weights, strict=True)}

    def unstructured_part(name: str, module: UnstructuredLinear) -> dict[str, Tensor]:
        return {name: unpack_unstructured(module.packed)}

    found: dict[str, tuple[int, Callable[[], dict[str, Tensor]]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, HybridLinear):
            found[name] = (module.checked().nbytes, partial(hybrid_parts, module))
        elif isinstance(module, UnstructuredLinear):
            found[name] = (module.packed.nbytes, partial(unstructured_part, name, module))
    return found


def _perplexity(trial: Trial, item: Perplexity, artefact: Artefact) -> tuple[list[Fact], dict[str, str]]:
    documents = text.load_documents(item.source, artefact.machine.data)
    windows = text.perplexity_windows(documents, artefact.tokenizer, item.length)

    def measure(model: nn.Module, which: str) -> perplexity.PerplexityResult:
        label = f"{trial.label}: {item.source}, {which}"
        return perplexity.perplexity(
            model,
            windows,
            device=artefact.machine.device,
            batch=trial.evaluation.batch,
            on_batch=lambda done, total: artefact.machine.progress(label, done, total),
        )

    packed, unpacked = measure(artefact.packed, "packed"), measure(artefact.unpacked, "unpacked")
    first = windows[:1].to(artefact.machine.device)
    reference = _logits(artefact.unpacked, first)
    disagreement = distance(_logits(artefact.packed, first), reference)
    exact = artefact.exact()
    rounding = distance(_logits(exact, first), reference)
    prompt = min(greedy.PROMPT, item.length // 2)
    count = greedy.TOKENS if artefact.machine.can_time else greedy.TOKENS_ON_CPU
    prompts, count = windows[: greedy.PROMPTS, :prompt].to(first.device), min(count, item.length - prompt)
    written = greedy.agreement(artefact.packed, artefact.unpacked, exact, prompts, count, LOGIT_BOUND)
    labels = {
        "source": item.source,
        "length": item.length,
        "windows": packed.windows,
        "tokens": packed.tokens,
        "dtype": _name(artefact.unpacked.dtype),
        "device": artefact.machine.device,
    }
    verdict = labels | {"agrees": agrees(packed.value, unpacked.value, disagreement, rounding)}
    return [
        Fact("packed_perplexity", packed.value, "ppl", verdict, packed.stderr),
        Fact("unpacked_perplexity", unpacked.value, "ppl", labels, unpacked.stderr),
        Fact("logit_disagreement", disagreement, "1", verdict),
        Fact("logit_rounding", rounding, "1", labels),
        *(Fact(name, share, "1", labels | {"tokens": written.tokens}) for name, share in written.shares().items()),
    ], {item.source: documents.sha256}


def agrees(packed: float, unpacked: float, disagreement: float, rounding: float) -> bool:
    """Whether rounding explains how a packed model differs from the same weights unpacked (see the top).

    Args:
        packed, unpacked: perplexities.
        disagreement: relative distance of their logits.
        rounding: relative distance of the unpacked logits from those in float32.
    """
    close = math.isclose(packed, unpacked, rel_tol=PERPLEXITY_BOUND)
    return close and disagreement <= LOGIT_BOUND * rounding


def distance(found: Tensor, reference: Tensor) -> float:
    """Relative distance of logits, ``|found - reference| / |reference|``, in the Euclidean norm."""
    return float((found - reference).double().norm() / reference.double().norm())


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """float32 ``[batch, length, vocab]``."""
    with evaluating(model), torch.inference_mode():
        return model(input_ids=tokens, use_cache=False).logits.float()


def _speed(about: Packed, work: Workload, artefact: Artefact) -> tuple[list[Fact], dict[str, str]]:
    if not artefact.machine.can_time:
        return skipped(artefact.machine), {}
    from experiments.bench import baselines
    from experiments.bench.model import measure, single_scales

    dense = baselines.sharing(artefact.dense)
    baselines.fused(dense)
    models = {"dense": dense}
    eight = []
    rounded = artefact.pruning.quantisation
    if not artefact.pruning.as_it_is:
        models["packed"] = artefact.packed
        eight = ["packed"] if rounded and not PRECISIONS[rounded.precision].grouped else []
    if rounded and rounded.precision == "fp8" and artefact.pruning.structure == "dense":
        models[SINGLE_SCALES] = single_scales(artefact.dense, work)
        eight.append(SINGLE_SCALES)
    speeds = measure(models, work, about.rounds, eight)
    return speed_facts(speeds, work, {"dtype": _name(artefact.unpacked.dtype)}), {}


def _projected(about: Packed, shape: str, artefact: Artefact) -> tuple[list[Fact], dict[str, str]]:
    if not artefact.machine.can_time:
        return skipped(artefact.machine), {}
    from experiments.bench import baselines, model

    model.forget_compiled()
    spec = REGISTRY[shape]
    masks = load_masks(artefact.source)
    assert artefact.pruning.tile is not None
    tile = about.carried_tile or projected.projected_tile(artefact.pruning.tile, spec)
    dense = model.build(shape, artefact.machine.device)
    hybrid = baselines.sharing(dense)
    shares = projected.projected_shares(masks, spec)
    # Names end in block, part and kind: model.layers.3.self_attn.q_proj.
    sparsity = {
        name: (1 - shares[int(name.split(".")[2]), name.rpartition(".")[2]]) / 2 for name in prunable_linears(hybrid)
    }
    report = model.make_hybrid(hybrid, sparsity, tile)
    baselines.fused(dense)
    labels = {"carried": True, "shape": shape, "tile": list(tile), "own_tile": tile == artefact.pruning.tile}
    facts = [
        Fact("packed_bytes", report.bytes_after, "B", labels),
        Fact("masked_bytes", report.bytes_before, "B", labels),
    ]
    for work in about.workloads:
        speeds = model.measure({"dense": dense, "packed": hybrid}, work, about.rounds)
        facts += speed_facts(speeds, work, labels | {"dtype": "bfloat16"})
    return facts, {}


def speed_facts(speeds: "dict[str, Speed]", work: Workload, about: dict[str, object]) -> list[Fact]:
    """The facts of one workload: times in microseconds, memory in bytes, and dense time over packed time.

    Args:
        speeds: of ``dense`` and, but for the dense model itself, whose speedup is 1 by definition, of ``packed``;
            perhaps of others.
        about: further labels.
    """
    labels = about | {"kind": work.kind, "batch": work.batch, "length": work.length, "dense": FUSED}
    facts = []
    for name, speed in speeds.items():
        time, of = speed.reading.time, {"implementation": name}
        middle, low, high = (round(each, 2) for each in (time.median, time.p20, time.p80))
        state = {"clock": speed.reading.clock, "power": speed.reading.power}
        facts.append(Fact(f"{name}_time", middle, "us", labels | state, None, low, high, time.runs))
        facts.append(Fact("peak_memory", speed.peak, "B", labels | of))
        if speed.reading.steady:
            energy = speed.reading.steady.energy / (work.batch * work.length)
            facts.append(Fact("energy", float(f"{energy:.5g}"), "J/token", labels | of))
    if "packed" in speeds:
        ratio = speeds["dense"].reading.time.median / speeds["packed"].reading.time.median
        facts.append(Fact("speedup", ratio, "1", labels))
    else:
        facts.append(Fact("speedup", 1.0, "1", labels | {"by_definition": True}))
    return facts


def skipped(machine: Machine) -> list[Fact]:
    """The one row of a stage that this machine cannot time."""
    reason = f"speed is measured on a CUDA GPU, this ran on {machine.device}"
    return [Fact(SKIPPED, None, "1", {"reason": reason, "device": machine.device})]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
