"""The inline PTX of the fast kernel, made for a code's shape: how a lane loads, multiplies and sums.

Each function gives the text of one `inline_asm_elementwise`; its docstring says what the operands are, outputs
first, in the order of $0, $1 ... Neither Triton nor a GPU is needed here: the kernel that runs it is in `ptx`,
with the picture of which lane owns which tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STREAM = "ld.global.L1::no_allocate.L2::cache_hint.v4.b32"
ONCE = "createpolicy.fractional.L2::evict_first.b64 once, 1.0;"
"""What is read once leaves the L2 first: code, maps, biases and partial results stay."""

FENCE = "bar.warp.sync 0xffffffff;"
"""Keeps the assembler from putting off a batch of loads until each is used: one latency, not one for each word."""


@dataclass(frozen=True)
class Shared:
    """Where a warp keeps, in shared memory, what it reads for every block: a load of it from global memory would
    queue behind the codes on their way. Offsets in bytes. The last three are for `moving` ranges alone, those of
    more than one block of keys that have a centre.

        descriptors   of the row, 16 bytes a field (see `key_code`)
        masks         of the head's value fields
        k_places, v_places   of the head's words
        rotation      cosines, then sines, of RoPE's turn by a block: float32 [d]
        state         the coefficients of the centre's scores at the block, each lane's: float32 [d / 16, 32, 4]
        turns         `Rope.turns`
    """

    dim: int
    k_fields: int
    v_fields: int
    k_words: int
    v_words: int
    moving: bool

    @property
    def masks(self) -> int:
        return 16 * self.k_fields

    @property
    def k_places(self) -> int:
        return self.masks + _row(self.v_fields)

    @property
    def v_places(self) -> int:
        return self.k_places + _row(self.k_words)

    @property
    def rotation(self) -> int:
        return self.v_places + _row(self.v_words)

    @property
    def state(self) -> int:
        return self.rotation + 4 * self.dim

    @property
    def turns(self) -> int:
        return self.state + 32 * self.dim

    @property
    def size(self) -> int:
        return self.turns + 64 * self.dim if self.moving else self.rotation


def _row(numbers: int) -> int:
    """Bytes of a row of int32, padded to 16."""
    return -(-numbers // 4) * 16


def open_code(at: Shared) -> str:
    """PTX: $0 = address of the shared memory, filled but for descriptors and state.

    After the output: the lane, addresses of the head's masks and places of keys and of values; of `Rope.turns` and
    `Rope.block_turn`.
    """
    lines = [f".shared .align 16 .b8 held[{at.size}];", *COPY_REGISTERS, "mov.u32 $0, held;"]
    for operand, offset, size in (
        (2, at.masks, _row(at.v_fields)), (3, at.k_places, _row(at.k_words)), (4, at.v_places, _row(at.v_words)),
    ):  # fmt: skip
        lines += _copy("$0", operand, offset, size)
    if at.moving:
        lines += _copy("$0", 5, at.turns, 64 * at.dim) + _copy("$0", 6, at.rotation, 4 * at.dim)
    return _block([*lines, FENCE])


OPEN_KINDS = "=&r,r,l,l,l,l,l"


def row_code(at: Shared) -> str:
    """PTX: fill in the descriptors. $0 = 0; the lane, address of the shared memory, of the row's descriptors."""
    return _block([*COPY_REGISTERS, "mov.u32 $0, 0;", *_copy("$2", 3, 0, 16 * at.k_fields), FENCE])


ROW_KINDS = "=&r,r,r,l"


def state_code(at: Shared) -> str:
    """PTX: fill in the state for the first block. $0 = 0; the lane's address in shared memory, 16 bytes a lane; of
    the lane's pairs' cosines and sines at token 2 (l / 4) of the block; the pairs' coefficients (`_phase`)."""
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


def load_code(words: int, places: int | None) -> str:
    """PTX: $0.. = 16 bytes of a lane from each of `words` planes, 4 registers a word.

    That is 4 tokens of keys, 16 of values.

    After the outputs: address of the lane's bytes in plane 0, bytes between words, address of the shared memory,
    whether to read at all (else the outputs hold anything). `places`: offset of the head's places; None where the
    third operand is their own address, in global memory.
    """
    space, offset = ("global", 0) if places is None else ("shared", places)
    base, stride, shared, wanted = (f"${4 * words + i}" for i in range(4))
    lines = [f".reg .b32 place<{4 * -(-words // 4)}>;", ".reg .b64 at, once;", ".reg .pred wanted;", ONCE]
    lines.append(f"setp.ne.b32 wanted, {wanted}, 0;")
    for w in range(0, words, 4):
        four = ", ".join(f"place{w + i}" for i in range(4))
        lines.append(f"ld.{space}.v4.b32 {{{four}}}, [{shared}+{offset + 4 * w}];")
    for w in range(words):
        four = ", ".join(f"${4 * w + i}" for i in range(4))
        lines.append(f"mad.wide.u32 at, place{w}, {stride}, {base};")
        lines.append(f"@wanted {STREAM} {{{four}}}, [at], once;")
    return _block([*lines, FENCE])


