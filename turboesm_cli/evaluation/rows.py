"""Results of proteins → figures: summaries for the screen, rows for files."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch

from turboesm_cli import __version__, whereabouts
from turboesm_cli.codec.bundle import Bundle
from turboesm_cli.evaluation import metrics
from turboesm_cli.evaluation.peers import peer_bits
from turboesm_cli.evaluation.protein_results import ProteinResult
from turboesm_cli.evaluation.streaming import RunningAgreement, RunningDivergence, State
from turboesm_cli.models.protocol import Model
from turboesm_cli.reporting.metric_names import ACCURACY, LANGUAGE, LANGUAGE_OF_TOKENS, Metric
from turboesm_cli.reporting.recipe_names import typed
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
    """What every row of a measurement says of its circumstances, as in `ResultRow`; `causal`: of the model.

    date        that of the day where it is not given
    calibrated  what rows say of each codec's calibration, by recipe and bits as they are typed
    seen        proteins of the measurement that a codec had been fitted to
    """

    model: str
    device: str
    dtype: str
    causal: bool
    seed: int = 0
    inputs: str = ""
    prompt: str = ""
    version: str = __version__
    commit: str = field(default_factory=commit_of_source)
    torch: str = str(torch.__version__)
    date: str = ""
    command: str = field(default_factory=whereabouts.command)
    calibrated: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seen: int = 0

    @classmethod
    def of(
        cls,
        model: Model,
        seed: int = 0,
        inputs: str = "",
        prompt: str = "",
        devices: str = "",
        bundles: Iterable[Bundle] = (),
        seen: int = 0,
    ) -> Context:
        """That of a model; `devices`: those that it is done on, where they are more than the model's."""
        device, dtype = devices or device_name(model.device), dtype_name(model.dtype)
        calibrated = {bundle.spec.recipe.typed: _calibration(bundle) for bundle in bundles}
        return cls(model.name, device, dtype, model.causal, seed, inputs, prompt, calibrated=calibrated, seen=seen)

    def of_inputs(self, proteins: Sequence[Protein]) -> Context:
        """The same, for figures of these proteins, whatever their order."""
        return replace(self, inputs=digest(proteins)[:16])

    def dated(self) -> Context:
        """The same with today's date."""
        return replace(self, date=datetime.date.today().isoformat())

    def row(
        self, recipe: Coded | str, family: str, protocol: str, metric: str, value: float, unit: str, n: int,
        accession: str = "", tokens: int = 0, p20: float | None = None, p80: float | None = None,
    ) -> ResultRow:  # fmt: skip
        """A row; `recipe` is a recipe, or the dtype of a dense cache."""
        name, bits_k, bits_v = identity_of(recipe)
        calibration = dict(self.calibrated.get(typed(name, bits_k, bits_v), {}))
        if calibration:
            calibration["calibration_seen"] = self.seen
        return ResultRow(
            self.model, name, bits_k, bits_v, family, protocol, metric, value, unit, n,
            self.device, self.dtype, self.seed, self.version, self.commit,
            accession=accession, tokens=tokens, p20=p20, p80=p80, torch=self.torch,
            date=self.date or datetime.date.today().isoformat(), inputs=self.inputs, prompt=self.prompt,
            command="" if accession else self.command, **calibration,
        )  # fmt: skip

    def accuracy(
        self, recipe: Coded | str, family: str, protocol: str, found: metrics.Agreement
    ) -> list[ResultRow]:
        """The rows of an agreement."""
        return self._figures(ACCURACY, recipe, family, protocol, found)

    def language(
        self, recipe: Coded | str, family: str, protocol: str, found: metrics.Divergence
    ) -> list[ResultRow]:
        """The rows of a divergence: distributions over the next residue, the 20 amino acids, or the next token."""
        wanted = LANGUAGE_OF_TOKENS if self.causal else LANGUAGE
        return self._figures(wanted, recipe, family, protocol, found)

    def _figures(
        self,
        wanted: Sequence[Metric],
        recipe: Coded | str,
        family: str,
        protocol: str,
        found: metrics.Agreement | metrics.Divergence,
    ) -> list[ResultRow]:
        return [
            self.row(recipe, family, protocol, metric.name, getattr(found, metric.field), metric.unit, found.n)
            for metric in wanted
        ]

    def of_proteins(
        self, recipe: Coded | str, family: str, protocol: str, results: Sequence[ProteinResult]
    ) -> list[ResultRow]:
        """All figures of some proteins together."""
        rows = self.accuracy(recipe, family, protocol, metrics.agreement([r.cosines for r in results]))
        parts = [r.predictions for r in results if r.predictions is not None and len(r.predictions.kl)]
        return rows + (self.language(recipe, family, protocol, metrics.divergence(parts)) if parts else [])

    def layers(self, recipe: Coded | str, family: str, results: Sequence[ProteinResult]) -> list[ResultRow]:
        """Relative error of each layer's attention output, ||found - exact|| / ||exact|| over all tokens."""
        traced = [result.layers for result in results if result.layers is not None]
        n = sum(len(result.cosines) for result in results)
        sums = torch.stack(traced).sum(0) if traced else torch.empty(0, 2)
        return [
            self.row(recipe, family, "layer", f"attention_error_{index}", float((error / norm) ** 0.5), "1", n)
            for index, (error, norm) in enumerate(sums)
        ]

    def each_protein(
        self, recipe: Coded | str, family: str, protocol: str, results: Sequence[ProteinResult]
    ) -> list[ResultRow]:
        """All figures of each protein alone."""
        return [
            replace(row, accession=result.protein.accession, command="")
            for result in results
            for row in self.of_proteins(recipe, family, protocol, [result])
        ]


