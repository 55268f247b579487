"""Every model through one door, on the device that is asked for."""

from __future__ import annotations

import torch

from turboesm_cli.errors import DeviceError
from turboesm_cli.models import decoder_weights, esm2_weights
from turboesm_cli.models.checkpoints import read_checkpoint
from turboesm_cli.models.names import EMBEDDED
from turboesm_cli.models.protocol import Model
from turboesm_cli.models.weights import Checkpoint


def load_model(name: str = EMBEDDED, device: str = "auto", dtype: torch.dtype = torch.float32) -> Model:
    """Load the model that `name` names, in `dtype`, on `device` ("auto", "cpu", "cuda", "cuda:1").

    `name` is "embedded", "iglm" or "iglm-s", an official name (`esm2_t33_650M`, with or without `esm2_` and
    `_UR50D`), a fair-esm `.pt` file, a Hugging Face folder, OWNER/MODEL of the hub, or "random:" and a known shape
    (random weights, to measure time and memory). Raises ModelError where it cannot be found or read, or would not
    be computed exactly, DeviceError where the device is not there.
    """
    target = pick_device(device)
    found = read_checkpoint(name)
    with torch.no_grad():
        model = esm2_weights.build(found) if isinstance(found, Checkpoint) else decoder_weights.build(found)
        return model.to(target, dtype)


def pick_device(name: str) -> torch.device:
    """The torch device of `name`; "auto" is CUDA where there is one. Raises DeviceError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise DeviceError(f"--device {name} cannot be used: turboesm runs on cpu and cuda")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise DeviceError(f"--device {name}: {torch.cuda.device_count()} CUDA devices here; use --device cpu")
        torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # where Triton launches and graphs are captured
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device
