"""ESM-2 behind the seam of `protocol`: fair-esm's own `ESM2` module, taken apart layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turboesm_kernels.token_tables import TokenTables

from turboesm_cli.errors import ModelError
from turboesm_cli.models.alphabet import Alphabet
from turboesm_cli.models.esm2_alphabet import ESM2_ALPHABET
from turboesm_cli.models.fair_esm import ESM2, gelu
from turboesm_cli.models.norms import Norm, few_rows
from turboesm_cli.models.shapes import Shape
from turboesm_cli.models.weights import widened

MASK_RATIO_IN_TRAINING = 0.15 * 0.8

_EMBEDDED: WeakKeyDictionary[nn.Module, tuple[Tensor, int, Tensor]] = WeakKeyDictionary()
"""Of each network in use, the weights that its embeddings were made of, kept so that no others
come to lie where they do, their version, and what `EsmModel.embed` takes of them."""


@dataclass(frozen=True)
class EsmModel:
    """A loaded ESM-2 model.

    name         as it appears in bundles and results
    net          fair-esm's ESM2 in evaluation mode
    shape        its size
    fingerprint  sha256 over a sample of the trunk's weights, and settings unlike ESM-2's usual ones, so that a
                 bundle can tell its model
    has_lm_head  False where the checkpoint is a trunk alone
    is_random    weights are random: good for time and memory, never for accuracy
    note         what a user should know about these weights, or ""
    """

    name: str
    net: ESM2
    shape: Shape
    fingerprint: str
    has_lm_head: bool
    is_random: bool = False
    note: str = ""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.net.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.net.embed_tokens.weight.dtype

    @property
    def family(self) -> str:
        """As `families` calls it."""
        return "esm2"

    @property
    def alphabet(self) -> Alphabet:
        """ESM-2's tokens."""
        return ESM2_ALPHABET

    @property
    def causal(self) -> bool:
        """ESM-2 is an encoder: every token sees every other."""
        return False

    @property
    def inverse_frequencies(self) -> Tensor:
        """RoPE's inverse frequencies float32 [d / 2], the same in every layer."""
        return self.net.layers[0].self_attn.rot_emb.inv_freq

    def require_lm_head(self, purpose: str) -> None:
        """Raise ModelError where there is no language-model head to do `purpose` with."""
        if not self.has_lm_head:
            raise ModelError(
                f"{self.name} is a trunk without a language-model head, which {purpose} needs; "
                "name a full ESM-2 checkpoint with --model"
            )

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> EsmModel:
        """The model on another device or in another dtype (RoPE's frequencies stay float32)."""
        frequencies = [layer.self_attn.rot_emb.inv_freq for layer in self.net.layers]
        net = self.net.to(device=device, dtype=dtype)
        for layer, exact in zip(net.layers, frequencies, strict=True):
            layer.self_attn.rot_emb.inv_freq = exact.to(device)
        return replace(self, net=net)

    def unmasked_fraction(self, tokens: Tensor) -> Tensor:
        """What token dropout divides embeddings by, float32 [B, 1, 1]: 1 less the share of `<mask>`."""
        observed = tokens.eq(self.alphabet.mask).sum(-1) / self.alphabet.lengths(tokens).clamp_min(1)
        return (1 - observed)[:, None, None]

    def embed(self, tokens: Tensor, positions: Tensor | None, unmasked: Tensor) -> Tensor:
        """Embeddings [B, T, E], scaled by token dropout, of masks and padding 0; positions come in as RoPE."""
        x = F.embedding(tokens, self._kinds_embedded())  # which refuses what is no token, below 0 too
        return x / unmasked.to(x.dtype) if self.net.token_dropout else x

    def _kinds_embedded(self) -> Tensor:
        """What `embed` makes of each kind of token before it knows how many are masked, [V, E].

        Kept until the weights change: a step would take a dozen small kernels for it.
        """
        weight = self.net.embed_tokens.weight
        if torch.is_grad_enabled() or weight.is_inference():
            return self._embed_kinds(weight)
        kept = _EMBEDDED.get(self.net)
        if kept is None or kept[0].data_ptr() != weight.data_ptr() or kept[1] != weight._version:
            kept = _EMBEDDED[self.net] = weight.detach(), weight._version, self._embed_kinds(weight)
        return kept[2]

    def _embed_kinds(self, weight: Tensor) -> Tensor:
        zero = torch.zeros(len(weight), 1, dtype=torch.bool, device=weight.device)
        zero[self.alphabet.padding] = True
        if self.net.token_dropout:
            zero[self.alphabet.mask] = True
            weight = weight * self._embedding_scale
        return weight.masked_fill(zero, 0.0)

    @property
    def _embedding_scale(self) -> float:
        return 1 - MASK_RATIO_IN_TRAINING if self.net.token_dropout else 1.0

    def attention_input(self, layer: int, x: Tensor) -> Tensor:
        """Hidden states [B, T, E], normed."""
        normed: Tensor = self.net.layers[layer].self_attn_layer_norm(x)
        return normed

    def project(self, layer: int, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (scaled), k and v [B, H, T, d], before RoPE."""
        own, heads = self.net.layers[layer].self_attn, self.shape.heads
        q = _split(own.q_proj(normed) * own.scaling, heads)
        return q, _split(own.k_proj(normed), heads), _split(own.v_proj(normed), heads)

    def joint_projection(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Weight [3 E, E] and bias [3 E] of queries, keys and values, of which the layer's own become views."""
        own = self.net.layers[layer].self_attn
        linears = [own.q_proj, own.k_proj, own.v_proj]
        weight, bias = (_join(linears, name) for name in ("weight", "bias"))
        return weight, bias

    @property
    def query_scale(self) -> float:
        """Of the joint projection's queries."""
        return float(self.shape.head_dim**-0.5)

    def after_attention(self, layer: int, x: Tensor, normed: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output [B, T, E], and what follows takes: that normed."""
        own = self.net.layers[layer]
        attended = attended.transpose(1, 2).flatten(2)
        x, hidden = _norm(own.final_layer_norm).of_product(x, attended, *_weights(own.self_attn.out_proj))
        del attended  # names are let go of and taken again: here a prefill takes the most memory
        if few_rows(hidden, own.fc1.weight):
            from turboesm_kernels.linear import linear

            hidden = linear(hidden, *_weights(own.fc1), "gelu")
        else:
            activation = F.gelu if x.is_cuda else gelu  # one kernel, or fair-esm's result to the bit
            hidden = own.fc1(hidden)
            hidden = activation(hidden)
        return self._norm_after(layer).of_product(x, hidden, *_weights(own.fc2))

    def _norm_after(self, layer: int) -> Norm:
        last = layer + 1 == self.shape.layers
        return _norm(self.net.emb_layer_norm_after if last else self.net.layers[layer + 1].self_attn_layer_norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., 33]. Raises ModelError for a trunk without a language-model head."""
        self.require_lm_head("a distribution over residues")
        head = self.net.lm_head
        if not few_rows(hidden, head.weight):
            exact: Tensor = head(hidden)
            return exact
        from turboesm_kernels.linear import linear

        normed = head.layer_norm(linear(hidden, *_weights(head.dense), "gelu"))
        return linear(normed, head.weight, head.bias)

    def _every_token(self) -> Tensor:
        return torch.arange(len(self.alphabet), device=self.device)[None]

    @torch.no_grad()
    def first_layer_tables(self) -> TokenTables:
        """Layer 0's keys and values of all kinds of token, in float32 at least.

        Token dropout scales an embedding by s; layer norm takes that out again but for its epsilon, which leaves
        s sigma / sqrt(s^2 sigma^2 + epsilon), sigma the embedding's deviation.
        """
        unscaled = self.embed(self._every_token(), None, torch.ones(1, 1, 1, device=self.device))[0]
        embedded = widened(unscaled / self._embedding_scale)
        centred = embedded - embedded.mean(-1, keepdim=True)
        sigma = centred.square().mean(-1, keepdim=True).sqrt()
        attention, norm = self.net.layers[0].self_attn, self.net.layers[0].self_attn_layer_norm
        scaled = centred / sigma.clamp_min(1e-30) * widened(norm.weight)  # 0 for kinds whose embedding is 0
        parts = []
        for linear in (attention.k_proj, attention.v_proj):
            weight, bias = widened(linear.weight), widened(linear.bias)
            kind = _split(scaled[None] @ weight.T, self.shape.heads)[0].contiguous()
            parts += [kind, (weight @ widened(norm.bias) + bias).view(self.shape.heads, self.shape.head_dim)]
        k, k_const, v, v_const = parts
        sigma = sigma[:, 0] * self._embedding_scale
        return TokenTables(k, v, k_const, v_const, sigma, norm.eps, bool(self.net.token_dropout))

    def output_weight(self, layer: int) -> Tensor:
        """Weight [E, H d] of the attention's output projection."""
        weight: Tensor = self.net.layers[layer].self_attn.out_proj.weight
        return weight


def _weights(module: nn.Linear) -> tuple[Tensor, Tensor]:
    return module.weight, module.bias


def _norm(module: nn.LayerNorm) -> Norm:
    return Norm(module.weight, module.bias, module.eps)


def _join(linears: Sequence[nn.Module], name: str) -> Tensor:
    whole = torch.cat([getattr(linear, name).data for linear in linears])
    for linear, part in zip(linears, whole.chunk(len(linears)), strict=True):
        getattr(linear, name).data = part
    return whole


def _split(x: Tensor, heads: int) -> Tensor:
    """[B, T, H d] -> [B, H, T, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
