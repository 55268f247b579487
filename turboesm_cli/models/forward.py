"""A model's layers over a key/value cache, with explicit positions.

An autoregressive model's keys and values never change: decode from an fp32 cache is the model itself. ESM-2 is a
bidirectional encoder. *Prefill* encodes a prompt as ESM-2 does, every token seeing
every other, and stores its keys and values. *Decode* lets each further token attend to what is cached and to
itself, and leaves earlier keys and values as they are; ESM-2 run again on the longer sequence would change them,
and that difference is the *drift*. With a prompt of one token, decode is ESM-2 under a causal mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from turboesm_kernels import reference
from turboesm_kernels.available import has_triton
from turboesm_kernels.operands import Joint
from turboesm_kernels.reference import Rope

from turboesm_cli.models.norms import few_rows
from turboesm_cli.models.protocol import Model

OVER_SEQUENCES = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""torch's attention backends for whole sequences, the preferred first. Not cuDNN, which makes a plan for each new
shape, 70 to 100 ms of the host's time (torch 2.11, H100): proteins are of all lengths."""

Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [B, H, T, d] scaled, k, v [B, K, T, d]), q and k after RoPE -> attention output [B, H, T, d]. K heads
of keys and values each serve H / K query heads, neighbours."""

Projection = Callable[[int, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(layer, normed hidden states [B, T, E]) -> q, k, v as `Attention` takes them."""


Mixing = Callable[[int, Tensor], Tensor]
"""(layer, normed hidden states [B, T, E]) -> attention output [B, H, T, d]."""


class Cache(Protocol):
    """What decoding needs of a key/value cache of B sequences (see `ragged.Ragged`)."""

    lengths: Tensor
    starts: Tensor
    unmasked: Tensor

    def begin(self, counts: int | Sequence[int]) -> None:
        """Make room for the next tokens of each sequence."""
        ...

    def append(self, layer: int, k: Tensor, v: Tensor, tokens: Tensor) -> None:
        """Store keys (after RoPE) and values [B, K, T, d] of the tokens int64 [B, T] that were begun."""
        ...

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attention of q [B, K, Q, d] over all that `layer` holds; result like q."""
        ...

    def append_and_attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
        """One token of each sequence stored, then `attend`: a step."""
        ...

    def takes_joint(self, layer: int) -> bool:
        """Whether the layer's next step may be `append_and_attend_joint`."""
        ...

    def append_and_attend_joint(self, layer: int, joint: Joint) -> Tensor:
        """The same of what the projection gives: RoPE is in it, at `starts`; result [B, K, H / K, d]."""
        ...

    def rewind(self, count: int = 1) -> None:
        """Forget each sequence's last `count` tokens."""
        ...


class Codec(Protocol):
    """What a cache does to keys and values, without the cache."""

    def roundtrip(self, layer: int, k: Tensor, v: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Keys and values [B, K, T, d] of whole sequences as they come back from the cache."""
        ...


def encode(
    model: Model, tokens: Tensor, observe: Attention | None = None, joint: JointProjection | None = None
) -> Tensor:
    """Final hidden states [B, T, E] of the model run on tokens int64 [B, T] (padding allowed).

    `observe` replaces the attention, see `Attention`. `joint` projects at once, from where `joint.at` said.
    """
    attention = observe or own_attention(model, tokens)
    project = joint or _projection(model, rope_at(model, 0, tokens.shape[1]))
    mix = _mixing(project, attention)
    with _over_sequences(model):
        return _layers(model, tokens, _upto(tokens), model.unmasked_fraction(tokens), mix)


def own_attention(model: Model, tokens: Tensor) -> Attention:
    """What the model attends with when it encodes tokens int64 [B, T]."""
    return _causal if model.causal else _bidirectional(model, tokens)


def _causal(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token sees itself and earlier ones: none of these is padding, which is on the right."""
    return _attention(q, k, v, is_causal=True)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """torch's attention of q [B, H, Q, d], scaled already, to k and v [B, K, T, d]."""
    k, v = (shared(x, q.shape[1]) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=1.0)


def shared(x: Tensor, heads: int) -> Tensor:
    """Keys or values [B, K, T, d] for each of `heads` query heads [B, heads, T, d]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _bidirectional(model: Model, tokens: Tensor) -> Attention:
    """Every token sees all that is not padding. On a CPU, fair-esm's result to the bit."""
    lengths = model.alphabet.lengths(tokens)
    mask = None
    if not bool((lengths == tokens.shape[1]).all()):
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None, None, None]

    def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.device.type == "cpu":
            return reference.attend(q, k, v, lengths)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)

    return attend


