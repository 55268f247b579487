"""The inline PTX of the fast kernel, made for a code's shape: how a warp loads, multiplies and sums.

Each function gives the text of one `inline_asm_elementwise`; its docstring says what the operands are, outputs
first, in the order of $0, $1 ... Neither Triton nor a GPU is needed here: the kernel that runs it is in
`ptx_kernels`, with the picture of which lane owns which tokens. A lane is 4 g + t, 0 <= t < 4, as in PTX's matrix
fragments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from turboesm_kernels.layout import TILE, WIDE

STREAM = "ld.global.L1::no_allocate.L2::cache_hint"
ONCE = "createpolicy.fractional.L2::evict_first.b64 once, 1.0;"
"""What is read once leaves the L2 first: code, maps, biases and partial results stay."""

FENCE = "bar.warp.sync 0xffffffff;"
"""Orders shared memory; and keeps the assembler from putting off a batch of loads until each is used: one latency,
not one for each word."""

DIGITS = 3
"""Bytes of a weight: 16 bits below the point, 8 before it."""

DIGIT_ROW = 192
"""Bytes from one digit's weights of a block to the next's: 128 would put two digits into the same banks."""

LANES = 512
"""Bytes that a warp's lanes copy at once, 16 each."""

TILE_BYTES = WIDE * TILE
"""Of a tile of values."""


