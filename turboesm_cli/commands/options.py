"""Options that several commands share, and what they mean."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from turboesm_cli import console
from turboesm_cli.cache.formats import FORMATS, KINDS
from turboesm_cli.commands import completion
from turboesm_cli.errors import InputError
from turboesm_cli.outputs.files import check_output, overwrites, work_folder
from turboesm_cli.sequences.datasets import ANTIBODIES, FAMILIES, HELDOUT, SUFFIXES
from turboesm_cli.sequences.fasta import LongPolicy

if TYPE_CHECKING:
    from turboesm_cli.codec.bundle import Bundle
    from turboesm_cli.models.protocol import Model
    from turboesm_cli.outputs.work import SavedWork

ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Official ESM-2 (esm2_t33_650M), fair-esm .pt file, Hugging Face folder, OWNER/MODEL, iglm, iglm-s "
        "or embedded. random:NAME has random weights. Default: $TURBOESM_MODEL, else the bundle's where it can be "
        "found, by its name or as a file or folder here, else, for ESM-2, the embedded 8M trunk.",
        show_default=False,
        autocompletion=completion.model,
    ),
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 or auto (CUDA where there is one).")]
Force = Annotated[
    bool, typer.Option("--force", "-f", help="Overwrite the output, and start anew on unfinished work.")
]
IfDone = Annotated[
    Literal["refuse", "skip"],
    typer.Option(
        "--if-done",
        help="What to do if the same run has written the output before: skip ends with exit code 0. "
        "With skip, OUTPUT.done records which run wrote it.",
    ),
]
ResumeAnywhere = Annotated[
    bool,
    typer.Option(
        "--resume-anywhere",
        help="Continue work that was begun on another device or with other threads; results name both.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print results as JSON on stdout instead of tables.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first record to mend or to skip.")]
Long = Annotated[LongPolicy, typer.Option("--long", help="Proteins of more than 1022 residues.")]
Rejects = Annotated[
    Path | None,
    typer.Option("--rejects", help="Write a table (TSV) of skipped records here.", show_default=False),
]
MaxProteins = Annotated[
    int | None, typer.Option("--max-proteins", min=1, help="Use the first N proteins.", show_default=False)
]
BitsK = Annotated[
    float | None, typer.Option("--bits-k", help="Bits per value, of keys alone.", show_default=False)
]
BitsV = Annotated[
    float | None, typer.Option("--bits-v", help="Bits per value, of values alone.", show_default=False)
]


Families = Annotated[
    str,
    typer.Option(
        "--families",
        help=f"Families ({', '.join((*FAMILIES, HELDOUT, ANTIBODIES))}) or files of proteins, by comma.",
        autocompletion=completion.families,
    ),
]
EVERY_FAMILY = ",".join(FAMILIES)
Calibration = Annotated[
    Path | None,
    typer.Option("--calibration", help="Proteins to calibrate on. Default: the bundled 900.", show_default=False),
]
MaxCalibration = Annotated[
    int | None,
    typer.Option("--max-calibration", min=1, help="Calibrate on the first N proteins.", show_default=False),
]
MaxEvaluated = Annotated[
    int | None,
    typer.Option("--max-proteins", min=1, help="Evaluate on the first N of each family.", show_default=False),
]
MaxResidues = Annotated[int, typer.Option("--max-residues", min=1, help="Leave out longer evaluation proteins.")]
BundleFiles = Annotated[
    list[Path] | None,
    typer.Option("--bundle", help="A ready bundle, in place of --recipes; repeatable.", show_default=False),
]


def _kind_of_cache(name: str) -> str:
    if name not in KINDS:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(KINDS)}")
    return name


Tags = Annotated[
    str,
    typer.Option(
        help="What a model is told and headers do not say: 'chain=HEAVY species=HUMAN', 'EC=1.1.1.1'.",
        show_default=False,
    ),
]

CacheKind = Annotated[
    str,
    typer.Option(
        "--kv",
        help=f"What the cache holds: {', '.join(KINDS)}.",
        callback=_kind_of_cache,
        autocompletion=lambda: list(KINDS),
    ),
]

DtypeName = Literal["fp32", "bf16", "fp16"]
Dtype = Annotated[DtypeName, typer.Option("--dtype", help="Data type of the model's weights.")]


def open_model(name: str | None, device: str, bundle: Bundle | None = None, dtype: DtypeName = "fp32") -> Model:
    """Load the model of --model or $TURBOESM_MODEL, else the bundle's where it is found, else the embedded one."""
    import torch

    from turboesm_cli.models.families import is_causal
    from turboesm_cli.models.loading import load_model
    from turboesm_cli.models.names import EMBEDDED, findable

    default = EMBEDDED
    if bundle and (found := findable(bundle.model_name)):
        default = found
    elif bundle and is_causal(bundle.family) and not os.environ.get("TURBOESM_MODEL"):
        default = ""
    if name is None and not default:
        raise InputError(f"the bundle is for {bundle and bundle.model_name}; name that model with --model")
    chosen = (os.environ.get("TURBOESM_MODEL") or default) if name is None else name
    with console.busy(f"loading {chosen}"):
        model = load_model(chosen, device, FORMATS[dtype].dtype)
    shape = model.shape
    where = f"{model.device}, {torch.get_num_threads()} threads" if model.device.type == "cpu" else model.device
    console.say(f"model: {model.name} ({shape.layers} layers, {shape.heads} heads of {shape.head_dim}) on {where}")
    if model.note:
        console.say(f"       {model.note}")
    return model


