"""The packed key/value cache (`forward.Cache`).

Memory is allocated once, for `capacity` tokens, and `nbytes` counts all of it. What a model's caches share
(tables, rotations) is counted apart, by `codec.sizes`, which also says how large the buffers are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor
from turboesm_kernels import cpu_compiled, cpu_lookup, dispatch, reference, token_layer, verify
from turboesm_kernels.available import has_triton
from turboesm_kernels.dispatch import put
from turboesm_kernels.layout import ROOM, TILE, tiles_shape
from turboesm_kernels.operands import Held, Joint, PreparedLayer
from turboesm_kernels.reference import Packed, Rope
from turboesm_kernels.token_tables import TokenTables

from turboesm_cli.cache.ragged import Ragged
from turboesm_cli.codec.fit import CodecSpec, LayerSpec
from turboesm_cli.codec.sizes import CodecSize
from turboesm_cli.errors import DeviceError
from turboesm_cli.models import forward
from turboesm_cli.models.alphabet import Alphabet
from turboesm_cli.models.protocol import Model

if TYPE_CHECKING:
    from turboesm_kernels.pack import Target

SINK_DTYPE = torch.float16


class PackedCodec:
    """What a packed cache does to keys and values, without the packing (see `forward.teacher_forced`)."""

    def __init__(self, spec: CodecSpec, device: torch.device) -> None:
        self._spec = on_device(spec, device)

    def roundtrip(self, layer: int, k: Tensor, v: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, d] of whole sequences as they come back from the cache."""
        layer_spec = self._spec.layers[layer]
        if layer_spec is None:
            return k, v
        back_k = reference.roundtrip(k, layer_spec.k, rope).to(k.dtype)
        back_v = reference.roundtrip(v, layer_spec.v).to(v.dtype)
        sinks = self._spec.recipe.sinks
        back_k[:, :, :sinks] = k[:, :, :sinks].to(SINK_DTYPE).to(k.dtype)
        back_v[:, :, :sinks] = v[:, :, :sinks].to(SINK_DTYPE).to(v.dtype)
        return back_k, back_v


