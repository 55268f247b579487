"""Faults that are planted into the fast kernel's texts, each under a name, to see that its tests see them.

A fault says which statement of which text it changes, by what the statement does, and how. A kernel that no longer
has the statement fails its test with the fault's name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ptx_machine import Statement, parse, render

Change = Callable[[Statement], Statement | None]


@dataclass(frozen=True)
class Fault:
    """What is changed, and where.

    text     the name of the text
    op       its first statement of this instruction, whose name may go on,
    having   with this operand, if any is said,
    then     followed by this instruction, if any is said
    change   what becomes of the statement
    """

    text: str
    op: str
    change: Change
    having: str = ""
    then: str = ""

    def is_of(self, statement: Statement, following: Statement | None) -> bool:
        """Whether it changes this statement."""
        return (
            statement.op.startswith(self.op)
            and (not self.having or self.having in statement.operands)
            and (not self.then or (following is not None and following.op.startswith(self.then)))
        )


def left_out(statement: Statement) -> None:
    """The statement is not there."""


def by_all(statement: Statement) -> Statement:
    """Lanes do it that should not, too."""
    assert statement.guard
    return replace(statement, guard="")


def by_the_others(statement: Statement) -> Statement:
    """The lanes do it that should not, and no others."""
    assert statement.guard
    return replace(statement, negated=not statement.negated)


def with_operand(at: int, new: str) -> Change:
    """Another operand stands at that place."""

    def change(statement: Statement) -> Statement:
        assert statement.operands[at] != new
        return replace(statement, operands=(*statement.operands[:at], new, *statement.operands[at + 1 :]))

    return change


RACES = {
    "the query's copies are not waited for": Fault("ROW", "cp.async.wait_group", left_out),
    "the query's copies are in no group": Fault("ROW", "cp.async.commit_group", left_out),
    "the query is read before other lanes' copies are there": Fault("ROW", "bar.warp.sync", left_out),
    "the turns are not waited for": Fault("WAIT", "cp.async.wait_group", left_out),
    "weights are read before all are written": Fault("SUM", "bar.warp.sync", left_out, then="ld.shared"),
    "weights are written before all are read": Fault("SUM", "bar.warp.sync", left_out, then="st.shared"),
}
"""What leaves out something that orders lanes."""

WRONG_RESULTS = {
    "the query's high digit counts 255": Fault("SCORE", "mad.lo.s32", with_operand(2, "255"), having="256"),
    "the query stands in columns of g, not of g / 2": Fault("SCORE", "shr.u32", with_operand(2, "2"), having="x"),
    "tables are copied by the wrong lanes": Fault("OPEN", "cp.async.ca", by_the_others),
    "sums are set to 0 by the wrong lanes": Fault("OPEN", "st.shared", by_the_others),
    "a weight's middle digit and the next one's low one change places": Fault(
        "SUM", "prmt", with_operand(3, "0x5410"), having="0x5140"
    ),
    "a weight's high digit is its middle one": Fault("SUM", "prmt", with_operand(3, "0x0061"), having="0x0062"),
    "a weight's middle digit counts 128": Fault(
        "EMIT", "selp.f32", with_operand(2, "0f43000000"), having="0f43800000"
    ),
    "sums of the wrong lanes are joined": Fault("EMIT", "shfl.sync.bfly", with_operand(2, "16"), having="18"),
    "sums before the last emptying are forgotten at the end": Fault("EMIT", "add.f32", left_out, having="old"),
    "sums are emptied where it is not asked for": Fault("EMPTY", "bra", left_out),
    "sums of earlier emptyings are forgotten": Fault("EMPTY", "add.f32", left_out, having="old"),
    "each word of keys is the first": Fault("KEYS", "mad.wide.u32", with_operand(2, "0"), having="1"),
    "each word of values is the first": Fault("VALUES", "mad.wide.u32", with_operand(2, "0"), having="1"),
    "keys past the end are read": Fault("KEYS", "ld.global", by_all),
    "the first angles turn the other way": Fault("TURN", "neg.f32", left_out),
    "the next block's angles turn the other way": Fault("BIAS", "neg.f32", left_out),
    "the coefficients' low parts are their high ones": Fault(
        "BIAS", "mma", with_operand(2, "{high0, high1}"), having="{low0, low1}"
    ),
    "the centre's scores go to each other's tokens": Fault(
        "BIAS", "mma", with_operand(0, "{c0, c1, c2, c3}"), having="{c0, c2, c1, c3}"
    ),
}
"""What makes the text give something else, or touch what it must not."""

FAULTS = RACES | WRONG_RESULTS


def plant(name: str, texts: dict[str, str]) -> dict[str, str]:
    """The texts, by their names, with the fault of that name. Raises LookupError where nothing is as it says."""
    fault = FAULTS[name]
    statements, labels = parse(texts[fault.text])
    following = [*statements[1:], None]
    places = [at for at, pair in enumerate(zip(statements, following, strict=True)) if fault.is_of(*pair)]
    if not places:
        raise LookupError(f"{name}: {fault.text} has no statement that this fault is of: {fault}")
    at = places[0]
    changed = fault.change(statements[at])
    kept = [*statements[:at], *([] if changed is None else [changed]), *statements[at + 1 :]]
    moved = {label: place - (changed is None and place > at) for label, place in labels.items()}
    return texts | {fault.text: render(kept, moved)}