class Kept:
    """What --force, --if-done and --resume-anywhere say of an output `path` that is there, or was begun."""

    def __init__(self, path: Path, force: bool, if_done: str, anywhere: bool, writes: bool = True) -> None:
        if force and (if_done == "skip" or anywhere):
            other = "--if-done skip" if if_done == "skip" else "--resume-anywhere"
            raise typer.BadParameter(f"starts anew, which {other} is not to; leave one out", param_hint="--force")
        self._path, self._force, self._skip, self._anywhere = path, force, if_done == "skip", anywhere
        if writes:
            check_output(path, force or self._skip or overwrites(path))

    def is_done(self, run: Mapping[str, str]) -> bool:
        """Whether the output is there, of this very `run` (see `run_of`), and is to be left alone.

        Raises OutputError where it is of another.
        """
        from turboesm_cli.outputs.work import is_done

        done = self._skip and is_done(self._path, run, self._anywhere)
        if done:
            console.files.append(self._path)
            console.say(f"{self._path} is there from this very run; nothing to do")
        return done

    @contextmanager
    def work(self, run: Mapping[str, str]) -> Iterator[SavedWork]:
        """The work on the output, locked and gone on with where it was stopped."""
        from turboesm_cli.outputs.work import Policy, saved_work

        policy = Policy(self._force, self._skip, self._anywhere)
        with saved_work(self._path, run, policy) as work:
            if work.units:
                devices = f", done on {work.devices}" if work.devices else ""
                console.say(
                    f"going on with the unfinished work in {work_folder(self._path)}: "
                    f"{work.units} units are done{devices}"
                )
            yield work
        console.files.append(self._path)


def run_of(command: str, model: Model, proteins: str, **options: object) -> dict[str, str]:
    """All that an output follows from, by name: command, model, device, a digest of proteins, and `options`."""
    import torch

    from turboesm_cli import __version__
    from turboesm_cli.evaluation.rows import device_name
    from turboesm_cli.outputs.identity import code_digest

    return {name.replace("_", " "): str(value) for name, value in options.items()} | {
        "command": command,
        "model": f"{model.name} {model.fingerprint[:16]}",
        "device": device_name(model.device),
        "proteins and prompts": proteins[:16],
        "version": f"turboesm {__version__} ({code_digest()[:8]}), torch {torch.__version__}",
    }


def default_output(source: str, suffix: str) -> Path:
    """The input's name with another suffix, in the working directory."""
    path = Path("stdin" if source == "-" else Path(source).name)
    while path.suffix.lower() in SUFFIXES:
        path = path.with_suffix("")
    return Path(f"{path}{suffix}")
