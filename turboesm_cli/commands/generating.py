"""Sampled sequences of `turboesm decode --generate`, as FASTA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from turboesm_cli import console
from turboesm_cli.errors import InputError
from turboesm_cli.sequences.fasta import MAX_RESIDUES, Protein, write_fasta
from turboesm_cli.sequences.records import RECORD_CAP

if TYPE_CHECKING:
    from turboesm_cli.codec.header import Known
    from turboesm_cli.commands.decoding import Decoding
    from turboesm_cli.engine.batch import Job
    from turboesm_cli.engine.prompts import Prompt
    from turboesm_cli.engine.workload import Workload
    from turboesm_cli.outputs.work import Tensors


@dataclass(frozen=True)
class Wanted:
    """What the options say: up to `tokens` tokens, `samples` of each prompt, and how they are drawn."""

    tokens: int
    samples: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int

    def check(self, bundle: Known, work: Workload) -> None:
        """Raise InputError for what the model cannot do, or what could not be read as FASTA again."""
        from turboesm_cli.models.families import is_causal

        longest = work.longest_prompt + self.tokens
        context = bundle.shape.context
        if context is not None and longest > context:
            raise InputError(
                f"--generate {self.tokens}: up to {longest:,} tokens, and {bundle.model_name} takes {context:,}; "
                f"sample {max(0, context - work.longest_prompt):,} at most, or shorten the prompts"
            )
        if longest > RECORD_CAP:
            raise InputError(
                f"--generate {self.tokens}: up to {longest:,} residues, over {RECORD_CAP:,}; sample fewer"
            )
        if not is_causal(bundle.family):
            if self.repetition_penalty != 1 or self.top_k:
                raise InputError("--top-k and --repetition-penalty are for autoregressive models, not for ESM-2")
            if longest - 1 > MAX_RESIDUES:
                console.warn(
                    f"up to {longest - 1:,} residues in a sequence: ESM-2 was trained on {MAX_RESIDUES:,}, and "
                    "commands read more only with --long"
                )


def generated(run: Decoding, wanted: Wanted, output: Path | None) -> Callable[[], None]:
    """Sampled sequences, in a file if there is `output`; what prints them otherwise is given back."""
    run.model.require_lm_head("--generate")
    sampled = _sampled(run, wanted)
    if output is not None:
        write_fasta(output, sampled, seal=run.seal(output, "fasta"))
        console.say(f"{run.work.count * wanted.samples} sequences in {output}")

    def show() -> None:
        for protein in sampled:
            console.print_line(f">{protein.accession} {protein.description}\n{protein.sequence}")

    return show


def _sampled(run: Decoding, wanted: Wanted) -> Iterator[Protein]:
    """Prompts with what was sampled after them, in the order of the input, all samples of a prompt together."""
    from turboesm_cli.engine.jobs import run as decoded
    from turboesm_cli.engine.jobs import samples_of
    from turboesm_cli.engine.tasks import Generated, Sampled
    from turboesm_cli.models.sampling import Sampling

    causal = run.model.causal
    sampling = Sampling(wanted.temperature, wanted.top_p, wanted.top_k, wanted.repetition_penalty)
    kind: type[Generated] | type[Sampled] = Generated if causal else Sampled

    def finish(_prompt: Prompt, found: Tensors) -> Tensors:
        return {name: tensor.cpu() for name, tensor in found.items()}

    total = run.work.count * wanted.samples * wanted.tokens
    with console.progress("sampling tokens" if causal else "sampling residues", total) as tick:
        batch = run.batch(lambda slots: kind.of(run.model, slots, wanted.tokens, sampling, wanted.seed), tick)
        todo = samples_of(run.work.prompts, wanted.tokens, wanted.samples, causal, run.work.first)
        for index, (prompt, job, held) in enumerate(decoded(batch, todo, finish, run.saved)):
            if run.saved.resumed(str(index)):
                tick(wanted.tokens, again=True)
            residues = run.model.alphabet.detokenize(held["ids"].tolist())
            name = prompt.protein.accession + (f"_{job.sample + 1}" if wanted.samples > 1 else "")
            yield Protein(name, _note(run, wanted, prompt, job, held), prompt.text + residues)


def _cuts(wanted: Wanted) -> list[str]:
    """What else the distribution was changed by, where it was."""
    usual = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    return [f"{name}={getattr(wanted, name):g}" for name, least in usual.items() if getattr(wanted, name) != least]


def _note(run: Decoding, wanted: Wanted, prompt: Prompt, job: Job, held: Tensors) -> str:
    """What a header says of how its sequence came about."""
    alphabet, protein = run.model.alphabet, prompt.protein
    taken = prompt.cached - len(alphabet.front(protein))
    if not run.model.causal:
        sample = f" sample={job.sample + 1}" if wanted.samples > 1 else ""
        return f"prompt={taken} sampled={wanted.tokens}{sample} seed={wanted.seed + job.number} kv={run.kv}"
    ids = held["ids"]
    ended = bool(len(ids)) and int(ids[-1]) == alphabet.end
    parts = [
        alphabet.tags(protein), f"prompt={taken}", f"sampled={len(ids) - ended}", f"sample={job.sample + 1}",
        f"seed={wanted.seed}", f"temperature={wanted.temperature:g}", *_cuts(wanted),
        f"log_likelihood={float(held['log_p']):.4f}", f"ended={'yes' if ended else 'no'}", f"kv={run.kv}",
    ]  # fmt: skip
    return " ".join(filter(None, parts))