@dataclass(frozen=True)
class Side:
    """How one side's fields meet the matrix products: how many each word of a code has, in order."""

    fields: tuple[int, ...]

    @property
    def count(self) -> int:
        """Fields, F."""
        return sum(self.fields)

    @property
    def table(self) -> int:
        """Fields padded to 4: words of a row of masks."""
        return -(-self.count // 4) * 4

    @property
    def word_of(self) -> list[int]:
        """For each field the word that it lies in."""
        return [word for word, count in enumerate(self.fields) for _ in range(count)]

    @property
    def pairs(self) -> list[tuple[int, int | None]]:
        """Fields two by two, as a product takes them; the last may be alone."""
        return [(f, f + 1 if f + 1 < self.count else None) for f in range(0, self.count, 2)]


@dataclass(frozen=True)
class Shared:
    """What a warp keeps in shared memory. Offsets in bytes. Tables are asked before the codes: what is asked of
    global memory after them arrives after them. A range of one block has no use for those from `query` on.

        weights       of a block's tokens, a digit a row (see `sum_code`)
        turns         `Rope.turns`, where keys have a centre
        query         the row's digits: `fast_project_query_kernel`'s descriptors
        k_masks, v_masks   of the head: `prepared.Fields.masks`
        sums          float32 [V fields padded to 2, 4]: what accumulators held when they were last emptied
        rotation      cosines, then sines, of RoPE's turn by a block: float32 [d]
        state         the coefficients of the centre's scores at the block, each lane's: float32 [d / 16, 32, 4]

    dim: d, padded to `reference.PAIRED`.
    """

    dim: int
    k: Side
    v: Side
    one_block: bool
    centred: bool

    @property
    def space(self) -> str:
        """Where the query and the masks are read from."""
        return "global" if self.one_block else "shared"

    @property
    def address(self) -> str:
        """The operand kind of an address there."""
        return "l" if self.one_block else "r"

    @property
    def turns(self) -> int:
        return DIGITS * DIGIT_ROW

    @property
    def query(self) -> int:
        return self.turns + 64 * self.dim * self.centred

    @property
    def k_masks(self) -> int:
        return self.query + 8 * self.k.table

    @property
    def v_masks(self) -> int:
        return self.k_masks + 4 * self.k.table

    @property
    def sums(self) -> int:
        return self.v_masks + 4 * self.v.table

    @property
    def rotation(self) -> int:
        return self.sums + 32 * len(self.v.pairs)

    @property
    def state(self) -> int:
        return self.rotation + 4 * self.dim

    @property
    def size(self) -> int:
        if self.one_block:
            return self.query
        return self.state + 32 * self.dim if self.centred else self.rotation


class Turning(Protocol):
    """Shared memory that holds the coefficients of the centre's scores, as in `Shared`."""

    @property
    def dim(self) -> int: ...

    @property
    def one_block(self) -> bool: ...

    @property
    def state(self) -> int: ...


def open_code(at: Shared) -> str:
    """PTX: $0 = address of the shared memory; ask for its tables but the query, one group of copies.

    After the output: the lane, addresses of the head's masks of keys and of values; of `Rope.turns` and
    `Rope.block_turn`.
    """
    lines = [f".shared .align 16 .b8 held[{at.size}];", *COPY_REGISTERS, "mov.u32 $0, held;"]
    if at.centred:
        lines += copy_lines("$0", 4, at.turns, 64 * at.dim)
    if not at.one_block:
        lines += copy_lines("$0", 2, at.k_masks, 4 * at.k.table) + copy_lines("$0", 3, at.v_masks, 4 * at.v.table)
        if at.centred:
            lines += copy_lines("$0", 5, at.rotation, 4 * at.dim)
        lines += ["setp.lt.u32 there, $1, 4;", "mad.lo.u32 to, $1, 4, $0;"]
        lines += [f"@there st.shared.b32 [to+{at.sums + 16 * field}], 0;" for field in range(2 * len(at.v.pairs))]
    return block([*lines, "cp.async.commit_group;"])


OPEN_KINDS = "=&r,r,l,l,l,l"


def row_code(at: Shared) -> str:
    """PTX: fetch the query, and wait for all groups. $0 = 0; the lane, address of the shared memory, of the row's
    descriptors."""
    copy = copy_lines("$2", 3, at.query, 8 * at.k.table)
    lines = [*COPY_REGISTERS, "mov.u32 $0, 0;", *copy, "cp.async.commit_group;"]
    return block([*lines, "cp.async.wait_group 0;", FENCE])


ROW_KINDS = "=&r,r,r,l"


def wait_code() -> str:
    """PTX: $0 = its only operand; wait for what all lanes have asked to be copied."""
    return block(["mov.b32 $0, $1;", "cp.async.wait_group 0;", FENCE])


WAIT_KINDS = "=&r,r"

COPY_REGISTERS = (".reg .pred there;", ".reg .b32 to;", ".reg .b64 from;")


def copy_lines(base: str, operand: int, offset: int, size: int) -> list[str]:
    """Copy `size` bytes from address `operand` to `offset` of shared memory; $1 is the lane."""
    lines = [f"mad.wide.u32 from, $1, 16, ${operand};", f"mad.lo.u32 to, $1, 16, {base};"]
    for done in range(0, size, LANES):
        least = min(LANES, size - done) // 16
        lines += [
            f"setp.lt.u32 there, $1, {least};",
            f"@there cp.async.ca.shared.global [to+{offset + done}], [from+{done}], 16;",
        ]
    return lines


def load_code(side: Side, tiled: bool = False) -> str:
    """PTX: $0.. = 16 bytes of a lane of each word's plane, 4 registers a word: 4 tokens of keys.

    Or, `tiled`, 16 tokens of values, of two tiles. After the outputs: address of the lane's bytes of word 0, bytes
    between words, whether to read at all (else the outputs hold anything).
    """
    words = len(side.fields)
    base, stride, wanted = (f"${4 * words + i}" for i in range(3))
    lines = [".reg .b64 at, once;", ".reg .pred wanted;", ONCE, f"setp.ne.b32 wanted, {wanted}, 0;"]
    for w in range(words):
        lines.append(f"mad.wide.u32 at, {stride}, {w}, {base};")
        lines += stream_lines("wanted", 4 * w, 0, tiled)
    return block([*lines, FENCE])


def stream_lines(wanted: str, first: int, offset: int, tiled: bool) -> list[str]:
    """Where `wanted`, operands from `first` on = 16 bytes at `offset` from `at`, or 8 of each of two tiles."""
    names = [f"${first + i}" for i in range(4)]
    if not tiled:
        return [f"@{wanted} {STREAM}.v4.b32 {{{', '.join(names)}}}, [at+{offset}], once;"]
    return [
        f"@{wanted} {STREAM}.v2.b32 {{{', '.join(two)}}}, [at+{place}], once;"
        for two, place in ((names[:2], offset), (names[2:], offset + TILE_BYTES))
    ]


def load_constraints(side: Side) -> str:
    """Operand kinds of `load_code`."""
    return ",".join(["=&r"] * (4 * len(side.fields)) + ["l", "r", "r"])


def vector(name: str) -> str:
    return "{" + ", ".join(f"{name}{i}" for i in range(4)) + "}"


def score_code(at: Shared) -> str:
    """PTX: $0..$3 = sum over axes of query * byte in place, of the lane's tokens 4 l .. 4 l + 3.

    After the outputs: the lane; addresses of the query's digit g % 2 and of the masks; the words of `load_code`.

    A product m16n8k32 has two of a lane's tokens in rows g and g + 8, two fields' bytes of them in the columns of
    t. So a row holds other tokens at each t, and the query's 8 columns keep them apart: its two digits stand in
    columns 2 t and 2 t + 1 at the bytes of t, and there is 0 elsewhere. Results lie with the lane whose tokens
    they are.
    """
    side = at.k
    lines = [
        ".reg .pred mine;", ".reg .b32 x, y, a<4>, c<16>, q<4>, m<4>;",
        "shr.u32 x, $4, 3;", "and.b32 y, $4, 3;", "setp.eq.u32 mine, x, y;",
        *(f"mov.b32 q{i}, 0;" for i in range(4)), *(f"mov.b32 c{i}, 0;" for i in range(16)),
    ]  # fmt: skip
    for number, pair in enumerate(side.pairs):
        if pair[0] % 4 == 0:
            lines.append(f"ld.{at.space}.v4.b32 {vector('m')}, [$6+{4 * pair[0]}];")
            lines.append(f"@mine ld.{at.space}.v4.b32 {vector('q')}, [$5+{4 * pair[0]}];")
        b0, b1 = (f"q{pair[0] % 4}", "x" if pair[1] is None else f"q{pair[1] % 4}")
        for half in range(2):
            lines += _left(side, 7, [(field, 2 * half + token) for field in pair for token in range(2)])
            lines.append(product("s8", 8 * half + 4 * (number % 2), b0, b1))
    for token in range(4):
        low = 8 * (token // 2) + 2 * (token % 2)
        lines += [
            f"add.s32 c{low}, c{low}, c{low + 4};", f"add.s32 c{low + 1}, c{low + 1}, c{low + 5};",
            f"mad.lo.s32 ${token}, c{low + 1}, 256, c{low};",
        ]  # fmt: skip
    return block(lines)


def score_constraints(at: Shared) -> str:
    """Operand kinds of `score_code`."""
    return ",".join(["=&r"] * 4 + ["r", at.address, at.address] + ["r"] * (4 * len(at.k.fields)))


def _left(side: Side, words: int, parts: Sequence[tuple[int | None, int]]) -> list[str]:
    """a0..a3, the left side of a product: for each (field, i) the i-th register of the field's word, of those from
    operand `words` on, masked; 0 where there is no field."""
    return [
        f"mov.b32 a{n}, 0;"
        if field is None
        else f"and.b32 a{n}, ${words + 4 * side.word_of[field] + i}, m{field % 4};"
        for n, (field, i) in enumerate(parts)
    ]


def product(kind: str, first: int, b0: str, b1: str) -> str:
    """The product of bytes a0..a3 with b0, b1, of kind u8 or s8, added to c from `first` on."""
    c = "{" + ", ".join(f"c{first + i}" for i in range(4)) + "}"
    return f"mma.sync.aligned.m16n8k32.row.col.s32.u8.{kind}.s32 {c}, {vector('a')}, {{{b0}, {b1}}}, {c};"


def accumulators(side: Side) -> int:
    """Registers of sums of values: 4 for each two fields."""
    return 4 * len(side.pairs)


def digit_lines(x: Sequence[str]) -> list[str]:
    """a0..a2 = the digits of four weights, each one's side by side, low ones first; x0..x3 are used."""
    return [
        f"prmt.b32 x0, {x[0]}, {x[1]}, 0x5140;", f"prmt.b32 x1, {x[2]}, {x[3]}, 0x5140;",
        f"prmt.b32 x2, {x[0]}, {x[1]}, 0x0062;", f"prmt.b32 x3, {x[2]}, {x[3]}, 0x0062;",
        "prmt.b32 a0, x0, x1, 0x5410;", "prmt.b32 a1, x0, x1, 0x7632;", "prmt.b32 a2, x2, x3, 0x5410;",
    ]  # fmt: skip


def sum_code(at: Shared) -> str:
    """PTX: $.. = accumulators + sum over the block's tokens of weight digits * masked byte.

    A product m16n8k32 has one field's bytes in rows g, another's in rows g + 8: of plane g % 4, of the half block
    g / 4. The weights' digits of the first half stand in columns 0 to 2, those of the second in 4 to 6. After the
    outputs: the lane's 4 weights (tokens 4 l on, 24 bits each), addresses in shared memory where the lane's
    weights go and where those that it multiplies lie; address of the masks; the words of `load_code`, the
    accumulators.
    """
    side, count = at.v, accumulators(at.v)
    x = [f"${count + i}" for i in range(4)]
    to, place, masks, words = *(f"${count + 4 + i}" for i in range(3)), count + 7
    old = words + 4 * len(side.fields)
    lines = [
        f".reg .b32 a<4>, b<4>, c<{count}>, m<4>, x<4>;",
        *digit_lines(x),
        FENCE,  # the block before is read
        *(f"st.shared.b32 [{to}+{DIGIT_ROW * digit}], a{digit};" for digit in range(DIGITS)),
        FENCE, f"ld.shared.v4.b32 {vector('b')}, [{place}];",
        *(f"mov.b32 c{i}, ${old + i};" for i in range(count)),
    ]  # fmt: skip
    for tile, pair in enumerate(side.pairs):
        if pair[0] % 4 == 0:
            lines.append(f"ld.{at.space}.v4.b32 {vector('m')}, [{masks}+{4 * pair[0]}];")
        for step in range(2):
            lines += _left(side, words, [(field, 2 * step + n) for n in range(2) for field in pair])
            lines.append(product("u8", 4 * tile, f"b{2 * step}", f"b{2 * step + 1}"))
    lines += [f"mov.b32 ${i}, c{i};" for i in range(count)]
    return block(lines)


def sum_constraints(at: Shared) -> str:
    """Operand kinds of `sum_code`."""
    count = accumulators(at.v)
    return ",".join(["=&r"] * count + ["r"] * 6 + [at.address] + ["r"] * (4 * len(at.v.fields) + count))


def empty_code(at: Shared) -> str:
    """PTX: where asked, move the accumulators' sums to shared memory, times alpha, and set them to 0.

    $.. = the accumulators after that; then whether to (for all lanes alike), alpha, the lane, address of the
    shared memory, the accumulators.
    """
    count = accumulators(at.v)
    asked, alpha, lane, shared = (f"${count + i}" for i in range(4))
    lines = [
        ".reg .pred asked;", *JOIN_REGISTERS, *(f"mov.b32 ${i}, ${count + 4 + i};" for i in range(count)),
        f"setp.ne.b32 asked, {asked}, 0;", "@!asked bra done;",
        *_join_setup(lane), f"add.u32 to, to, {shared};",
    ]  # fmt: skip
    for pair in at.v.pairs:
        place = at.sums + 16 * pair[0]
        lines += [
            *_join(pair, 0), f"@owner ld.shared.f32 old, [to+{place}];", "add.f32 f, f, old;",
            f"mul.f32 f, f, {alpha};", f"@owner st.shared.f32 [to+{place}], f;",
        ]  # fmt: skip
    return block([*lines, *(f"mov.b32 ${i}, 0;" for i in range(count)), "done:", "mov.b32 to, 0;"])


def empty_constraints(side: Side) -> str:
    """Operand kinds of `empty_code`."""
    count = accumulators(side)
    return ",".join(["=&r"] * count + ["r", "f", "r", "r"] + ["r"] * count)


def emit_code(at: Shared) -> str:
    """PTX: write the sums, float32 [V fields padded to 2, 4] in units of a weight of 1.

    $0 = 0; the lane, address of the shared memory, where to, the accumulators.
    """
    lines = [
        ".reg .b32 place;", ".reg .b64 out;", *JOIN_REGISTERS, "mov.u32 $0, 0;", *_join_setup("$1"),
        "cvt.u64.u32 out, to;", "add.u64 out, out, $3;", "add.u32 place, to, $2;",
    ]  # fmt: skip
    for pair in at.v.pairs:
        lines += _join(pair, 4)
        if not at.one_block:
            lines += [f"@owner ld.shared.f32 old, [place+{at.sums + 16 * pair[0]}];", "add.f32 f, f, old;"]
        lines += ["mul.f32 f, f, 0f37800000;", f"@owner st.global.f32 [out+{16 * pair[0]}], f;"]  # 2^-16
    return block(lines)


def emit_constraints(side: Side) -> str:
    """Operand kinds of `emit_code`."""
    return ",".join(["=&r", "r", "r", "l"] + ["r"] * accumulators(side))


JOIN_REGISTERS = (
    ".reg .pred owner, second;",
    ".reg .b32 to, t, h;",
    ".reg .f32 f, even, odd, more, s<2>, old;",
)


def _join_setup(lane: str) -> list[str]:
    """What each lane's two columns count in rows g < 4: digits 0 and 1 where t = 0, 2 where t = 1; in the others
    where t = 2 and t = 3. Sums go to lanes of g < 4: a pair's first field where t = 0, its second where t = 1. The
    other lanes have products of one half's values and the other's weights, which meet no owner's."""
    return [
        f"and.b32 t, {lane}, 3;", f"shr.u32 h, {lane}, 4;", "setp.eq.u32 second, h, 0;",
        "setp.lt.and.u32 owner, t, 2, second;",
        "and.b32 to, t, 1;", "setp.ne.u32 second, to, 0;",
        "selp.f32 even, 0f47800000, 0f3F800000, second;",  # 65536 or 1
        "selp.f32 odd, 0f00000000, 0f43800000, second;",  # 0 or 256
        "mul.lo.u32 to, to, 16;", f"and.b32 h, {lane}, 0xc;", "add.u32 to, to, h;",
    ]  # fmt: skip


def _join(pair: tuple[int, int | None], operand: int) -> list[str]:
    """f = the sums of two fields' digits where they go, of accumulators from `operand` on."""
    lines = ["mov.f32 s1, 0f00000000;"] if pair[1] is None else []
    for i in range(2 - len(lines)):
        first = operand + 2 * pair[0] + 2 * i
        lines += [
            f"cvt.rn.f32.s32 s{i}, ${first};", f"cvt.rn.f32.s32 more, ${first + 1};",
            f"mul.f32 s{i}, s{i}, even;", f"fma.rn.f32 s{i}, more, odd, s{i};",
        ]  # fmt: skip
    return [
        *lines, "selp.f32 f, s1, s0, second;", "selp.f32 more, s0, s1, second;",
        "shfl.sync.bfly.b32 more, more, 1, 0x1f, 0xffffffff;", "add.f32 f, f, more;",
        "shfl.sync.bfly.b32 more, f, 18, 0x1f, 0xffffffff;", "add.f32 f, f, more;",
    ]  # fmt: skip


def angles_code(dim: int) -> str:
    """PTX: d / 8 cosines, then sines, of the lane's pairs from two addresses, the operands after the outputs."""
    count = dim // 8
    lines = [
        f"ld.global.v4.f32 {{{', '.join(f'${count * side + first + n}' for n in range(4))}}}, "
        f"[${2 * count + side}+{4 * first}];"
        for side in range(2)
        for first in range(0, count, 4)
    ]
    return block(lines)


def angles_constraints(dim: int) -> str:
    """Operand kinds of `angles_code`."""
    return ",".join(["=&f"] * (dim // 4) + ["l", "l"])


def turn_code(at: Turning) -> str:
    """PTX: the coefficients of the centre's scores at the first block, d / 8 of cosines, then of sines.

    $0.. = them for one block; else $0 = 0 and they are kept as the state. Then the angles of the lane's pairs at
    the block's token 2 g (`angles_code`); the pairs' coefficients at position 0 (`_phase`); the lane's place in
    shared memory, 16 bytes a lane.
    """
    outputs, half = at.dim // 4 if at.one_block else 1, at.dim // 8
    lines = [".reg .f32 a<4>, b<4>;"]
    for first in range(0, half, 4):
        x, y, even, odd = ([f"${outputs + half * i + first + n}" for n in range(4)] for i in range(4))
        lines += turn_lines(even, odd, x, y)
        if at.one_block:
            lines += [
                f"mov.f32 ${half * i + first + n}, {name}{n};" for i, name in enumerate("ab") for n in range(4)
            ]
        else:
            lines += keep_lines(first // 4, at.state, f"${outputs + 4 * half}")
    return block([*lines, *([] if at.one_block else ["mov.u32 $0, 0;"])])


def turn_constraints(at: Turning) -> str:
    """Operand kinds of `turn_code`."""
    outputs = ["=&f"] * (at.dim // 4) if at.one_block else ["=&r"]
    return ",".join([*outputs, *["f"] * (at.dim // 2), "r"])


def turn_lines(even: Sequence[str], odd: Sequence[str], x: Sequence[str], y: Sequence[str]) -> list[str]:
    """Coefficients a, b of cosines and sines: those of even and odd turned by angles of cosine x and sine y."""
    lines = []
    for n in range(4):
        lines += [
            f"mul.f32 a{n}, {odd[n]}, {y[n]};", f"fma.rn.f32 a{n}, {even[n]}, {x[n]}, a{n};",
            f"mul.f32 b{n}, {even[n]}, {y[n]};", f"neg.f32 b{n}, b{n};",
            f"fma.rn.f32 b{n}, {odd[n]}, {x[n]}, b{n};",
        ]  # fmt: skip
    return lines


def keep_lines(four: int, state: int, lane_at: str) -> list[str]:
    """Store a and b as the lane's state."""
    place = state + 2 * LANES * four
    return [
        f"st.shared.v4.f32 [{lane_at}+{place}], {vector('a')};",
        f"st.shared.v4.f32 [{lane_at}+{place + LANES}], {vector('b')};",
    ]


def bias_code(at: Shared) -> str:
    """PTX: $0..$3 = the centre's scores of the lane's tokens of a block.

    After the outputs: the lane's place in shared memory, 16 bytes a lane; for one block the coefficients of
    `turn_code`, else the place of its pairs' rotation.
    Tokens are 16 g + 4 t + {0, 1} + {0, 2}: the state is the coefficients turned by the block and 2 c, one column
    c a g; they meet the turns by 16 g and 16 g + 1 in a matrix product, m16n8k16, whose results lie where they
    belong. Then the state is turned by a block.
    """
    lines = list(PRODUCT_REGISTERS)
    for four in range(at.dim // 32):
        even, odd = [f"e{n}" for n in range(4)], [f"o{n}" for n in range(4)]
        if at.one_block:
            even = [f"${5 + 4 * four + n}" for n in range(4)]
            odd = [f"${5 + 4 * four + at.dim // 8 + n}" for n in range(4)]
        else:
            for name, operand, offset in (
                ("e", 4, at.state + 2 * LANES * four), ("o", 4, at.state + 2 * LANES * four + LANES),
                ("x", 5, at.rotation + 16 * four), ("y", 5, at.rotation + 16 * four + 2 * at.dim),
            ):  # fmt: skip
                lines.append(f"ld.shared.v4.f32 {vector(name)}, [${operand}+{offset}];")
        lines += _multiply(at, four, even, odd)
        if not at.one_block:
            x, y = [f"x{n}" for n in range(4)], [f"y{n}" for n in range(4)]
            lines += turn_lines(even, odd, x, y) + keep_lines(four, at.state, "$4")
    return block([*lines, *(f"add.f32 ${token}, ${token}, c{token};" for token in range(4))])


def bias_constraints(at: Shared) -> str:
    """Operand kinds of `bias_code`."""
    return ",".join(["=&f"] * 4 + ["r"] + (["f"] * (at.dim // 4) if at.one_block else ["r"]))


PRODUCT_REGISTERS = (
    ".reg .f32 x<4>, y<4>, a<4>, b<4>, e<4>, o<4>, c<4>, r, s;", ".reg .b16 p, q;",
    ".reg .b32 high<2>, low<2>, m<4>;",
    *(f"mov.f32 {name}{token}, 0f00000000;" for name in "$c" for token in range(4)),
)  # fmt: skip


def _multiply(at: Shared, four: int, even: Sequence[str], odd: Sequence[str]) -> list[str]:
    """Add the products of four pairs' coefficients and turns: both sums of two float16; those of two low parts are
    below rounding. There are two sums, c and the outputs, for half the latency."""
    product = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
    acc, more = "{$0, $2, $1, $3}", "{c0, c2, c1, c3}"
    lines = []
    for two in range(2):
        for j in range(2):
            n = 2 * two + j
            lines += [
                f"cvt.rn.f16x2.f32 high{j}, {odd[n]}, {even[n]};", f"mov.b32 {{p, q}}, high{j};",
                "cvt.f32.f16 r, p;", "cvt.f32.f16 s, q;", f"sub.f32 r, {even[n]}, r;", f"sub.f32 s, {odd[n]}, s;",
                f"cvt.rn.f16x2.f32 low{j}, s, r;",
            ]  # fmt: skip
        place = at.turns + LANES * (2 * four + two)
        lines += [
            f"ld.shared.v4.b32 {vector('m')}, [$4+{place}];",
            f"{product} {acc}, {vector('m')}, {{low0, low1}}, {acc};",
            f"{product} {more}, {vector('m')}, {{high0, high1}}, {more};",
            f"ld.shared.v4.b32 {vector('m')}, [$4+{place + 32 * at.dim}];",
            f"{product} {acc}, {vector('m')}, {{high0, high1}}, {acc};",
        ]
    return lines


def block(lines: list[str]) -> str:
    return "{\n" + "\n".join(lines) + "\n}"