class PackedCache(Ragged):
    """Keys and values packed by a codec; leading tokens (sinks) in float16; layers that keep tokens alone.

    `tensors` are all the bytes of a sequence: what is written to disk is what is held in memory, but for the order
    of values where a GPU's fast path reads them. `backend` as in `dispatch.attend`.
    """

    def __init__(
        self, model: Model, spec: CodecSpec, batch: int, capacity: int, backend: dispatch.Backend | None = None
    ) -> None:
        super().__init__(batch, capacity, model.device)
        self._codec = _prepare(model, spec)
        _check_kernels(model, spec, forward.joint_parts(model, batch))
        self._backend = backend
        self._rope = forward.rope_at(model, 0, _room(capacity, model.device) + ROOM)
        self._sinks = sinks = min(spec.recipe.sinks, _room(capacity, model.device))
        self._packed_starts = torch.zeros_like(self.starts)
        self._packed_rope = self._rope.rows(slice(sinks, None))
        if model.device.type == "cuda":
            # Kernels read what is made here before they wait for earlier work.
            self._packed_rope.ready()
            torch.cuda.synchronize(model.device)
        self.fits_a_graph = not any(
            layer and (layer.k.residual_axes or layer.v.residual_axes) for layer in spec.layers
        )
        size, room = spec.size, _room(capacity, model.device)
        self._layers = [
            _LayerStore.empty(size, layer, batch, room, model.device, self._keeps_tiles(layer))
            for layer in range(len(spec.layers))
        ]
        self._steps: dict[int, cpu_compiled.Step | None] = {}
        self._targets: dict[int, Target | None] = {}

    def __getstate__(self) -> dict[str, object]:
        """What a copy has: its steps and targets are those of its own buffers."""
        return self.__dict__ | {"_steps": {}, "_targets": {}}

    def _keeps_tiles(self, layer: int) -> bool:
        prepared = self._codec.layers[layer]
        return prepared is not None and self._backend in (None, "ptx") and dispatch.keeps_tiles(prepared)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that `capacity` tokens of each sequence take, by name, as files have it: values in planes."""
        return self._named([store.upto(self.capacity).in_planes() for store in self._layers])

    def leading(self, length: int) -> dict[str, Tensor]:
        """What the first `length` tokens take, by name: views, of whole tiles where values lie in tiles."""
        return self._named([store.upto(length) for store in self._layers])

    def _named(self, stores: Sequence[_LayerStore]) -> dict[str, Tensor]:
        held = {"unmasked": self.unmasked}
        for index, store in enumerate(stores):
            held |= {f"layers.{index}.{name}": tensor for name, tensor in store.tensors.items()}
        return held

    def fill(self, tensors: Mapping[str, Tensor], length: int) -> None:
        """Hold what `leading` or `tensors` gave of such a cache, of one sequence for all of these, or as many."""
        own = self.leading(length)
        super().fill(
            {name: reference.tiled(x) if x.dim() < own[name].dim() else x for name, x in tensors.items()}, length
        )

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        stored = sum(tensor.nbytes for store in self._layers for tensor in store.tensors.values())
        return stored + self.unmasked.nbytes

    def wipe(self, length: int) -> None:
        """See `Ragged`; packed token 0 as well, where a step puts what is made of a sink."""
        super().wipe(max(length, self._sinks + 1))

    def rows(self, start: int, stop: int) -> Self:
        """Sequences start..stop - 1: a view of the same memory."""
        part = super().rows(start, stop)
        if part is self:
            return self
        part._packed_starts = self._packed_starts[start:stop]
        part._layers = [store.rows(start, stop) for store in self._layers]
        return part

    def take(self, other: Self, sequences: Tensor) -> None:
        """Hold what `sequences` int64 [B] of another cache of this codec and capacity hold, or of this one itself.

        What is copied is as long as the longest sequence there.
        """
        theirs = other.leading(other.length)
        for name, tensor in self.leading(other.length).items():
            tensor.copy_(theirs[name].index_select(0, sequences))
        super().take(other, sequences)

    def load(self, tensors: Mapping[str, Tensor], length: int) -> None:
        """Take over the `tensors` of a cache of the same codec and batch that is full with `length` tokens.

        Raises ValueError where they are not such a cache's.
        """
        check_tensors(self._codec.spec, self._codec.model.alphabet, tensors, length, self.batch)
        self.fill(tensors, length)

    def begin(self, counts: int | Sequence[int]) -> None:
        """Make room for the next tokens of each sequence."""
        super().begin(counts)
        if not any(self._codec.pairs):  # kernels and loops subtract the sinks themselves
            return
        first = torch.sub(self.starts, self._sinks, out=self._packed_starts).clamp_(min=0)
        rope = self._packed_rope
        if len(rope.cos):
            self._angles = rope.rows(first[:, None, None])

    def append(self, layer: int, k: Tensor, v: Tensor, tokens: Tensor) -> None:
        """Pack keys and values [B, H, T, d] of the tokens int64 [B, T] that were begun."""
        start: int | Tensor = self.starts if tokens.shape[1] == 1 else self.common_start()
        prepared, store = self._codec.layers[layer], self._layers[layer]
        if prepared is None:
            put(store.tokens, tokens.to(store.tokens.dtype), start, 1)
            return
        if isinstance(start, int):
            if (target := self._target(layer)) is not None:
                target.put(k, v, start)
            else:
                dispatch.append(k, v, prepared, self._held_by(layer), start, self._backend)
            return
        if self.shortest < store.sinks:
            store.put_sinks(k, v, start)
        if not store.room:
            return
        if (step := self._step(layer)) is not None:
            step.writing.append(k, v, start)
        elif self._backend is None and (pair := self._codec.pairs[layer]) is not None:
            store.put(*pair.compress(k, v, self._angles), self._packed_starts)
        else:
            dispatch.append(k, v, prepared, self._held_by(layer), start, self._backend)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attention of q [B, H, Q, d] over all that `layer` holds."""
        if (step := self._step(layer)) is not None and q.dtype != torch.float64:
            return step.reading.attend(q, self.lengths, self.length).to(q.dtype)
        whole = q.is_cuda  # what a CUDA graph captures serves sequences of any length
        reach = self._layers[layer].room + self._layers[layer].sinks if whole else self.length
        lengths = None if self.is_even and not whole else self.lengths
        prepared, store = self._codec.layers[layer], self._layers[layer]
        if prepared is None:
            tokens, unmasked = store.tokens[:, :reach], self.unmasked.view(-1)
            return token_layer.attend_tokens(q, tokens, self._codec.tables, unmasked, self._rope, lengths)
        return dispatch.attend(q, self._held_by(layer, reach, lengths), prepared, self._backend)

    def append_and_attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
        """See `forward.Cache`; on a GPU in fewer launches than one after the other."""
        prepared, store = self._codec.layers[layer], self._layers[layer]
        if prepared is None or not q.is_cuda or not store.room:
            return super().append_and_attend(layer, q, k, v, tokens)
        if self.shortest < store.sinks:
            store.put_sinks(k, v, self.starts)
        held = self._held_by(layer, store.room + store.sinks, self.lengths)
        return dispatch.append_and_attend(q, k, v, held, prepared, self.starts, self._backend)

    def takes_joint(self, layer: int) -> bool:
        """See `forward.Cache`: on the fast path, where positions are turns."""
        prepared, store = self._codec.layers[layer], self._layers[layer]
        if prepared is None or not store.room or not store.packed("v").tiled:
            return False
        return prepared.k.spec.centre_at is None

    def append_and_attend_joint(self, layer: int, joint: Joint) -> Tensor:
        """See `forward.Cache`."""
        prepared, store = self._codec.layers[layer], self._layers[layer]
        assert prepared is not None
        if self.shortest < store.sinks:
            from turboesm_kernels.rotary import rotate

            store.put_sinks(*rotate(joint, self._rope, self.starts)[1:], self.starts)
        held = self._held_by(layer, store.room + store.sinks, self.lengths)
        return dispatch.append_and_attend_joint(joint, held, prepared, self.starts)

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys (after RoPE) and values [B, H, length, d] of one layer, unpacked: float32, or the model's dtype."""
        prepared, store = self._codec.layers[layer], self._layers[layer].upto(self.length)
        rope = self._rope.rows(slice(self.length))
        if prepared is None:
            model, tokens = self._codec.model, store.tokens[:, : self.length].long()
            x = model.embed(tokens, torch.arange(self.length, device=tokens.device), self.unmasked)
            _, keys, values = model.project(0, model.attention_input(0, x))
            return rope.rotate(keys), values
        held = self._held_by(layer, self.length)
        return dispatch.expand(held, prepared)

    def _step(self, layer: int) -> cpu_compiled.Step | None:
        """What a CPU's compiled loops do with a layer, where nothing else was asked for and they serve it."""
        step = self._steps.get(layer)
        if layer not in self._steps or (step is not None and step.is_stale):
            prepared, found = self._codec.layers[layer], None
            if prepared is not None and self._backend in (None, "compiled") and self._layers[layer].room:
                found = cpu_compiled.Step.of(prepared, self._held_by(layer))
            self._steps[layer] = found
        return self._steps[layer]

    def _target(self, layer: int) -> Target | None:
        """What a GPU puts prompts into, looked at once for these sequences: short prompts wait for the host."""
        if layer not in self._targets:
            prepared = self._codec.layers[layer]
            assert prepared is not None
            self._targets[layer] = dispatch.target(prepared, self._held_by(layer), self._backend)
        return self._targets[layer]

    def _held_by(self, layer: int, reach: int | None = None, lengths: Tensor | None = None) -> Held:
        """What a layer holds of the first `reach` tokens, for the kernels."""
        store = self._layers[layer] if reach is None else self._layers[layer].upto(reach)
        return Held(
            store.packed("k"), store.packed("v"), self._packed_rope, lengths,
            store.tensors.get("k.sinks"), store.tensors.get("v.sinks"),
        )  # fmt: skip


