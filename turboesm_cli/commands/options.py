"""Options that several commands share, and what they mean."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from turboesm_cli import console
from turboesm_cli.files import work_folder
from turboesm_cli.sequences import LongPolicy

if TYPE_CHECKING:
    from turboesm_cli.bundle import Bundle
    from turboesm_cli.model import EsmModel
    from turboesm_cli.work import SavedWork

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Official name (esm2_t33_650M), fair-esm .pt file, Hugging Face folder, OWNER/MODEL or 'embedded'. "
        "Default: $TURBOESM_MODEL, else the embedded ESM-2 8M trunk.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 or auto (CUDA where there is one).")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Overwrite the output, and unfinished work on it.")]
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
BitsK = Annotated[float | None, typer.Option("--bits-k", help="Bits a key value.", show_default=False)]
BitsV = Annotated[float | None, typer.Option("--bits-v", help="Bits a value's value.", show_default=False)]


DtypeName = Literal["fp32", "bf16", "fp16"]
Dtype = Annotated[DtypeName, typer.Option("--dtype", help="Of the model's weights.")]


def open_model(name: str | None, device: str, bundle: Bundle | None = None, dtype: DtypeName = "fp32") -> EsmModel:
    """Load the model of --model or $TURBOESM_MODEL, else the bundle's if it is official, else the embedded one."""
    from turboesm_cli.checkpoints import EMBEDDED
    from turboesm_cli.formats import FORMATS
    from turboesm_cli.model import load_model
    from turboesm_cli.shapes import official_name

    default = bundle.model_name if bundle and official_name(bundle.model_name) else EMBEDDED
    chosen = (os.environ.get("TURBOESM_MODEL") or default) if name is None else name
    model = load_model(chosen, device, FORMATS[dtype].dtype)
    shape = model.shape
    console.say(
        f"model: {model.name} ({shape.layers} layers, {shape.heads} heads of {shape.head_dim}) on {model.device}"
    )
    if model.note:
        console.say(f"       {model.note}")
    return model


@contextmanager
def unfinished_work(
    path: Path, force: bool, command: str, model: EsmModel, proteins: str, **options: object
) -> Iterator[SavedWork]:
    """The work on output `path`, locked and gone on with where it was stopped.

    What the output follows from: the command, the model, the device, `proteins` (a digest), and `options`.
    """
    import torch

    from turboesm_cli import __version__
    from turboesm_cli.identity import code_digest
    from turboesm_cli.summaries import device_name
    from turboesm_cli.work import saved_work

    run = {name.replace("_", " "): str(value) for name, value in options.items()} | {
        "command": command,
        "model": f"{model.name} {model.fingerprint[:16]}",
        "device": device_name(model.device),
        "proteins": proteins[:16],
        "version": f"turboesm {__version__} ({code_digest()[:8]}), torch {torch.__version__}",
    }
    with saved_work(path, run, force) as work:
        if work.units:
            console.say(f"going on with the unfinished work in {work_folder(path)}: {work.units} units are done")
        yield work


def default_output(source: str, suffix: str) -> Path:
    """The input's name with another suffix, in the working directory."""
    path = Path("stdin" if source == "-" else Path(source).name)
    while path.suffix in {".gz", ".bz2", ".xz", ".zst", ".fasta", ".fa", ".faa", ".fas"}:
        path = path.with_suffix("")
    return Path(f"{path}{suffix}")
