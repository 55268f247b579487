"""What the kernels need of a `SideSpec`, computed once: maps with the deviations folded in, tables of pieces.

Decoding is x^ = n (s T[code]) D + c. The deviations s go into the matrices, so that a query meets the levels
alone: keys are asked with q (D^T s), values come out through s D.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from turboesm_kernels.arguments import Fixed
from turboesm_kernels.bits import Bits, grid_of
from turboesm_kernels.cpu_masks import Loops
from turboesm_kernels.grouped_text import KEY_WORDS, VALUE_WORDS, Slots, slots_of
from turboesm_kernels.layout import BYTE, Profile
from turboesm_kernels.reference import SideSpec, table_slice

PIECE_FIELDS = 5
FIELD_LANES = 4
LEAST_WORDS, LEAST_FIELDS = 8, 4
"""Of `picks`: the same for most codes, so that one compiled kernel serves them."""


@dataclass(frozen=True)
class PreparedSide:
    """One side of one layer, ready for the kernels. H heads, A axes, head_dim d, P pieces a code at most.

    spec      what it was made from
    pieces    int32 [H, P, 5, A]: word, lane, shift, mask and place in the code of each piece; mask 0 where none
    start     int32 [H, A]: where an axis' table starts in `table`
    table     float32 [H, S]: the levels, then a 0 for axes that have no code
    map       float32: keys [H, d, A] = D^T s, values [H, A, d] = s D
    centre    float32 [H, d]
    centred   whether any centre differs from 0; keys that have one for each position always are
    """

    spec: SideSpec
    pieces: Tensor
    start: Tensor
    table: Tensor
    map: Tensor
    centre: Tensor
    centred: bool

    @classmethod
    def of(cls, spec: SideSpec) -> PreparedSide:
        """Prepare `spec`, on its device. Synchronizes with the device: do it once, before decoding."""
        dense: dict[str, Any] = {name: tensor.contiguous() for name, tensor in spec.tensors.items()}
        spec = replace(spec, **dense)
        device = spec.centre.device
        scaled = spec.deviation[:, :, None] * spec.synthesis
        zero = torch.zeros_like(spec.levels[:, :1])
        return cls(
            spec,
            _piece_table(spec).to(device),
            _table_starts(spec).to(device),
            torch.cat((spec.levels, zero), 1).contiguous(),
            (scaled.mT if spec.side == "k" else scaled).contiguous(),
            spec.centre.contiguous(),
            bool(spec.centre.any()) or spec.centre_at is not None,
        )

    @property
    def axes(self) -> int:
        """Coded and uncoded axes of a head, A."""
        return self.spec.deviation.shape[-1]

    @property
    def head_dim(self) -> int:
        """Channels of a head, d."""
        return self.spec.centre.shape[-1]

    @cached_property
    def picks(self) -> Tensor:
        """int32 [H, 4, W, F]: the pieces of each packed word, for `pack`; W, F powers of 2 that hold any head's.

        A piece of `lanes` neighbouring codes at once, side by side in a word: which neighbours, their bit that
        comes first, the mask of all lanes' bits after that, and where they go; mask 0 where there is no piece.
        """
        spec = self.spec
        every = (1 << BYTE * spec.lanes) // ((1 << BYTE) - 1)  # 1 in each lane
        words: dict[tuple[int, int], list[tuple[int, ...]]] = {}
        for head, index in enumerate(spec.profile_of_head):
            for piece in spec.profiles[index].pieces:
                if piece.axis % spec.lanes == 0:
                    fields = piece.axis // spec.lanes, piece.low, _signed(piece.mask * every), piece.shift
                    words.setdefault((head, piece.byte // spec.lanes), []).append(fields)
        most = max(map(len, words.values()), default=1)
        count = spec.nbytes // spec.lanes
        table = torch.zeros(
            spec.heads, 4, padded(count, LEAST_WORDS), padded(most, LEAST_FIELDS), dtype=torch.int32
        )
        for (head, word), pieces in words.items():
            table[head, :, word, : len(pieces)] = torch.tensor(pieces, dtype=torch.int32).T
        return table.to(spec.centre.device)

    @cached_property
    def widths(self) -> Tensor:
        """int32 [H, A]: code widths."""
        rows = [self.spec.profiles[index].widths for index in self.spec.profile_of_head]
        return torch.tensor(rows, dtype=torch.int32, device=self.spec.centre.device)

    @cached_property
    def _coded(self) -> Tensor:
        """float32 [H, A]: 1 where an axis has a code of its own."""
        coded = (self.widths > 0).float()
        coded[:, self.head_dim :] = 0
        return coded

    @cached_property
    def analysis(self) -> tuple[Tensor, Tensor]:
        """The analysis matrix over the deviations, 0 where an axis is not coded, see `in_halves`."""
        return in_halves(self.spec.analysis * (self._coded / self.spec.deviation)[:, None])

    @cached_property
    def coded_norm(self) -> Tensor:
        """float32 [H]: what turns the norm of normalised coordinates into their root mean square."""
        return self._coded.sum(-1).rsqrt()

    @cached_property
    def grid(self) -> Tensor | None:
        """float32 [H, 6, A]: `per_step`, `half`, `top`, `level`, `zero`, `deviation` of `bits`, for `pack`."""
        return None if self._steps is None else grid_of(self.spec, self._steps)

    @cached_property
    def line(self) -> Tensor | None:
        """float32 [H, 2, A]: a, b of each level a code - b, both 0 where there is no code; None where none are."""
        if self._steps is None:
            return None
        profiles = [self.spec.profiles[index] for index in self.spec.profile_of_head]
        rows = [
            [(step := own.get(width, 0.0) if width else 0.0, step * _middle(width)) for width in profile.widths]
            for own, profile in zip(self._steps, profiles, strict=True)
        ]
        return torch.tensor(rows, device=self.spec.centre.device).mT.contiguous()

    @cached_property
    def pack_tables(self) -> Fixed:
        """The tables of a side that `pack_kernel` takes, in its order."""
        spec = self.spec
        grid = spec.deviation if self.grid is None else self.grid
        return Fixed((
            self.centre, *self.analysis, self.coded_norm, grid, self.widths, self.start, self.table,
            spec.thresholds, spec.deviation, self.picks,
        ))  # fmt: skip

    @cached_property
    def pack_constants(self) -> dict[str, int | str]:
        """What `pack_kernel` is compiled for of a side, by its names."""
        spec = self.spec
        _, _, words, fields = self.picks.shape
        values: dict[str, int | str] = {
            "AXES": self.axes, "PAD": padded(self.axes), "LANES": spec.lanes, "WORDS": words, "FIELDS": fields,
            "SCALE": spec.scale, "UNIFORM": self.grid is not None, "WIDEST": 0, "LEVELS": 0, "THRESHOLDS": 0,
        }  # fmt: skip
        if self.grid is None:
            values["WIDEST"] = max(profile.widths[0] for profile in spec.profiles)
            values["LEVELS"], values["THRESHOLDS"] = self.table.shape[1], spec.thresholds.shape[1]
        return {f"{spec.side.upper()}_{name}": value for name, value in values.items()}

    def ready(self) -> None:
        """Make now what the kernels would ask for first: they read it before they wait for earlier work."""
        _ = self.pack_tables, self.pack_constants
        if self.fields is not None:
            _ = (self.fields.halves, self.fields.of_keys) if self.spec.side == "k" else self.fields.of_values

    @cached_property
    def fields(self) -> Fields | None:
        """The code in groups of 4 lanes for the fast path, or None where the spec does not allow it."""
        return Fields.of(self)

    @cached_property
    def bits(self) -> Bits | None:
        """The code bit by bit for `cpu_lookup`, or None where levels are not on a uniform grid."""
        return None if self._steps is None else Bits.of(self.spec, self.map, self._steps)

    @cached_property
    def loops(self) -> Loops | None:
        """The code by masks for `cpu_compiled`, or None where levels are not on a uniform grid."""
        return None if self._steps is None else Loops.of(self.spec, self.map, self._steps)

    @cached_property
    def _steps(self) -> list[dict[int, float]] | None:
        return None if self.spec.residual_axes else grid_steps(self.spec)


def in_halves(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix float32 [H, d, A] for products in float16 that are as exact as in float32.

    float16 [2, H, d, A], whose sum is the matrix but for a factor of each column, a power of 2: float32 [H, A].
    """
    factor = torch.exp2(matrix.abs().amax(1).clamp_min(2.0**-100).log2().ceil())
    scaled = matrix / factor[:, None]
    high = scaled.half()
    return torch.stack((high, (scaled - high).half())), factor