def prefill(model: Model, tokens: Tensor, cache: Cache, joint: JointProjection | None = None) -> Tensor:
    """Encode prompts int64 [B, P], padded on the right, and fill the empty cache with them layer by layer.

    Keys and values of one layer at a time are in memory; `joint` as in `step`. Returns the final hidden states
    [B, P, E]; they are exact, whatever the cache.
    """
    cache.begin(model.alphabet.lengths(tokens).tolist())
    cache.unmasked.copy_(model.unmasked_fraction(tokens))
    if joint is not None:
        joint.at(cache.starts)
    exact = own_attention(model, tokens)
    kept = tokens.clamp(min=0)  # what fills up shorter prompts may be no token, and is looked up all the same

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.append(layer, k, v, kept)
        return exact(layer, q, k, v)

    return encode(model, tokens, attend, joint)


def step(model: Model, tokens: Tensor, cache: Cache, joint: JointProjection | None = None) -> Tensor:
    """Decode one token of each sequence, int64 [B]: append its keys and values, then attend to all cached.

    `joint` projects queries, keys and values at once, for GPUs. Nothing is synchronized: safe in a CUDA graph.
    Returns the final hidden states [B, E].
    """
    tokens = tokens[:, None]
    project = joint or _projection(model, Rope.at(cache.lengths[:, None, None], model.inverse_frequencies))
    cache.begin(1)

    def mix(layer: int, normed: Tensor) -> Tensor:
        if joint is not None and joint.turns and cache.takes_joint(layer):
            return cache.append_and_attend_joint(layer, joint.product(layer, normed)).flatten(1, 2)[:, :, None]
        q, k, v = project(layer, normed)
        side_by_side = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # query heads of one key/value head
        return cache.append_and_attend(layer, side_by_side, k, v, tokens).reshape(q.shape)

    if joint is not None:
        joint.at(cache.starts)
    return _layers(model, tokens, cache.starts[:, None], cache.unmasked, mix)[:, 0]


def replay(model: Model, tokens: Tensor, cache: Cache) -> Tensor:
    """Decode given tokens int64 [B, n] one by one after what is cached: final hidden states [B, n, E]."""
    return torch.stack([step(model, column, cache) for column in tokens.unbind(1)], 1)