def rows_apart(model: Model, spec: CodecSpec) -> bool:
    """Whether a step on a CPU gives each sequence the same bits whatever the others of its batch are."""
    prepared = _prepare(model, spec)
    if prepared.tokens is not None and not cpu_compiled.attends_tokens(prepared.tokens.k, prepared.tokens):
        return False
    return not any(layer is not None and cpu_compiled.no_loops(layer) for layer in prepared.layers)


def check_tensors(
    spec: CodecSpec, alphabet: Alphabet, tensors: Mapping[str, Tensor], length: int, batch: int = 1
) -> None:
    """Raise ValueError where `tensors` are not those of a `PackedCache` that is full with `length` tokens."""
    full = {"unmasked": torch.empty(batch, 1, 1, device="meta")}
    size = spec.size
    for index in range(len(spec.layers)):
        empty = _LayerStore.empty(size, index, batch, length, torch.device("meta"))
        full |= {f"layers.{index}.{name}": tensor for name, tensor in empty.tensors.items()}
    if set(full) != set(tensors):
        raise ValueError("the cache was packed by another codec")
    for name, tensor in tensors.items():
        if tensor.dtype != full[name].dtype or tensor.shape != full[name].shape:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {list(full[name].shape)}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} is not finite")
        if name.endswith(".tokens") and not 0 <= int(tensor.min()) <= int(tensor.max()) < len(alphabet):
            raise ValueError(f"{name} holds what is no token of {alphabet.family}")
    if not bool(((tensors["unmasked"] > 0) & (tensors["unmasked"] <= 1)).all()):
        raise ValueError("the fraction of tokens that are not masked is not in 0..1")


