"""transformers' own ways to decode, measured beside ours: same weights, shape, dtype, batch and context.

| name        | cache                                     | step                                          |
|-------------|-------------------------------------------|-----------------------------------------------|
| hf-dynamic  | `DynamicCache`, the default of `generate` | as Python runs it                             |
| hf-static   | `StaticCache` of `context` tokens         | as Python runs it                             |
| hf-compiled | `StaticCache` of `context` tokens         | by torch.compile, replayed as one CUDA graph  |

Attention is transformers' default: `sdpa` wherever a class has it (GPT-J's of 5.17 has not), by torch's fastest
backend: that is cuDNN's on an H100, also in a process where other code has set priorities. A step is the whole
model with its head and the likeliest token, as ours is. The graph is captured from what torch.compile makes in
`MODE`, mask included, and replayed without the checks of dynamo that `generate` makes at each step. Prefill is not
compiled, as in `generate`. After each step the cache is rewound by one token, off the clock.

Both models lie in memory at once. What is no part of transformers' is taken off its peak on a GPU.
"""

from __future__ import annotations

import gc
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from turboesm_cli.cache.dense import FASTEST
from turboesm_cli.engine.memory_plan import PREFILL_TOKENS, RESERVED
from turboesm_cli.errors import ModelError
from turboesm_cli.evaluation.throughput import (
    PREFILLS,
    REPEATS,
    Load,
    Throughput,
    decode_steps,
    first_tokens,
    free_memory,
    peak_memory,
)
from turboesm_cli.models import forward
from turboesm_cli.models.export import check_exportable, exported
from turboesm_cli.models.protocol import Model

DYNAMIC, STATIC, COMPILED = "hf-dynamic", "hf-static", "hf-compiled"
PEERS = (DYNAMIC, STATIC, COMPILED)

MODE = "default"
"""Of torch.compile; the graph is ours (see above)."""

OLDEST = (5, 17)
"""The transformers whose static cache counts its tokens on the device."""

WIDE, NARROW = 1e-3, 0.2
"""Relative differences of logits that rounding explains, in float32 and in 16 bits; another model's are over 1."""


@dataclass(frozen=True)
class PeerKind:
    """One of `PEERS`, by its `name`.

    numbers       of a token's keys and values
    number_bytes  of each
    """

    name: str
    numbers: int
    number_bytes: int

    @classmethod
    def of_model(cls, name: str, model: Model) -> PeerKind:
        """Of a model, whose shape says what a token takes."""
        shape = model.shape
        numbers = 2 * shape.layers * shape.key_value_heads * shape.head_dim
        return cls(name, numbers, model.dtype.itemsize)

    @property
    def form(self) -> str:
        """Its name."""
        return self.name

    @property
    def recipe(self) -> PeerKind:
        """As results name it: by its name, and its numbers' bits."""
        return self

    @property
    def bits_k(self) -> float:
        """Of a number of a key."""
        return 8.0 * self.number_bytes

    @property
    def bits_v(self) -> float:
        """Of a number of a value."""
        return 8.0 * self.number_bytes

    def nbytes(self, context: int) -> int:
        """Bytes of one sequence."""
        return context * self.numbers * self.number_bytes


@dataclass(frozen=True)
class Peer:
    """transformers' model; `beside`: bytes on the GPU that are none of its own."""

    net: Any
    beside: int


def check_peers(model: Model) -> None:
    """Raise ModelError where transformers is missing, or has no class of such a model."""
    check_exportable(model)
    _library()


def _library() -> Any:
    """The module. Raises ModelError where it is not installed, or too old."""
    install = "run pip install 'turboesm[hf]', or leave out --peers"
    try:
        found = importlib.import_module("transformers")
    except ImportError as error:
        raise ModelError(f"--peers measures transformers, which cannot be imported: {install}") from error
    if tuple(int(part) for part in found.__version__.split(".")[:2]) < OLDEST:
        least = ".".join(map(str, OLDEST))
        raise ModelError(f"--peers measures transformers from {least} on, here is {found.__version__}: {install}")
    return found


@torch.no_grad()
def rebuilt(model: Model) -> Peer:
    """transformers' model of the same weights. Raises ModelError where it does not compute the same."""
    library, given, on_gpu = _library(), exported(model), model.device.type == "cuda"
    ends = {"bos_token_id": None, "eos_token_id": None}  # of no use here, and warned of beyond the vocabulary
    config = library.AutoConfig.for_model(given.family, **given.settings, **ends)
    with torch.device("meta"):
        net = library.AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    try:
        net.load_state_dict(given.weights, assign=True)
    except RuntimeError as error:
        raise ModelError(f"{model.name} is none of transformers' {model.family} ({_one_line(error)})") from error
    net.tie_weights()
    net.requires_grad_(False).eval()
    _fill_buffers(net, given.buffers)
    _check_same(model, net)
    held = {x.data_ptr(): x.nbytes for x in (*net.parameters(), *net.buffers())}
    taken = torch.cuda.memory_allocated(model.device) if on_gpu else 0
    return Peer(net, max(0, taken - sum(held.values())))


