"""Runs the PTX of a kernel on a CPU: what a kernel computes, where its instructions are known to no interpreter.

All threads of a block take each instruction together, as numpy arrays, so branches must be the same for all of them.
Known are the instructions that Triton makes of the decode kernel: tensor cores by their documented fragments, 2:4 with
metadata too, ``ldmatrix``, asynchronous copies (done at once), clusters. Every address is checked to lie in a buffer,
and registers and shared memory that were not written are an error.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Array = Any
_INTEGERS = {"8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}
_SIGNED = {"8": np.int8, "16": np.int16, "32": np.int32, "64": np.int64}
_GAP = 1 << 12


class Memory:
    """Global memory: copies of tensors, each at an address of its own."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.start, self.size, self.kinds = {}, {}, {name: tensor.dtype for name, tensor in tensors.items()}
        at = 1 << 16
        chunks = []
        for name, tensor in tensors.items():
            raw = tensor.contiguous().flatten().view(torch.uint8).numpy()
            self.start[name], self.size[name] = at, len(raw)
            chunks.append((at, raw))
            at = (at + len(raw) + _GAP) // 256 * 256 + 256
        self.bytes, self.owned = np.zeros(at, np.uint8), np.zeros(at, bool)
        for place, raw in chunks:
            self.bytes[place : place + len(raw)], self.owned[place : place + len(raw)] = raw, True

    def tensor(self, name: str) -> torch.Tensor:
        raw = self.bytes[self.start[name] : self.start[name] + self.size[name]].copy()
        return torch.from_numpy(raw).view(self.kinds[name])


def _gather(memory: Array, owned: Array, addresses: Array, size: int) -> Array:
    place = addresses.astype(np.int64)[:, None] + np.arange(size)
    assert not (addresses.astype(np.int64) % size).any(), "misaligned address"
    assert place.min(initial=0) >= 0 and place.max(initial=0) < len(memory), "address outside of memory"
    assert owned[place].all(), "address outside of any buffer, or memory that was not written"
    return memory[place]


def _floats(words: Array, kind: str) -> Array:
    """Two 16-bit floats of each word, along a new last axis, as float32."""
    halves = words.astype(np.uint32)[..., None] >> np.array([0, 16], np.uint32) & np.uint32(0xFFFF)
    return _float(halves, kind)


def _float(halves: Array, kind: str) -> Array:
    if kind == "bf16":
        return (halves.astype(np.uint32) << 16).view(np.float32)
    return halves.astype(np.uint16).view(np.float16).astype(np.float32)