def teacher_forced(
    model: Model,
    tokens: Tensor,
    prompts: Sequence[int],
    codec: Codec | None,
    trace: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """What `prefill` of each sequence's prompt and `step` over its further tokens give, in one causal pass.

    tokens int64 [B, T], padded on the right; prompts: tokens of each prompt, 0 for a decode from an empty cache.
    `codec` None is an fp32 cache. `trace` gets each layer's attention output [B, H, T, d] in turn.
    Returns the final hidden states [B, T, E]; equal to decoding token by token but for rounding (tested).
    """
    attend = _TeacherForced(model, tokens, prompts, codec, trace)
    with _over_sequences(model):
        unmasked = _prompt_unmasked(model, tokens, prompts)
        mix = _mixing(_projection(model, attend.rope), attend.tokens)
        return _layers(model, tokens, _upto(tokens), unmasked, mix)


def teacher_forced_with_masks(
    model: Model,
    tokens: Tensor,
    prompts: Sequence[int],
    codec: Codec | None,
    trace: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """`teacher_forced`, and beside it a second stream: a `<mask>` in the place of every token.

    A mask sees what came before its place, as the cache holds it, and itself, and no token sees a mask: what
    `step` with a `<mask>`, forgotten afterwards (`Cache.rewind`), gives at every place at once. Returns both
    streams' final hidden states [B, T, E]; those of masks mean nothing within a prompt or on padding.
    """
    attend = _TeacherForced(model, tokens, prompts, codec, trace)
    both = torch.cat((tokens, torch.full_like(tokens, model.alphabet.mask)), 1)
    rope = Rope(*(torch.cat((part, part)) for part in (attend.rope.cos, attend.rope.sin)))
    unmasked = _prompt_unmasked(model, tokens, prompts)
    with _over_sequences(model):
        positions = _upto(tokens).repeat(2)
        mix = _mixing(_projection(model, rope), attend.tokens_and_masks)
        hidden = _layers(model, both, positions, unmasked, mix)
    return hidden[:, : tokens.shape[1]], hidden[:, tokens.shape[1] :]


class _TeacherForced:
    """The attention of a causal pass over tokens [B, T]: what is cached is seen as `codec` gives it back."""

    def __init__(
        self,
        model: Model,
        tokens: Tensor,
        prompts: Sequence[int],
        codec: Codec | None,
        trace: Callable[[Tensor], None] | None,
    ) -> None:
        self.rope = rope_at(model, 0, tokens.shape[1])
        self._codec, self._trace, self._longest = codec, trace, max(prompts)
        self._in_prompt, self._visible = _teacher_masks(tokens, prompts, model.causal)

    def tokens(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`Attention` of the tokens."""
        return self._attend(q, k, v, *self._stored(layer, k, v))

    def tokens_and_masks(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`Attention` [B, H, 2 T, d] of the tokens and, behind them, of a mask in each one's place."""
        (q, of_masks), (k, own_k), (v, own_v) = (x.chunk(2, dim=2) for x in (q, k, v))
        stored = self._stored(layer, k, v)
        keys, values = (torch.cat(pair, 2) for pair in zip(stored, self._stored(layer, own_k, own_v), strict=True))
        every = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)
        visible = torch.cat((every.tril(-1), torch.eye(len(every), dtype=torch.bool, device=q.device)), 1)
        masks = _attention(of_masks, keys, values, visible)
        return torch.cat((self._attend(q, k, v, *stored), masks), 2)

    def _stored(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return (k, v) if self._codec is None else self._codec.roundtrip(layer, k, v, self.rope)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, stored_k: Tensor, stored_v: Tensor) -> Tensor:
        decoded = _attention(q, stored_k, stored_v, self._visible)
        longest = self._longest
        if self._codec is not None and longest:  # prefill attends to what it computed, not to what it stored
            visible = self._visible[:, :, :longest]
            exact = _attention(q[:, :, :longest], k, v, visible)
            rows = self._in_prompt[:, None, :longest, None]
            decoded[:, :, :longest] = torch.where(rows, exact, decoded[:, :, :longest])
        if self._trace:
            self._trace(decoded)
        return decoded


def _upto(tokens: Tensor) -> Tensor:
    """Positions int64 [T] of whole sequences [B, T]."""
    return torch.arange(tokens.shape[1], device=tokens.device)


def rope_at(model: Model, start: int, count: int) -> Rope:
    """RoPE's angles at positions start..start + count - 1."""
    positions = torch.arange(start, start + count, device=model.device)
    return Rope.at(positions, model.inverse_frequencies)


def _layers(model: Model, tokens: Tensor, positions: Tensor, unmasked: Tensor, mix: Mixing) -> Tensor:
    x = model.embed(tokens, positions, unmasked)
    normed = model.attention_input(0, x)
    for layer in range(model.shape.layers):  # the attention output has no name here: the layer may let go of it
        x, normed = model.after_attention(layer, x, normed, mix(layer, normed))
    return normed


def _mixing(project: Projection, attention: Attention) -> Mixing:
    return lambda layer, normed: attention(layer, *project(layer, normed))


def _over_sequences(model: Model) -> AbstractContextManager[object]:
    on_gpu = model.device.type == "cuda"
    return sdpa_kernel(OVER_SEQUENCES, set_priority=True) if on_gpu else nullcontext()


def _projection(model: Model, rope: Rope) -> Projection:
    """The layers' own projections at the positions of `rope`."""

    def project(layer: int, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = model.project(layer, normed)
        return rope.rotate(q).to(v.dtype), rope.rotate(k).to(v.dtype), v

    return project


def joint_parts(model: Model, batch: int) -> int | None:
    """Parts of a step's joint projection on a GPU, 0 where it is in none; None where nothing turns after it."""
    if model.device.type != "cuda" or not has_triton() or not _turns(model):
        return None
    from turboesm_kernels.linear import parts_for

    shape = model.shape
    width = (shape.heads + 2 * shape.key_value_heads) * shape.head_dim
    return parts_for(batch, width, shape.width, model.dtype)


def _turns(model: Model) -> bool:
    return model.query_scale != 1 or bool(model.inverse_frequencies.any())


class JointProjection:
    """One matrix for a layer's queries, keys and values, and one kernel that turns them: for GPUs.

    The model's own weights become views of the joint ones, so that nothing is held twice. `turns`: whether queries
    and keys are turned, or scaled, after it.
    """

    def __init__(self, model: Model, capacity: int) -> None:
        self._heads = (model.shape.heads, model.shape.key_value_heads)
        self._scaling = model.query_scale
        self.turns = _turns(model)
        self._rope = rope_at(model, 0, capacity)
        self._starts = torch.zeros(0, dtype=torch.int32)
        self._weights = [model.joint_projection(layer) for layer in range(model.shape.layers)]

    def at(self, starts: Tensor) -> None:
        """Where the sequences' first tokens stand, int32 [B]."""
        self._starts = starts

    def __call__(self, index: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, T, d] (scaled), k (both after RoPE) and v [B, K, T, d] of normed hidden states [B, T, E]."""
        if not self.turns:
            heads, shared = self._heads
            joint = F.linear(x, *self._weights[index])
            q, k, v = (
                joint.unflatten(-1, (heads + 2 * shared, -1)).transpose(1, 2).split((heads, shared, shared), 1)
            )
            return q, k, v
        from turboesm_kernels.rotary import rotate

        return rotate(self.product(index, x), self._rope, self._starts)

    def product(self, index: int, x: Tensor) -> Joint:
        """What is turned of normed hidden states [B, T, E]; where nothing `turns`, its `scaling` is 1."""
        from turboesm_kernels.linear import linear_parts

        weight, bias = self._weights[index]
        project = linear_parts if few_rows(x, weight) else F.linear
        return Joint(project(x, weight, bias), self._heads, self._scaling, x.dtype)


def _teacher_masks(tokens: Tensor, prompts: Sequence[int], causal: bool) -> tuple[Tensor, Tensor]:
    """Which tokens [B, T] are prompt, and which keys each may see, [B or 1, 1, T, T]."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    in_prompt = positions < torch.tensor(list(prompts), device=tokens.device)[:, None]
    visible = (positions <= positions[:, None])[None]
    if not causal:  # an encoder's prompt sees all of itself
        visible = visible | (in_prompt[:, None] & in_prompt[:, :, None])
    return in_prompt, visible[:, None]


def _prompt_unmasked(model: Model, tokens: Tensor, prompts: Sequence[int]) -> Tensor:
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    beyond = positions >= torch.tensor(list(prompts), device=tokens.device)[:, None]
    return model.unmasked_fraction(tokens.masked_fill(beyond, model.alphabet.padding))