@dataclass(frozen=True)
class Fields:
    """A uniform-grid code as fields of 32-bit words, each the piece of 4 neighbouring axes' codes.

    For `ptx_launch`.

    `shape` is the greatest count of any head for each word, and a head with fewer has fields of mask 0. So which
    bits a field has is data, and one compiled kernel serves all heads, and all layers of that shape.

    With levels step (code - middle), a level is the sum over its fields of weight (piece - piece's middle). Pieces
    stay where they are in their byte, and 2^-shift goes into the map.

    shape   fields of each word, F in sum
    masks   int32 [H, P]: of a word's 4 bytes; P: F padded to 4
    map     float32: keys [H, d, 4 P], values [H, 4 P', d], P': F padded to 2: `PreparedSide.map` times weight, an
            axis a byte
    middle  float32 [H, 4 P or 4 P']: of the piece, in the units in which it is summed
    offset  float32 [H, d]: -middle map, what a sum of values' pieces of weight 1 is off by; 0 for keys
    """

    shape: tuple[int, ...]
    masks: Tensor
    map: Tensor
    middle: Tensor
    offset: Tensor

    @classmethod
    def of(cls, side: PreparedSide) -> Fields | None:
        """Fields of a side, or None: not 4 lanes, levels that are no arithmetic progression, or no coded axis."""
        spec = side.spec
        steps = grid_steps(spec) if spec.lanes == FIELD_LANES else None
        if steps is None:
            return None
        heads = [
            _fields_by_word(spec.profiles[index], own)
            for index, own in zip(spec.profile_of_head, steps, strict=True)
        ]
        shape = tuple(max(map(len, words)) for words in zip(*heads, strict=True))
        if not any(shape):
            return None
        rows = [
            [field for own, count in zip(words, shape, strict=True) for field in _fill(own, count)]
            for words in heads
        ]
        mask, group, weight, middle = _padded_table(rows).to(spec.centre.device).unbind(-1)  # float64 [H, P]
        if spec.side == "v":
            group, weight, middle = (x[:, : -(-sum(shape) // 2) * 2] for x in (group, weight, middle))
        byte = torch.arange(FIELD_LANES, device=group.device)
        axes = (group.long()[..., None] * FIELD_LANES + byte).flatten(1)[..., None].expand(-1, -1, side.head_dim)
        levels = (side.map.mT if spec.side == "k" else side.map).gather(1, axes)
        levels = levels * weight.float().repeat_interleave(FIELD_LANES, 1)[..., None]
        middle = middle.float().repeat_interleave(FIELD_LANES, 1).contiguous()
        offset = -torch.einsum("hf,hfd->hd", middle, levels) * (spec.side == "v")
        turned = levels.mT if spec.side == "k" else levels
        return cls(shape, mask.to(torch.int32).contiguous(), turned.contiguous(), middle, offset.contiguous())

    @cached_property
    def of_keys(self) -> tuple[Tensor, Tensor]:
        """`lined_up` as the kernel for grouped queries takes keys."""
        return self.lined_up(slots_of(self.shape, KEY_WORDS))

    @cached_property
    def of_values(self) -> tuple[Tensor, Tensor]:
        """`lined_up` as it takes values."""
        return self.lined_up(slots_of(self.shape, VALUE_WORDS))

    @cached_property
    def halves(self) -> tuple[Tensor, Tensor]:
        """`map` of keys, see `in_halves`."""
        return in_halves(self.map)

    def lined_up(self, slots: Slots) -> tuple[Tensor, Tensor]:
        """Masks int32 [H, n, R] of n words side by side, and fields' places int32 [n, R]; R: `Slots.row`."""
        places = torch.tensor(slots.places, device=self.masks.device)
        masks = self.masks[:, places] * torch.tensor(slots.there, device=self.masks.device)
        return masks.contiguous(), places.to(torch.int32)

    @property
    def count(self) -> int:
        """Fields of a head, F."""
        return sum(self.shape)


@dataclass(frozen=True)
class _Field:
    mask: int
    group: int
    weight: float
    middle: float


_NO_FIELD = _Field(0, 0, 0.0, 0.0)


def _fill(fields: list[_Field], count: int) -> list[_Field]:
    return fields + [_NO_FIELD] * (count - len(fields))


def _padded_table(rows: list[list[_Field]]) -> Tensor:
    """float64 [H, n, 4] of fields (mask, group, weight, middle), n rounded up to 4."""
    size = -(-len(rows[0]) // 4) * 4
    table = [[(f.mask, f.group, f.weight, f.middle) for f in _fill(row, size)] for row in rows]
    return torch.tensor(table, dtype=torch.float64)


def _fields_by_word(profile: Profile, steps: dict[int, float]) -> list[list[_Field]]:
    """The fields of each word of the layout."""
    words: list[list[_Field]] = [[] for _ in range(profile.nbytes // FIELD_LANES)]
    for piece in profile.pieces:
        if piece.axis % FIELD_LANES == 0:
            field = _Field(
                _signed((piece.mask << piece.shift) * 0x01010101),
                piece.axis // FIELD_LANES,
                steps[profile.widths[piece.axis]] * 2.0 ** (piece.low - piece.shift),
                _middle(piece.width) * 2.0**piece.shift,
            )
            words[piece.byte // FIELD_LANES].append(field)
    return words


def padded(size: int, least: int = 16) -> int:
    """The power of two, `least` at least, that a kernel pads `size` to."""
    return max(least, 1 << (size - 1).bit_length())


def dims_at_once(dim: int, is_roomy: bool) -> int:
    """Rows of a matrix [d, d] that a kernel multiplies by at once: all, or as many as shared memory holds."""
    return padded(dim) if dim <= 64 or (dim <= 128 and is_roomy) else 64


def grid_steps(spec: SideSpec) -> list[dict[int, float]] | None:
    """For each head, the step of each width it uses; None where levels are not step (code - middle)."""
    found, tables = [], spec.levels.double().cpu()
    for head, index in enumerate(spec.profile_of_head):
        steps = {}
        for width, _ in spec.profiles[index].runs:
            levels = tables[head, table_slice(width)]
            step = float(levels[-1] - levels[0]) / (2**width - 1)
            grid = step * (torch.arange(2**width).double() - _middle(width))
            if not torch.allclose(levels, grid, rtol=0.0, atol=1e-4 * step):  # float32 rounds 8-bit levels by 1e-5
                return None
            steps[width] = step
        found.append(steps)
    return found


def _signed(word: int) -> int:
    """The int32 of the same 32 bits."""
    return word - (1 << 32) if word >> 31 else word


def _middle(width: int) -> float:
    return (2**width - 1) / 2


def _piece_table(spec: SideSpec) -> Tensor:
    """int32 [H, P, 5, A], see `PreparedSide`."""
    lanes = spec.lanes if spec.side == "k" else 1  # values have a plane for each byte
    tables = [_profile_pieces(profile, lanes) for profile in spec.profiles]
    most = max(len(table) for table in tables)
    padded = [torch.nn.functional.pad(table, (0, 0, 0, 0, 0, most - len(table))) for table in tables]
    return torch.stack([padded[index] for index in spec.profile_of_head]).contiguous()


def _profile_pieces(profile: Profile, lanes: int) -> Tensor:
    axes = len(profile.widths)
    own: list[list[tuple[int, ...]]] = [[] for _ in range(axes)]
    for p in profile.pieces:
        own[p.axis].append((p.byte // lanes, p.byte % lanes, p.shift, p.mask, p.low))
    table = torch.zeros(max(1, *map(len, own)), PIECE_FIELDS, axes, dtype=torch.int32)
    for axis, pieces in enumerate(own):
        for i, fields in enumerate(pieces):
            table[i, :, axis] = torch.tensor(fields, dtype=torch.int32)
    return table


def _table_starts(spec: SideSpec) -> Tensor:
    zero = spec.levels.shape[1]
    rows = [
        [table_slice(width).start if width else zero for width in spec.profiles[index].widths]
        for index in spec.profile_of_head
    ]
    return torch.tensor(rows, dtype=torch.int32)
