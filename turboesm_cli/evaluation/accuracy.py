"""Recipes side by side on evaluation proteins: accuracy, memory and time, as rows.

Protocols: `decode`, every token decoded from an initially empty cache, all layers quantized, errors passing
through all layers, against the same decode with an fp32 cache; `drift`, that fp32 decode against ESM-2 encoding
the whole protein; `paper` and `paper_heads`, layer 0's attention output alone, see `evaluation.FirstLayer`;
`layer`, every layer's attention output in the decode; `memory`; `time`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import platformdirs
import torch

from turboesm_cli import __version__
from turboesm_cli.cache.packed import PackedCodec, bytes_per_sequence, codec_nbytes, dense_bytes_per_sequence
from turboesm_cli.codec.bundle import Bundle, read_bundle, seen, write_bundle
from turboesm_cli.codec.calibration import bundle_of, require_enough
from turboesm_cli.codec.fit import CodecSpec
from turboesm_cli.codec.recipes import Recipe
from turboesm_cli.console import Phases, Tick, quiet
from turboesm_cli.engine.jobs import new_cache
from turboesm_cli.errors import BundleError, InputError, OutputError
from turboesm_cli.evaluation import metrics, timing
from turboesm_cli.evaluation.peers import peer, peer_nbytes
from turboesm_cli.evaluation.protein_results import ProteinResult
from turboesm_cli.evaluation.rows import Context
from turboesm_cli.evaluation.teacher_forced import DRIFT, compare_decoding, first_layer_cosines
from turboesm_cli.models.forward import Codec, prefill, step
from turboesm_cli.models.protocol import Model
from turboesm_cli.outputs.identity import code_digest
from turboesm_cli.outputs.work import NOTHING_KEPT, Tensors, Work
from turboesm_cli.reporting.results import ResultRow
from turboesm_cli.sequences.fasta import Protein, digest
from turboesm_cli.statistics.batching import told
from turboesm_cli.statistics.collect import collect

MEMORY_LENGTHS = (128, 256, 512, 1024)
TIMED_CONTEXT = 256
Families = Mapping[str, Sequence[Protein]]


@dataclass(frozen=True)
class Entry:
    """A recipe in the bench, by the name that it goes by, with its codec."""

    name: str
    bundle: Bundle

    @property
    def spec(self) -> CodecSpec:
        """The codec."""
        return self.bundle.spec


def calibrated(
    model: Model,
    proteins: Sequence[Protein],
    recipes: Mapping[str, Recipe],
    phase: Phases = quiet,
    work: Work = NOTHING_KEPT,
) -> list[Entry]:
    """A bundle for each recipe: from the user's cache folder, else calibrated (statistics once) and kept there."""
    paths = {name: _cached_path(model, proteins, recipe) for name, recipe in recipes.items()}
    found = {name: _read_if_good(path) for name, path in paths.items()}
    if all(found.values()):
        return [Entry(name, bundle) for name, bundle in found.items() if bundle]
    require_enough(model, proteins)
    statistics = collect(model, proteins, phase=phase, work=work)
    missing = [name for name in recipes if not found[name]]
    with phase("fitting", len(missing)) as tick:
        for name in missing:
            found[name] = bundle = bundle_of(model, proteins, statistics, recipes[name])
            tick()
            with contextlib.suppress(OutputError):  # kept for the next run where the cache can be written to
                write_bundle(paths[name], bundle)
    return [Entry(name, bundle) for name, bundle in found.items() if bundle]


def refuse_seen(entries: Sequence[Entry], families: Families) -> None:
    """Raise InputError where a protein to evaluate on took part in a calibration."""
    for entry in entries:
        for family, proteins in families.items():
            known = seen(entry.bundle, proteins)
            if known:
                names = ", ".join(protein.accession for protein in known[:3])
                names += ", ..." if len(known) > 3 else ""
                raise InputError(
                    f"{len(known)} proteins of {family} ({names}) were in the calibration set of {entry.name}; "
                    "evaluate on others, or pass --allow-seen to flag the figures instead"
                )


def accuracy(
    model: Model,
    entries: Sequence[Entry],
    families: Families,
    phase: Phases = quiet,
    formats: Sequence[str] = (),
    work: Work = NOTHING_KEPT,
) -> Iterator[ResultRow]:
    """Rows of the protocols decode and drift: families, proteins, all; `formats`: names of `peers`.

    The phase "decoding" hears of each protein and codec.
    """
    context = Context(model, devices=work.devices)
    codecs: dict[str, Codec] = {entry.name: PackedCodec(entry.spec, model.device) for entry in entries}
    codecs |= {name: peer(name) for name in formats}
    recipes: dict[str, Recipe | str] = {entry.name: entry.spec.recipe for entry in entries}
    recipes |= {name: name for name in formats}
    by_name: dict[str, list[ProteinResult]] = {name: [] for name in (DRIFT, *codecs)}
    total = sum(map(len, families.values())) * (len(codecs) + (not model.causal))  # drift is an encoder's
    with phase("decoding", total) as tick:
        for family, proteins in families.items():
            own: dict[str, list[ProteinResult]] = {name: [] for name in by_name}
            for name, result in compare_decoding(model, proteins, codecs, work=work.under(family), tick=tick):
                own[name].append(result)
            yield from _accuracy_rows(context.of_inputs(proteins), recipes, family, own)
            for name, results in own.items():
                by_name[name] += results
    if len(families) > 1:
        everything = [protein for proteins in families.values() for protein in proteins]
        for row in _accuracy_rows(context.of_inputs(everything), recipes, "all", by_name):
            if not row.accession:
                yield row