def load_constraints(words: int, from_shared: bool) -> str:
    """Operand kinds of `load_code`."""
    return ",".join(["=&r"] * (4 * words) + ["l", "r", "r" if from_shared else "l", "r"])


def key_code(shape: tuple[int, ...]) -> str:
    """PTX: $0..$3 = sum over fields and lanes of query * piece, of 4 tokens.

    After the outputs: address of the shared memory, with the row's descriptors, F times (shift, mask, query of
    lanes 0 and 1, of lanes 2 and 3); the words of `load_code`.
    """
    lines = [".reg .b32 t, d<4>;", *(f"mov.b32 ${token}, 0;" for token in range(4))]
    words = _word_of_field(shape)
    for f, word in enumerate(words):
        is_first = f == 0 or words[f - 1] != word  # at bit 0
        lines.append(f"ld.shared.v4.b32 {{d0, d1, d2, d3}}, [$4+{16 * f}];")
        for token in range(4):
            if is_first:
                lines.append(f"and.b32 t, ${5 + 4 * word + token}, d1;")
            else:
                lines.append(f"shr.u32 t, ${5 + 4 * word + token}, d0;")
                lines.append("and.b32 t, t, d1;")
            lines.append(f"dp2a.lo.s32.u32 ${token}, d2, t, ${token};")
            lines.append(f"dp2a.hi.s32.u32 ${token}, d3, t, ${token};")
    return _block(lines)


def _word_of_field(shape: tuple[int, ...]) -> list[int]:
    return [word for word, count in enumerate(shape) for _ in range(count)]


def value_code(shape: tuple[int, ...], masks_at: int) -> str:
    """PTX: $f = acc * alpha + sum over 16 tokens of weight * masked byte, for each of F fields.

    After the outputs: the lane's own 4 weights as 2 words, address of the shared memory, alpha, the words of
    `load_code`, the F accumulators. `masks_at`: offset of the head's masks.
    """
    fields = sum(shape)
    low, high, shared, alpha = (f"${fields + i}" for i in range(4))
    word_at = fields + 4
    acc_at = word_at + 4 * len(shape)
    lines = [".reg .b32 p<8>, t, sum, m<4>;", ".reg .f32 x;"]
    for owner in range(4):  # the weights of the quad's 16 tokens, in order
        lines.append(f"shfl.sync.idx.b32 p{2 * owner}, {low}, {owner}, 0x1c1f, 0xffffffff;")
        lines.append(f"shfl.sync.idx.b32 p{2 * owner + 1}, {high}, {owner}, 0x1c1f, 0xffffffff;")
    for f, word in enumerate(_word_of_field(shape)):
        if f % 4 == 0:
            lines.append(f"ld.shared.v4.b32 {{m0, m1, m2, m3}}, [{shared}+{masks_at + 4 * f}];")
        lines.append("mov.b32 sum, 0;")
        for i in range(4):
            lines.append(f"and.b32 t, ${word_at + 4 * word + i}, m{f % 4};")
            lines.append(f"dp2a.lo.u32.u32 sum, p{2 * i}, t, sum;")
            lines.append(f"dp2a.hi.u32.u32 sum, p{2 * i + 1}, t, sum;")
        lines += ["cvt.rn.f32.s32 x, sum;", f"fma.rn.f32 ${f}, ${acc_at + f}, {alpha}, x;"]
    return _block(lines)


def bias_code(at: Shared) -> str:
    """PTX: $0..$3 = the centre's scores of the lane's tokens 4 l .. 4 l + 3 of a block.

    After the outputs: the lane's address in shared memory, 16 bytes a lane, and that of its pairs' rotation.
    Tokens are 16 g + 2 c + {0, 1}: the state is the coefficients turned by the block and 2 c, one column c a quad;
    they meet the turns by 16 g and 16 g + 1 in a matrix product, m16n8k16, whose results lie where they belong.
    Then the state is turned by a block.
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

    After the outputs: the lane's address in `Rope.turns`, of its pairs' cosines and sines at token 2 (l / 4) of
    the block, the pairs' coefficients.
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


def key_constraints(shape: tuple[int, ...]) -> str:
    """Operand kinds of `key_code`."""
    return ",".join(["=&r"] * 4 + ["r"] + ["r"] * (4 * len(shape)))


def value_constraints(shape: tuple[int, ...]) -> str:
    """Operand kinds of `value_code`."""
    fields = sum(shape)
    return ",".join(["=&f"] * fields + ["r", "r", "r", "f"] + ["r"] * (4 * len(shape)) + ["f"] * fields)


def _block(lines: list[str]) -> str:
    return "{\n" + "\n".join(lines) + "\n}"
