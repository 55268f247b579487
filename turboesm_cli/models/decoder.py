"""Autoregressive transformers behind the seam of `protocol`: GPT-2, GPT-J, ProGen, Llama and Mistral in one body.

They differ in norms, in where positions come in, in the feed-forward part and in whether that runs beside
attention: all of it is data here, and `decoder_weights` reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from turboesm_kernels.token_tables import TokenTables

from turboesm_cli.models.alphabet import Alphabet
from turboesm_cli.models.norms import Norm, by_kernel, few_rows
from turboesm_cli.models.shapes import Shape
from turboesm_cli.models.weights import widened

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}
"""By the names that Hugging Face's configurations give them."""

HEAD_ROWS = 8
"""Rows that tensor cores want in 16 bits; ProtGPT2 has 50,257 tokens."""

NEARLY_0 = 1e-20
"""Epsilon of `TokenTables` whose factors are 1; not 0: kernels take 0 / sqrt(0 + epsilon) of missing kinds."""

SILU = {"silu", "swish"}
TANH_GELU = {"gelu_new", "gelu_pytorch_tanh"}
OF_FEW_ROWS = {"gelu": "gelu", "relu": "relu"} | dict.fromkeys(TANH_GELU, "gelu_tanh")
"""What `linear` calls them."""