def _rounded(values: Array, kind: str) -> Array:
    """The bits of float32 values as 16-bit floats."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).view(torch.int16).numpy().view(np.uint16)


def _fragments(registers: Sequence[Array], kind: str) -> Array:
    """``[warps, 8, 4, registers, 2]``: of each lane ``4q + p`` its values."""
    return np.stack([_floats(r.reshape(-1, 8, 4), kind) for r in registers], axis=3)


def _mma(operands: list[list[Array]], kind: str, sparse: bool, selector: int) -> list[Array]:
    a, b, c = operands[0], operands[1], operands[2]
    own = _fragments(a, kind)  # register r: row q + 8 (r % 2), columns 8 (r // 2) + 2p and the next
    warps = len(own)
    left = own.reshape(warps, 8, 4, 2, 2, 2).transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, 16)
    if sparse:
        words = operands[3][0].reshape(warps, 8, 2, 2)[:, :, selector]
        halves = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], axis=1)  # warp, half, q, p'
        nibbles = halves[..., None] >> (4 * np.arange(4)).astype(np.uint32) & np.uint32(15)
        groups = nibbles.reshape(warps, 16, 8).astype(np.int64)
        first, second = groups & 3, groups >> 2
        assert (first < second).all(), "metadata is not ascending"
        wide = np.zeros((warps, 16, 8, 4), np.float32)
        np.put_along_axis(wide, first[..., None], left.reshape(warps, 16, 8, 2)[..., :1], -1)
        np.put_along_axis(wide, second[..., None], left.reshape(warps, 16, 8, 2)[..., 1:], -1)
        left = wide.reshape(warps, 16, 32)
    depth = left.shape[2]
    # Register r: column q, rows 8r + 2p and the next.
    right = _fragments(b, kind).transpose(0, 3, 2, 4, 1).reshape(warps, depth, 8)
    sums = np.stack([r.view(np.float32).reshape(-1, 8, 4) for r in c], axis=3).reshape(warps, 8, 4, 2, 2)
    total = sums.transpose(0, 3, 1, 2, 4).reshape(warps, 16, 8).astype(np.float64)
    total = (total + left.astype(np.float64) @ right.astype(np.float64)).astype(np.float32)
    back = total.reshape(warps, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 4)
    return [np.ascontiguousarray(back[:, register]).view(np.uint32) for register in range(4)]


def _lop3(a: Array, b: Array, c: Array, table: int) -> Array:
    found = np.zeros_like(a)
    for case in range(8):
        if table >> case & 1:
            sides = [value if case & bit else ~value for value, bit in ((a, 4), (b, 2), (c, 1))]
            found |= sides[0] & sides[1] & sides[2]
    return found


_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}


@dataclass(frozen=True)
class Instruction:
    """One line: its guard's register and whether that is negated, its name and operands."""

    guard: str
    negated: bool
    name: str
    operands: list[str]

    @classmethod
    def of(cls, line: str) -> "Instruction":
        guard = re.match(r"@(!?)([%\w]+)\s+", line)
        name, _, rest = (line[guard.end() :] if guard else line).partition(" ")
        operands = [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", rest) if part.strip()]
        return cls(guard[2] if guard else "", bool(guard and guard[1]), name, operands)


@dataclass
class Block:
    """One thread block; ``run`` stops where it waits for the others of its cluster."""

    lines: list[Instruction]
    labels: dict[str, int]
    parameters: list[int]
    place: tuple[int, int]
    grid: tuple[int, int]
    threads: int
    memory: Memory
    shared: int
    registers: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.own, self.written = np.zeros(self.shared, np.uint8), np.zeros(self.shared, bool)
        self.special = {
            "%tid.x": np.arange(self.threads),
            "%ctaid.x": np.full(self.threads, self.place[0]),
            "%ctaid.y": np.full(self.threads, self.place[1]),
            "%nctaid.x": np.full(self.threads, self.grid[0]),
            "global_smem": np.zeros(self.threads),
        }

    def run(self) -> Iterator[None]:
        at, everyone = 0, np.ones(self.threads, bool)
        while True:
            line = self.lines[at]
            at += 1
            mask = self.registers[line.guard] ^ line.negated if line.guard else everyone
            if line.name in ("bra", "bra.uni"):
                assert mask.all() or not mask.any(), "threads of a block part ways"
                at = self.labels[line.operands[0]] if mask.any() else at
            elif line.name == "ret":
                return
            elif line.name == "barrier.cluster.wait.acquire":
                yield
            else:
                self._step(line.name, line.operands, mask)

    def _value(self, text: str, bits: str, signed: bool = False) -> Array:
        kinds = _SIGNED if signed else _INTEGERS
        if text in self.registers:
            return self.registers[text].astype(_INTEGERS[bits], copy=False).view(kinds[bits])
        text = re.sub(r"^0f(?=[0-9A-F]{8}$)", "0x", text).lower() if text.startswith("0f") else text
        if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)U?", text):
            return (
                np.full(self.threads, int(text.rstrip("U"), 0) & ((1 << int(bits)) - 1), np.uint64)
                .astype(_INTEGERS[bits])
                .view(kinds[bits])
            )
        return self.special[text].astype(_INTEGERS[bits]).view(kinds[bits])

    def _set(self, name: str, value: Array, mask: Array) -> None:
        if not mask.all():
            value = np.where(mask, value, self.registers.get(name, np.zeros_like(value)))
        self.registers[name] = value

    def _address(self, text: str) -> Array:
        base, _, offset = text.strip("[] ").partition("+")
        base = base.strip()
        bits = "64" if base.startswith("%rd") else "32"
        address = self._value(base, bits).astype(np.int64) + int(offset or 0)
        return address if bits == "64" else address & 0xFFFFFFFF

    def _load(self, space: str, addresses: Array, size: int) -> Array:
        if space == "shared":
            return _gather(self.own, self.written, addresses, size)
        return _gather(self.memory.bytes, self.memory.owned, addresses, size)

    def _step(self, name: str, arguments: list[str], mask: Array) -> None:
        parts = name.split(".")
        kind = parts[-1]
        bits = re.sub(r"\D", "", kind) or "32"
        if parts[0] in ("ld", "st"):
            self._move(parts, arguments, mask, bits)
            return
        if parts[0] in ("createpolicy", "griddepcontrol", "bar", "barrier", "fence") or name.startswith(
            ("cp.async.commit", "cp.async.wait", "griddep")
        ):
            if parts[0] == "createpolicy":
                self._set(arguments[0], np.zeros(self.threads, np.uint64), mask)
            return
        if name == "cp.async.cg.shared.global":
            target, source, count = self._address(arguments[0]), self._address(arguments[1]), arguments[3]
            size = self._value(count, "32").astype(np.int64)
            found = np.zeros((self.threads, 16), np.uint8)
            some = mask & (size > 0)
            assert set(size.tolist()) <= {0, 16}
            found[some] = self._load("global", source[some], 16)
            place = target[:, None] + np.arange(16)
            self.own[place[mask]], self.written[place[mask]] = found[mask], True
            return
        if parts[0] == "ldmatrix":
            rows = self._address(arguments[1]).reshape(-1, 4, 8)
            for register, target in enumerate(_list(arguments[0])):
                found = self._load("shared", rows[:, register].flatten(), 16).reshape(-1, 8, 4, 4)
                self._set(target, np.ascontiguousarray(found).view(np.uint32).flatten(), mask)
            return
        if parts[0] == "mma":
            lists = [[self._value(each, "32") for each in _list(text)] for text in arguments[1:4]]
            sparse = parts[1].startswith("sp")
            lists += [[self._value(arguments[4], "32")]] if sparse else []
            made = _mma(lists, parts[-2], sparse, int(arguments[5]) if sparse else 0)
            for target, value in zip(_list(arguments[0]), made, strict=True):
                self._set(target, value, mask)
            return
        self._set(arguments[0], self._compute(parts, kind, bits, arguments[1:]), mask)

    def _move(self, parts: list[str], arguments: list[str], mask: Array, bits: str) -> None:
        if "param" in parts:
            index = int(re.sub(r".*_param_(\d+)\]", r"\1", arguments[1]))
            self._set(arguments[0], np.full(self.threads, self.parameters[index]).astype(_INTEGERS[bits]), mask)
            return
        space = "shared" if any(part.startswith("shared") for part in parts) else "global"
        count = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d", part)), 1)
        size = int(bits) // 8
        if parts[0] == "ld":
            addresses = self._address(arguments[1])[mask]
            found = self._load(space, addresses, size * count) if mask.any() else np.zeros((0, size * count), np.uint8)
            words = np.ascontiguousarray(found).view(_INTEGERS[bits])
            for index, target in enumerate(_list(arguments[0])):
                whole = np.zeros(self.threads, _INTEGERS[bits])
                whole[mask] = words[:, index] if mask.any() else 0
                self._set(target, whole, mask)
            return
        values = np.stack([self._value(each, bits) for each in _list(arguments[1])], axis=1)
        raw = np.ascontiguousarray(values).view(np.uint8)[mask]
        place = self._address(arguments[0])[mask][:, None] + np.arange(size * count)
        if space == "shared":
            self.own[place], self.written[place] = raw, True
        else:
            assert self.memory.owned[place].all(), "a store outside of any buffer"
            self.memory.bytes[place] = raw

    def _compute(self, parts: list[str], kind: str, bits: str, given: list[str]) -> Array:
        name, signed = parts[0], kind.startswith("s")
        take = lambda index: self._value(given[index], bits, signed)  # noqa: E731
        if kind == "pred":
            sides = [np.full(self.threads, g == "-1") if g in ("-1", "0") else self.registers[g] for g in given]
            both = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
            return both[name](*sides) if name in both else (~sides[0] if name == "not" else sides[0])
        if name == "setp":
            return _COMPARE[parts[1]](take(0), take(1))
        if name == "selp":
            return np.where(self.registers[given[2]], take(0), take(1))
        if name == "mov":
            return take(0)
        if name == "cvt":
            source, last = parts[-1], re.sub(r"\D", "", parts[-2])
            if source == "f32":
                return _rounded(self._value(given[0], "32").view(np.float32), parts[-2])
            if parts[-2] == "f32":
                return _float(self._value(given[0], "16"), source).view(np.uint32)
            return self._value(given[0], bits, signed).astype(_SIGNED[last]).view(_INTEGERS[last])
        if name in ("fma", "add", "mul", "sub") and kind in ("f32", "bf16x2", "f16x2"):
            return self._floating(name, kind, given)
        if name in ("mul", "mad") and parts[1] in ("wide", "hi"):
            product = (take(0).astype(np.int64) * take(1).astype(np.int64)).view(np.uint64)
            if parts[1] == "hi":
                assert bits == "32" and name == "mul"
                return (product >> np.uint64(32)).astype(np.uint32).view(take(0).dtype)
            return product + self._value(given[2], "64") if name == "mad" else product
        if name == "mad":
            return take(0) * take(1) + take(2)
        if name == "lop3":
            return _lop3(take(0), take(1), take(2), int(given[3], 0))
        if name == "bfe":
            first, length = int(given[1]), int(given[2])
            return take(0) >> np.uint32(first) & np.uint32((1 << length) - 1)
        if name in ("shl", "shr"):
            places = self._value(given[1], "32").astype(_SIGNED[bits] if signed else _INTEGERS[bits])
            return np.left_shift(take(0), places) if name == "shl" else np.right_shift(take(0), places)
        if name == "shfl":
            lane = np.arange(self.threads)
            return take(0)[lane ^ int(given[1])]
        plain = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and, "or": np.bitwise_or}
        plain |= {"xor": np.bitwise_xor, "min": np.minimum, "max": np.maximum, "div": np.floor_divide, "rem": np.fmod}
        if name == "not":
            return ~take(0)
        if name == "neg":
            return -take(0)
        return plain[name](take(0), take(1))

    def _floating(self, name: str, kind: str, given: list[str]) -> Array:
        words = [self._value(text, "32") for text in given]
        half = kind.removesuffix("x2")
        sides = [w.view(np.float32) if kind == "f32" else _floats(w, half) for w in words]
        wide = [side.astype(np.float64) for side in sides]
        exact = {
            "fma": lambda: wide[0] * wide[1] + wide[2],
            "add": lambda: wide[0] + wide[1],
            "sub": lambda: wide[0] - wide[1],
            "mul": lambda: wide[0] * wide[1],
        }[name]()
        if kind == "f32":
            return exact.astype(np.float32).view(np.uint32)
        halves = _rounded(exact.astype(np.float32), half).astype(np.uint32)
        return halves[:, 0] | halves[:, 1] << np.uint32(16)


