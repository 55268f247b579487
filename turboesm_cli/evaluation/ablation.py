"""What each part of a recipe is worth: one part changed at a time, at equal bytes, over calibration subsets.

The spread is that of three disjoint thirds of the calibration set, so that a difference smaller than it is none.
A scale costs a byte a token and head; where a variant has none, it gets that byte as payload if the layout can
use it (at head_dim 16 half a bit a value), and the table shows the bits that each variant holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from turboesm_cli.cache.packed import PackedCodec
from turboesm_cli.codec.fit import CodecSpec, fit
from turboesm_cli.codec.header import sequence_key
from turboesm_cli.codec.recipes import RECIPES, Recipe, Rotation
from turboesm_cli.console import Phases, Tick, quiet
from turboesm_cli.evaluation import metrics
from turboesm_cli.evaluation.protein_results import ProteinResult
from turboesm_cli.evaluation.rows import Context
from turboesm_cli.evaluation.teacher_forced import compare_decoding, decoding_cost
from turboesm_cli.models.protocol import Model
from turboesm_cli.outputs.work import NOTHING_KEPT, Work
from turboesm_cli.reporting.results import ResultRow
from turboesm_cli.sequences.fasta import Protein
from turboesm_cli.statistics.collect import collect

SUBSETS = 3
CONTEXT = 1024


@dataclass(frozen=True)
class Variant:
    """A recipe with one part changed. The first variant of a part is what the others are compared with."""

    part: str
    setting: str
    recipe: Recipe

    @property
    def name(self) -> str:
        """As it appears in results."""
        return f"{self.part}: {self.setting}"


def variants(head_dim: int) -> tuple[Variant, ...]:
    """The table: part, setting, recipe."""
    flat, paper, waterfill, auto = (RECIPES[name] for name in ("flat", "paper", "waterfill", "auto"))
    spare = 3.5 if head_dim == 16 else 3.0  # a scale's byte, as payload
    table: list[tuple[str, str, Recipe]] = [
        ("whole", "flat", flat),
        ("whole", "paper", paper),
        ("whole", "waterfill", waterfill),
        ("whole", "auto", auto),
        ("centre", "on", flat),
        ("centre", "off", replace(flat, centre=False)),
        *(("rotation", name, replace(flat, rotation_k=name, rotation_v=name)) for name in _ROTATIONS),
        ("scale", "least-squares", flat),
        ("scale", "norm", replace(flat, scale="norm")),
        ("scale", "none", replace(flat, scale="none", bits_k=spare, bits_v=spare)),
        *(("sinks", str(count), replace(flat, sinks=count)) for count in (1, 0, 2, 4)),
        ("K's 4th bit", "16 levels", replace(flat, bits_k=4)),
        ("K's 4th bit", "8 levels and sign", replace(flat, bits_k=4, residual="sign")),
        ("K's 4th bit", "8 levels and QJL", replace(flat, bits_k=4, residual="qjl")),
        ("K's 4th bit", "to V: 16 levels", replace(flat, bits_v=4)),
        ("metric of waterfill", "attention", waterfill),
        ("metric of waterfill", "plain", replace(waterfill, metric="plain")),
        ("metric of waterfill", "sensitivity", replace(waterfill, metric="sensitivity")),
        ("levels of waterfill", "uniform", waterfill),
        ("levels of waterfill", "Lloyd-Max", replace(waterfill, grid="lloyd-max")),
        ("widths of waterfill", "one profile per layer", waterfill),
        ("widths of waterfill", "one per head", replace(waterfill, profile="head")),
        ("auto without", "(all of it)", auto),
        ("auto without", "tokens in layer 0", replace(auto, exact_first=False)),
        ("auto without", "choice of flat or waterfill", replace(auto, choose=False)),
        ("auto without", "bits shared over layers", replace(auto, budget="side")),
        ("paper with", "(nothing)", paper),
        ("paper with", "centring", replace(paper, centre=True)),
        ("paper with", "a sink", replace(paper, sinks=1)),
        ("paper with", "no residual sign", replace(paper, residual="none")),
    ]
    return tuple(Variant(*row) for row in table)


_ROTATIONS: tuple[Rotation, ...] = ("hadamard-svd", "none", "hadamard", "svd")


def subsets(proteins: Sequence[Protein]) -> list[list[Protein]]:
    """Three disjoint thirds, by hash."""
    parts: list[list[Protein]] = [[] for _ in range(SUBSETS)]
    for protein in proteins:
        parts[int(sequence_key(protein), 16) % SUBSETS].append(protein)
    return parts


def ablate(
    model: Model,
    calibration: Sequence[Protein],
    families: Mapping[str, Sequence[Protein]],
    phase: Phases = quiet,
    work: Work = NOTHING_KEPT,
) -> Iterator[ResultRow]:
    """Rows of the protocol ablation: each variant's error in each family; `seed` is the calibration subset."""
    table = variants(model.shape.head_dim)
    for subset, part in enumerate(subsets(calibration)):
        own = work.under(f"subset{subset}")
        statistics = collect(model, part, phase=phase, work=own)
        distinct = {variant.recipe: fit(model, statistics, variant.recipe) for variant in table}
        context = Context.of(model, subset, devices=work.devices)
        everything: dict[Recipe, list[ProteinResult]] = {recipe: [] for recipe in distinct}
        for family, proteins in families.items():
            each, cost = len(distinct) + (not model.causal), decoding_cost(model, proteins, len(distinct))
            with phase(f"decoding {family}", len(proteins) * each, cost) as tick:
                found = _decode(model, proteins, distinct, tick, own.under(family))
            for variant in table:
                yield _error(context, variant, family, found[variant.recipe])
            for recipe, results in found.items():
                everything[recipe] += results
        for variant in table:
            yield _error(context, variant, "all", everything[variant.recipe])
            yield _bits(context, variant, distinct[variant.recipe])


