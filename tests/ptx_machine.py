"""Runs the inline PTX of `turboesm_kernels.ptx_text` on a CPU: one warp, its 32 lanes in lockstep, and strictly.

It knows the instructions that those texts have, as the PTX ISA manual describes them, and refuses any other. What
a GPU might let pass is an error here: an address outside of memory that was given or not aligned, shared memory
read before it was written or before its copy was waited for, a lane that touches what another wrote, or writes
what another read, with no bar.warp.sync between. Registers start as NaN.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LANES = 32
LANE = np.arange(LANES)
GROUP, THREAD = LANE // 4, LANE % 4  # g and t of PTX's matrix fragments
ALL = "0xffffffff"

JUNK = 0xFFA5A5A5FFA5FFA5
"""What registers hold at first: its lower 32 and 16 bits are NaN too."""

POLICY = 0xCACE
"""What createpolicy gives; it means nothing but that it was made."""

SHARED_BASE, GLOBAL_BASE, GLOBAL_STEP = 0x410, 0x7FFFF0010, 1 << 32
NEVER, IN_FLIGHT, THERE = range(3)  # states of a byte of shared memory

SIZES = {"pred": "?", "b16": "u2", "b32": "u4", "f32": "u4", "b64": "u8"}
TYPES = {**SIZES, "f16": "f2", "u32": "u4", "s32": "i4", "f32": "f4", "u64": "u8"}
OPERANDS = {"r": "u4", "f": "u4", "l": "u8"}


class MachineError(Exception):
    """The text cannot be run, or does what it must not."""


class RaceError(MachineError):
    """Lanes meet in shared memory with nothing that orders them."""


@dataclass(frozen=True)
class Statement:
    """A statement: what guards it ("p", or "" for nothing) and whether it must be false, its words."""

    guard: str
    negated: bool
    op: str
    operands: tuple[str, ...]


@lru_cache(maxsize=256)
def parse(text: str) -> tuple[list[Statement], dict[str, int]]:
    """The statements of a text in braces, and before which of them its labels stand."""
    if not (text.strip().startswith("{") and text.strip().endswith("}")):
        raise MachineError("a text is a block in braces")
    statements: list[Statement] = []
    labels: dict[str, int] = {}
    for part in text.strip()[1:-1].split(";"):
        rest = part.strip()
        while label := re.match(r"(\w+):(?!:)\s*", rest):
            labels[label[1]] = len(statements)
            rest = rest[label.end() :]
        if found := re.fullmatch(r"(?:@(!?)([\w$]+)\s+)?([\w.:]+)\s*(.*)", rest, re.DOTALL):
            operands = re.split(r",\s*(?![^{]*\})", found[4].strip())  # commas that are not in braces
            statements.append(Statement(found[2] or "", found[1] == "!", found[3], tuple(operands)))
        elif rest:
            raise MachineError(f"not a statement: {rest}")
    return statements, labels


def render(statements: Sequence[Statement], labels: Mapping[str, int]) -> str:
    """The text that `parse` takes apart into these."""
    lines: list[str] = []
    for at in range(len(statements) + 1):
        lines += [f"{label}:" for label, place in labels.items() if place == at]
        for own in statements[at : at + 1]:
            guard = f"@{'!' * own.negated}{own.guard} " if own.guard else ""
            lines.append(f"{guard}{own.op} {', '.join(own.operands)};")
    return "{\n" + "\n".join(lines) + "\n}"


def _shift_right(a: Array, b: Array) -> Array:
    """PTX clamps the shift; C does not define it."""
    return np.where(b < 32, a >> np.minimum(b, 31), a >> 31 if a.dtype.kind == "i" else 0).astype(a.dtype)


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """Each 4 bits of the selector name one of the bytes of b, a; the highest asks for its sign alone."""
    both = np.stack((a, b), 1).view("u1")
    chosen = (selector[:, None] >> (4 * np.arange(4, dtype="u4"))) & 0xF
    byte = both[LANE[:, None], chosen & 7]
    return np.where(chosen & 8, (byte >> 7) * 255, byte).astype("u1").view("u4")[:, 0]


def _halves(a: Array, b: Array) -> Array:
    """Two float32 as float16: a goes to the upper half."""
    return np.stack((b.astype("f2"), a.astype("f2")), 1).view("u4")[:, 0]


def _same(a: Array) -> Array:
    return a


INSTRUCTIONS: dict[str, tuple[str, str, Callable[..., Array]]] = {
    **{f"mov.{kind}": (kind, kind, _same) for kind in ("b32", "u32", "f32", "b64", "u64")},
    **{f"add.{kind}": (kind, f"{kind} {kind}", np.add) for kind in ("u32", "s32", "u64", "f32")},
    **{f"sub.{kind}": (kind, f"{kind} {kind}", np.subtract) for kind in ("u32", "s32", "u64", "f32")},
    **{f"shr.{kind}": (kind, f"{kind} u32", _shift_right) for kind in ("u32", "s32")},
    **{f"mul.lo.{kind}": (kind, f"{kind} {kind}", np.multiply) for kind in ("u32", "s32")},
    **{f"mad.lo.{kind}": (kind, f"{kind} {kind} {kind}", lambda a, b, c: a * b + c) for kind in ("u32", "s32")},
    **{
        f"selp.{kind}": (kind, f"{kind} {kind} pred", lambda a, b, p: np.where(p, a, b)) for kind in ("b32", "f32")
    },
    **{
        f"setp.{name}.{kind}": ("pred", f"{kind} {kind}", function)
        for kind in ("b32", "u32", "s32")
        for name, function in (("eq", np.equal), ("ne", np.not_equal), ("lt", np.less), ("ge", np.greater_equal))
    },
    "setp.lt.and.u32": ("pred", "u32 u32 pred", lambda a, b, p: (a < b) & p),
    "setp.eq.and.u32": ("pred", "u32 u32 pred", lambda a, b, p: (a == b) & p),
    "max.f32": ("f32", "f32 f32", np.fmax),
    "and.b32": ("b32", "b32 b32", np.bitwise_and),
    "or.b32": ("b32", "b32 b32", np.bitwise_or),
    "xor.b32": ("b32", "b32 b32", np.bitwise_xor),
    "shl.b32": ("b32", "b32 u32", lambda a, b: np.where(b < 32, a << np.minimum(b, 31), 0).astype("u4")),
    "mul.f32": ("f32", "f32 f32", np.multiply),
    "mad.wide.u32": ("u64", "u32 u32 u64", lambda a, b, c: a.astype("u8") * b + c),
    # The product is exact in float64; that the sum is rounded twice changes about one result in 2^28.
    "fma.rn.f32": ("f32", "f32 f32 f32", lambda a, b, c: (a.astype("f8") * b + c).astype("f4")),
    "neg.f32": ("f32", "f32", np.negative),
    "cvt.rn.f32.s32": ("f32", "s32", lambda a: a.astype("f4")),
    "cvt.f32.f16": ("f32", "f16", lambda a: a.astype("f4")),
    "cvt.u64.u32": ("u64", "u32", lambda a: a.astype("u8")),
    "cvt.rn.f16x2.f32": ("b32", "f32 f32", _halves),
    "prmt.b32": ("b32", "b32 b32 b32", _permute),
    "createpolicy.fractional.L2::evict_first.b64": (
        "b64", "one", lambda one: np.full(LANES, POLICY, "u8"),
    ),
}  # fmt: skip
"""Instructions that each lane does for itself: the result's type, the operands', what it is."""


class Warp:
    """A warp with its shared memory, which outlives a text, and the global memory that it may touch."""

    def __init__(self) -> None:
        self._global: list[tuple[int, NDArray[np.uint8], bool]] = []
        self._shared = np.zeros(0, "u1")
        self._copies: list[tuple[Array, Array, Array]] = []  # since the last group: where, what, lanes
        self._groups: list[list[tuple[Array, Array, Array]]] = []

    def hold(self, array: Array, writable: bool = False, at: int | None = None) -> int:
        """The address at which the bytes of a dense array are from now on: `at`, or any."""
        flat = array.reshape(-1).view("u1")
        assert np.shares_memory(flat, array)
        own = GLOBAL_BASE + GLOBAL_STEP * len(self._global) if at is None else at
        self._global.append((own, flat, writable))
        return own

    def run(self, text: str, kinds: str, *inputs: Array | float) -> list[Array]:
        """Run a text whose operands are of these kinds; its outputs, int32 or float32 [32].

        Inputs are [32], or one number for all lanes. An output that is not early-clobber ("&") gets an input's
        register, as a compiler may choose.
        """
        own = kinds.split(",")
        outputs = [kind for kind in own if kind.startswith("=")]
        self._inputs = {f"${n}": kind for n, kind in enumerate(own) if n >= len(outputs)}
        self._registers: dict[str, Array] = {}
        self._symbols: dict[str, int] = {}
        for (name, kind), value in zip(self._inputs.items(), inputs, strict=True):
            given = np.broadcast_to(np.asarray(value), LANES)
            bits = given.astype("f4").view("u4") if kind == "f" else given.astype("i8").astype(OPERANDS[kind])
            self._registers[name] = bits.copy()
        for n, kind in enumerate(outputs):
            like = [name for name, other in self._inputs.items() if other == kind[1:]]  # none where there is a "&"
            self._registers[f"${n}"] = self._registers[like[0]] if like else _junk(OPERANDS[kind[-1]])
        statements, labels = parse(text)
        at = 0
        with np.errstate(all="ignore"):
            while at < len(statements):
                try:
                    target = self._step(statements[at])
                except MachineError as error:
                    raise type(error)(f"{error}: {statements[at]}") from None
                at = at + 1 if target is None else labels[target]
        return [self._registers[f"${n}"].view("f4" if kind[-1] == "f" else "i4") for n, kind in enumerate(outputs)]

    def _step(self, statement: Statement) -> str | None:
        """Do one statement; the label to go on at, if it jumps."""
        op, operands, active = statement.op, statement.operands, np.ones(LANES, bool)
        if statement.guard:
            active = self._read(statement.guard, "pred") ^ statement.negated
        special = _SPECIAL.get(op.lstrip(".").split(".")[0])
        if op == "bra":
            if active.any() != active.all():
                raise MachineError("lanes part")
            return operands[0] if active.any() else None
        if op == "mov.b32" and "{" in "".join(operands):
            self._pack(operands, active)
        elif op in INSTRUCTIONS:
            result, sources, function = INSTRUCTIONS[op]
            pairs = zip(operands[1:], sources.split(), strict=True)
            self._write(operands[0], result, function(*(self._read(*pair) for pair in pairs)), active)
        elif special:
            special(self, op, operands, active)
        else:
            raise MachineError("unknown instruction")
        return None

    def _reg(self, op: str, operands: tuple[str, ...], active: Array) -> None:
        kind, name = operands[0].removeprefix(".").split()
        for pattern in (name, *operands[1:]):
            stem, _, count = pattern.rstrip(">").partition("<")
            for own in [f"{stem}{i}" for i in range(int(count))] if count else [stem]:
                if own in self._registers:
                    raise MachineError("declared twice")
                self._registers[own] = _junk(SIZES[kind])

    def _declare_shared(self, op: str, operands: tuple[str, ...], active: Array) -> None:
        found = re.fullmatch(r"\.align 16 \.b8 (\w+)\[(\d+)\]", operands[0])
        if not found or len(self._shared):
            raise MachineError("shared memory is one array of bytes, declared once")
        self._symbols[found[1]] = SHARED_BASE
        self._shared = np.full(int(found[2]), 0xA5, "u1")
        self._state, self._writers, self._readers = np.zeros((3, len(self._shared)), "u4")

    def _read(self, name: str, kind: str) -> Array:
        """A register or a number, as of a type of its size."""
        dtype = np.dtype(TYPES.get(kind, "f4"))
        if name in self._registers:
            found = self._registers[name]
            if found.dtype.itemsize == dtype.itemsize:
                return found.view(dtype)
        elif name in self._symbols and dtype.itemsize == 4:
            return np.full(LANES, self._symbols[name], "u4").view(dtype)
        elif re.fullmatch(r"0f[0-9a-fA-F]{8}", name) and dtype.itemsize == 4:
            return np.full(LANES, int(name[2:], 16), "u4").view(dtype)
        elif re.fullmatch(r"0x[0-9a-fA-F]+|\d+", name) and dtype.kind in "ui":
            return np.full(LANES, int(name, 0), "u8").astype(f"u{dtype.itemsize}").view(dtype)
        elif kind == "one" and name == "1.0":
            return np.ones(LANES, dtype)
        raise MachineError(f"{name} is no {kind}")

    def _write(self, name: str, kind: str, value: Array, active: Array) -> None:
        if name in self._inputs or name not in self._registers:
            raise MachineError(f"{name} cannot be written")
        register = self._read(name, kind)
        assert register.dtype == value.dtype, (register.dtype, value.dtype)
        np.copyto(register, value, where=active)

    def _pack(self, operands: tuple[str, ...], active: Array) -> None:
        """mov between a register of 32 bits and two of 16, the lower one first."""
        to, source = operands
        if to.startswith("{"):
            parts = self._read(source, "b32").view("u2").reshape(LANES, 2).T
            for name, part in zip(_names(to), parts, strict=True):
                self._write(name, "b16", part, active)
        else:
            low, high = (self._read(name, "b16") for name in _names(source))
            self._write(to, "b32", np.stack((low, high), 1).view("u4")[:, 0], active)

    def _place(self, operand: str, space: str, size: int, active: Array) -> tuple[Array, Array]:
        """For active lanes: the bytes that they mean, [n, size], and of which piece of global memory."""
        found = re.fullmatch(r"\[([\w$]+)(?:\+(\d+))?\]", operand)
        if not found:
            raise MachineError("unknown address")
        at = self._read(found[1], "u64" if space == "global" else "u32").astype("i8") + int(found[2] or 0)
        at = at[active]
        if (at % size).any():
            raise MachineError("not aligned")
        pieces = self._global if space == "global" else [(SHARED_BASE, self._shared, True)]
        piece, offset = np.full(len(at), -1), np.zeros(len(at), "i8")
        for n, (base, own, _) in enumerate(pieces):
            inside = (at >= base) & (at + size <= base + len(own))
            piece[inside], offset[inside] = n, at[inside] - base
        if (piece < 0).any():
            raise MachineError("outside of memory")
        return offset[:, None] + np.arange(size), piece

    def _fetch(self, index: Array, piece: Array) -> Array:
        """Bytes of global memory."""
        found = np.empty(index.shape, "u1")
        for n in set(piece.tolist()):
            found[piece == n] = self._global[n][1][index[piece == n]]
        return found

    def _meet(self, index: Array, active: Array, writes: bool) -> Array:
        """Lanes touch bytes of shared memory: raise where others did before. Each lane's bit, [n, size]."""
        own = np.broadcast_to((1 << LANE[active]).astype("u4")[:, None], index.shape)
        state, writers = self._state[index], self._writers[index]
        if (state == IN_FLIGHT).any():
            raise RaceError("a copy to there was not waited for")
        if writes and ((writers | self._readers[index]) & ~own).any():
            raise RaceError("another lane wrote or read there")
        if not writes and ((writers != 0) & (writers & own == 0)).any():
            raise RaceError("another lane wrote there")
        if not writes and (state == NEVER).any():
            raise MachineError("nothing was written there")
        return own

    def _ld(self, op: str, operands: tuple[str, ...], active: Array) -> None:
        space, names = _transfer(op, operands[0])
        hinted = "L2::cache_hint" in op
        if len(operands) != 2 + hinted or (hinted and (self._read(operands[2], "b64") != POLICY).any()):
            raise MachineError("operands do not fit")
        index, piece = self._place(operands[1], space, 4 * len(names), active)
        if space == "shared":
            np.bitwise_or.at(self._readers, index, self._meet(index, active, writes=False))
        data = self._shared[index] if space == "shared" else self._fetch(index, piece)
        value = np.zeros((LANES, len(names)), "u4")
        value[active] = data.view("u4")
        for name, own in zip(names, value.T, strict=True):
            self._write(name, "b32", own, active)

    def _st(self, op: str, operands: tuple[str, ...], active: Array) -> None:
        to, data = operands
        space, names = _transfer(op, data)
        index, piece = self._place(to, space, 4 * len(names), active)
        value = np.stack([self._read(name, "b32") for name in names], 1)[active].view("u1")
        if space == "shared":
            own = self._meet(index, active, writes=True)
            self._shared[index], self._state[index] = value, THERE
            np.bitwise_or.at(self._writers, index, own)
            if (self._shared[index] != value).any():
                raise RaceError("lanes write there at once")
        for n in set(piece.tolist()) if space == "global" else ():
            if not self._global[n][2]:
                raise MachineError("this memory is only read")
            self._global[n][1][index[piece == n]] = value[piece == n]
        if space == "global" and (self._fetch(index, piece) != value).any():
            raise RaceError("lanes write there at once")

    def _cp(self, op: str, operands: tuple[str, ...], active: Array) -> None:
        """Copies arrive when they are waited for, and not before; each is then as if its lane had written it."""
        if op == "cp.async.commit_group":
            self._groups.append(self._copies)
            self._copies = []
        elif op == "cp.async.wait_group":
            ready = max(len(self._groups) - int(operands[0]), 0)
            for index, data, own in chain(*self._groups[:ready]):
                self._shared[index], self._state[index], self._writers[index] = data, THERE, own
            del self._groups[:ready]
        elif op == "cp.async.ca.shared.global" and operands[2] == "16":
            index, _ = self._place(operands[0], "shared", 16, active)
            data = self._fetch(*self._place(operands[1], "global", 16, active))
            self._copies.append((index, data, self._meet(index, active, writes=True)))
            if len(np.unique(index)) != index.size:
                raise RaceError("lanes copy to there at once")
            self._state[index] = IN_FLIGHT
        else:
            raise MachineError("unknown instruction")

    def _bar(self, op: str, operands: tuple[str, ...], active: Array) -> None:
        _check(op == "bar.warp.sync" and operands == (ALL,), active)
        self._writers[:] = self._readers[:] = 0

    def _shfl(self, op: str, operands: tuple[str, ...], active: Array) -> None:
        to, source, by, clamp, mask = operands
        b = self._read(by, "u32").astype("i8")
        ways = {"bfly": LANE ^ b, "idx": b, "down": np.where(LANE + b < LANES, LANE + b, LANE)}
        found = re.fullmatch(r"shfl\.sync\.(bfly|idx|down)\.b32", op)
        _check(found and (clamp, mask) == ("0x1f", ALL), active)
        self._write(to, "b32", self._read(source, "b32")[ways[found[1]] % LANES], active)

    def _redux(self, op: str, operands: tuple[str, ...], active: Array) -> None:
        _check(op == "redux.sync.max.s32" and operands[2] == ALL, active)
        self._write(operands[0], "s32", np.full(LANES, self._read(operands[1], "s32").max()), active)

    def _mma(self, op: str, operands: tuple[str, ...], active: Array) -> None:
        """PTX ISA, matrix fragments for mma.m16n8k32 of bytes and for mma.m16n8k16 of float16.

        A register has 4 or 2 neighbours of k. The left side's are of rows g and g + 8, then of both in the other
        half of k; the result's of columns 2 t and 2 t + 1 of row g, then of row g + 8.
        """
        found = re.fullmatch(r"mma\.sync\.aligned\.m16n8k(32\.row\.col\.s32\.u8\.([us])8\.s32|16.*)", op)
        halves = op.endswith(".m16n8k16.row.col.f32.f16.f16.f32")
        d, a, b, c = (_names(operand) for operand in operands)
        _check(found and bool(found[2]) != halves and list(map(len, (d, a, b, c))) == [4, 4, 2, 4], active)
        a_kind, b_kind, wide, result = ("f2", "f2", "f8", "f32") if halves else ("u1", "u1", "i8", "s32")
        b_kind = "i1" if found[2] == "s" else b_kind
        each = 2 if halves else 4
        k = each * THREAD[:, None] + np.arange(each)
        left, right = np.zeros((16, 8 * each), wide), np.zeros((8 * each, 8), wide)
        for n, name in enumerate(a):
            own = self._read(name, "b32").view(a_kind).reshape(LANES, each)
            left[GROUP[:, None] + 8 * (n % 2), k + 4 * each * (n // 2)] = own
        for n, name in enumerate(b):
            own = self._read(name, "b32").view(b_kind).reshape(LANES, each)
            right[k + 4 * each * n, GROUP[:, None]] = own
        product = left @ right
        old = [self._read(name, result).astype(wide) for name in c]
        for n, name in enumerate(d):
            total = old[n] + product[GROUP + 8 * (n // 2), 2 * THREAD + n % 2]
            if not halves and (np.abs(total) >= 2**31).any():
                raise MachineError("a sum overflows")
            self._write(name, result, total.astype(TYPES[result]), active)


_SPECIAL = {
    "reg": Warp._reg, "shared": Warp._declare_shared, "ld": Warp._ld, "st": Warp._st, "cp": Warp._cp,
    "bar": Warp._bar, "shfl": Warp._shfl, "redux": Warp._redux, "mma": Warp._mma,
}  # fmt: skip


def _check(known: object, active: Array) -> None:
    """What all lanes do together is done by all lanes."""
    if not known or not active.all():
        raise MachineError("unknown instruction" if not known else "not all lanes take part")


def _transfer(op: str, data: str) -> tuple[str, list[str]]:
    """The space of a load or store, and its registers: 1, 2 or 4 of 32 bits."""
    found = re.fullmatch(
        r"(?:ld|st)(?:\.volatile)?\.(shared|global)(?:\.L1::no_allocate)?(?:\.L2::cache_hint)?"
        r"(?:\.v([24]))?\.[bfu]32",
        op,
    )
    names = _names(data)
    if not found or len(names) != int(found[2] or 1) or data.startswith("{") != bool(found[2]):
        raise MachineError("unknown instruction")
    return found[1], names


def _junk(dtype: str) -> Array:
    """NaN; of predicates, every other true."""
    return LANE % 2 == 1 if dtype == "?" else np.full(LANES, JUNK, "u8").astype(dtype)


def _names(operand: str) -> list[str]:
    """Those in {a, b}; or the one."""
    return [name.strip() for name in operand.strip("{}").split(",")]
