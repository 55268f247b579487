"""The inline PTX of the fast kernel, made for a code's shape: how a warp loads, multiplies and sums.

Each function gives the text of one `inline_asm_elementwise`; its docstring says what the operands are, outputs
first, in the order of $0, $1 ... Neither Triton nor a GPU is needed here: the kernel that runs it is in `ptx`,
with the picture of which lane owns which tokens. A lane is 4 g + t, 0 <= t < 4, as in PTX's matrix fragments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STREAM = "ld.global.L1::no_allocate.L2::cache_hint.v4.b32"
ONCE = "createpolicy.fractional.L2::evict_first.b64 once, 1.0;"
"""What is read once leaves the L2 first: code, maps, biases and partial results stay."""

FENCE = "bar.warp.sync 0xffffffff;"
"""Keeps the assembler from putting off a batch of loads until each is used: one latency, not one for each word."""

DIGITS = 3
"""Bytes of a weight: 16 bits below the point, 8 before it."""

DIGIT_ROW = 192
"""Bytes from one digit's weights of a block to the next's: 128 would put two digits into the same banks."""


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
    """Where a warp keeps, in shared memory, what it reads for every block: a load of it from global memory would
    queue behind the codes on their way. Offsets in bytes. A range of one block keeps only the weights there; the
    last three are for those of more blocks of keys that have a centre.

        weights       of a block's tokens, a digit a row (see `sum_code`)
        query         the row's digits: `fast_fold_kernel`'s descriptors
        k_masks, v_masks   of the head: `prepared.Fields.masks`
        sums          float32 [V slots, 8]: what accumulators held when they were last emptied
        rotation      cosines, then sines, of RoPE's turn by a block: float32 [d]
        state         the coefficients of the centre's scores at the block, each lane's: float32 [d / 16, 32, 4]
        turns         `Rope.turns`
    """

    dim: int
    k: Side
    v: Side
    one_block: bool
    centred: bool

    @property
    def query(self) -> int:
        return DIGITS * DIGIT_ROW

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
    def state(self) -> int:
        return self.rotation + 4 * self.dim

    @property
    def turns(self) -> int:
        return self.state + 32 * self.dim

    @property
    def size(self) -> int:
        if self.one_block:
            return self.query
        return self.turns + 64 * self.dim if self.centred else self.rotation


def open_code(at: Shared) -> str:
    """PTX: $0 = address of the shared memory; for more blocks than one filled, but for query and state.

    After the output: the lane, addresses of the head's masks of keys and of values; of `Rope.turns` and
    `Rope.block_turn`.
    """
    lines = [f".shared .align 16 .b8 held[{at.size}];", *COPY_REGISTERS, "mov.u32 $0, held;"]
    if not at.one_block:
        lines += _copy("$0", 2, at.k_masks, 16 * at.k.table) + _copy("$0", 3, at.v_masks, 8 * at.v.table)
        lines += ["setp.lt.u32 there, $1, 8;", "mad.lo.u32 to, $1, 4, $0;"]
        lines += [f"@there st.shared.b32 [to+{at.sums + 32 * slot}], 0;" for slot in range(at.v.count)]
        if at.centred:
            lines += _copy("$0", 4, at.turns, 64 * at.dim) + _copy("$0", 5, at.rotation, 4 * at.dim)
        lines.append(FENCE)
    return _block(lines)


OPEN_KINDS = "=&r,r,l,l,l,l"


def row_code(at: Shared) -> str:
    """PTX: fill in the query. $0 = 0; the lane, address of the shared memory, of the row's descriptors."""
    return _block([*COPY_REGISTERS, "mov.u32 $0, 0;", *_copy("$2", 3, at.query, 32 * at.k.table), FENCE])


ROW_KINDS = "=&r,r,r,l"


def table_code(words: int, space: str) -> str:
    """PTX: $0.. = `words` (a multiple of 4) int32 from an address, the operand after the outputs."""
    lines = []
    for w in range(0, words, 4):
        four = ", ".join(f"${w + i}" for i in range(4))
        lines.append(f"ld.{space}.v4.b32 {{{four}}}, [${words}+{4 * w}];")
    return _block(lines)


def table_constraints(words: int, space: str) -> str:
    """Operand kinds of `table_code`."""
    return ",".join(["=&r"] * words + ["l" if space == "global" else "r"])


