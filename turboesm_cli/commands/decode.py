"""`turboesm decode`: prompt → packed cache → token by token, against the same decode with an fp32 cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turboesm_cli import console
from turboesm_cli.cache.formats import FORMATS, PACKED
from turboesm_cli.commands import options
from turboesm_cli.commands.decoding import Decoding
from turboesm_cli.commands.gpus import Gpus
from turboesm_cli.commands.reading import Reading, hashed, hashed_bundle
from turboesm_cli.commands.sharding import ShardOption, check_shard, of_shard, say_shard
from turboesm_cli.errors import InputError
from turboesm_cli.sequences.fasta import LongPolicy

if TYPE_CHECKING:
    from turboesm_cli.codec.bundle import Bundle
    from turboesm_cli.codec.fit import CodecSpec
    from turboesm_cli.codec.header import Header, Known
    from turboesm_cli.engine.memory_plan import Plan
    from turboesm_cli.engine.prompts import Prompt
    from turboesm_cli.engine.workload import Workload
    from turboesm_cli.evaluation.rows import Summary
    from turboesm_cli.models.protocol import Model
    from turboesm_cli.outputs.shards import Shard
    from turboesm_cli.outputs.work import Tensors
    from turboesm_cli.reporting.results import ResultRow

_OF_OUTPUTS = ["--if-done", "--resume-anywhere"]
LARGEST_BATCH = 256
"""Sequences at once that a GPU is given where --batch does not say."""
TOKEN_OF_PASS = 0.25
"""What a token takes in a pass over a whole protein, in decoded tokens; measured on a CPU (8M)."""


def decode(
    bundle: Annotated[Path, typer.Argument(help="Bundle of `turboesm calibrate`.", show_default=False)],
    source: Annotated[
        str, typer.Argument(help="Proteins (- for stdin), or the caches of quantize.", show_default=False)
    ],
    prompt: Annotated[
        str | None,
        typer.Option(
            help="How much of each protein is prompt: all, a fraction or residues. Default: 0.5.",
            show_default=False,
        ),
    ] = None,
    kv: options.CacheKind = PACKED,
    generate: Annotated[
        int, typer.Option(min=0, help="Sample up to N tokens (residues) after the prompt; FASTA on stdout.")
    ] = 0,
    num_samples: Annotated[
        int, typer.Option(min=1, max=10**7, help="Samples of each prompt, which is encoded once.")
    ] = 1,
    temperature: Annotated[
        float, typer.Option(min=0, help="Sampling temperature; 0 always takes the most likely token.")
    ] = 1.0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Sample from the most likely tokens that add up to this.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from so many most likely tokens; 0: from all.")] = 0,
    repetition_penalty: Annotated[
        float, typer.Option(min=0.1, max=10, help="Make tokens that are there already less likely.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Random seed of sampling.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write figures as CSV, or sampled FASTA, here.", show_default=False),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Proteins at once. Default: what fits, up to 256; on a CPU 8, its multiples, or 1.",
            show_default=False,
        ),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Print memory per sequence and the largest batch, and exit."),
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(help="Plan with this much memory, such as 24GiB, not with the device's.", show_default=False),
    ] = None,
    model: options.ModelName = None,
    dtype: options.Dtype = "fp32",
    max_proteins: options.MaxProteins = None,
    shard: ShardOption = None,
    gpus: Gpus = None,
    strict: options.Strict = False,
    long: options.Long = LongPolicy.ERROR,
    rejects: options.Rejects = None,
    tags: options.Tags = "",
    device: options.Device = "auto",
    json: options.Json = False,
    force: options.Force = False,
    if_done: options.IfDone = "refuse",
    resume_anywhere: options.ResumeAnywhere = False,
) -> None:
    """Prefill each protein's prompt, then decode token by token from the cache, all layers quantized.

    Teacher-forced: the true residues are fed, and the final hidden states are compared with the same decode
    with an fp32 cache (cosine: what quantization costs). For ESM-2 also, as drift, that fp32 decode with encoding
    the whole protein (what caching an encoder costs). With a language-model head also how well the next token is
    predicted: KL, top-1 and perplexity, for ESM-2 over the 20 amino acids by a mask in the residue's place.

    With --generate an autoregressive model writes proteins until their end comes; ESM-2 fills masks one by one.

    On a GPU many proteins are decoded at once, and a finished one makes room for the next; results come in the
    order of the input. Files are streamed. Where memory runs out, the batch is halved and the work goes on.

    Example: turboesm decode 650M.tqz proteins.fasta --prompt 0.5

    Example: turboesm decode 650M.tqz proteins.fasta --prompt all --generate 50 --seed 1 -o longer.fasta

    Example: turboesm decode progen2.tqz starts.fasta --prompt all --generate 500 --num-samples 1000 -o new.fasta

    Example: turboesm decode 650M.tqz proteins.fasta --shard 0/4 -o part-0.csv
    """
    check_shard(shard, output)
    kept = None
    if output is not None and not plan:
        kept = options.Kept(output, force, if_done, resume_anywhere)
    elif output is None and (if_done == "skip" or resume_anywhere):
        raise typer.BadParameter(
            "go with an output that work is kept for: name one with -o", param_hint=_OF_OUTPUTS
        )
    if memory and not plan:
        raise typer.BadParameter("goes with --plan", param_hint="--memory")
    told, sha256 = _opened(bundle, source, plan)
    if plan:
        from turboesm_cli.commands.planning import check_named

        check_named(told, model, bundle)
    with ExitStack() as stack:
        reading = Reading(strict, long, max_proteins, rejects, tags=tags, alphabet=told.alphabet)
        work = _workload(stack, sha256, told, source, prompt, kv, reading, shard)
        wanted = None
        if generate:
            from turboesm_cli.commands.generating import Wanted

            wanted = Wanted(generate, num_samples, temperature, top_p, top_k, repetition_penalty, seed)
            wanted.check(told, work)
            if json and not plan:
                raise typer.BadParameter("does not go with --generate, which writes FASTA", param_hint="--json")
        elif work.known:
            console.warn(
                f"{work.known} of {console.counted(work.total, 'protein')} were in the bundle's calibration set"
            )
        if not generate and (num_samples > 1 or top_k or repetition_penalty != 1):
            raise typer.BadParameter(
                "go with --generate", param_hint=["--num-samples", "--top-k", "--repetition-penalty"]
            )
        plans = _plans(told, work, generate, device, dtype, memory)
        if plan:
            _show_plans(plans, memory, json)
            return
        from turboesm_cli.cache.packed import make_ready
        from turboesm_cli.codec.bundle import Bundle
        from turboesm_cli.outputs.work import NOTHING_KEPT

        assert isinstance(told, Bundle)
        codec = told
        loaded = options.open_model(model, device, codec, dtype)
        codec.check_model(loaded, bundle)
        own = next(item for item in plans if item.kind == kv)
        with console.busy("checking kernels") if kv == PACKED else nullcontext():
            slots = _slots(batch, own, work.count * num_samples, loaded, codec.spec)
            if kv == PACKED:
                make_ready(loaded, codec.spec, slots)
        described = {"bundle": sha256[:16], "cache": kv, "dtype": dtype, "sampling": str(wanted or "none")}
        if loaded.device.type == "cpu":  # the last bits depend on it
            described["slots"] = str(slots)
        whole = options.run_of("decode", loaded, work.sha256, **described)
        if kept is not None and kept.is_done(of_shard(whole, shard)):
            return
        with kept.work(of_shard(whole, shard)) if kept is not None else nullcontext(NOTHING_KEPT) as saved:
            run = Decoding(codec, loaded, work, saved, kv, slots, own.context, whole, shard)
            if wanted is not None:
                from turboesm_cli.commands.generating import generated

                show = generated(run, wanted, output)
            else:
                show = _compare(run, output, json)
        show()
    say_shard(shard)


def _opened(bundle: Path, source: str, plan: bool) -> tuple[Bundle | Header, str]:
    """The bundle, or its header where that is enough for a plan; and its sha256."""
    from turboesm_cli.cache.cache_file import is_packfile

    if not plan or (source != "-" and is_packfile(Path(source))):
        return hashed_bundle(bundle)
    from turboesm_cli.codec.header import read_header

    return hashed(bundle, read_header)


def _workload(
    stack: ExitStack,
    sha256: str,
    bundle: Bundle | Header,
    source: str,
    prompt: str | None,
    kv: str,
    reading: Reading,
    shard: Shard | None,
) -> Workload:
    from turboesm_cli.cache.cache_file import Packfile, is_packfile
    from turboesm_cli.engine.prompts import parse_prompt
    from turboesm_cli.engine.workload import of_packfile, of_proteins

    rule = parse_prompt(prompt or "0.5", bundle.alphabet)
    packed = source != "-" and is_packfile(Path(source))
    if packed and prompt:
        raise InputError(f"{source} holds prompts already; leave --prompt out, or name the FASTA file")
    if packed and reading.tags:
        raise InputError(f"{source} holds what its proteins were told; leave --tags out")
    if packed and kv != PACKED:
        raise InputError(f"{source} holds packed caches; --kv {kv} needs the proteins' FASTA file")
    if packed:
        from turboesm_cli.codec.bundle import Bundle

        assert isinstance(bundle, Bundle)
        work = of_packfile(stack, Packfile(Path(source), bundle, sha256), reading.limit, bundle, shard)
        if work.count and work.decoded <= work.count:
            console.warn(
                f"{source} holds whole proteins: one token of each is left; quantize --prompt 0.5 leaves more"
            )
        return work
    with console.busy(f"reading {source}"):
        work = of_proteins(reading.stream(source), rule, bundle, prompt or "0.5", shard)
    return work


def _plans(
    bundle: Known, work: Workload, generate: int, device: str, dtype: options.DtypeName, memory: str | None
) -> list[Plan]:
    """What each kind of cache would take for this work."""
    from turboesm_cli.commands.planning import memory_of
    from turboesm_cli.engine.memory_plan import plans
    from turboesm_cli.models.families import is_causal

    itemsize = FORMATS[dtype].itemsize
    context = work.longest_prompt + generate if generate else work.longest
    kinds = len(bundle.alphabet) if is_causal(bundle.family) else 20
    token = bundle.shape.width * itemsize + 8 + (0 if is_causal(bundle.family) else 80)
    results = generate * 16 + kinds * 48 if generate else work.longest * token  # logits, sorted and summed up
    return plans(bundle.shape, bundle.size, itemsize, context, memory_of(memory, device), results)


def _show_plans(plans: list[Plan], memory: str | None, as_json: bool) -> None:
    from turboesm_cli.engine.memory_plan import COLUMNS, LEGEND, RESERVED

    if as_json:
        console.print_json([item.as_dict() for item in plans])
        return
    whose = "planned with" if memory else "of this device are free"
    size = plans[0].memory / 2**30
    room = f"{size:.1f} GiB" if size >= 1 else f"{size * 1024:.0f} MiB"
    free = f"{room} {whose}, of which {RESERVED:.0%} stay free"
    title = f"Memory for sequences of up to {plans[0].context:,} tokens; {free}"
    console.print_table(title, COLUMNS, [item.cells() for item in plans])
    console.say(LEGEND)
    if not any(item.batch for item in plans):
        console.warn("not one sequence of that length fits with any kind of cache")


def _slots(wanted: int | None, plan: Plan, jobs: int, model: Model, spec: CodecSpec) -> int:
    """How many sequences to decode at once; on a CPU a number that does not depend on how many there are."""
    if model.device.type == "cpu":
        from turboesm_cli.engine.batch import cpu_slots

        return cpu_slots(model, spec, plan.kind, wanted)
    return max(1, min(wanted or max(1, min(plan.batch, LARGEST_BATCH)), jobs))


def _compare(run: Decoding, output: Path | None, as_json: bool) -> Callable[[], None]:
    """Figures, in a file if there is `output`; what prints them is given back."""
    from turboesm_cli.evaluation.rows import Context, Summary
    from turboesm_cli.reporting.results import csv_rows, to_record, write_csv

    recipe = run.bundle.spec.recipe
    work = run.work
    context = Context.of(run.model, 0, work.sha256[:16], work.prompt, run.saved.devices, [run.bundle], work.known)
    summary = Summary(context, recipe if run.kv == PACKED else run.kv)
    rows = _compared(run, summary)
    if output is not None:
        write_csv(output, rows, run.seal(output, "csv", lambda: summary.state))
        console.say(f"figures of {console.counted(summary.count, 'protein')} in {output}")

    def show() -> None:
        if as_json:
            again = csv_rows(output) if output is not None and run.work.count else rows
            console.print_json_rows(map(to_record, again))
            return
        for _ in rows:  # where nothing has asked for them yet
            pass
        if not summary.count:
            return
        title = f"{run.model.name}, recipe {recipe.name}, {run.kv} cache"
        console.print_table(title, *summary.table(run.kv))

    return show


def _compared(run: Decoding, summary: Summary) -> Iterator[ResultRow]:
    """Rows protein by protein, in the order of the input, then those of all together: of a shard when merged."""
    from turboesm_cli.engine.jobs import rest_of
    from turboesm_cli.engine.jobs import run as decoded
    from turboesm_cli.engine.tasks import Forced
    from turboesm_cli.evaluation.comparison import compare
    from turboesm_cli.evaluation.protein_results import from_tensors, to_tensors

    predict = run.model.has_lm_head and not run.model.causal
    passes = 1 if run.model.causal else 2

    def finishing(cached: int, decoded: int) -> float:
        """What is done of a protein beside decoding it: its prompt encoded, and what it is compared with."""
        return TOKEN_OF_PASS * (cached + passes * (cached + decoded))

    def finish(prompt: Prompt, found: Tensors) -> Tensors:
        compared = to_tensors(compare(run.model, prompt, found))
        tick(0, cost=finishing(prompt.cached, prompt.length - prompt.cached))
        return compared

    cost = run.work.decoded + finishing(run.work.cached, run.work.decoded)
    with console.progress("decoding tokens", run.work.decoded, cost) as tick:
        batch = run.batch(lambda slots: Forced.of(run.model, slots, run.work.longest, predict), tick)
        todo = rest_of(run.work.prompts)
        for index, (prompt, _, held) in enumerate(decoded(batch, todo, finish, run.saved)):
            if run.saved.resumed(str(index)):
                left = prompt.length - prompt.cached
                tick(left, again=True, cost=left + finishing(prompt.cached, left))
            yield from summary.add(*from_tensors(held, [prompt.protein] * (1 if run.model.causal else 2)))
    if run.shard is None:
        yield from summary.rows()