class Linear(NamedTuple):
    """Weight [out, in] and bias [out] or None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        if few_rows(x, self.weight):
            from turboesm_kernels.linear import linear

            return linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Block:
    """A layer's weights.

    norm      before attention
    joint     queries (scaled), keys and values beside each other, [(H + 2 K) d, E]
    out       attention's output projection
    mlp_norm  before the feed-forward part; None where that runs beside attention, on the same input
    up        its first matrix; where it is `gated`, gate and value below each other
    down      its second matrix
    """

    norm: Norm
    joint: Linear
    out: Linear
    mlp_norm: Norm | None
    up: Linear
    down: Linear


@dataclass(frozen=True, eq=False)
class Decoder:
    """A loaded autoregressive model; see `protocol.Model` for what is not told here.

    embedding   [V, E]
    positions   learned ones [P, E], or None
    frequencies RoPE's inverse frequencies float32 [d / 2], 0 where a pair of channels is not turned
    blocks      of the layers
    last_norm   after them
    head        the language-model head
    activation  of the feed-forward part, by name; `gated`: times a second projection
    wide_head   the head with rows of 0 up to a multiple of `HEAD_ROWS`, of which `head` is a view, or None
    """

    name: str
    family: str
    shape: Shape
    alphabet: Alphabet
    fingerprint: str
    embedding: Tensor
    positions: Tensor | None
    frequencies: Tensor
    blocks: tuple[Block, ...]
    last_norm: Norm
    head: Linear
    activation: str
    gated: bool
    is_random: bool = False
    note: str = ""
    causal: bool = True
    has_lm_head: bool = True
    wide_head: Linear | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.embedding.dtype

    @property
    def inverse_frequencies(self) -> Tensor:
        """RoPE's inverse frequencies float32 [d / 2], the same in every layer."""
        return self.frequencies

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Decoder:
        """The model on another device or in another dtype (RoPE's frequencies stay float32)."""
        moved = _moved(replace(self, wide_head=None), device, dtype)
        tied = self.head.weight is self.embedding
        head = moved.head._replace(weight=moved.embedding) if tied else moved.head
        found = replace(moved, frequencies=self.frequencies.to(device), head=head)
        return found.with_wide_head() if device.type == "cuda" else found

    def with_wide_head(self) -> Decoder:
        """The model with its `wide_head`, if it needs one; nothing is held twice."""
        wide, tied = _with_more_rows(self.head), self.head.weight is self.embedding
        if wide is None:
            return self
        head = self.head._replace(weight=wide.weight[: len(self.head.weight)])
        return replace(self, embedding=head.weight if tied else self.embedding, head=head, wide_head=wide)

    def require_lm_head(self, purpose: str) -> None:
        """There always is one."""

    def unmasked_fraction(self, tokens: Tensor) -> Tensor:
        """1: embeddings are not scaled."""
        return torch.ones(len(tokens), 1, 1, device=tokens.device)

    def embed(self, tokens: Tensor, positions: Tensor, unmasked: Tensor) -> Tensor:
        """Embeddings [B, T, E]; of padding anything finite."""
        x = F.embedding(tokens.clamp_min(0), self.embedding)
        return x if self.positions is None else x + F.embedding(positions, self.positions)

    def attention_input(self, layer: int, x: Tensor) -> Tensor:
        """Hidden states [B, T, E], normed."""
        return self.blocks[layer].norm(x)

    def project(self, layer: int, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, T, d] (scaled), k and v [B, K, T, d], before RoPE."""
        return self._split(self.blocks[layer].joint(normed))

    def _split(self, joint: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, shared = self.shape.heads, self.shape.key_value_heads
        x = joint.unflatten(-1, (heads + 2 * shared, -1)).transpose(1, 2)
        q, k, v = x.split((heads, shared, shared), 1)
        return q, k, v

    def joint_projection(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Weight [(H + 2 K) d, E] and bias of queries, keys and values."""
        return self.blocks[layer].joint

    @property
    def query_scale(self) -> float:
        """1: the weights are scaled."""
        return 1.0

    def after_attention(self, layer: int, x: Tensor, normed: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output [B, T, E], and what follows takes: that normed."""
        own, last = self.blocks[layer], layer + 1 == self.shape.layers
        attended = attended.transpose(1, 2).flatten(2)
        x, before = (
            (x + own.out(attended), normed)
            if own.mlp_norm is None
            else own.mlp_norm.of_product(x, attended, *own.out)
        )
        del attended  # what follows takes the most memory
        norm = self.last_norm if last else self.blocks[layer + 1].norm
        return norm.of_product(x, self._inner(own.up, before), *own.down)

    def _inner(self, up: Linear, x: Tensor) -> Tensor:
        """What the feed-forward part's second matrix is given, [B, T, F]."""
        if not self.gated:
            return self._activated(up, x)
        joint = up(x)
        if self.activation in SILU and by_kernel(joint):
            from turboesm_kernels.gated import gated_silu

            return gated_silu(joint)
        gate, value = joint.chunk(2, -1)
        return ACTIVATIONS[self.activation](gate) * value

    def _activated(self, up: Linear, x: Tensor) -> Tensor:
        """The activation of a product; a GPU's kernel applies it as it writes the product, where it knows it."""
        if few_rows(x, up.weight) and self.activation in OF_FEW_ROWS:
            from turboesm_kernels.linear import linear

            return linear(x, *up, OF_FEW_ROWS[self.activation])
        fused = x.is_cuda and self.activation in TANH_GELU and not torch.is_grad_enabled()  # it has no derivative
        if fused and up.bias is not None:
            flat = torch._addmm_activation(up.bias, x.flatten(0, 1), up.weight.T, use_gelu=True)
            return flat.unflatten(0, x.shape[:2])
        return ACTIVATIONS[self.activation](up(x))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V]."""
        if self.wide_head is None:
            return self.head(hidden)
        return self.wide_head(hidden)[..., : len(self.head.weight)]

    @torch.no_grad()
    def first_layer_tables(self) -> TokenTables:
        """Layer 0's keys and values of all kinds of token, in float32 at least.

        With learned positions the norm sees the sum of two embeddings: centred, of token t and position p, their
        variance is (|t|^2 + |p|^2 + 2 t.p) / E, and but for it keys and values are sums of what t and p give.
        """
        block = self.blocks[0]
        wide = widened(self.embedding)
        if self.positions is None:
            _, k, v = self._split(_wide(block.joint)(_wide(block.norm)(wide))[None])
            nothing = k.new_zeros(k.shape[1], k.shape[3])
            return TokenTables(
                k[0].contiguous(), v[0].contiguous(), nothing, nothing, k.new_ones(len(wide)), NEARLY_0, False
            )
        norm, joint, at = _wide(block.norm), _wide(block.joint), widened(self.positions)
        token, place = (x - x.mean(-1, keepdim=True) for x in (wide, at))
        squares = token.square().sum(-1)[:, None] + place.square().sum(-1) + 2 * token @ place.T
        across = (squares / wide.shape[1] + norm.epsilon).rsqrt()
        assert norm.bias is not None
        (_, k, v), (_, k_at, v_at) = (
            self._split(F.linear(x * norm.weight, joint.weight)[None]) for x in (token, place)
        )
        _, k_const, v_const = self._split(joint(norm.bias)[None, None])
        k, v, k_at, v_at, k_const, v_const = (x[0].contiguous() for x in (k, v, k_at, v_at, k_const, v_const))
        nothing = wide.new_ones(len(wide))
        return TokenTables(k, v, k_const[:, 0], v_const[:, 0], nothing, NEARLY_0, False, k_at, v_at, across)

    def output_weight(self, layer: int) -> Tensor:
        """Weight [E, H d] of the attention's output projection."""
        return self.blocks[layer].out.weight


def _wide(part: Any) -> Any:
    """A Linear or Norm in float32 at least."""
    return part._replace(**{n: widened(x) for n, x in part._asdict().items() if isinstance(x, Tensor)})


def _with_more_rows(part: Linear) -> Linear | None:
    """A copy with rows of 0 up to a multiple of `HEAD_ROWS`; None where there is one."""
    more = -len(part.weight) % HEAD_ROWS
    if not more:
        return None
    bias = None if part.bias is None else F.pad(part.bias, (0, more))
    return Linear(F.pad(part.weight, (0, 0, 0, more)), bias)


def _moved(part: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A part with all its tensors on `device` in `dtype`."""
    if isinstance(part, Tensor):
        return part.to(device=device, dtype=dtype)
    if isinstance(part, Linear | Norm):
        return type(part)(*(_moved(each, device, dtype) for each in part))
    if isinstance(part, tuple):
        return tuple(_moved(each, device, dtype) for each in part)
    if isinstance(part, Block | Decoder):
        return replace(part, **{f.name: _moved(getattr(part, f.name), device, dtype) for f in fields(part)})
    return part
