"""`turboesm score`: how likely an autoregressive model finds proteins, from a packed cache or an exact one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from turboesm_cli import console
from turboesm_cli.cache.formats import FORMATS, PACKED
from turboesm_cli.commands import options
from turboesm_cli.commands.gpus import Gpus
from turboesm_cli.commands.reading import Reading, hashed_bundle
from turboesm_cli.commands.sharding import ShardOption, check_shard, of_shard, say_shard, seal_of
from turboesm_cli.errors import InputError
from turboesm_cli.sequences.fasta import LongPolicy


def score(
    bundle: Annotated[Path, typer.Argument(help="Bundle of `turboesm calibrate`.", show_default=False)],
    fasta: Annotated[str, typer.Argument(help="Proteins; - for stdin.", show_default=False)],
    kv: options.CacheKind = PACKED,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Table to write, tab-separated. Default: stdout.", show_default=False),
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
    force: options.Force = False,
    if_done: options.IfDone = "refuse",
    resume_anywhere: options.ResumeAnywhere = False,
) -> None:
    """Log-likelihood of whole proteins under an autoregressive model, as a tab-separated table.

    Each token is predicted from those before it, as the packed cache holds them; --kv fp32 is exact. The sum, in
    nats, is over the residues and the end, given what stands before them (chain, species, EC number).

    Example: turboesm score progen2.tqz variants.fasta --model ./progen2-small -o scores.tsv
    """
    from turboesm_cli.engine.prompts import parse_prompt
    from turboesm_cli.engine.workload import of_proteins
    from turboesm_cli.evaluation.scoring import COLUMNS
    from turboesm_cli.models.families import is_causal
    from turboesm_cli.outputs.files import atomic_output
    from turboesm_cli.outputs.work import NOTHING_KEPT

    check_shard(shard, output)
    kept = None if output is None else options.Kept(output, force, if_done, resume_anywhere)
    if kept is None and (if_done == "skip" or resume_anywhere):
        raise typer.BadParameter("goes with an output that work is kept for: name one with -o")
    codec, sha256 = hashed_bundle(bundle)
    if not is_causal(codec.family):
        raise InputError(
            f"{bundle} is for {codec.model_name}, an encoder, which gives no likelihood of a protein; `turboesm "
            "decode` says how well it predicts residues"
        )
    reading = Reading(strict, long, max_proteins, rejects, tags=tags, alphabet=codec.alphabet)
    todo = of_proteins(reading.stream(fasta), parse_prompt("0", codec.alphabet), codec, shard=shard)
    loaded = options.open_model(model, device, codec, dtype)
    codec.check_model(loaded, bundle)
    run = options.run_of("score", loaded, todo.sha256, bundle=sha256[:16], cache=kv, dtype=dtype)
    if kept is not None and kept.is_done(of_shard(run, shard)):
        return

    def lines() -> Iterator[str]:
        from turboesm_cli.cache.dense import DenseCodec
        from turboesm_cli.cache.packed import PackedCodec
        from turboesm_cli.evaluation.scoring import scores

        coded = PackedCodec(codec.spec, loaded.device) if kv == PACKED else DenseCodec(FORMATS[kv])
        yield "\t".join(COLUMNS)
        with console.progress("scoring", todo.count, todo.decoded) as tick:
            for found, again in scores(loaded, todo.prompts(), None if kv == "fp32" else coded, work):
                yield "\t".join(found.cells())
                tick(again=again, cost=found.tokens)

    with kept.work(of_shard(run, shard)) if kept is not None else nullcontext(NOTHING_KEPT) as work:
        if output is None:
            for line in lines():
                console.print_line(line)
            return
        seal = seal_of(output, run, shard, "tsv", todo.place, work.devices)
        with atomic_output(output, seal) as partial, partial.open("w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(f"{line}\n" for line in lines())
    console.say(f"scores of {console.counted(todo.count, 'protein')} in {output}")
    say_shard(shard)
