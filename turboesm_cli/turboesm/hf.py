"""Hugging Face's `generate` from the packed cache (`pip install 'turboesm[hf]'`).

    use_turboesm(model, bundle)  # once
    model.generate(**inputs, max_new_tokens=200, past_key_values=TurboCache(model))

A hook before the model's body hears of each forward pass: tokens, padding, positions. A layer's `update` then
hands its keys and values through to the attention that is registered here. A prompt's tokens attend to what was
computed for it, and its keys and values are packed, padding left out: a token's place there is its position. Every
later token is packed, then attends to the packed cache. Without a `TurboCache`, the model does what it did.

Not done: ESM-2, which is an encoder (`turboesm.prefill`, `turboesm.step`); models whose code brings its own
attention, as ProGen2's does; training; torch.compile; a model on several devices. Each is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from turboesm_cli.cache.packed import PackedCache
from turboesm_cli.codec.bundle import Bundle
from turboesm_cli.codec.fit import CodecSpec
from turboesm_cli.errors import BundleError, InputError, ModelError
from turboesm_cli.models.in_transformers import SERVED, Loaded, for_caches, read_loaded, unrounded
from turboesm_cli.models.protocol import Model

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.cache_utils import Cache, CacheLayerMixin
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise ImportError(f"turboesm.hf needs transformers ({error}): pip install 'turboesm[hf]'") from error

NAME = "turboesm"
"""The attention's name in transformers."""


@dataclass(frozen=True, eq=False)
class _Door:
    """What `use_turboesm` learned of a model.

    model  what a `PackedCache` asks of it: its first layer alone, and that where the codec keeps tokens there
    order  of a head's channels, int64 [d], from transformers' to ours; None where they are the same
    stop   takes the hook away
    """

    model: Model
    spec: CodecSpec
    order: Tensor | None
    stop: Callable[[], None]


_DOORS: WeakKeyDictionary[nn.Module, _Door] = WeakKeyDictionary()


def use_turboesm(model: PreTrainedModel, bundle: Bundle) -> None:
    """Let a Hugging Face model decode from packed caches, `TurboCache`, that are coded as `bundle` says.

    Checks that the bundle is the model's, for which its weights are copied to the host once. A model that was
    rounded when it was loaded (bfloat16, float16) is compared with its files, which have to be where it came from.
    Raises ModelError where the model is not served, BundleError where the bundle is of another one.
    """
    device = _check_served(model)
    if bundle.family != model.config.model_type:
        raise BundleError(
            f"the bundle is for models of family {bundle.family!r} ({bundle.model_name}), and this one is of "
            f"{model.config.model_type!r}; calibrate one for it"
        )
    found = _read(model, bundle)
    if model in _DOORS:
        _DOORS[model].stop()
    hook = model.base_model.register_forward_pre_hook(_listen, with_kwargs=True)
    kept = for_caches(found, keeps_tokens=None in bundle.spec.layers).to(device, found.dtype)
    order = None if found.order is None else found.order.to(device)
    _DOORS[model] = _DOORS[model.base_model] = _Door(kept, bundle.spec, order, hook.remove)
    model.set_attn_implementation(NAME)


_INSTEAD = {
    "esm": "; for ESM-2 there are turboesm.prefill and turboesm.step",
    "progen": "; for ProGen2 there are turboesm.load_model and turboesm decode",
}


def _check_served(model: PreTrainedModel) -> torch.device:
    """The model's device. Raises ModelError where it cannot decode from a packed cache."""
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"{type(model).__name__} is no model of transformers; unwrap it")
    family = model.config.model_type
    if family not in SERVED:
        instead = _INSTEAD.get(family, "")
        raise ModelError(f"{family!r} is not served through transformers: {', '.join(SERVED)} are{instead}")
    if not model._supports_attention_backend:
        newer = "; GPT-J needs transformers 5.24" if family == "gptj" else ""
        raise ModelError(f"this {type(model).__name__} has attention of its own, which no cache reaches{newer}")
    devices = {weight.device for weight in model.parameters()}
    if len(devices) != 1 or any(device.type not in ("cpu", "cuda") for device in devices):
        raise ModelError(
            f"the model is on {', '.join(sorted(map(str, devices)))}; put it on one CPU or CUDA device"
        )
    return devices.pop()