def _fill_buffers(net: Any, known: dict[str, Tensor]) -> None:
    """What is in no checkpoint, and without memory so far."""
    for name, buffer in list(net.named_buffers()):
        if not buffer.is_meta:
            continue
        owner, _, last = name.rpartition(".")
        if last not in known or known[last].shape != buffer.shape:
            raise ModelError(
                f"transformers' {net.config.model_type} has a buffer {name} that is not known; use 5.24"
            )
        setattr(net.get_submodule(owner), last, known[last])


def _check_same(model: Model, net: Any) -> None:
    """Logits of a few tokens, ours and transformers'."""
    tokens = model.alphabet.random(1, min(16, model.shape.context or 16)).to(model.device)
    ours = model.logits(forward.encode(model, tokens))
    apart = _apart(net(input_ids=tokens, use_cache=False).logits, ours)
    if not apart < _agreement(model.dtype):
        raise ModelError(f"{model.name}: logits of transformers' model are {apart:.3g} away from ours, relatively")


def _apart(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _agreement(dtype: torch.dtype) -> float:
    return WIDE if dtype.itemsize >= 4 else NARROW


class Decoding:
    """The last of tokens int64 [B, T], T > 1, decoded after the others, which the cache holds once prefilled.

    part  tokens of each sequence that are prefilled at once
    """

    def __init__(self, net: Any, form: str, tokens: Tensor, part: int | None = None) -> None:
        self._net, self._form = net, form
        self._prompt, self._last = tokens[:, :-1], tokens[:, -1:].contiguous()
        self._position = torch.full_like(self._last, tokens.shape[1] - 1)
        self.part = part or self._prompt.shape[1]
        there = inspect.signature(net.forward).parameters
        self._named = "cache" if "cache" in there else "past_key_values"  # up to transformers 5.23
        self._cache = self._empty()

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers)

    def _empty(self) -> Any:
        library, length = _library(), self._prompt.shape[1] + 1
        if self._form == DYNAMIC:
            return library.DynamicCache(config=self._net.config)
        return library.StaticCache(config=self._net.config, max_cache_len=length)

    def prefill(self) -> None:
        """All but the last token; what the cache held is gone."""
        if self._form == DYNAMIC:
            self._cache = self._empty()
        elif self._cache.layers[0].is_initialized:
            torch._foreach_zero_(self._lengths)
        for part in self._prompt.split(self.part, 1):
            self._call(part, logits_to_keep=1)

    def step(self) -> tuple[Tensor, Tensor]:
        """The likeliest next tokens int64 [B], and logits [B, V]. Nothing is synchronized."""
        logits = self._call(self._last, position_ids=self._position).logits[:, -1]
        return logits.float().argmax(-1), logits

    def rewind(self) -> None:
        """Forget the last token; a dynamic cache lies in memory as `generate` would have it, too."""
        if self._form == DYNAMIC:
            for layer in self._cache.layers:
                layer.keys = layer.keys[:, :, :-1].contiguous()
                layer.values = layer.values[:, :, :-1].contiguous()
        else:
            torch._foreach_sub_(self._lengths, 1)

    @property
    def _lengths(self) -> list[Tensor]:
        return [layer.cumulative_length for layer in self._cache.layers]

    def _call(self, tokens: Tensor, **more: Any) -> Any:
        return self._net(input_ids=tokens, use_cache=True, **{self._named: self._cache}, **more)