def _decode(
    model: Model,
    proteins: Sequence[Protein],
    specs: Mapping[Recipe, CodecSpec],
    tick: Tick,
    work: Work,
) -> dict[Recipe, list[ProteinResult]]:
    names = {str(index): recipe for index, recipe in enumerate(specs)}
    codecs = {name: PackedCodec(specs[recipe], model.device) for name, recipe in names.items()}
    found: dict[Recipe, list[ProteinResult]] = {recipe: [] for recipe in specs}
    for name, result in compare_decoding(model, proteins, codecs, work=work, tick=tick):
        if name in names:
            found[names[name]].append(result)
    return found


def _error(context: Context, variant: Variant, family: str, results: Sequence[ProteinResult]) -> ResultRow:
    found = metrics.agreement([result.cosines for result in results])
    return context.row(_named(variant), family, "ablation", "error", found.error, "1", found.n)


def _bits(context: Context, variant: Variant, spec: CodecSpec) -> ResultRow:
    held = 8 * spec.size.sequence_bytes(CONTEXT) / spec.size.numbers(CONTEXT)
    return context.row(_named(variant), "", "ablation", "bits_per_value", held, "bit", 1, tokens=CONTEXT)


def _named(variant: Variant) -> Recipe:
    return replace(variant.recipe, name=variant.name)


def ablation_table(rows: Sequence[ResultRow]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for the screen: mean error, its range over subsets, ratio to the part's first setting."""
    errors: dict[str, list[float]] = {}
    bits: dict[str, float] = {}
    for row in rows:
        if row.metric == "bits_per_value":
            bits[row.recipe] = row.value
        elif row.family == "all":
            errors.setdefault(row.recipe, []).append(row.value)
    cells: list[list[str]] = []
    base: dict[str, float] = {}
    for name, values in errors.items():
        mean = sum(values) / len(values)
        first = base.setdefault(name.split(": ")[0], mean)
        spread = f"{min(values):.3g} - {max(values):.3g}"
        cells.append([name, f"{bits[name]:.3f}", f"{mean:.4g}", spread, f"{mean / first:.3f}"])
    return ["part: setting", "bits per value", "error", "over subsets", "x first setting"], cells
