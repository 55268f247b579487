"""The inline PTX of the fast kernel, made for a code's shape: how a warp loads, multiplies and sums.

Each function gives the text of one `inline_asm_elementwise`; its docstring says what the operands are, outputs
first, in the order of $0, $1 ... Neither Triton nor a GPU is needed here: the kernel that runs it is in `ptx`,
with the picture of which lane owns which tokens. A lane is 4 g + t, 0 <= t < 4, as in PTX's matrix fragments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STREAM = "cp.async.cg.shared.global.L2::cache_hint"
ONCE = "createpolicy.fractional.L2::evict_first.b64 once, 1.0;"
"""What is read once leaves the L2 first: code, maps, biases and partial results stay."""

FENCE = "bar.warp.sync 0xffffffff;"

DIGITS = 3
"""Bytes of a weight: 16 bits below the point, 8 before it."""

DIGIT_ROW = 192
"""Bytes from one digit's weights of a block to the next's: 128 would put two digits into the same banks."""

LANES = 512
"""Bytes that a warp's lanes copy at once, 16 each. A lane copies what it reads itself."""

KEY_BATCHES, KEY_TOKENS, KEY_SIZE = 4, 32, 128
VALUE_BATCHES, VALUE_TOKENS, VALUE_SIZE = 2, 64, 64
"""Into how many copies a load of a block is cut; tokens and bytes from one to the next."""


