"""The inline PTX of the kernel for grouped queries: four queries of a key/value head share each product.

As in `ptx_text`, each function gives the text of one `inline_asm_elementwise`, and a lane is 4 g + t. Of a block
of 128 tokens lane (g, t) reads

    keys      tokens 32 s + 4 g .. + 3, s < 4, of words 4 j + t: a product's row is a token, 16 bytes of it side by
              side in the lanes of t; its 8 columns are the 2 digits of 4 queries
    values    tokens 64 h + 16 t .. + 15, h < 2, of byte lane g % 4 of words 2 j + g / 4: a product's row is a byte
              of the code; the columns of two products are the 3 digits of 2 queries each

and has in between the scores and weights of query t, of its tokens of keys. Words side by side may have fields of
different numbers: `Slots` lines them up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from turboesm_kernels.layout import TILE
from turboesm_kernels.ptx_text import (
    COPY_REGISTERS,
    DIGIT_ROW,
    DIGITS,
    FENCE,
    LANES,
    ONCE,
    block,
    copy_lines,
    digit_lines,
    keep_lines,
    product,
    stream_lines,
    turn_lines,
    vector,
)

QUERIES = 4
"""That share a product: 8 columns, of 2 digits each."""

KEY_WORDS, VALUE_WORDS = 4, 2
"""Words of a code side by side in a product."""

SCORES = 16
"""Of a lane: 4 tokens from 32 s + 4 g on, for each s < 4."""

QUERY_ROW = 3 * DIGIT_ROW + 32
"""Bytes from one query's weights of a block to the next's: lanes of each t write banks of their own."""

ROWS_OF_TURNS = 64
"""Bytes of a channel in a table of turns: 16 rows, cosines and sines in two halves."""


@dataclass(frozen=True)
class Slots:
    """Fields of the words of a code, `together` words side by side: a slot for those of one place in their words.

    `fields`: how many each word has.
    """

    fields: tuple[int, ...]
    together: int

    @property
    def groups(self) -> int:
        """Of words that lie side by side."""
        return -(-len(self.fields) // self.together)

    @cached_property
    def group_of(self) -> list[int]:
        """For each slot the group that its words are of."""
        return [
            group
            for group in range(self.groups)
            for _ in range(max(self.fields[group * self.together : (group + 1) * self.together]))
        ]

    @cached_property
    def pairs(self) -> list[tuple[int, int | None]]:
        """Slots two by two, as a product takes them; the last may be alone."""
        count = len(self.group_of)
        return [(slot, slot + 1 if slot + 1 < count else None) for slot in range(0, count, 2)]

    @property
    def row(self) -> int:
        """Words of a table's row: slots padded so that lanes that read rows of their own meet in no bank."""
        return -(-(len(self.group_of) - 4) // 8) * 8 + 4

    def field(self, member: int, slot: int) -> int | None:
        """The field that stands in a slot of the words in place `member` of their groups, if there is one."""
        groups = self.group_of
        word, own = groups[slot] * self.together + member, slot - groups.index(groups[slot])
        if word >= len(self.fields) or own >= self.fields[word]:
            return None
        return sum(self.fields[:word]) + own

    @cached_property
    def places(self) -> list[list[int]]:
        """Fields by member and slot, in rows of `row`; 0, whose mask is then 0, where there is none."""
        return [[found or 0 for found in row] for row in self._fields]

    @cached_property
    def there(self) -> list[list[bool]]:
        """Where `places` names a field."""
        return [[found is not None for found in row] for row in self._fields]

    @property
    def _fields(self) -> list[list[int | None]]:
        count = len(self.group_of)
        return [
            [self.field(member, slot) if slot < count else None for slot in range(self.row)]
            for member in range(self.together)
        ]


@lru_cache(maxsize=256)
def slots_of(fields: tuple[int, ...], together: int) -> Slots:
    """`Slots` of a shape, made once: many layers have the same."""
    return Slots(fields, together)


@dataclass(frozen=True)
class GroupShared:
    """What a warp keeps in shared memory. Offsets in bytes.

        weights       of a block's tokens: rows of digits, queries `QUERY_ROW` apart
        query         each lane's row of digits, of a column and of the words of its t
        k_masks, v_masks   of the head, `Slots.row` words for each word side by side
        sums          float32 [2 pairs of slots, 32]: what accumulators held when they were last emptied
        rotation, state    as in `ptx_text.Shared`

    dim: d, padded to `reference.PAIRED`.
    """

    dim: int
    k: Slots
    v: Slots
    centred: bool
    one_block: bool = False

    @property
    def query(self) -> int:
        return QUERIES * QUERY_ROW

    @property
    def k_masks(self) -> int:
        return self.query + 128 * self.k.row

    @property
    def v_masks(self) -> int:
        return self.k_masks + 4 * KEY_WORDS * self.k.row

    @property
    def sums(self) -> int:
        return self.v_masks + 4 * VALUE_WORDS * self.v.row

    @property
    def rotation(self) -> int:
        return self.sums + 256 * len(self.v.pairs)

    @property
    def state(self) -> int:
        return self.rotation + 4 * self.dim

    @property
    def size(self) -> int:
        return self.state + 32 * self.dim if self.centred else self.rotation


def registers(k: Slots, v: Slots) -> int:
    """Registers of a lane that hold codes and sums."""
    return 16 * k.groups + 8 * v.groups + accumulators(v)


def open_code(at: GroupShared) -> str:
    """PTX: $0 = address of the shared memory; ask for its tables but the query, one group of copies.

    After the output: the lane, addresses of the head's masks of keys and of values; of `Rope.block_turn`.
    """
    lines = [f".shared .align 16 .b8 held[{at.size}];", *COPY_REGISTERS, "mov.u32 $0, held;"]
    lines += copy_lines("$0", 2, at.k_masks, 4 * KEY_WORDS * at.k.row)
    lines += copy_lines("$0", 3, at.v_masks, 4 * VALUE_WORDS * at.v.row)
    if at.centred:
        lines += copy_lines("$0", 4, at.rotation, 4 * at.dim)
    lines.append("mad.lo.u32 to, $1, 4, $0;")
    lines += [f"st.shared.b32 [to+{at.sums + 128 * n}], 0;" for n in range(2 * len(at.v.pairs))]
    return block([*lines, "cp.async.commit_group;"])


OPEN_KINDS = "=&r,r,l,l,l"


def row_code(at: GroupShared) -> str:
    """PTX: fetch the lane's digits, and wait for all copies. $0 = 0.

    Then the lane, address of the shared memory, of the lane's `Slots.places`, of its digit's descriptors.
    """
    lines = [
        ".reg .b32 to, p<4>, q<4>;", ".reg .b64 from;", "mov.u32 $0, 0;",
        f"mad.lo.u32 to, $1, {4 * at.k.row}, $2;",
    ]  # fmt: skip
    for first in range(0, at.k.row, 4):
        lines.append(f"ld.global.v4.b32 {vector('p')}, [$3+{4 * first}];")
        for n in range(4):
            lines += [f"mad.wide.u32 from, p{n}, 4, $4;", f"ld.global.b32 q{n}, [from];"]
        lines.append(f"st.shared.v4.b32 [to+{at.query + 4 * first}], {vector('q')};")
    return block([*lines, "cp.async.wait_group 0;", FENCE])


ROW_KINDS = "=&r,r,r,l,l"


def keys_code(at: GroupShared) -> str:
    """PTX: $0.. = 4 tokens of 4 registers for each s, for each of the lane's words.

    After the outputs: the lane, address of the first word, bytes between words, a block's first token, the first
    that is past the end. What is past it, or no word, is anything.
    """
    first = ("and.b32 own, {lane}, 3;", "mov.b32 inside, 0;", "and.b32 token, {lane}, 0x1c;")  # 4 g
    return block(_loads(at.k, first, [32 * s for s in range(4)]))


def values_code(at: GroupShared) -> str:
    """PTX: $0.. = 16 tokens of 4 registers for each h, for each of the lane's words, as `keys_code`."""
    first = (
        "shr.u32 own, {lane}, 4;", "and.b32 inside, {lane}, 0xc;", f"mul.lo.u32 inside, inside, {TILE // 4};",
        "and.b32 token, {lane}, 3;", "mul.lo.u32 token, token, 16;",
    )  # fmt: skip
    return block(_loads(at.v, first, [64 * h for h in range(2)], tiled=True))


def _loads(slots: Slots, first: Sequence[str], parts: Sequence[int], tiled: bool = False) -> list[str]:
    """16 bytes of each part of a block, that many tokens from its first, of each group of words.

    `first` gives own, the lane's word in a group; inside, its bytes there; and token, its first one. Nothing else
    differs from lane to lane, so that addresses take no registers from block to block.
    """
    count = 4 * len(parts) * slots.groups
    lane, base, stride, start, end = (f"${count + n}" for n in range(5))
    lines = [
        ".reg .b64 base, at, once;", ".reg .b32 own, inside, token, left;",
        f".reg .pred p<{len(parts)}>, q;", ONCE,
        *(line.format(lane=lane) for line in first), f"add.u32 token, token, {start};",
        f"sub.s32 left, {end}, token;", f"mad.wide.u32 base, own, {stride}, {base};",
        "mad.lo.u32 inside, token, 4, inside;", "cvt.u64.u32 at, inside;", "add.u64 base, base, at;",
        *(f"setp.ge.s32 p{n}, left, {tokens + 1};" for n, tokens in enumerate(parts)),
    ]  # fmt: skip
    for group in range(slots.groups):
        there = len(slots.fields) - slots.together * group
        lines.append(f"mad.wide.u32 at, {stride}, {slots.together * group}, base;")
        for n, tokens in enumerate(parts):
            asked = f"p{n}"
            if there < slots.together:
                lines.append(f"setp.lt.and.u32 q, own, {there}, p{n};")
                asked = "q"
            lines += stream_lines(asked, 4 * (len(parts) * group + n), 4 * tokens, tiled)
    return [*lines, FENCE]


def loads_constraints(count: int) -> str:
    """Operand kinds of `keys_code` and `values_code`, of so many outputs."""
    return ",".join(["=&r"] * count + ["r", "l", "r", "r", "r"])


def score_code(at: GroupShared) -> str:
    """PTX: $0..$15 = sum over axes of query t * byte in place, of tokens 32 s + 4 g + i, i the fastest.

    After the outputs: addresses of the lane's digits and of its words' masks; the words of `keys_code`.
    """
    lines = [".reg .b32 a<4>, c<16>, q<4>, m<4>;"]
    for half in range(2):  # of s: registers of all at once would not suffice
        lines += [f"mov.b32 c{i}, 0;" for i in range(16)]
        for pair in at.k.pairs:
            if pair[0] % 4 == 0:
                lines.append(f"ld.shared.v4.b32 {vector('m')}, [$17+{4 * pair[0]}];")
                lines.append(f"ld.shared.v4.b32 {vector('q')}, [$16+{4 * pair[0]}];")
            second = pair[0] % 4 if pair[1] is None else pair[1] % 4
            for two in range(4):  # of tokens: 2 of each s
                place = 8 * half + 2 * two
                lines += _left(at.k, 18, 16, [(slot, place + token) for slot in pair for token in range(2)])
                lines.append(product("s8", 4 * two, f"q{pair[0] % 4}", f"q{second}"))
        lines += [f"mad.lo.s32 ${8 * half + n}, c{2 * n + 1}, 256, c{2 * n};" for n in range(8)]
    return block(lines)


def score_constraints(at: GroupShared) -> str:
    """Operand kinds of `score_code`."""
    return ",".join(["=&r"] * SCORES + ["r"] * (2 + 16 * at.k.groups))


def _left(slots: Slots, words: int, each: int, parts: list[tuple[int | None, int]]) -> list[str]:
    """a0..a3, the left side of a product: for each (slot, i) the i-th of the slot's word's `each` registers, of
    those from operand `words` on, masked; 0 where there is no slot."""
    return [
        f"mov.b32 a{n}, 0;"
        if slot is None
        else f"and.b32 a{n}, ${words + each * slots.group_of[slot] + i}, m{slot % 4};"
        for n, (slot, i) in enumerate(parts)
    ]


def put_code() -> str:
    """PTX: the lane's weights, 24 bits each, into shared memory by digits. $0 = 0; where, the 16 weights."""
    lines = [".reg .b32 x<4>, a<4>;", "mov.u32 $0, 0;", FENCE]  # the block before is read
    for s in range(4):
        lines += [
            *digit_lines([f"${2 + 4 * s + i}" for i in range(4)]),
            *(f"st.shared.b32 [$1+{DIGIT_ROW * digit + 32 * s}], a{digit};" for digit in range(DIGITS)),
        ]  # fmt: skip
    return block([*lines, FENCE])


PUT_KINDS = ",".join(["=&r"] + ["r"] * (1 + SCORES))


def accumulators(slots: Slots) -> int:
    """Registers of sums of values: 8 for each two slots."""
    return 8 * len(slots.pairs)


def sum_code(at: GroupShared) -> str:
    """PTX: $.. = accumulators + sum over the block's tokens of weight digits * masked byte.

    A product has one slot's bytes in rows g, another's in rows g + 8. After the outputs: address of the lane's
    column's digits of queries 0 and 1 at token 16 t; of its words' masks; the words of `values_code`, the
    accumulators.
    """
    count = accumulators(at.v)
    place, masks, words = f"${count}", f"${count + 1}", count + 2
    old = words + 8 * at.v.groups
    lines = [f".reg .b32 a<4>, b<16>, c<{count}>, m<4>;", *(f"mov.b32 c{i}, ${old + i};" for i in range(count))]
    for half in range(2):
        for two in range(2):
            to = ", ".join(f"b{8 * half + 4 * two + i}" for i in range(4))
            lines.append(f"ld.shared.v4.b32 {{{to}}}, [{place}+{64 * half + 2 * QUERY_ROW * two}];")
    for tile, pair in enumerate(at.v.pairs):
        if pair[0] % 4 == 0:
            lines.append(f"ld.shared.v4.b32 {vector('m')}, [{masks}+{4 * pair[0]}];")
        for half in range(2):
            for step in range(2):
                lines += _left(
                    at.v, words, 8, [(slot, 4 * half + 2 * step + n) for n in range(2) for slot in pair]
                )
                for two in range(2):
                    b = 8 * half + 4 * two + 2 * step
                    lines.append(product("u8", 8 * tile + 4 * two, f"b{b}", f"b{b + 1}"))
    return block([*lines, *(f"mov.b32 ${i}, c{i};" for i in range(count))])


def sum_constraints(at: GroupShared) -> str:
    """Operand kinds of `sum_code`."""
    count = accumulators(at.v)
    return ",".join(["=&r"] * count + ["r"] * (2 + 8 * at.v.groups + count))


def empty_code(at: GroupShared) -> str:
    """PTX: where asked, move the accumulators' sums to shared memory, times alpha, and set them to 0.

    $.. = the accumulators after that; then whether to (for all lanes alike), alpha of query t, the lane, address
    of the shared memory, the accumulators.
    """
    count = accumulators(at.v)
    asked, alpha, lane, shared = (f"${count + i}" for i in range(4))
    lines = [
        ".reg .pred asked;", ".reg .b32 from;", ".reg .f32 alpha<2>;", *JOIN_REGISTERS,
        *(f"mov.b32 ${i}, ${count + 4 + i};" for i in range(count)),
        f"setp.ne.b32 asked, {asked}, 0;", "@!asked bra done;", *_join_setup(lane),
        f"mad.lo.u32 to, {lane}, 4, {shared};",
    ]  # fmt: skip
    for two in range(2):  # sums of lanes t are of query 2 two + t / 2
        lines += [
            f"and.b32 from, {lane}, 0x1c;", f"add.u32 from, from, {2 * two};", f"and.b32 x, {lane}, 2;",
            "shr.u32 x, x, 1;", "add.u32 from, from, x;",
            f"shfl.sync.idx.b32 alpha{two}, {alpha}, from, 0x1f, 0xffffffff;",
        ]  # fmt: skip
    for n in range(2 * len(at.v.pairs)):
        place = at.sums + 128 * n
        lines += [
            *_join(count + 4 + 4 * n), f"ld.shared.f32 more, [to+{place}];", "add.f32 f, f, more;",
            f"mul.f32 f, f, alpha{n % 2};", f"st.shared.f32 [to+{place}], f;",
        ]  # fmt: skip
    return block([*lines, *(f"mov.b32 ${i}, 0;" for i in range(count)), "done:", "mov.b32 to, 0;"])


def empty_constraints(at: GroupShared) -> str:
    """Operand kinds of `empty_code`."""
    count = accumulators(at.v)
    return ",".join(["=&r"] * count + ["r", "f", "r", "r"] + ["r"] * count)


def emit_code(at: GroupShared) -> str:
    """PTX: write the sums, float32 [V fields padded to 2, 4] of each query in units of a weight of 1.

    $0 = 0; the lane, address of the shared memory; where the lane's byte of queries t / 2 and 2 + t / 2 goes, and
    whether there are such queries; the accumulators.
    """
    lines = [
        ".reg .pred own<8>, there;", ".reg .b32 which, zero;", *JOIN_REGISTERS,
        "mov.u32 $0, 0;", "mov.u32 zero, 0;",
        *_join_setup("$1"), "mad.lo.u32 to, $1, 4, $2;",
        "and.b32 which, $1, 1;", "shr.u32 x, $1, 4;", "mad.lo.u32 which, x, 2, which;",
    ]  # fmt: skip
    for two in range(2):
        lines.append(f"setp.ne.b32 there, ${5 + two}, 0;")
        lines += [f"setp.eq.and.u32 own{4 * two + n}, which, {n}, there;" for n in range(4)]
    for tile, pair in enumerate(at.v.pairs):
        for two in range(2):
            n = 2 * tile + two
            lines += [
                *_join(7 + 4 * n), f"ld.shared.f32 more, [to+{at.sums + 128 * n}];", "add.f32 f, f, more;",
                "mul.f32 f, f, 0f37800000;",  # 2^-16
            ]  # fmt: skip
            for odd, slot in enumerate(pair):
                for member in range(VALUE_WORDS):
                    field = None if slot is None else at.v.field(member, slot)
                    if field is not None:
                        lines.append(
                            f"@own{4 * two + 2 * member + odd} st.global.f32 [${3 + two}+{16 * field}], f;"
                        )
    if (fields := sum(at.v.fields)) % 2:
        lines += [f"@own{4 * two} st.global.b32 [${3 + two}+{16 * fields}], zero;" for two in range(2)]
    return block(lines)


def emit_constraints(at: GroupShared) -> str:
    """Operand kinds of `emit_code`."""
    return ",".join(["=&r", "r", "r", "l", "l", "r", "r"] + ["r"] * accumulators(at.v))


JOIN_REGISTERS = (".reg .pred second;", ".reg .b32 to, x;", ".reg .f32 f, even, odd, more, s<2>;")


def _join_setup(lane: str) -> list[str]:
    """What a lane's two columns count: digits 0 and 1 where t is even, 2 where it is odd. Sums of rows g go to
    even lanes, those of rows g + 8 to odd ones."""
    return [
        f"and.b32 x, {lane}, 1;", "setp.ne.u32 second, x, 0;",
        "selp.f32 even, 0f47800000, 0f3F800000, second;",  # 65536 or 1
        "selp.f32 odd, 0f00000000, 0f43800000, second;",  # 0 or 256
    ]  # fmt: skip


def _join(first: int) -> list[str]:
    """f = the sum of digits of a product's accumulators, operands from `first` on, that goes to the lane."""
    lines = []
    for i in range(2):
        lines += [
            f"cvt.rn.f32.s32 s{i}, ${first + 2 * i};", f"cvt.rn.f32.s32 more, ${first + 2 * i + 1};",
            f"mul.f32 s{i}, s{i}, even;", f"fma.rn.f32 s{i}, more, odd, s{i};",
        ]  # fmt: skip
    return [
        *lines, "selp.f32 f, s1, s0, second;", "selp.f32 more, s0, s1, second;",
        "shfl.sync.bfly.b32 more, more, 1, 0x1f, 0xffffffff;", "add.f32 f, f, more;",
    ]  # fmt: skip


def bias_code(at: GroupShared) -> str:
    """PTX: $0..$15 = the centre's scores of query t at tokens 32 s + 4 g + i, i the fastest, of the next block.

    After the outputs: the lane's place in shared memory, 16 bytes a lane; the place of its pairs' rotation;
    address of its part of `Rope.group_turns`. The state is the coefficients of query g / 2 turned by the block and
    g % 2; then it is turned by a block.
    """
    lines = [
        ".reg .f32 x<4>, y<4>, a<4>, b<4>, e<4>, o<4>, r, s;", ".reg .b16 p, q;",
        ".reg .b32 high<4>, low<4>, m<4>;",
        *(f"mov.f32 ${token}, 0f00000000;" for token in range(SCORES)),
    ]  # fmt: skip
    for part in range(at.dim // 32):
        for name, operand, offset in (
            ("e", 16, at.state + 2 * LANES * part), ("o", 16, at.state + 2 * LANES * part + LANES),
            ("x", 17, at.rotation + 16 * part), ("y", 17, at.rotation + 16 * part + 2 * at.dim),
        ):  # fmt: skip
            lines.append(f"ld.shared.v4.f32 {vector(name)}, [${operand}+{offset}];")
        for n in range(4):
            lines += [
                f"cvt.rn.f16x2.f32 high{n}, o{n}, e{n};", f"mov.b32 {{p, q}}, high{n};",
                "cvt.f32.f16 r, p;", "cvt.f32.f16 s, q;", f"sub.f32 r, e{n}, r;", f"sub.f32 s, o{n}, s;",
                f"cvt.rn.f16x2.f32 low{n}, s, r;",
            ]  # fmt: skip
        for s in range(4):
            for two in range(2):
                lines += _multiply(at, s, 2 * part + two, two)
        e, o, x, y = ([f"{name}{n}" for n in range(4)] for name in "eoxy")
        lines += turn_lines(e, o, x, y) + keep_lines(part, at.state, "$16")
    return block(lines)


def _multiply(at: GroupShared, s: int, place: int, two: int) -> list[str]:
    """Add the products of two pairs' coefficients and turns, as `ptx_text`'s of one query."""
    kind = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
    acc = "{" + ", ".join(f"${4 * s + i}" for i in range(4)) + "}"
    high, low = (f"{{{name}{2 * two}, {name}{2 * two + 1}}}" for name in ("high", "low"))
    offset = ROWS_OF_TURNS * at.dim * s + LANES * place
    return [
        f"ld.global.v4.b32 {vector('m')}, [$18+{offset}];",
        f"{kind} {acc}, {vector('m')}, {low}, {acc};",
        f"{kind} {acc}, {vector('m')}, {high}, {acc};",
        f"ld.global.v4.b32 {vector('m')}, [$18+{offset + ROWS_OF_TURNS // 2 * at.dim}];",
        f"{kind} {acc}, {vector('m')}, {high}, {acc};",
    ]


BIAS_KINDS = ",".join(["=&f"] * SCORES + ["r", "r", "l"])


def spread_code() -> str:
    """PTX: $0..$3 = what lanes 8 s + g hold of the last operand, s < 4; the lane."""
    lines = [".reg .b32 x;", "shr.u32 x, $4, 2;"]
    for s in range(4):
        lines += [f"shfl.sync.idx.b32 $ {s}, $5, x, 0x1f, 0xffffffff;".replace("$ ", "$"), "add.u32 x, x, 8;"]
    return block(lines)


SPREAD_KINDS = "=&r,=&r,=&r,=&r,r,r"


def over_groups(operation: str) -> str:
    """PTX: $0 = $1 of all lanes of the same t, float32, by an operation of two."""
    lines = [".reg .f32 x;", "mov.f32 $0, $1;"]
    for by in (4, 8, 16):
        lines += [f"shfl.sync.bfly.b32 x, $0, {by}, 0x1f, 0xffffffff;", f"{operation}.f32 $0, $0, x;"]
    return block(lines)


def any_query() -> str:
    """PTX: $0 = $1 of any t, bits; lanes of the same t have the same."""
    lines = [".reg .b32 x;", "mov.b32 $0, $1;"]
    for by in (1, 2):
        lines += [f"shfl.sync.bfly.b32 x, $0, {by}, 0x1f, 0xffffffff;", "or.b32 $0, $0, x;"]
    return block(lines)