def first_layer(
    model: Model, entries: Sequence[Entry], families: Families, phase: Phases = quiet, work: Work = NOTHING_KEPT
) -> Iterator[ResultRow]:
    """Rows of the protocols paper (heads joined) and paper_heads (each head on its own): of encoders alone."""
    if model.causal:
        return
    with phase("first layer", len(entries) * len(families)) as tick:
        yield from _first_layer(model, entries, families, tick, work)


def _first_layer(
    model: Model, entries: Sequence[Entry], families: Families, tick: Tick, work: Work
) -> Iterator[ResultRow]:
    context = Context(model, devices=work.devices)
    for index, entry in enumerate(entries):
        found = {}
        for family, few in families.items():
            found[family] = list(first_layer_cosines(model, few, entry.spec, work.under(f"{index}-{family}")))
            tick()
        if len(families) > 1:
            found["all"] = [part for parts in found.values() for part in parts]
        everything = [protein for few in families.values() for protein in few]
        for family, parts in found.items():
            own = context.of_inputs(families.get(family, everything))
            joined, heads = (
                metrics.agreement([getattr(part, name) for part in parts]) for name in ("joined", "heads")
            )
            yield from own.accuracy(entry.spec.recipe, family, "paper", joined)
            yield from own.accuracy(entry.spec.recipe, family, "paper_heads", heads)


def memory(model: Model, entries: Sequence[Entry], formats: Sequence[str] = ()) -> Iterator[ResultRow]:
    """Rows of the protocol memory: bytes that a sequence holds at some lengths, everything counted, and ratios."""
    context = Context(model)
    for tokens in (length for length in MEMORY_LENGTHS if length <= (model.shape.context or length)):
        spec = entries[0].spec
        fp32 = dense_bytes_per_sequence(spec, tokens, torch.float32)
        dense = dict.fromkeys(("fp32", "fp16", *formats))
        held: list[tuple[Recipe | str, int]] = [
            (name, peer_nbytes(name, fp32 // 4, spec.head_dim)) for name in dense
        ]
        held += [(entry.spec.recipe, bytes_per_sequence(entry.spec, tokens)) for entry in entries]
        for recipe, nbytes in held:
            figures = {
                "bytes": (float(nbytes), "B"),
                "bits_per_value": (nbytes / fp32 * 32, "bit"),
                "ratio_fp32": (fp32 / nbytes, "1"),
                "ratio_fp16": (fp32 / 2 / nbytes, "1"),
            }
            for name, (value, unit) in figures.items():
                yield context.row(recipe, "", "memory", name, value, unit, 1, tokens=tokens)
    for entry in entries:
        shared = float(codec_nbytes(entry.spec))
        yield context.row(entry.spec.recipe, "", "memory", "bytes_model_tables", shared, "B", 1)


@torch.no_grad()
def times(
    model: Model,
    entries: Sequence[Entry],
    repeats: int = 20,
    phase: Phases = quiet,
    work: Work = NOTHING_KEPT,
) -> Iterator[ResultRow]:
    """Rows of the protocol time: microseconds to decode one token of one sequence after 256 cached ones."""
    context = Context(model, devices=work.devices)
    tokens = model.alphabet.random(1, TIMED_CONTEXT).to(model.device)
    variants: list[tuple[Recipe | str, CodecSpec, str]] = [(kv, entries[0].spec, kv) for kv in ("fp32", "fp16")]
    variants += [(entry.spec.recipe, entry.spec, "packed") for entry in entries]
    with phase("timing", len(variants)) as tick:
        for index, (recipe, spec, kv) in enumerate(variants):
            cache = new_cache(model, spec, kv, 1, TIMED_CONTEXT + 1)
            prefill(model, tokens, cache)

            def one_token(cache=cache) -> None:  # type: ignore[no-untyped-def]
                step(model, tokens[:, 0], cache)
                cache.truncate(TIMED_CONTEXT)

            saved = work.unit(str(index), partial(_timed, one_token, model.device, repeats))
            median, p20, p80 = saved["median_p20_p80"].tolist()
            yield context.row(
                recipe, "", "time", "us_per_token", median, "us", int(saved["n"]),
                tokens=TIMED_CONTEXT, p20=p20, p80=p80,
            )  # fmt: skip
            tick()


def _timed(call: Callable[[], object], device: torch.device, repeats: int) -> Tensors:
    took = timing.measure(call, device, repeats=repeats)
    spread = torch.tensor([took.median, took.p20, took.p80], dtype=torch.float64)
    return {"median_p20_p80": spread, "n": torch.tensor(took.n)}


def _accuracy_rows(
    context: Context,
    recipes: Mapping[str, Recipe | str],
    family: str,
    results: Mapping[str, Sequence[ProteinResult]],
) -> Iterator[ResultRow]:
    if results[DRIFT]:
        yield from context.of_proteins("fp32", family, "drift", results[DRIFT])
        yield from context.each_protein("fp32", family, "drift", results[DRIFT])
    for name, recipe in recipes.items():
        yield from context.of_proteins(recipe, family, "decode", results[name])
        yield from context.each_protein(recipe, family, "decode", results[name])
        yield from context.layers(recipe, family, results[name])


def _cached_path(model: Model, proteins: Sequence[Protein], recipe: Recipe) -> Path:
    """Where the bundle is kept: named by all that it follows from, the code that makes it included."""
    read = digest(proteins) + told(proteins, model.alphabet)
    identity = [__version__, code_digest(), model.fingerprint, read, recipe.as_dict()]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    return platformdirs.user_cache_path("turboesm") / "bundles" / f"{key}.tqz"


def _read_if_good(path: Path) -> Bundle | None:
    if not path.exists():
        return None
    try:
        return read_bundle(path)
    except BundleError:
        return None