@dataclass(frozen=True)
class Side:
    """How one side's fields meet the matrix products: `slots` of each load, see `prepared.Fields`."""

    slots: tuple[int, ...]

    @property
    def count(self) -> int:
        """Slots, S."""
        return sum(self.slots)

    @property
    def table(self) -> int:
        """Slots padded to 4: words of a row of masks."""
        return -(-self.count // 4) * 4

    @property
    def load_of(self) -> list[int]:
        """For each slot the load that its words come from."""
        return [load for load, count in enumerate(self.slots) for _ in range(count)]

    @property
    def pairs(self) -> list[tuple[int, int | None]]:
        """Slots two by two, as a product takes them; the last may be alone."""
        return [(s, s + 1 if s + 1 < self.count else None) for s in range(0, self.count, 2)]


@dataclass(frozen=True)
class Shared:
    """What a warp keeps in shared memory. Offsets in bytes.

    Codes arrive there without waiting for registers. Small tables are asked before the codes: what is asked after
    them arrives after them. A range of one block has no use for those from `query` on.

        weights       of a block's tokens, a digit a row (see `sum_code`)
        keys, values  of a block: 16 bytes a lane of each load and batch
        turns         `Rope.turns`, where keys have a centre
        query         the row's digits: `fast_fold_kernel`'s descriptors
        k_masks, v_masks   of the head: `prepared.Fields.masks`
        sums          float32 [V slots, 8]: what accumulators held when they were last emptied
        rotation      cosines, then sines, of RoPE's turn by a block: float32 [d]
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
    def keys(self) -> int:
        return DIGITS * DIGIT_ROW

    @property
    def values(self) -> int:
        return self.keys + LANES * KEY_BATCHES * len(self.k.slots)

    @property
    def turns(self) -> int:
        return self.values + LANES * VALUE_BATCHES * len(self.v.slots)

    @property
    def query(self) -> int:
        return self.turns + 64 * self.dim * self.centred

    @property
    def k_masks(self) -> int:
        return self.query + 32 * self.k.table

    @property
    def v_masks(self) -> int:
        return self.k_masks + 16 * self.k.table

    @property
    def sums(self) -> int:
        return self.v_masks + 8 * self.v.table

    @property
    def rotation(self) -> int:
        return self.sums + 32 * self.v.count

    @property
    def size(self) -> int:
        return self.query if self.one_block else self.rotation + 4 * self.dim * self.centred


def open_code(at: Shared) -> str:
    """PTX: $0 = address of the shared memory; ask for its tables but the query, one group of copies.

    After the output: the lane, addresses of the head's masks of keys and of values; of `Rope.turns` and
    `Rope.block_turn`.
    """
    lines = [f".shared .align 16 .b8 held[{at.size}];", *COPY_REGISTERS, "mov.u32 $0, held;"]
    if at.centred:
        lines += _copy("$0", 4, at.turns, 64 * at.dim)
    if not at.one_block:
        lines += _copy("$0", 2, at.k_masks, 16 * at.k.table) + _copy("$0", 3, at.v_masks, 8 * at.v.table)
        if at.centred:
            lines += _copy("$0", 5, at.rotation, 4 * at.dim)
        lines += ["setp.lt.u32 there, $1, 8;", "mad.lo.u32 to, $1, 4, $0;"]
        lines += [f"@there st.shared.b32 [to+{at.sums + 32 * slot}], 0;" for slot in range(at.v.count)]
    return _block([*lines, "cp.async.commit_group;"])


OPEN_KINDS = "=&r,r,l,l,l,l"


def row_code(at: Shared) -> str:
    """PTX: fetch the query, and wait for all groups. $0 = 0; the lane, address of the shared memory, of the row's
    descriptors."""
    copy = _copy("$2", 3, at.query, 32 * at.k.table)
    lines = [*COPY_REGISTERS, "mov.u32 $0, 0;", *copy, "cp.async.commit_group;"]
    return _block([*lines, "cp.async.wait_group 0;", FENCE])


ROW_KINDS = "=&r,r,r,l"


def wait_code(groups: int) -> str:
    """PTX: $0 = its only operand; wait for all groups of copies but the last few, of all lanes."""
    return _block(["mov.b32 $0, $1;", f"cp.async.wait_group {groups};", FENCE])


COPY_REGISTERS = (".reg .pred there;", ".reg .b32 to;", ".reg .b64 from;")


def _copy(base: str, operand: int, offset: int, size: int) -> list[str]:
    """Copy `size` bytes from address `operand` to `offset` of shared memory; $1 is the lane."""
    lines = [f"mad.wide.u32 from, $1, 16, ${operand};", f"mad.lo.u32 to, $1, 16, {base};"]
    for done in range(0, size, LANES):
        least = min(LANES, size - done) // 16
        lines += [
            f"setp.lt.u32 there, $1, {least};",
            f"@there cp.async.cg.shared.global [to+{offset + done}], [from+{done}], 16;",
        ]
    return lines


def fetch_code(side: Side, batches: int, tokens: int, size: int, place: int) -> str:
    """PTX: ask for 16 bytes of each load and batch, one group; where there is no token, anything stays.

    $0 = 0; the lane's address of each load, how many tokens there are from the lane's first on, the lane's place in
    shared memory, 16 bytes a lane. A batch begins `tokens` tokens and `size` bytes after the one before.
    """
    loads = len(side.slots)
    lines = [".reg .b64 once;", f".reg .pred there<{batches}>;", "mov.u32 $0, 0;", ONCE]
    lines += [f"setp.gt.s32 there{b}, ${1 + loads}, {tokens * b};" for b in range(batches)]
    for load in range(loads):
        for b in range(batches):
            to = f"${2 + loads}+{place + LANES * (load * batches + b)}"
            lines.append(f"@there{b} {STREAM} [{to}], [${1 + load}+{size * b}], 16, once;")
    return _block([*lines, "cp.async.commit_group;"])


def fetch_keys(at: Shared) -> str:
    """PTX: `fetch_code` of a block of keys."""
    return fetch_code(at.k, KEY_BATCHES, KEY_TOKENS, KEY_SIZE, at.keys)


def fetch_values(at: Shared) -> str:
    """PTX: `fetch_code` of a block of values."""
    return fetch_code(at.v, VALUE_BATCHES, VALUE_TOKENS, VALUE_SIZE, at.values)


def fetch_constraints(side: Side) -> str:
    """Operand kinds of `fetch_code`."""
    return ",".join(["=&r"] + ["l"] * len(side.slots) + ["r", "r"])


def _four(name: str, first: int = 0) -> str:
    return "{" + ", ".join(f"{name}{first + i}" for i in range(4)) + "}"


def score_code(at: Shared) -> str:
    """PTX: $0..$3 = sum over axes of query * byte in place, of the lane's tokens 32 t + 4 g .. + 3.

    After the outputs: the lane; addresses of the lane's query words (digit g % 2 of the fields of t) and of the masks
    of t; the lane's place in shared memory. Waits for all groups but the last.

    A product m16n8k32 has 16 tokens as rows, a token's fields' bytes as columns; of the query's 8 columns, those of
    t hold its low and its high digit where the batch is the t-th, else 0: so tokens of four batches, added up, end
    in four lanes each.
    """
    side, loads = at.k, len(at.k.slots)
    lines = [
        ".reg .pred mine;", f".reg .b32 column, a<4>, b<2>, c<16>, q<{side.table}>, m<{side.table}>, w<{4 * loads}>;",
        *(f"ld.{at.space}.v4.b32 {_four(name, s)}, [{address}+{4 * s}];"
          for name, address in (("m", "$6"), ("q", "$5")) for s in range(0, side.table, 4)),
        "cp.async.wait_group 1;", "shr.u32 column, $4, 3;", *(f"mov.b32 c{i}, 0;" for i in range(16)),
    ]  # fmt: skip
    for batch in range(KEY_BATCHES):
        lines.append(f"setp.eq.u32 mine, column, {batch};")
        lines += _read("$7", at.keys, loads, KEY_BATCHES, batch)
        for pair in side.pairs:
            for i, slot in enumerate(pair):
                lines.append(f"mov.b32 b{i}, 0;" if slot is None else f"selp.b32 b{i}, q{slot}, 0, mine;")
            for half in range(2):
                lines += _left(side, [(slot, 2 * half + n) for slot in pair for n in range(2)])
                lines.append(_product("s8", 8 * half + 4 * (batch % 2), "b0", "b1"))
    for token in range(4):
        low = 8 * (token // 2) + 2 * (token % 2)
        lines += [
            f"add.s32 c{low}, c{low}, c{low + 4};", f"add.s32 c{low + 1}, c{low + 1}, c{low + 5};",
            f"mad.lo.s32 ${token}, c{low + 1}, 256, c{low};",
        ]  # fmt: skip
    return _block(lines)


SCORE_KINDS = "=&r,=&r,=&r,=&r,r,{0},{0},r"
"""Operand kinds of `score_code`, with `Shared.address`."""


def _read(lane_at: str, place: int, loads: int, batches: int, batch: int) -> list[str]:
    """w = the lane's words of a batch, 4 of each load."""
    return [
        f"ld.shared.v4.b32 {_four('w', 4 * load)}, [{lane_at}+{place + LANES * (load * batches + batch)}];"
        for load in range(loads)
    ]


def _left(side: Side, parts: Sequence[tuple[int | None, int]]) -> list[str]:
    """a0..a3, the left side of a product: for each (slot, word) that word of the slot's load, masked, or 0."""
    return [
        f"mov.b32 a{i}, 0;" if slot is None else f"and.b32 a{i}, w{4 * side.load_of[slot] + word}, m{slot};"
        for i, (slot, word) in enumerate(parts)
    ]


def _product(kind: str, first: int, b0: str, b1: str) -> str:
    """The product of bytes a0..a3 with b0, b1, of kind u8 or s8, added to c from `first` on."""
    c = "{" + ", ".join(f"c{first + i}" for i in range(4)) + "}"
    return f"mma.sync.aligned.m16n8k32.row.col.s32.u8.{kind}.s32 {c}, {_four('a')}, {{{b0}, {b1}}}, {c};"


def accumulators(side: Side) -> int:
    """Registers of sums of values: 4 for each two slots."""
    return 4 * len(side.pairs)


def sum_code(at: Shared) -> str:
    """PTX: $.. = accumulators + sum over the block's tokens of weight digits * masked byte.

    A product has two slots of 8 planes as rows, 32 tokens as columns; digit n of the weights is the n-th column of
    its right side. After the outputs: the lane's 4 weights (tokens 32 t + 4 g on, 24 bits each), addresses in shared
    memory where the lane's weights go and where those that it multiplies lie; address of the masks of g / 4; the
    lane's place in shared memory; the accumulators. Waits for the values: all groups but the next keys'.
    """
    side, loads, count = at.v, len(at.v.slots), accumulators(at.v)
    x = [f"${count + i}" for i in range(4)]
    to, place, masks, lane_at, old = *(f"${count + 4 + i}" for i in range(4)), count + 8
    lines = [
        f".reg .b32 a<4>, b<4>, c<{count}>, m<{side.table}>, w<{4 * loads}>, x<4>;",
        *(f"ld.{at.space}.v4.b32 {_four('m', s)}, [{masks}+{4 * s}];" for s in range(0, side.table, 4)),
        f"prmt.b32 x0, {x[0]}, {x[1]}, 0x5140;", f"prmt.b32 x1, {x[2]}, {x[3]}, 0x5140;",
        f"prmt.b32 x2, {x[0]}, {x[1]}, 0x0062;", f"prmt.b32 x3, {x[2]}, {x[3]}, 0x0062;",
        "prmt.b32 a0, x0, x1, 0x5410;", "prmt.b32 a1, x0, x1, 0x7632;", "prmt.b32 a2, x2, x3, 0x5410;",
        FENCE,  # the block before is read
        *(f"st.shared.b32 [{to}+{DIGIT_ROW * digit}], a{digit};" for digit in range(DIGITS)),
        FENCE, f"cp.async.wait_group {0 if at.one_block else 1};",
        *(f"mov.b32 c{i}, ${old + i};" for i in range(count)),
    ]  # fmt: skip
    for batch in range(VALUE_BATCHES):
        lines.append(f"ld.shared.v4.b32 {_four('b')}, [{place}+{64 * batch}];")
        lines += _read(lane_at, at.values, loads, VALUE_BATCHES, batch)
        for step in range(2):
            for tile, pair in enumerate(side.pairs):
                lines += _left(side, [(slot, 2 * step + n) for n in range(2) for slot in pair])
                lines.append(_product("u8", 4 * tile, f"b{2 * step}", f"b{2 * step + 1}"))
    lines += [f"mov.b32 ${i}, c{i};" for i in range(count)]
    return _block(lines)


def sum_constraints(at: Shared) -> str:
    """Operand kinds of `sum_code`."""
    count = accumulators(at.v)
    return ",".join(["=&r"] * count + ["r"] * 6 + [at.address, "r"] + ["r"] * count)


def empty_code(side: Side, at: Shared) -> str:
    """PTX: where asked, move the accumulators' sums to shared memory, times alpha, and set them to 0.

    $.. = the accumulators after that; then whether to (for all lanes alike), alpha, the lane, address of the shared
    memory, the accumulators.
    """
    count = accumulators(side)
    asked, alpha, lane, shared = (f"${count + i}" for i in range(4))
    lines = [
        ".reg .pred asked, owner;", ".reg .b32 to;", *JOIN_REGISTERS, ".reg .f32 old;",
        *(f"mov.b32 ${i}, ${count + 4 + i};" for i in range(count)),
        f"setp.ne.b32 asked, {asked}, 0;", "@!asked bra done;",
        *_join_setup(lane), f"add.u32 to, to, {shared};",
    ]  # fmt: skip
    for slot in range(side.count):
        lines += [
            *_join(slot, 0), f"@owner ld.shared.f32 old, [to+{at.sums + 32 * slot}];", "add.f32 f, f, old;",
            f"mul.f32 f, f, {alpha};", f"@owner st.shared.f32 [to+{at.sums + 32 * slot}], f;",
        ]  # fmt: skip
    return _block([*lines, *(f"mov.b32 ${i}, 0;" for i in range(count)), "done:", "mov.b32 to, 0;"])


def empty_constraints(side: Side) -> str:
    """Operand kinds of `empty_code`."""
    count = accumulators(side)
    return ",".join(["=&r"] * count + ["r", "f", "r", "r"] + ["r"] * count)


def emit_code(side: Side, at: Shared) -> str:
    """PTX: write the sums, float32 [V slots, 8] in units of a weight of 1. $0 = 0; the lane, address of the shared
    memory, where to, the accumulators."""
    lines = [
        ".reg .pred owner;", ".reg .b32 to, place;", ".reg .b64 out;", *JOIN_REGISTERS, ".reg .f32 old;",
        "mov.u32 $0, 0;", *_join_setup("$1"), "cvt.u64.u32 out, to;", "add.u64 out, out, $3;",
        "add.u32 place, to, $2;",
    ]  # fmt: skip
    for slot in range(side.count):
        lines += _join(slot, 4)
        if not at.one_block:
            lines += [f"@owner ld.shared.f32 old, [place+{at.sums + 32 * slot}];", "add.f32 f, f, old;"]
        lines += ["mul.f32 f, f, 0f37800000;", f"@owner st.global.f32 [out+{32 * slot}], f;"]  # 2^-16
    return _block(lines)


def emit_constraints(side: Side) -> str:
    """Operand kinds of `emit_code`."""
    return ",".join(["=&r", "r", "r", "l"] + ["r"] * accumulators(side))


JOIN_REGISTERS = (".reg .f32 f, even, odd, more;", ".reg .b32 t;")


def _join_setup(lane: str) -> list[str]:
    """What each lane's two columns count: digits 0 and 1 in lanes of t = 0, which own the sums; 2 where t = 1."""
    return [
        f"and.b32 t, {lane}, 3;", "setp.eq.u32 owner, t, 0;",
        "selp.f32 even, 0f3F800000, 0f47800000, owner;",  # 1 or 65536
        "selp.f32 odd, 0f43800000, 0f00000000, owner;",  # 256 or 0
        f"and.b32 to, {lane}, 0x1c;",  # 4 g
    ]  # fmt: skip


def _join(slot: int, operand: int) -> list[str]:
    """f = the sum of a slot's digits, in lanes of t = 0, of accumulators from `operand` on."""
    first = operand + 2 * slot
    return [
        f"cvt.rn.f32.s32 f, ${first};", f"cvt.rn.f32.s32 more, ${first + 1};", "mul.f32 f, f, even;",
        "fma.rn.f32 f, more, odd, f;", "shfl.sync.down.b32 more, f, 1, 0x1f, 0xffffffff;", "add.f32 f, f, more;",
    ]  # fmt: skip


def turn_code(dim: int) -> str:
    """PTX: the coefficients of the centre's scores at the first block, d / 8 of cosines, then of sines.

    After them: the lane's addresses of its pairs' cosines and sines at the block's token 32 (g / 2) + 2 (g % 2); the
    pairs' coefficients at position 0 (`_phase`).
    """
    lines = [".reg .f32 x<4>, y<4>;"]
    for four in range(dim // 32):
        lines += [
            f"ld.global.v4.f32 {_four(x)}, [${dim // 4 + operand}+{16 * four}];" for operand, x in enumerate("xy")
        ]
        lines += _turn(dim, 4 * four, dim // 4 + 2)
    return _block(lines)


def turn_constraints(dim: int) -> str:
    """Operand kinds of `turn_code`."""
    return ",".join(["=&f"] * (dim // 4) + ["l", "l"] + ["f"] * (dim // 4))


def _turn(dim: int, first: int, old: int, new: int = 0) -> list[str]:
    """Four pairs' coefficients, from `first` on, of operands from `old` on turned by angles of cosine x and sine y,
    as operands from `new` on."""
    lines = []
    for n in range(4):
        even, odd = f"${old + first + n}", f"${old + first + n + dim // 8}"
        to_even, to_odd = f"${new + first + n}", f"${new + first + n + dim // 8}"
        lines += [
            f"mul.f32 {to_even}, {odd}, y{n};", f"fma.rn.f32 {to_even}, {even}, x{n}, {to_even};",
            f"mul.f32 {to_odd}, {even}, y{n};", f"neg.f32 {to_odd}, {to_odd};",
            f"fma.rn.f32 {to_odd}, {odd}, x{n}, {to_odd};",
        ]  # fmt: skip
    return lines


def bias_code(at: Shared) -> str:
    """PTX: $0..$3 = the centre's scores of the lane's tokens of a block; then, for more blocks than one, the state
    after.

    After the outputs: the lane's place in shared memory, that of its pairs' rotation; the state, coefficients of
    the lane's pairs turned to the block and, one column of lanes each, by 32 t and 32 t + 2. Tokens are
    4 g + {0, 1} + 32 t + {0, 2}: the state meets the turns by 4 g and 4 g + 1 in a matrix product, m16n8k16, whose
    results lie where they belong. Then it is turned by a block.
    """
    state = 0 if at.one_block else at.dim // 4
    lane_at, rotation, old = f"${4 + state}", f"${5 + state}", 6 + state
    lines = list(PRODUCT_REGISTERS)
    for four in range(at.dim // 32):
        lines += _multiply(at, four, old, f"{lane_at}+{at.turns}")
        if not at.one_block:
            lines += [
                f"ld.shared.v4.f32 {_four(x)}, [{rotation}+{at.rotation + 16 * four + place}];"
                for x, place in (("x", 0), ("y", 2 * at.dim))
            ]
            lines += _turn(at.dim, 4 * four, old, 4)
    return _block([*lines, *(f"add.f32 ${token}, ${token}, c{token};" for token in range(4))])


def bias_constraints(at: Shared) -> str:
    """Operand kinds of `bias_code`."""
    state = at.dim // 4
    return ",".join(["=&f"] * (4 + state * (not at.one_block)) + ["r", "r"] + ["f"] * state)


PRODUCT_REGISTERS = (
    ".reg .f32 x<4>, y<4>, c<4>, r, s;", ".reg .b16 p, q;", ".reg .b32 high<2>, low<2>, m<4>;",
    *(f"mov.f32 {name}{token}, 0f00000000;" for name in "$c" for token in range(4)),
)  # fmt: skip


def _multiply(at: Shared, four: int, state: int, turns: str) -> list[str]:
    """Add the products of four pairs' coefficients and turns: both sums of two float16; those of two low parts are
    below rounding. There are two sums, c and the outputs, for half the latency."""
    product = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
    acc, more = "{$0, $2, $1, $3}", "{c0, c2, c1, c3}"
    lines = []
    for two in range(2):
        for j in range(2):
            even = f"${state + 4 * four + 2 * two + j}"
            odd = f"${state + 4 * four + 2 * two + j + at.dim // 8}"
            lines += [
                f"cvt.rn.f16x2.f32 high{j}, {odd}, {even};", f"mov.b32 {{p, q}}, high{j};",
                "cvt.f32.f16 r, p;", "cvt.f32.f16 s, q;", f"sub.f32 r, {even}, r;", f"sub.f32 s, {odd}, s;",
                f"cvt.rn.f16x2.f32 low{j}, s, r;",
            ]  # fmt: skip
        place = LANES * (2 * four + two)
        lines += [
            f"ld.shared.v4.b32 {_four('m')}, [{turns}+{place}];",
            f"{product} {acc}, {_four('m')}, {{low0, low1}}, {acc};",
            f"{product} {more}, {_four('m')}, {{high0, high1}}, {more};",
            f"ld.shared.v4.b32 {_four('m')}, [{turns}+{place + 32 * at.dim}];",
            f"{product} {acc}, {_four('m')}, {{high0, high1}}, {acc};",
        ]
    return lines


def _block(lines: list[str]) -> str:
    return "{\n" + "\n".join(lines) + "\n}"