def state_code(at: Shared) -> str:
    """PTX: fill in the state for the first block. $0 = 0; the lane's address in shared memory, 16 bytes a lane; of
    the lane's pairs' cosines and sines at the block's token 32 (g / 2) + 2 (g % 2); the pairs' coefficients
    (`_phase`)."""
    lines = [".reg .b32 to;", ".reg .f32 x<4>, y<4>, a<4>, b<4>;", "mov.u32 $0, 0;", "mov.u32 to, $1;"]
    for four in range(at.dim // 32):
        lines += _angles(four, "$2", "$3") + _turn(*_coefficients(4, four, at.dim)) + _keep(four, at)
    return _block(lines)


def state_constraints(dim: int) -> str:
    """Operand kinds of `state_code`."""
    return ",".join(["=&r", "r", "l", "l"] + ["f"] * (dim // 4))


def _angles(four: int, cos: str, sin: str) -> list[str]:
    """Load the cosines x and sines y of four pairs."""
    return [f"ld.global.v4.f32 {_four(x)}, [{at}+{16 * four}];" for x, at in (("x", cos), ("y", sin))]


def _coefficients(operand: int, four: int, dim: int) -> tuple[list[str], list[str]]:
    """Operands that hold the coefficients of four pairs: of cosines from `operand` on, then those of sines."""
    first = operand + 4 * four
    return [f"${first + n}" for n in range(4)], [f"${first + dim // 8 + n}" for n in range(4)]


def _turn(even: Sequence[str], odd: Sequence[str]) -> list[str]:
    """Coefficients a, b of cosines and sines: those of even and odd turned by angles of cosine x and sine y."""
    lines = []
    for n in range(4):
        lines += [
            f"mul.f32 a{n}, {odd[n]}, y{n};", f"fma.rn.f32 a{n}, {even[n]}, x{n}, a{n};",
            f"mul.f32 b{n}, {even[n]}, y{n};", f"neg.f32 b{n}, b{n};", f"fma.rn.f32 b{n}, {odd[n]}, x{n}, b{n};",
        ]  # fmt: skip
    return lines


def _keep(four: int, at: Shared) -> list[str]:
    """Store a and b as the lane's state."""
    place = at.state + 1024 * four
    return [f"st.shared.v4.f32 [to+{place}], {_four('a')};", f"st.shared.v4.f32 [to+{place + 512}], {_four('b')};"]


COPY_REGISTERS = (".reg .pred there;", ".reg .b32 to, c<4>;", ".reg .b64 from;")


def _copy(base: str, operand: int, offset: int, size: int) -> list[str]:
    """Copy `size` bytes from address `operand` to `offset` of shared memory; $1 is the lane."""
    lines = []
    for done in range(0, size, 512):
        least = min(512, size - done) // 16
        lines += [
            f"setp.lt.u32 there, $1, {least};", f"mad.wide.u32 from, $1, 16, ${operand};",
            "shl.b32 to, $1, 4;", f"add.u32 to, to, {base};",
            f"@there ld.global.v4.b32 {_four('c')}, [from+{done}];",
            f"@there st.shared.v4.b32 [to+{offset + done}], {_four('c')};",
        ]  # fmt: skip
    return lines


def _four(name: str) -> str:
    return "{" + ", ".join(f"{name}{i}" for i in range(4)) + "}"


def load_code(loads: int, batches: int, tokens: int, size: int) -> str:
    """PTX: 16 bytes of each load and batch, $(4 (load batches + batch)) on; where there is no token, anything.

    After the outputs: the lane's address of each load, how many tokens there are from the lane's first on. A batch
    begins `tokens` tokens and `size` bytes after the one before.
    """
    at = 4 * loads * batches
    lines = [".reg .b64 once;", f".reg .pred there<{batches}>;", ONCE]
    lines += [f"setp.gt.s32 there{b}, ${at + loads}, {tokens * b};" for b in range(batches)]
    for load in range(loads):
        for b in range(batches):
            four = ", ".join(f"${4 * (load * batches + b) + i}" for i in range(4))
            lines.append(f"@there{b} {STREAM} {{{four}}}, [${at + load}+{size * b}], once;")
    return _block([*lines, FENCE])


def load_constraints(loads: int, batches: int) -> str:
    """Operand kinds of `load_code`."""
    return ",".join(["=&r"] * (4 * loads * batches) + ["l"] * loads + ["r"])


KEY_BATCHES, KEY_TOKENS, KEY_SIZE = 4, 32, 128
VALUE_BATCHES, VALUE_TOKENS, VALUE_SIZE = 2, 64, 64


def score_code(side: Side) -> str:
    """PTX: $0..$3 = sum over axes of query * byte in place, of the lane's tokens 32 t + 4 g .. + 3.

    After the outputs: the lane; the words of `load_code`; the S query words of the lane (digit g % 2 of the fields
    of t); the S masks of t.

    A product m16n8k32 has 16 tokens as rows, a token's fields' bytes as columns; of the query's 8 columns, those of
    t hold its low and its high digit where the batch is the t-th, else 0: so tokens of four batches, added up, end
    in four lanes each.
    """
    words, query = 5, 5 + 16 * len(side.slots)
    masks = query + side.table
    lines = [
        ".reg .pred mine;", ".reg .b32 column, a<4>, b<2>, c<16>;", "shr.u32 column, $4, 3;",
        *(f"mov.b32 c{i}, 0;" for i in range(16)),
    ]  # fmt: skip
    for batch in range(KEY_BATCHES):
        lines.append(f"setp.eq.u32 mine, column, {batch};")
        for pair in side.pairs:
            for i, slot in enumerate(pair):
                lines.append(f"mov.b32 b{i}, 0;" if slot is None else f"selp.b32 b{i}, ${query + slot}, 0, mine;")
            for half in range(2):
                for i, slot in enumerate(pair):
                    for token in range(2):
                        to = f"a{2 * i + token}"
                        if slot is None:
                            lines.append(f"mov.b32 {to}, 0;")
                            continue
                        word = words + 4 * (side.load_of[slot] * KEY_BATCHES + batch) + 2 * half + token
                        lines.append(f"and.b32 {to}, ${word}, ${masks + slot};")
                lines.append(_product("s8", 8 * half + 4 * (batch % 2), "b0", "b1"))
    for token in range(4):
        low = 8 * (token // 2) + 2 * (token % 2)
        lines += [
            f"add.s32 c{low}, c{low}, c{low + 4};", f"add.s32 c{low + 1}, c{low + 1}, c{low + 5};",
            f"mad.lo.s32 ${token}, c{low + 1}, 256, c{low};",
        ]  # fmt: skip
    return _block(lines)


def _product(kind: str, first: int, b0: str, b1: str) -> str:
    """The product of bytes a0..a3 with b0, b1, of kind u8 or s8, added to c from `first` on."""
    c = "{" + ", ".join(f"c{first + i}" for i in range(4)) + "}"
    return f"mma.sync.aligned.m16n8k32.row.col.s32.u8.{kind}.s32 {c}, {_four('a')}, {{{b0}, {b1}}}, {c};"


def score_constraints(side: Side) -> str:
    """Operand kinds of `score_code`."""
    return ",".join(["=&r"] * 4 + ["r"] * (1 + 16 * len(side.slots) + 2 * side.table))


def accumulators(side: Side) -> int:
    """Registers of sums of values: 4 for each two slots."""
    return 4 * len(side.pairs)


def sum_code(side: Side) -> str:
    """PTX: $.. = accumulators + sum over the block's tokens of weight digits * masked byte.

    A product has two slots of 8 planes as rows, 32 tokens as columns; digit n of the weights is the n-th column of
    its right side. After the outputs: the lane's 4 weights (tokens 32 t + 4 g on, 24 bits each), addresses in shared
    memory where the lane's weights go and where those that it multiplies lie; the words of `load_code`, the masks
    of g / 4, the accumulators.
    """
    count = accumulators(side)
    w = [f"${count + i}" for i in range(4)]
    to, at, words = f"${count + 4}", f"${count + 5}", count + 6
    masks = words + 8 * len(side.slots)
    old = masks + side.table
    lines = [
        f".reg .b32 a<4>, b<8>, c<{count}>, x<4>;",
        f"prmt.b32 x0, {w[0]}, {w[1]}, 0x5140;", f"prmt.b32 x1, {w[2]}, {w[3]}, 0x5140;",
        f"prmt.b32 x2, {w[0]}, {w[1]}, 0x0062;", f"prmt.b32 x3, {w[2]}, {w[3]}, 0x0062;",
        "prmt.b32 a0, x0, x1, 0x5410;", "prmt.b32 a1, x0, x1, 0x7632;", "prmt.b32 a2, x2, x3, 0x5410;",
        FENCE,  # the block before is read
        *(f"st.shared.b32 [{to}+{DIGIT_ROW * digit}], a{digit};" for digit in range(DIGITS)),
        FENCE,
        *(f"ld.shared.v4.b32 {{b{4 * n}, b{4 * n + 1}, b{4 * n + 2}, b{4 * n + 3}}}, [{at}+{64 * n}];" for n in (0, 1)),
        *(f"mov.b32 c{i}, ${old + i};" for i in range(count)),
    ]  # fmt: skip
    for step in range(4):
        batch, word = step // 2, step % 2 * 2
        for tile, pair in enumerate(side.pairs):
            for i, slot in enumerate(pair):
                for second in range(2):
                    to_a = f"a{2 * second + i}"
                    if slot is None:
                        lines.append(f"mov.b32 {to_a}, 0;")
                        continue
                    own = words + 4 * (side.load_of[slot] * VALUE_BATCHES + batch) + word + second
                    lines.append(f"and.b32 {to_a}, ${own}, ${masks + slot};")
            lines.append(_product("u8", 4 * tile, f"b{2 * step}", f"b{2 * step + 1}"))
    lines += [f"mov.b32 ${i}, c{i};" for i in range(count)]
    return _block(lines)


def sum_constraints(side: Side) -> str:
    """Operand kinds of `sum_code`."""
    count = accumulators(side)
    return ",".join(["=&r"] * count + ["r"] * (6 + 8 * len(side.slots) + side.table + count))


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


def bias_code(at: Shared) -> str:
    """PTX: $0..$3 = the centre's scores of the lane's tokens of a block.

    After the outputs: the lane's address in shared memory, 16 bytes a lane, and that of its pairs' rotation.
    Tokens are 4 g + {0, 1} + 32 t + {0, 2}: the state is the coefficients turned by the block and, one column each,
    by 32 t and 32 t + 2; they meet the turns by 4 g and 4 g + 1 in a matrix product, m16n8k16, whose results lie
    where they belong. Then the state is turned by a block.
    """
    lines = [*PRODUCT_REGISTERS, ".reg .f32 e<4>, o<4>;", ".reg .b32 to;", "mov.u32 to, $4;"]
    for four in range(at.dim // 32):
        for name, operand, offset in (
            ("e", 4, at.state + 1024 * four), ("o", 4, at.state + 1024 * four + 512),
            ("x", 5, 16 * four), ("y", 5, 16 * four + 2 * at.dim),
        ):  # fmt: skip
            lines.append(f"ld.shared.v4.f32 {_four(name)}, [${operand}+{offset}];")
        even, odd = [f"e{n}" for n in range(4)], [f"o{n}" for n in range(4)]
        lines += _multiply(four, even, odd, "shared", at.turns, at.dim)
        lines += _turn(even, odd) + _keep(four, at)
    return _block([*lines, *SUMS])


BIAS_KINDS = "=&f,=&f,=&f,=&f,r,r"


def bias_once_code(dim: int) -> str:
    """PTX: the same for a range of one block, from global memory.

    After the outputs: the lane's address in `Rope.turns`, of its pairs' cosines and sines at the block's token
    32 (g / 2) + 2 (g % 2), the pairs' coefficients.
    """
    lines = list(PRODUCT_REGISTERS)
    a, b = [f"a{n}" for n in range(4)], [f"b{n}" for n in range(4)]
    for four in range(dim // 32):
        lines += _angles(four, "$5", "$6") + _turn(*_coefficients(7, four, dim))
        lines += _multiply(four, a, b, "global", 0, dim)
    return _block([*lines, *SUMS])


def bias_once_constraints(dim: int) -> str:
    """Operand kinds of `bias_once_code`."""
    return ",".join(["=&f"] * 4 + ["l", "l", "l"] + ["f"] * (dim // 4))


PRODUCT_REGISTERS = (
    ".reg .f32 x<4>, y<4>, a<4>, b<4>, c<4>, r, s;", ".reg .b16 p, q;", ".reg .b32 high<2>, low<2>, m<4>;",
    *(f"mov.f32 {name}{token}, 0f00000000;" for name in "$c" for token in range(4)),
)  # fmt: skip
SUMS = tuple(f"add.f32 ${token}, ${token}, c{token};" for token in range(4))


def _multiply(four: int, even: Sequence[str], odd: Sequence[str], space: str, turns: int, dim: int) -> list[str]:
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
        place = turns + 512 * (2 * four + two)
        lines += [
            f"ld.{space}.v4.b32 {_four('m')}, [$4+{place}];",
            f"{product} {acc}, {_four('m')}, {{low0, low1}}, {acc};",
            f"{product} {more}, {_four('m')}, {{high0, high1}}, {more};",
            f"ld.{space}.v4.b32 {_four('m')}, [$4+{place + 32 * dim}];",
            f"{product} {acc}, {_four('m')}, {{high0, high1}}, {acc};",
        ]
    return lines


def _block(lines: list[str]) -> str:
    return "{\n" + "\n".join(lines) + "\n}"
