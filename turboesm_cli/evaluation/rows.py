"""Results of proteins → figures: summaries for the screen, rows for files."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from turboesm_cli import __version__
from turboesm_cli.codec.recipes import Recipe
from turboesm_cli.evaluation import metrics
from turboesm_cli.evaluation.peers import peer_bits
from turboesm_cli.evaluation.protein_results import ProteinResult
from turboesm_cli.evaluation.streaming import RunningAgreement, RunningDivergence
from turboesm_cli.models.protocol import Model
from turboesm_cli.reporting.metric_names import ACCURACY, LANGUAGE, LANGUAGE_OF_TOKENS, Metric
from turboesm_cli.reporting.results import ResultRow, commit_of_source
from turboesm_cli.sequences.fasta import Protein, digest


class Coded(Protocol):
    """What rows can be of: a recipe, or whatever else has a name and bits of a key's and a value's numbers."""

    @property
    def name(self) -> str: ...
    @property
    def bits_k(self) -> float: ...
    @property
    def bits_v(self) -> float: ...


@dataclass(frozen=True)
class Context:
    """What every row of a measurement says of its circumstances; `inputs` and `prompt` as in `ResultRow`.

    devices  those that it was done on, where they are more than the model's
    """

    model: Model
    seed: int = 0
    inputs: str = ""
    prompt: str = ""
    devices: str = ""

    def of_inputs(self, proteins: Sequence[Protein]) -> Context:
        """The same, for figures of these proteins, whatever their order."""
        return replace(self, inputs=digest(proteins)[:16])

    def row(
        self, recipe: Coded | str, family: str, protocol: str, metric: str, value: float, unit: str, n: int,
        accession: str = "", tokens: int = 0, p20: float | None = None, p80: float | None = None,
    ) -> ResultRow:  # fmt: skip
        """A row; `recipe` is a recipe, or the dtype of a dense cache."""
        name, bits_k, bits_v = _identity(recipe)
        return ResultRow(
            self.model.name, name, bits_k, bits_v, family, protocol, metric, value, unit, n,
            self.devices or device_name(self.model.device), dtype_name(self.model.dtype), self.seed,
            __version__, commit_of_source(),
            accession=accession, tokens=tokens, p20=p20, p80=p80, torch=torch.__version__,
            date=datetime.date.today().isoformat(), inputs=self.inputs, prompt=self.prompt,
        )  # fmt: skip

    def accuracy(
        self, recipe: Recipe | str, family: str, protocol: str, found: metrics.Agreement
    ) -> list[ResultRow]:
        """The rows of an agreement."""
        return self._figures(ACCURACY, recipe, family, protocol, found)

    def language(
        self, recipe: Recipe | str, family: str, protocol: str, found: metrics.Divergence
    ) -> list[ResultRow]:
        """The rows of a divergence: distributions over the next residue, the 20 amino acids, or the next token."""
        wanted = LANGUAGE_OF_TOKENS if self.model.causal else LANGUAGE
        return self._figures(wanted, recipe, family, protocol, found)

    def _figures(
        self,
        wanted: Sequence[Metric],
        recipe: Recipe | str,
        family: str,
        protocol: str,
        found: metrics.Agreement | metrics.Divergence,
    ) -> list[ResultRow]:
        return [
            self.row(recipe, family, protocol, metric.name, getattr(found, metric.field), metric.unit, found.n)
            for metric in wanted
        ]

    def of_proteins(
        self, recipe: Recipe | str, family: str, protocol: str, results: Sequence[ProteinResult]
    ) -> list[ResultRow]:
        """All figures of some proteins together."""
        rows = self.accuracy(recipe, family, protocol, metrics.agreement([r.cosines for r in results]))
        parts = [r.predictions for r in results if r.predictions is not None and len(r.predictions.kl)]
        return rows + (self.language(recipe, family, protocol, metrics.divergence(parts)) if parts else [])

    def layers(self, recipe: Recipe | str, family: str, results: Sequence[ProteinResult]) -> list[ResultRow]:
        """Relative error of each layer's attention output, ||found - exact|| / ||exact|| over all tokens."""
        traced = [result.layers for result in results if result.layers is not None]
        n = sum(len(result.cosines) for result in results)
        sums = torch.stack(traced).sum(0) if traced else torch.empty(0, 2)
        return [
            self.row(recipe, family, "layer", f"attention_error_{index}", float((error / norm) ** 0.5), "1", n)
            for index, (error, norm) in enumerate(sums)
        ]

    def each_protein(
        self, recipe: Recipe | str, family: str, protocol: str, results: Sequence[ProteinResult]
    ) -> list[ResultRow]:
        """All figures of each protein alone."""
        return [
            replace(row, accession=result.protein.accession)
            for result in results
            for row in self.of_proteins(recipe, family, protocol, [result])
        ]


