"""What a `.tqz` bundle or a `.tqkv` file of caches holds, every part read and checked: facts for JSON, tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from turboesm_cli.cache.cache_file import KIND as CACHES
from turboesm_cli.cache.cache_file import Packfile
from turboesm_cli.cache.memory import memory_of
from turboesm_cli.codec.bundle import Bundle, read_bundle
from turboesm_cli.codec.fit import CodecSpec
from turboesm_cli.codec.header import KIND as BUNDLE
from turboesm_cli.codec.header import VERSION
from turboesm_cli.outputs.archive import Archive, kind_of, printable
from turboesm_cli.outputs.files import file_sha256
from turboesm_cli.statistics.sensitivity import SIDES

TOKENS = 1024
"""Length of the sequence whose bits per value are told, or the model's context where that is shorter."""

Facts = dict[str, Any]
Shown = tuple[str, list[str], list[list[str]]]


def facts_of(path: Path) -> Facts:
    """Everything that a file says of itself. Raises BundleError where it is damaged."""
    if kind_of(path) == CACHES:
        return _of_caches(path)
    bundle = read_bundle(path)
    with Archive(path, BUNDLE, VERSION) as archive:
        return _of_file(path, archive) | _of_bundle(bundle)


def tables_of(facts: Facts) -> list[Shown]:
    """Title, columns and rows for the screen."""
    tables: list[Shown] = [(str(facts["file"]), ["field", "value"], _flat(facts))]
    if codec := facts.get("codec"):
        columns = [
            "layer",
            "side",
            "allocation",
            "bytes per vector",
            "bits per value",
            "scale",
            "predicted error",
            "others",
        ]
        tables.append(("How keys and values are coded", columns, [_codec_row(row) for row in codec]))
    parts = [[name, f"{part['bytes']:,}", part["sha256"]] for name, part in facts["parts"].items()]
    shown = parts if len(parts) <= 20 else [*parts[:20], [f"... and {len(parts) - 20} more", "", ""]]
    return [*tables, ("Parts", ["part", "bytes", "sha256"], shown)]


def _of_file(path: Path, archive: Archive) -> Facts:
    manifest = archive.manifest
    parts = {name: {key: part[key] for key in ("bytes", "sha256")} for name, part in manifest["parts"].items()}
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "sha256": file_sha256(path),
        "format": manifest["format"],
        "format_version": manifest["format_version"],
        "tool_version": _said(manifest, "tool_version")[:40],
        **({"devices": _said(manifest, "devices")[:400]} if "devices" in manifest else {}),
        "parts": parts,
    }


def _said(manifest: dict[str, Any], key: str) -> str:
    return "".join(filter(str.isprintable, str(manifest.get(key, ""))))


def _of_bundle(bundle: Bundle) -> Facts:
    spec, shape, calibration = bundle.spec, bundle.shape, bundle.calibration
    tokens = min(TOKENS, shape.context or TOKENS)
    held = memory_of(spec, "", tokens, spec.size.sequence_bytes(tokens))
    return {
        "model": {
            "name": bundle.model_name,
            "fingerprint": bundle.fingerprint,
            "layers": shape.layers,
            "width": shape.width,
            "heads": shape.heads,
            "head_dim": shape.head_dim,
        },
        "recipe": spec.recipe.as_dict(),
        "calibration": {
            "sha256": calibration.sha256,
            "proteins": calibration.proteins,
            "tokens": calibration.tokens,
        }
        | ({"source": calibration.source} if calibration.source else {}),
        f"bits_per_value_at_{tokens}_tokens": held.bits_per_value,
        f"bytes_of_{tokens}_tokens": held.nbytes,
        "bytes_model_tables": spec.size.shared_bytes,
        "codec": _codec(spec),
    }


def _codec(spec: CodecSpec) -> list[Facts]:
    """One entry a coded layer and side; a layer that keeps tokens has one entry, without a side."""
    chosen = {(choice["layer"], choice["side"]): choice for choice in spec.choices}
    rows: list[Facts] = []
    for index, layer in enumerate(spec.layers):
        if layer is None:
            rows.append({"layer": index, "allocation": "tokens kept"})
            continue
        for side in SIDES:
            code, choice = getattr(layer, side), chosen.get((index, side), {})
            rows.append(
                {
                    "layer": index,
                    "side": side,
                    "allocation": choice.get("allocation", ""),
                    "bytes_per_vector": code.nbytes,
                    "bits_per_value": code.nbytes * 8 / spec.head_dim,
                    "scale": code.scale,
                    "predicted": choice.get("predicted", {}),
                }
            )
    return rows


def _codec_row(row: Facts) -> list[str]:
    if "side" not in row:
        return [str(row["layer"]), "", row["allocation"], "", "", "", "", ""]
    predicted = dict(row["predicted"])
    own = predicted.pop(row["allocation"], None)
    others = ", ".join(f"{name} {value:.3g}" for name, value in predicted.items())
    cells = [str(row["layer"]), row["side"], row["allocation"], str(row["bytes_per_vector"])]
    return [*cells, f"{row['bits_per_value']:g}", row["scale"], "" if own is None else f"{own:.3g}", others]


def _of_caches(path: Path) -> Facts:
    with Packfile(path) as file:
        try:
            model = {name: printable(file.archive.manifest["model"][name]) for name in ("name", "fingerprint")}
            bundle = printable(file.archive.manifest["bundle_sha256"])
        except (LookupError, TypeError, ValueError) as error:
            raise file.archive.broken(repr(error)) from error
        for name in file.archive.parts:
            for _ in file.archive.checked(name):
                pass
        return _of_file(path, file.archive) | {"bundle_sha256": bundle, "model": model} | _sums(file)


def _sums(file: Packfile) -> Facts:
    """Of all caches, each one read and checked."""
    proteins = tokens = nbytes = 0
    for stored in file:
        stored.read()
        proteins, tokens, nbytes = proteins + 1, tokens + stored.cached, nbytes + stored.nbytes
    return {"proteins": proteins, "tokens": tokens, "bytes_of_caches": nbytes}


def _flat(facts: Facts, prefix: str = "") -> list[list[str]]:
    """Single values as rows, those of an inner object under its name."""
    rows: list[list[str]] = []
    for name, value in facts.items():
        if name in ("codec", "parts"):
            continue
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append([f"{prefix}{name}", _text(value)])
    return rows


def _text(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
