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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import platformdirs
import torch

from turboesm_cli import __version__
from turboesm_cli.cache.packed import PackedCodec
from turboesm_cli.codec.bundle import Bundle, read_bundle, write_bundle
from turboesm_cli.codec.calibration import bundle_of, require_enough, source_of
from turboesm_cli.codec.fit import CodecSpec
from turboesm_cli.codec.header import seen
from turboesm_cli.codec.recipes import Recipe
from turboesm_cli.console import Phases, Tick, quiet
from turboesm_cli.engine.jobs import new_cache
from turboesm_cli.errors import BundleError, InputError, OutputError
from turboesm_cli.evaluation import timing
from turboesm_cli.evaluation.accuracy_rows import (
    ALL,
    Circumstances,
    Measured,
    decoded_rows,
    first_layer_rows,
)
from turboesm_cli.evaluation.peers import peer, peer_nbytes
from turboesm_cli.evaluation.protein_results import ProteinResult
from turboesm_cli.evaluation.rows import Coded, Context
from turboesm_cli.evaluation.teacher_forced import (
    DRIFT,
    FirstLayer,
    compare_decoding,
    decoding_cost,
    first_layer_cosines,
    first_layer_cost,
)
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
        return _entries(found, proteins)
    require_enough(model, proteins)
    statistics = collect(model, proteins, phase=phase, work=work)
    missing = [name for name in recipes if not found[name]]
    with phase("fitting", len(missing)) as tick:
        for name in missing:
            found[name] = bundle = bundle_of(model, proteins, statistics, recipes[name])
            tick()
            with contextlib.suppress(OutputError):  # kept for the next run where the cache can be written to
                write_bundle(paths[name], bundle)
    return _entries(found, proteins)


def _entries(found: Mapping[str, Bundle | None], proteins: Sequence[Protein]) -> list[Entry]:
    """One that was kept may be of the same proteins from a file of another name."""
    source = source_of(proteins)
    return [
        Entry(name, replace(bundle, calibration=replace(bundle.calibration, source=source)))
        for name, bundle in found.items()
        if bundle
    ]


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
    each = len(entries) + len(formats) + (not model.causal)  # drift is an encoder's
    codecs = len(entries) + len(formats)
    cost = sum(decoding_cost(model, proteins, codecs) for proteins in families.values())
    with phase("decoding", each * sum(map(len, families.values())), cost) as tick:
        measured = Measured(decoded(model, entries, families, tick, formats, work))
    yield from decoded_rows(circumstances(model, entries, families, formats, work.devices), measured)


def first_layer(
    model: Model, entries: Sequence[Entry], families: Families, phase: Phases = quiet, work: Work = NOTHING_KEPT
) -> Iterator[ResultRow]:
    """Rows of the protocols paper (heads joined) and paper_heads (each head on its own): of encoders alone."""
    if model.causal:
        return
    cost = len(entries) * sum(first_layer_cost(model, proteins) for proteins in families.values())
    with phase("first layer", len(entries) * len(families), cost) as tick:
        measured = Measured(first=first_layers(model, entries, families, tick, work))
    yield from first_layer_rows(circumstances(model, entries, families, (), work.devices), measured)


def circumstances(
    model: Model, entries: Sequence[Entry], families: Families, formats: Sequence[str], devices: str
) -> Circumstances:
    """What rows say beside the figures."""
    recipes: dict[str, Coded | str] = {entry.name: entry.spec.recipe for entry in entries}
    everything = [protein for proteins in families.values() for protein in proteins]
    inputs = {family: digest(proteins)[:16] for family, proteins in {**families, ALL: everything}.items()}
    known = max((len(seen(entry.bundle, everything)) for entry in entries), default=0)
    context = Context.of(model, devices=devices, bundles=(entry.bundle for entry in entries), seen=known)
    return Circumstances(context, recipes | {name: name for name in formats}, inputs)