def dtype_name(dtype: torch.dtype) -> str:
    """float32, bfloat16, ..."""
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """What results call a device: the GPU's name, or the CPU's with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


@dataclass
class Totals:
    """All figures of proteins that stream by."""

    cosines: RunningAgreement = field(default_factory=RunningAgreement)
    predictions: RunningDivergence = field(default_factory=RunningDivergence)

    def add(self, result: ProteinResult) -> None:
        """Take in one protein."""
        self.cosines.add(result.cosines)
        if result.predictions is not None:
            self.predictions.add(result.predictions)

    def rows(self, context: Context, recipe: Recipe | str, protocol: str) -> list[ResultRow]:
        """As `Context.of_proteins`."""
        rows = context.accuracy(recipe, "", protocol, self.cosines.summary())
        language = self.predictions.summary()
        return rows + (context.language(recipe, "", protocol, language) if language else [])


@dataclass
class Summary:
    """Results of `decode` as they stream by: the first `shown` proteins and all together.

    Protocol `prompted`, and `drift` of the fp32 decode.
    """

    context: Context
    recipe: Recipe | str
    shown: int = 20
    results: Totals = field(default_factory=Totals)
    drift: Totals = field(default_factory=Totals)
    count: int = 0
    _lines: list[list[str]] = field(default_factory=list)

    def add(self, result: ProteinResult, drift: ProteinResult | None = None) -> list[ResultRow]:
        """Take in one protein: its rows. An autoregressive model has no drift."""
        self.results.add(result)
        self.count += 1
        if drift is not None:
            self.drift.add(drift)
        if self.count <= self.shown:
            alone, drifted = Totals(), Totals()
            alone.add(result)
            if drift is not None:
                drifted.add(drift)
            self._lines.append(_cells(result.protein.accession, alone, drifted))
        rows = self.context.each_protein(self.recipe, "", "prompted", [result])
        return rows if drift is None else rows + self.context.each_protein("fp32", "", "drift", [drift])

    def rows(self) -> list[ResultRow]:
        """Of all proteins together."""
        prompted = self.results.rows(self.context, self.recipe, "prompted")
        return prompted + (self.drift.rows(self.context, "fp32", "drift") if self.drift.cosines.n else [])

    def table(self, kv: str) -> tuple[list[str], list[list[str]]]:
        """Columns and rows for the screen."""
        columns = ["protein", "decoded", "error", "cosine", "p5", "min"]
        columns += ["drift"] if self.drift.cosines.n else []
        what = "token" if self.context.model.causal else "residue"
        if self.results.predictions.n:
            columns += [f"{what} KL (nat)", f"{what} top-1", f"{what} perplexity fp32", f"{what} perplexity {kv}"]
        more = self.count - len(self._lines)
        dots = [[f"... and {more} more"]] if more else []
        lines = [*self._lines, *dots, _cells(f"all {self.count}", self.results, self.drift)]
        return columns, [line + [""] * (len(columns) - len(line)) for line in lines]


def _cells(name: str, results: Totals, drift: Totals) -> list[str]:
    found = results.cosines.summary()
    cells = [name, str(found.n), _number(found.error)]
    cells += [f"{cosine:.5f}" for cosine in (found.mean, found.p05, found.minimum)]
    cells += [_number(drift.cosines.summary().error)] if drift.cosines.n else []
    lm = results.predictions.summary()
    if lm is not None:
        cells += [f"{lm.kl_mean:.5f}", f"{lm.top1_agreement:.4f}"]
        cells += [f"{lm.reference_perplexity:.3f}", f"{lm.perplexity:.3f}"]
    return cells


def _identity(recipe: Coded | str) -> tuple[str, float, float]:
    if isinstance(recipe, str):
        bits = peer_bits(recipe)
        return recipe, bits, bits
    return recipe.name, recipe.bits_k, recipe.bits_v


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:  # noqa: PTH123
            names = (line.split(":", 1)[1].strip() for line in stream if line.startswith("model name"))
            return next(names, "cpu")
    except OSError:
        return "cpu"


def bench_tables(
    rows: Sequence[ResultRow], recipes: Sequence[Recipe | str], families: Sequence[str]
) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows of the tables that `bench` shows: accuracy by family, then memory and time."""
    found = {
        (r.recipe, r.bits_k, r.bits_v, r.family, r.protocol, r.metric, r.tokens): r
        for r in rows
        if not r.accession
    }

    def value(recipe: Recipe | str, family: str, protocol: str, metric: str, tokens: int = 0) -> float | None:
        row = found.get((*_identity(recipe), family, protocol, metric, tokens))
        return None if row is None else row.value

    overall = [*families, "all"] if len(families) > 1 else list(families)
    tables = []
    if any(row.protocol == "decode" for row in rows):
        shown = {(row.protocol, row.metric) for row in rows}
        further = [column for column in _FURTHER if column[:2] in shown]
        accuracy = [
            [_label(recipe)]
            + [_number(value(recipe, family, "decode", "error")) for family in overall]
            + [_number(value(recipe, overall[-1], "decode", f"cosine_{m}")) for m in ("mean", "p05", "min")]
            + [_number(value(recipe, overall[-1], protocol, metric)) for protocol, metric, _ in further]
            for recipe in recipes
        ]
        drift = ["drift of fp32"] + [_number(value("fp32", family, "drift", "error")) for family in overall]
        drift += [_number(value("fp32", overall[-1], "drift", f"cosine_{m}")) for m in ("mean", "p05", "min")]
        columns = ["recipe", *(f"error {name}" for name in overall), "cosine", "p5", "min"]
        title = "Decoded hidden states against an fp32 cache: error = 1 - mean cosine"
        has_drift = any(row.protocol == "drift" for row in rows)
        lines = [*accuracy, [*drift, *[""] * len(further)]] if has_drift else accuracy
        tables.append((title, [*columns, *(name for _, _, name in further)], lines))
    cost = []
    caches: list[Recipe | str] = list(dict.fromkeys(["fp32", "fp16", *recipes]))
    longest = max((row.tokens for row in rows if row.protocol == "memory"), default=0)
    for cache in caches:
        figures = [value(cache, "", "memory", name, longest) for name in _MEMORY_METRICS]
        figures += [
            value(cache, "", "memory", "bytes_model_tables"),
            value(cache, "", "time", "us_per_token", 256),
        ]
        cost.append([_label(cache), *map(_number, figures)])
    columns = [
        "cache",
        f"bytes at {longest} tokens",
        "bits per value",
        "x fp32",
        "x fp16",
        "tables",
        "us per token at 256",
    ]
    return [*tables, ("Memory of a sequence, everything counted, and time", columns, cost)]


_FURTHER = (
    ("decode", "residue_kl_mean", "residue KL (nat)"),
    ("decode", "residue_top1_agreement", "residue top-1"),
    ("decode", "token_kl_mean", "token KL (nat)"),
    ("decode", "token_top1_agreement", "token top-1"),
    ("paper", "cosine_mean", "layer 0 cosine"),
)
"""Protocol, metric and column of what is shown where there is a language-model head, or an encoder."""

_MEMORY_METRICS = ("bytes", "bits_per_value", "ratio_fp32", "ratio_fp16")


def _label(recipe: Recipe | str) -> str:
    return recipe if isinstance(recipe, str) else recipe.typed


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
