"""`turboesm quantize`: proteins → prefill → packed caches, and what they take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turboesm_cli import console
from turboesm_cli.commands import options
from turboesm_cli.commands.gpus import Gpus
from turboesm_cli.commands.reading import Reading, hashed_bundle
from turboesm_cli.commands.sharding import ShardOption, check_shard, of_shard, say_shard, seal_of
from turboesm_cli.sequences.fasta import LongPolicy

if TYPE_CHECKING:
    from turboesm_cli.cache.memory import Tally
    from turboesm_cli.codec.fit import CodecSpec
    from turboesm_cli.outputs.work import Work


def quantize(
    bundle: Annotated[Path, typer.Argument(help="Bundle of `turboesm calibrate`.", show_default=False)],
    fasta: Annotated[str, typer.Argument(help="Proteins; - for stdin.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File of caches to write. Default: FASTA.tqkv.", show_default=False),
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="How much of each protein to cache: all, a fraction (0.5) or residues (40).")
    ] = "all",
    model: options.ModelName = None,
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
    """Encode proteins with the model (exactly), pack their keys and values, and say what the caches hold.

    `turboesm decode BUNDLE OUT` goes on from the file. Every byte of a cache is counted: codes, scales,
    exact leading tokens; what all caches of a model share is reported beside.

    Example: turboesm quantize 650M.tqz proteins.fasta -o proteins.tqkv

    Example: turboesm quantize 650M.tqz proteins.fasta --shard 0/4 -o part-0.tqkv
    """
    from turboesm_cli.cache.cache_file import CachedProtein, check_longest, storable, write_packfile
    from turboesm_cli.cache.memory import Tally, memory_of
    from turboesm_cli.engine.prefill import cache_proteins
    from turboesm_cli.engine.prompts import parse_prompt
    from turboesm_cli.engine.workload import of_proteins

    check_shard(shard, output)
    path = output or options.default_output(fasta, ".tqkv")
    kept = options.Kept(path, force, if_done, resume_anywhere)
    codec, source = hashed_bundle(bundle)
    rule = storable(parse_prompt(prompt, codec.alphabet))
    reading = Reading(strict, long, max_proteins, rejects, tags=tags, alphabet=codec.alphabet)
    with console.busy(f"reading {fasta}"):
        todo = of_proteins(reading.stream(fasta), rule, codec, shard=shard)
    check_longest(codec, todo.longest)
    loaded = options.open_model(model, device, codec)
    codec.check_model(loaded, bundle)
    run = options.run_of("quantize", loaded, todo.sha256, bundle=source[:16])
    if kept.is_done(of_shard(run, shard)):
        return
    tally = Tally()

    def caches(work: Work) -> Iterator[CachedProtein]:
        with console.progress("packing", todo.count, todo.cached) as tick:
            for index, item in enumerate(cache_proteins(loaded, codec.spec, todo.prompts(), work)):
                tally.add(memory_of(codec.spec, item.protein.accession, item.cached, item.nbytes))
                yield item
                tick(again=work.resumed(str(index)), cost=item.cached)

    with kept.work(of_shard(run, shard)) as work:
        if not work.is_finished(path):
            seal = seal_of(path, run, shard, "tqkv", todo.place, work.devices)
            write_packfile(path, codec, source, caches(work), work, seal)
    if json:
        _print_json(path, codec.spec)
    elif tally.count:
        _show(tally, codec.spec.recipe.name, codec.spec.size.shared_bytes)
    count = console.counted(todo.count, "protein")
    console.say(f"caches of {count} in {path} ({path.stat().st_size:,} bytes, headers included)")
    say_shard(shard)


def _print_json(path: Path, spec: CodecSpec) -> None:
    """What the finished file says of its proteins, one by one: they may be too many to hold."""
    from turboesm_cli.cache.cache_file import Packfile
    from turboesm_cli.cache.memory import memory_of

    with Packfile(path) as file:
        lines = (memory_of(spec, item.protein.accession, item.cached, item.nbytes).as_dict() for item in file)
        console.print_json_rows(lines, "proteins", {"bytes_model_tables": spec.size.shared_bytes})


def _show(tally: Tally, recipe: str, codec_tables: int) -> None:
    rows = [line.cells() for line in [*tally.first, tally.total]]
    columns = ["protein", "tokens", "bytes", "bits per value", "fp32 bytes", "x fp32", "x fp16"]
    console.print_table(f"Packed caches, recipe {recipe}", columns, rows)
    if tally.count > len(tally.first):
        console.say(f"the first {len(tally.first)} of {tally.count} proteins are shown; --json prints all")
    console.say(f"tables and rotations that all caches of the model share: {codec_tables:,} bytes")