def _calibration(bundle: Bundle) -> dict[str, Any]:
    """Columns of `ResultRow`."""
    found = bundle.calibration
    return {
        "calibration": found.sha256[:16],
        "calibration_source": found.source,
        "calibration_proteins": found.proteins,
        "calibration_tokens": found.tokens,
    }


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

    @property
    def state(self) -> State:
        """What `add_state` takes, as JSON has it."""
        return {"cosines": self.cosines.state, "predictions": self.predictions.state}

    def add_state(self, state: Mapping[str, Any]) -> None:
        """Take in the proteins of another one."""
        self.cosines.add_state(state["cosines"])
        self.predictions.add_state(state["predictions"])

    def rows(self, context: Context, recipe: Coded | str, protocol: str) -> list[ResultRow]:
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
    recipe: Coded | str
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

    @property
    def state(self) -> State:
        """What rows of all together follow from, as JSON has it; `merged_rows` joins those of shards."""
        totals = {"results": self.results.state, "drift": self.drift.state}
        return {"context": asdict(self.context.dated()), "recipe": [*identity_of(self.recipe)]} | totals

    def rows(self) -> list[ResultRow]:
        """Of all proteins together."""
        prompted = self.results.rows(self.context, self.recipe, "prompted")
        return prompted + (self.drift.rows(self.context, "fp32", "drift") if self.drift.cosines.n else [])

    def table(self, kv: str) -> tuple[list[str], list[list[str]]]:
        """Columns and rows for the screen."""
        columns = ["protein", "decoded", "error", "cosine", "p5", "min"]
        columns += ["drift"] if self.drift.cosines.n else []
        what = "token" if self.context.causal else "residue"
        if self.results.predictions.n:
            columns += [f"{what} KL (nat)", f"{what} top-1", f"{what} perplexity fp32", f"{what} perplexity {kv}"]
        more = self.count - len(self._lines)
        dots = [[f"... and {more} more"]] if more else []
        lines = [*self._lines, *dots, _cells(f"all {self.count}", self.results, self.drift)]
        return columns, [line + [""] * (len(columns) - len(line)) for line in lines]


def _cells(name: str, results: Totals, drift: Totals) -> list[str]:
    found = results.cosines.summary()
    cells = [name, str(found.n), number(found.error)]
    cells += [f"{cosine:.5f}" for cosine in (found.mean, found.p05, found.minimum)]
    cells += [number(drift.cosines.summary().error)] if drift.cosines.n else []
    lm = results.predictions.summary()
    if lm is not None:
        cells += [f"{lm.kl_mean:.5f}", f"{lm.top1_agreement:.4f}"]
        cells += [f"{lm.reference_perplexity:.3f}", f"{lm.perplexity:.3f}"]
    return cells


def identity_of(recipe: Coded | str) -> tuple[str, float, float]:
    """What rows call a recipe or a dense cache: name, bits of keys, bits of values."""
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


def number(value: float | None) -> str:
    """As tables show it: four digits, none for what was not measured."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