def _read(model: PreTrainedModel, bundle: Bundle) -> Loaded:
    """The model as turboesm reads it. Raises ModelError, or BundleError where the bundle is another's."""
    weights = {key: weight.detach() for key, weight in model.named_parameters(remove_duplicate=False)}
    name = model.config.name_or_path or type(model).__name__
    found = read_loaded(name, model.config.to_dict(), weights, bundle.alphabet)
    original: Model = found.model
    if original.fingerprint != bundle.fingerprint and found.dtype in (torch.bfloat16, torch.float16):
        try:
            original = unrounded(found)
        except ModelError as error:
            raise BundleError(
                f"the bundle's weights are not these, and that they were rounded is not to be seen ({error}); "
                "load the model from its folder, or in the dtype of its files, or calibrate again"
            ) from error
    bundle.check_model(original, "the bundle")
    return found


def _listen(body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a forward pass of a model's body: tell its `TurboCache`, if it has one, what comes."""
    cache = kwargs.get("cache")  # past_key_values before transformers 5.24
    cache = kwargs.get("past_key_values") if cache is None else cache
    if not isinstance(cache, TurboCache):
        return
    if cache.door is not _DOORS.get(body):
        raise InputError("the cache is another model's, or older than its use_turboesm; make a new TurboCache")
    config: Any = body.config
    if config._attn_implementation != NAME:
        raise InputError(f"the model's attention is {config._attn_implementation!r} now; call use_turboesm again")
    if body.training or torch.is_grad_enabled():
        raise InputError("a packed cache has no gradients: call model.eval(), and run it under torch.no_grad()")
    if torch.compiler.is_compiling():
        raise InputError("a TurboCache cannot be compiled; generate without torch.compile")
    if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
        raise InputError("a packed cache gives no attention weights; leave output_attentions out")
    if kwargs.get("token_type_ids") is not None:
        raise InputError("token_type_ids change what tokens mean; leave them out")
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if tokens is None:
        if None in cache.door.spec.layers:
            raise InputError("this bundle's codec keeps tokens: give input_ids, not inputs_embeds")
        tokens = torch.zeros(kwargs["inputs_embeds"].shape[:2], dtype=torch.int64, device=cache.door.model.device)
    cache.begin(tokens, kwargs.get("attention_mask"), kwargs.get("position_ids"))


class _Prompt(NamedTuple):
    """The tokens of the first forward pass of a cache, int64 [B, T'], padding on the right.

    order   where they come from, int64 [B, T'], or None where nothing was padded
    beyond  which are padding, bool [B, T']
    """

    tokens: Tensor
    order: Tensor | None
    beyond: Tensor


class _Computed(NamedTuple):
    """What `TurboCache.update` hands to the attention: a layer, its keys and values [B, K, T, d] of this pass."""

    cache: TurboCache
    layer: int
    k: Tensor
    v: Tensor


class TurboCache(Cache):  # type: ignore[misc]
    """A packed key/value cache for `generate(past_key_values=...)` of a model after `use_turboesm`.

    max_tokens  of a sequence, prompt and padding-free: memory for them is taken at the first prompt; left out, the
                model's context

    One cache serves one `generate`, or several that go on from each other; `reset` makes it empty again. Raises
    InputError where the model is not prepared, or has a shorter context.
    """

    def __init__(self, model: PreTrainedModel, max_tokens: int | None = None) -> None:
        if model not in _DOORS:
            raise InputError("call use_turboesm(model, bundle) first")
        door = _DOORS[model]
        context = door.model.shape.context
        assert context is not None
        if max_tokens is not None and not 0 < max_tokens <= context:
            raise InputError(f"max_tokens is {max_tokens}, and the model takes 1 to {context}")
        self._start(door, max_tokens or context)

    def _start(self, door: _Door, max_tokens: int) -> None:
        self.door, self.max_tokens = door, max_tokens
        self._packed: PackedCache | None = None
        self._columns = 0
        self._step: Tensor | _Prompt | None = None
        self._next = 0
        super().__init__(layers=[_Layer(self, index) for index in range(door.model.shape.layers)])

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self._packed is None else self._packed.nbytes

    @property
    def batch_size(self) -> int:
        """Sequences; -1 before there are any."""
        return -1 if self._packed is None else self._packed.batch

    @property
    def is_initialized(self) -> bool:
        """Whether memory has been taken."""
        return self._packed is not None

    def begin(self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None) -> None:
        """What a forward pass will bring: tokens int64 [B, T].

        mask       which of all tokens so far, [B, columns + T], are no padding; None: all
        positions  of the tokens, int [B or 1, T]; None: counted, padding included

        Raises InputError where the cache cannot hold them, or where a token's position is not its place.
        """
        if self._step is not None:
            raise InputError("the last forward pass of this cache broke off; reset() it, or make a new TurboCache")
        batch, count = tokens.shape
        if mask is None:
            mask = torch.ones(batch, self._columns + count, dtype=torch.bool, device=tokens.device)
        if not isinstance(mask, Tensor) or mask.shape != (batch, self._columns + count):
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(
                f"the attention mask is {shape}; a TurboCache takes [{batch}, {self._columns + count}]"
            )
        if positions is None:
            positions = torch.arange(self._columns, self._columns + count, device=tokens.device)[None]
        mask, positions = mask.to(tokens.device, torch.bool), positions.to(tokens.device)
        if self._columns:
            self._begin_tokens(tokens, mask, positions)
        else:
            self._begin_prompt(tokens, mask, positions)

    def _begin_prompt(self, tokens: Tensor, real: Tensor, positions: Tensor) -> None:
        counted = real.cumsum(-1)
        self._check_places(((positions == counted - 1) | ~real).all())
        lengths: list[int] = counted[:, -1].tolist()
        longest = max(lengths)
        if min(lengths) == 0:
            raise InputError("a prompt has no token that is not padding")
        self._check_room(longest)
        if self._packed is None or self._packed.batch != len(tokens):
            self._packed = None  # its memory can go before the new one's is taken
            self._packed = self._empty(len(tokens))
        order = None
        if min(lengths) < tokens.shape[1]:
            order = real.byte().argsort(dim=-1, descending=True, stable=True)[:, :longest]
            tokens = tokens.gather(1, order)
        beyond = torch.arange(longest, device=tokens.device) >= counted[:, -1:]
        self._packed.begin(lengths)
        self._step = _Prompt(tokens, order, beyond)

    def _begin_tokens(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> None:
        assert self._packed is not None
        batch, count = tokens.shape
        if batch != self._packed.batch:
            raise InputError(f"{batch} sequences, and the cache holds {self._packed.batch}; make a new TurboCache")
        lengths = self._packed.lengths[:, None]
        places = positions == lengths + torch.arange(count, device=tokens.device)
        self._check_places(places.all() & (mask.sum(-1, keepdim=True) == lengths + count).all())
        self._check_room(self._packed.length + count)
        if count == 1:
            self._packed.begin(1)
        self._step = tokens

    def _check_places(self, right: Tensor) -> None:
        if not bool(right):
            raise InputError(
                "tokens must stand at the positions 0, 1, 2... of their sequences, padding not counted, and only "
                "prompts be padded: give generate the attention_mask, and a forward pass position_ids, too"
            )

    def _check_room(self, tokens: int) -> None:
        if tokens > self.max_tokens:
            raise InputError(f"{tokens} tokens do not fit in a TurboCache of max_tokens {self.max_tokens}")

    def _empty(self, batch: int) -> PackedCache:
        return PackedCache(self.door.model, self.door.spec, batch, self.max_tokens)

    def hand(self, layer: int, k: Tensor, v: Tensor) -> tuple[Any, Any]:
        """A layer's keys (after RoPE) and values [B, K, T, d] of this forward pass, for `attend`, as both."""
        if self._step is None:
            raise InputError("this model has not been prepared for a TurboCache: call use_turboesm(model, bundle)")
        if layer != self._next:
            raise InputError(f"layer {layer} comes where {self._next} was to; reset() the cache")
        self._next = layer + 1
        found = _Computed(self, layer, k, v)
        return found, found

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, exact: Callable[[], Tensor]) -> Tensor:
        """Attention [B, T, H, d] of q [B, H, T, d], scaled and after RoPE, over all that the cache holds.

        Stores k, v [B, K, T, d]. `exact` attends within this forward pass, to which prompts are left.
        """
        step, packed, order = self._step, self._packed, self.door.order
        assert step is not None and packed is not None
        if order is not None:
            q, k = q.index_select(-1, order), k.index_select(-1, order)
        last = layer + 1 == len(self.layers)
        if isinstance(step, _Prompt):
            k, v = (_compact(x, step) for x in (k, v))
            packed.append(layer, k, v, step.tokens)
            found = exact()
        else:
            found = _one_by_one(packed, layer, q, k, v, step).transpose(1, 2)
            if step.shape[1] > 1 and not last:
                packed.rewind(step.shape[1])  # the next layer begins them again
        if last:
            self._columns += q.shape[2]
            self._step, self._next = None, 0
        return found

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding counted: what transformers slices its inputs by."""
        return self._columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The most tokens of a sequence."""
        return self.max_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns of the mask with the next tokens', and the first of them."""
        return self._columns + query_length, 0

    def reset(self) -> None:
        """Forget all tokens; memory is kept for the next prompts."""
        self._columns, self._step, self._next = 0, None, 0
        if self._packed is not None:
            self._packed.truncate(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens of each sequence; where it is positive, all but so many.

        Raises InputError where a sequence does not have so many: padding is not kept.
        """
        given = int(tokens_to_remove)  # transformers 5.17 gives a tensor
        count = -given if given <= 0 else max(0, self._columns - given)
        if count == 0 or self._packed is None:
            return
        if count >= self._columns:
            self.reset()
            return
        if count >= self._packed.fewest:
            raise InputError(f"{count} tokens of each sequence cannot be forgotten: the shortest has no more")
        self._packed.rewind(count)
        self._columns -= count

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Hold sequence beam_idx[i] in the place of i, int64 [B]: what beam search asks for."""
        if self._packed is not None:
            self._packed.take(self._packed, beam_idx.to(self._packed.lengths.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Hold each sequence `repeats` times, copies beside each other."""
        self._become(lambda rows: rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Hold the sequences `indices` alone, int64 [B'] or bool [B]."""
        self._become(lambda rows: rows[indices.to(rows.device)])

    def _become(self, choose: Callable[[Tensor], Tensor]) -> None:
        if self._packed is None:
            return
        rows = choose(torch.arange(self._packed.batch, device=self._packed.lengths.device))
        chosen = self._empty(len(rows))
        chosen.take(self._packed, rows)
        self._packed = chosen

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A cache of its own that holds the same: to go on from one prompt more than once."""
        if self._step is not None:
            raise InputError("a cache cannot be copied in the middle of a forward pass")
        twin = type(self).__new__(type(self))
        twin._start(self.door, self.max_tokens)
        twin._columns, twin._packed = self._columns, self._packed
        twin._become(lambda rows: rows)
        return twin


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """A layer of a `TurboCache`: they are filled, cut and reordered together, by the cache."""

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: TurboCache, index: int) -> None:
        super().__init__()
        self._cache, self._index = cache, index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: memory is taken when the cache hears of a prompt."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """See `TurboCache.hand`."""
        return self._cache.hand(self._index, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See `TurboCache`."""
        return self._cache.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        """See `TurboCache`."""
        return self._cache.get_seq_length()

    def get_max_length(self) -> int:
        """See `TurboCache`."""
        return self._cache.max_tokens

    def _together(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise InputError."""
        raise InputError("the layers of a TurboCache change together: call this of the cache, not of a layer")

    reset = reorder_cache = crop = batch_repeat_interleave = batch_select_indices = offload = prefetch = _together


def _compact(x: Tensor, prompt: _Prompt) -> Tensor:
    """Keys or values [B, K, T, d] as [B, K, T', d], padding on the right and 0."""
    if prompt.order is None:
        return x
    index = prompt.order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index).masked_fill(prompt.beyond[:, None, :, None], 0)


def _one_by_one(packed: PackedCache, layer: int, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
    """Store each token [B, T] and attend to all up to it: [B, H, T, d]. One token has been begun already."""
    count = tokens.shape[1]
    grouped = q.unflatten(1, (k.shape[1], -1))  # query heads of one key/value head
    found = []
    for at in range(count):
        if count > 1:
            packed.begin(1)
        packed.append(layer, k[:, :, at : at + 1], v[:, :, at : at + 1], tokens[:, at : at + 1])
        found.append(packed.attend(layer, grouped[:, :, :, at]))
    return torch.stack(found, 3).flatten(1, 2)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [B, H, T, d] -> [B, T, H, d], and no weights.

    From a `TurboCache` where key and value are what its `update` gave, else torch's, as "sdpa".
    """

    def exact(k: Tensor, v: Tensor) -> Tensor:
        found: Tensor = sdpa_attention_forward(module, query, k, v, attention_mask, scaling=scaling, **kwargs)[0]
        return found

    if not isinstance(key, _Computed):
        return exact(key, value), None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    k, v = key.k, key.v
    return key.cache.attend(key.layer, query * scale, k, v, lambda: exact(k, v)), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without it, transformers drops the padding mask silently