def on_device(spec: CodecSpec, device: torch.device) -> CodecSpec:
    """The codec with its tensors on `device`; no copy where they are there already."""
    layers = (layer and LayerSpec(layer.k.to(device), layer.v.to(device)) for layer in spec.layers)
    return replace(spec, layers=tuple(layers))


@dataclass(frozen=True)
class _Prepared:
    """A model's codec, ready for the kernels.

    `tokens` serves the layers that are None, `pairs` those of a CPU that has no compiled loops for them.
    """

    model: Model
    spec: CodecSpec
    layers: list[PreparedLayer | None]
    tokens: TokenTables | None
    pairs: list[cpu_lookup.Pair | None]

    @property
    def tables(self) -> TokenTables:
        """Of the first layer, which keeps tokens."""
        assert self.tokens is not None
        return self.tokens


def make_ready(model: Model, spec: CodecSpec, batch: int) -> None:
    """Do what caches of this codec would wait for: on a GPU kernels are compiled, and checked before their use.

    Raises DeviceError where a kernel is wrong on this device.
    """
    _check_kernels(model, spec, forward.joint_parts(model, batch))


@lru_cache(maxsize=4)
def _prepare(model: Model, spec: CodecSpec) -> _Prepared:
    spec = on_device(spec, model.device)
    layers = [None if layer is None else PreparedLayer.of(layer.k, layer.v) for layer in spec.layers]
    on_cpu = model.device.type == "cpu"
    tokens = model.first_layer_tables() if None in spec.layers else None
    if model.device.type == "cuda":  # made now: the kernels read it before they wait for earlier work
        for side in (side for layer in layers if layer for side in (layer.k, layer.v)):
            side.ready()
    pairs = [_pair(layer) if layer and on_cpu else None for layer in layers]
    return _Prepared(model, spec, layers, tokens, pairs)


def _pair(layer: PreparedLayer) -> cpu_lookup.Pair | None:
    return cpu_lookup.Pair.of(layer.k, layer.v) if cpu_compiled.no_loops(layer) else None