def decoded(
    model: Model,
    entries: Sequence[Entry],
    families: Families,
    tick: Tick,
    formats: Sequence[str] = (),
    work: Work = NOTHING_KEPT,
    own: Mapping[str, range] | None = None,
) -> dict[str, dict[str, list[ProteinResult]]]:
    """Each family's results, by entry, format and DRIFT; `own`: of these batches of each family alone."""
    codecs: dict[str, Codec] = {entry.name: PackedCodec(entry.spec, model.device) for entry in entries}
    codecs |= {name: peer(name) for name in formats}
    found: dict[str, dict[str, list[ProteinResult]]] = {}
    for family, proteins in families.items():
        found[family] = {name: [] for name in (DRIFT, *codecs)}
        few = None if own is None else own[family]
        for name, result in compare_decoding(model, proteins, codecs, work=work.under(family), tick=tick, own=few):
            found[family][name].append(result)
    return found


def first_layers(
    model: Model,
    entries: Sequence[Entry],
    families: Families,
    tick: Tick,
    work: Work = NOTHING_KEPT,
    own: Mapping[str, range] | None = None,
) -> dict[str, dict[str, list[FirstLayer]]]:
    """Layer 0's attention output, by entry and family; {} of a model that is no encoder. `own` as in `decoded`.

    `tick` hears of each entry and family.
    """
    found: dict[str, dict[str, list[FirstLayer]]] = {}
    for index, entry in enumerate(() if model.causal else entries):
        found[entry.name] = {}
        for family, few in families.items():
            batches = None if own is None else own[family]
            kept = work.under(f"{index}-{family}")
            found[entry.name][family] = list(first_layer_cosines(model, few, entry.spec, kept, batches))
            tick(cost=first_layer_cost(model, few, batches))
    return found


def memory(model: Model, entries: Sequence[Entry], formats: Sequence[str] = ()) -> Iterator[ResultRow]:
    """Rows of the protocol memory: bytes that a sequence holds at some lengths, everything counted, and ratios."""
    context = Context.of(model, bundles=(entry.bundle for entry in entries))
    for tokens in (length for length in MEMORY_LENGTHS if length <= (model.shape.context or length)):
        spec = entries[0].spec
        fp32 = 4 * spec.size.numbers(tokens)
        dense = dict.fromkeys(("fp32", "fp16", *formats))
        held: list[tuple[Recipe | str, int]] = [
            (name, peer_nbytes(name, fp32 // 4, spec.head_dim)) for name in dense
        ]
        held += [(entry.spec.recipe, entry.spec.size.sequence_bytes(tokens)) for entry in entries]
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
        shared = float(entry.spec.size.shared_bytes)
        yield context.row(entry.spec.recipe, "", "memory", "bytes_model_tables", shared, "B", 1)


@torch.no_grad()
def times(
    model: Model,
    entries: Sequence[Entry],
    repeats: int = 20,
    phase: Phases = quiet,
    work: Work = NOTHING_KEPT,
) -> Iterator[ResultRow]:
    """Rows of the protocol time: microseconds to decode one token of one sequence after 256 cached ones.

    None for a model that takes no more than these.
    """
    if model.shape.context is not None and model.shape.context <= TIMED_CONTEXT:
        return
    context = Context.of(model, devices=work.devices, bundles=(entry.bundle for entry in entries))
    tokens = model.alphabet.random(1, TIMED_CONTEXT).to(model.device)
    variants: list[tuple[Recipe | str, CodecSpec, str]] = [(kv, entries[0].spec, kv) for kv in ("fp32", "fp16")]
    variants += [(entry.spec.recipe, entry.spec, "packed") for entry in entries]
    costs = {"packed": 1.5}  # of the time that a dense cache takes, with what is made ready
    cost = sum(costs.get(kv, 1.0) for *_, kv in variants)
    with phase("timing", len(variants), cost) as tick:
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
            tick(cost=costs.get(kv, 1.0))


def _timed(call: Callable[[], object], device: torch.device, repeats: int) -> Tensors:
    took = timing.measure(call, device, repeats=repeats)
    spread = torch.tensor([took.median, took.p20, took.p80], dtype=torch.float64)
    return {"median_p20_p80": spread, "n": torch.tensor(took.n)}


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