class Replayed:
    """A compiled step as one CUDA graph: the first two calls warm up, the third captures."""

    def __init__(self, step: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self._step, self._warm = step, 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None
        """[B, V] of the last call."""

    def __call__(self) -> None:
        if self._warm < 2:
            self._warm += 1
            self.logits = self._step()[1]
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self.logits = self._step()[1]
        self._graph.replay()


def sweep_peers(
    model: Model,
    loads: Sequence[Load],
    memory: int,
    skipped: Callable[[str], None],
    noticed: Callable[[str], None],
) -> Iterator[Throughput]:
    """Measure each of `PEERS` under each load that fits in `memory` bytes; `skipped` hears of those that do not.

    `noticed` hears where a prefill is not as usual.
    """
    _let_go(model.device)  # of what was measured before
    peer = rebuilt(model)
    for load in loads:
        for form in PEERS:
            what = f"{form}, {load.batch} x {load.context}"
            found = _tried(
                model, peer, PeerKind.of_model(form, model), load, memory, partial(_said, noticed, what)
            )
            _let_go(model.device)
            if isinstance(found, str):
                skipped(f"{what}: {found}")
            else:
                yield found


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _said(to: Callable[[str], None], what: str, text: str) -> None:
    to(f"{what}: {text}")


def _tried(
    model: Model, peer: Peer, kind: PeerKind, load: Load, memory: int, noticed: Callable[[str], None]
) -> Throughput | str:
    """What was measured, or why it was not."""
    reason = _reason(model, kind, load, memory)
    if reason is not None:
        return reason
    try:
        return measure_peer(model, peer, kind, load, noticed)
    except torch.OutOfMemoryError:
        return "out of memory"
    except RuntimeError as error:  # of torch.compile, or of capturing
        if kind.form != COMPILED:
            raise
        return _one_line(error)


def _reason(model: Model, kind: PeerKind, load: Load, memory: int) -> str | None:
    """Why a load is not measured, or None."""
    if load.context < 2:
        return "transformers prefills one token at least"
    if kind.form == COMPILED and model.device.type != "cuda":
        return "CUDA graphs need a GPU"
    if load.batch * kind.nbytes(load.context) > memory * (1 - RESERVED):
        return "the cache alone does not fit in memory"
    return None


@torch.no_grad()
def measure_peer(
    model: Model,
    peer: Peer,
    kind: PeerKind,
    load: Load,
    noticed: Callable[[str], None],
    repeats: int = REPEATS,
    prefills: int = PREFILLS,
) -> Throughput:
    """One of `PEERS` under one load, as `throughput.measure` does it for ours."""
    with sdpa_kernel(FASTEST, set_priority=True):
        return _measured(model, peer, kind, load, noticed, repeats, prefills)


def _measured(
    model: Model,
    peer: Peer,
    kind: PeerKind,
    load: Load,
    noticed: Callable[[str], None],
    repeats: int,
    prefills: int,
) -> Throughput:
    device = model.device
    tokens = model.alphabet.random(load.batch, load.context).to(device)
    decoding = _prefilled(peer.net, kind.form, tokens, noticed)
    expected = decoding.step()[1].clone()
    decoding.rewind()
    step: Callable[[], tuple[Tensor, Tensor]] = decoding.step
    if kind.form == COMPILED:
        step = compiled(step)
        step()
    free_memory(device)  # of compiling

    def first_token() -> None:
        decoding.prefill()
        step()

    first = first_tokens(first_token, device, repeats, prefills)
    prefill_peak = peak_memory(device) - peer.beside
    decoding.rewind()
    call = Replayed(step) if kind.form == COMPILED else step
    steps = decode_steps(call, decoding.rewind, device, repeats)
    peak = peak_memory(device) - peer.beside
    if isinstance(call, Replayed):
        _check_replay(call, expected)
    decoding.step()  # that a dynamic cache be full
    return Throughput(kind, load, steps, first, prefill_peak, peak, decoding.nbytes)


def _prefilled(net: Any, form: str, tokens: Tensor, noticed: Callable[[str], None]) -> Decoding:
    """Prefilled at once, as `generate` does; where memory does not suffice, as it does with prefill_chunk_size."""
    part = max(1, PREFILL_TOKENS // len(tokens))
    try:
        return _prefilled_by(net, form, tokens, None)
    except torch.OutOfMemoryError:
        if part >= tokens.shape[1] - 1:
            raise
    free_memory(tokens.device)  # outside the handler, whose traceback holds on to tensors
    noticed(f"all prompts at once are out of memory; prefilled {part} tokens of each at a time")
    return _prefilled_by(net, form, tokens, part)


def _prefilled_by(net: Any, form: str, tokens: Tensor, part: int | None) -> Decoding:
    decoding = Decoding(net, form, tokens, part)
    decoding.prefill()
    return decoding


def compiled(step: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[], tuple[Tensor, Tensor]]:
    """The step through torch.compile, which then does not print what it tries."""
    trying: Any = importlib.import_module("torch._inductor.select_algorithm")
    trying.PRINT_AUTOTUNE = False
    return torch.compile(step, mode=MODE, dynamic=False)


def _check_replay(call: Replayed, expected: Tensor) -> None:
    """Raise RuntimeError where the graph computes something else than the step that was not compiled."""
    assert call.logits is not None
    apart = _apart(call.logits, expected)
    if not apart < _agreement(expected.dtype):
        raise RuntimeError(
            f"logits of the compiled step are {apart:.3g} away from those of the same step in eager"
        )


def _let_go(device: torch.device) -> None:
    """Forget what was compiled, which holds on to caches, and free memory."""
    torch.compiler.reset()
    gc.collect()
    free_memory(device)