@lru_cache(maxsize=4)
def _check_kernels(model: Model, spec: CodecSpec, parts: int | None) -> None:
    """Raise DeviceError where a kernel is wrong on this device; `parts` as in `verify.problem`."""
    prepared = _prepare(model, spec)
    if model.device.type != "cuda" or not has_triton():
        return
    layers = [layer for layer in prepared.layers if layer is not None]
    queries = model.shape.heads // model.shape.key_value_heads
    problem = verify.problem(layers, model.dtype, spec.recipe.sinks, queries, parts)
    if prepared.tokens is not None:
        problem = problem or verify.token_problem(prepared.tokens, model.dtype, queries)
    if problem:
        raise DeviceError(f"{model.device}: {problem}; install another version of Triton, or use --device cpu")


def _room(capacity: int, device: torch.device) -> int:
    """Tokens that buffers are made for."""
    return -(-capacity // ROOM) * ROOM if device.type == "cuda" else capacity


@dataclass(frozen=True)
class _LayerStore:
    """One layer's buffers. Packed token 0 is the sequence's token number `sinks`."""

    tensors: dict[str, Tensor]

    @property
    def tokens(self) -> Tensor:
        return self.tensors["tokens"]

    @property
    def sinks(self) -> int:
        return self.tensors["k.sinks"].shape[2] if "k.sinks" in self.tensors else 0

    @property
    def room(self) -> int:
        """Tokens beyond the sinks."""
        return self.tokens.shape[1] if "tokens" in self.tensors else self.tensors["k.codes"].shape[3]

    @classmethod
    def empty(
        cls, size: CodecSize, layer: int, batch: int, capacity: int, device: torch.device, tiled: bool = False
    ) -> _LayerStore:
        """Buffers on `device`, with values in tiles or in planes."""
        buffers = size.buffers(layer, batch, capacity, ROOM if device.type == "cuda" else 1)
        tensors = {
            name: torch.zeros(each.size, dtype=getattr(torch, each.dtype), device=device)
            for name, each in buffers.items()
        }
        if tiled:
            _, heads, nbytes, tokens = tensors["v.codes"].shape
            tensors["v.codes"] = tensors["v.codes"].view(tiles_shape(heads, nbytes, batch, tokens))
        return cls(tensors)

    def rows(self, start: int, stop: int) -> _LayerStore:
        """Some sequences: a view."""
        return _LayerStore({name: tensor[start:stop] for name, tensor in self.tensors.items()})

    def upto(self, length: int) -> _LayerStore:
        """The first `length` tokens: a view."""
        sinks = min(self.sinks, length)
        upto = {
            "tokens": (1, length),
            "codes": (3, length - sinks),
            "tiles": (3, -(-(length - sinks) // TILE)),
            "scales": (2, length - sinks),
            "sinks": (2, sinks),
        }
        return _LayerStore(
            {name: tensor.narrow(upto[kind][0], 0, min(upto[kind][1], tensor.shape[upto[kind][0]]))
             for name, tensor in self.tensors.items()
             for kind in ["tiles" if Packed(tensor, None).tiled else name.split(".")[-1]]}
        )  # fmt: skip

    def in_planes(self) -> _LayerStore:
        """The same with values in planes: a copy of them where they lie in tiles."""
        if "v.codes" not in self.tensors:
            return self
        planes = reference.untiled(self.tensors["v.codes"])[..., : self.room]
        return _LayerStore(self.tensors | {"v.codes": planes})

    def packed(self, name: str) -> Packed:
        return Packed(self.tensors[f"{name}.codes"], self.tensors.get(f"{name}.scales"))

    def put(self, k: Packed, v: Packed, start: Tensor) -> None:
        """One packed token of each sequence, where `start` int [B] says."""
        for name, found in (("k", k), ("v", v)):
            put(self.tensors[f"{name}.codes"], found.codes, start, 3)
            if found.scales is not None:
                put(self.tensors[f"{name}.scales"], found.scales, start, 2)

    def put_sinks(self, k: Tensor, v: Tensor, start: Tensor) -> None:
        """Keep k, v [B, H, 1, d] of sequences whose token, number `start` int [B], is a sink."""
        there = (torch.arange(self.sinks, device=k.device) == start[:, None])[:, None, :, None]
        for name, x in (("k", k), ("v", v)):
            into = self.tensors[f"{name}.sinks"]
            into.copy_(torch.where(there, x.to(SINK_DTYPE), into))