def _list(text: str) -> list[str]:
    return [each.strip() for each in text.strip("{} ").split(",")]


def _parsed(ptx: str) -> tuple[list[Instruction], dict[str, int]]:
    lines: list[Instruction] = []
    labels: dict[str, int] = {}
    body = ptx[ptx.index("// %bb.0") :]
    for line in body[: body.index("$L__func_end0")].split("\n"):
        text = line.split("//")[0].strip()
        label = re.fullmatch(r"(\$\w+):", text)
        if label:
            labels[label[1]] = len(lines)
            continue
        text = re.sub(r"^\{ (?=\.reg)", "", text)
        for statement in text.split(";"):
            one = re.sub(r"\s+", " ", statement).strip()
            if one and one not in ("{", "}") and not one.startswith((".", "}")):
                lines.append(Instruction.of(one))
    return lines, labels


def run(
    ptx: str, tensors: dict[str, torch.Tensor], arguments: Sequence[str | int], grid: tuple[int, int], shared: int
) -> dict[str, torch.Tensor]:
    """What a kernel leaves in its tensors.

    Args:
        tensors: by any name.
        arguments: the kernel's, in order: names of tensors, and integers.
        grid: blocks along x and y.
        shared: bytes of a block's shared memory.
    """
    memory = Memory(tensors)
    threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])  # type: ignore[index]
    cluster = re.search(r"\.reqnctapercluster (\d+)", ptx)
    together = int(cluster[1]) if cluster else 1
    lines, labels = _parsed(ptx)
    values = [memory.start[each] if isinstance(each, str) else each for each in arguments]
    values += [0] * 4
    for y in range(grid[1]):
        for x in range(0, grid[0], together):
            places = [(x + rank, y) for rank in range(together)]
            blocks = [Block(lines, labels, values, place, grid, threads, memory, shared).run() for place in places]
            running = blocks
            while running:
                running = [block for block in running if next(block, "done") != "done"]
    return {name: memory.tensor(name) for name in tensors}
