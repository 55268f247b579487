"""Prefill and decode over a cache: the same mathematics as fair-esm where that is defined."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

import pytest
import torch
from unlike import UNLIKE

from turboesm_cli.cache.dense import DenseCache, DenseCodec
from turboesm_cli.cache.formats import FORMATS
from turboesm_cli.cache.packed import PackedCache, PackedCodec
from turboesm_cli.codec.fit import CodecSpec, fit
from turboesm_cli.codec.recipes import RECIPES
from turboesm_cli.models import forward
from turboesm_cli.models.esm2 import EsmModel
from turboesm_cli.models.esm2_alphabet import ESM2_ALPHABET
from turboesm_cli.sequences.fasta import Protein
from turboesm_cli.statistics.batching import to_tokens
from turboesm_cli.statistics.collect import collect

PROMPTS = [0, 1, 4, 9]


def test_recipes_that_are_unlike_have_every_part(specs: dict[str, CodecSpec]) -> None:
    """All that other recipes show to a cache, one of these shows, too."""

    def parts(names: Iterable[str]) -> set[tuple[str, object]]:
        found: set[tuple[str, object]] = set()
        for spec in map(specs.__getitem__, names):
            found |= {("keeps leading tokens", spec.recipe.sinks > 0), ("grid", spec.recipe.grid)}
            for index, layer in enumerate(spec.layers):
                found.add((f"layer {index} is coded", layer is not None))
                for side in (layer.k, layer.v) if layer else ():
                    widths = {width for profile in side.profiles for width in profile.widths}
                    found |= {("widths differ", len(widths) > 1), ("axes left out", 0 in widths)}
                    found |= {("scale", side.scale), ("centre", bool(side.centre.any()))}
            found.add(("residual", spec.recipe.residual))
        return found

    assert parts(UNLIKE) == parts(RECIPES)


def one_by_one(model: EsmModel, tokens: torch.Tensor, prompt: int, cache: forward.Cache) -> torch.Tensor:
    with torch.no_grad():
        parts = [forward.prefill(model, tokens[:, :prompt], cache)] if prompt else []
        parts.append(forward.replay(model, tokens[:, prompt:], cache))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_one_causal_pass_equals_decoding_token_by_token_fp32(
    tiny: EsmModel, peptides: list[Protein], prompt: int
) -> None:
    tokens = to_tokens(peptides[:1], tiny)
    stepped = one_by_one(tiny, tokens, prompt, DenseCache(tiny, 1, tokens.shape[1], FORMATS["fp32"]))
    with torch.no_grad():
        passed = forward.teacher_forced(tiny, tokens, [prompt], None)
    assert torch.allclose(stepped, passed, atol=2e-5)


@pytest.mark.parametrize("recipe", UNLIKE)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_one_causal_pass_equals_decoding_token_by_token_packed(
    precise: EsmModel, precise_specs: dict[str, CodecSpec], peptides: list[Protein], prompt: int, recipe: str
) -> None:
    spec = precise_specs[recipe]
    tokens = to_tokens(peptides[:1], precise)
    cache = PackedCache(precise, spec, 1, tokens.shape[1], backend="torch")
    stepped = one_by_one(precise, tokens, prompt, cache)
    with torch.no_grad():
        passed = forward.teacher_forced(precise, tokens, [prompt], PackedCodec(spec, torch.device("cpu")))
        exact = forward.teacher_forced(precise, tokens, [prompt], None)
    assert torch.allclose(stepped, passed, atol=1e-6)  # codes' levels are float32; another code is off by 1e-3
    assert torch.allclose(passed[:, :prompt], exact[:, :prompt], rtol=0, atol=1e-13)  # prefill is exact
    assert not torch.allclose(passed[:, prompt:], exact[:, prompt:], atol=1e-9)  # and what follows is quantized


def masks_one_by_one(model: EsmModel, tokens: torch.Tensor, prompt: int, cache: forward.Cache) -> torch.Tensor:
    """The definition: decode a mask in a token's place, forget it, decode the token."""
    found = []
    with torch.no_grad():
        if prompt:
            forward.prefill(model, tokens[:, :prompt], cache)
        for column in tokens[:, prompt:].unbind(1):
            found.append(forward.step(model, torch.full_like(column, ESM2_ALPHABET.mask), cache))
            cache.rewind()
            forward.step(model, column, cache)
    return torch.stack(found, 1)


@pytest.mark.parametrize("kind", ["fp32", "int8", *UNLIKE])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_second_stream_of_masks_equals_a_mask_at_each_step(
    precise: EsmModel, precise_specs: dict[str, CodecSpec], peptides: list[Protein], prompt: int, kind: str
) -> None:
    tokens = to_tokens(peptides[:1], precise)
    tokens[0, 2] = ESM2_ALPHABET.mask  # token dropout of the prompt, and a mask that is decoded
    cache: forward.Cache
    if kind in FORMATS:
        cache = DenseCache(precise, 1, tokens.shape[1], FORMATS[kind])
        codec: forward.Codec = DenseCodec(FORMATS[kind])
    else:
        cache = PackedCache(precise, precise_specs[kind], 1, tokens.shape[1], backend="torch")
        codec = PackedCodec(precise_specs[kind], torch.device("cpu"))
    stepped = masks_one_by_one(precise, tokens, prompt, cache)
    with torch.no_grad():
        passed, masks = forward.teacher_forced_with_masks(precise, tokens, [prompt], codec)
        alone = forward.teacher_forced(precise, tokens, [prompt], codec)
    assert torch.allclose(stepped, masks[:, prompt:], atol=1e-6)
    assert torch.allclose(passed, alone, atol=1e-12)  # the tokens do not see the masks
    assert not torch.allclose(masks[:, prompt:], passed[:, prompt:], atol=1e-3)


def test_a_mask_does_not_see_the_token_in_its_place(
    precise: EsmModel, precise_specs: dict[str, CodecSpec], peptides: list[Protein]
) -> None:
    """Nor what comes after: the prediction at a place is the same whatever stands there."""
    tokens = to_tokens(peptides[:1], precise)
    other = tokens.clone()
    other[0, 9] = 5 if int(tokens[0, 9]) != 5 else 6
    codec = PackedCodec(precise_specs["flat"], torch.device("cpu"))
    with torch.no_grad():
        pair = [forward.teacher_forced_with_masks(precise, x, [3], codec)[1] for x in (tokens, other)]
    assert torch.equal(pair[0][:, :10], pair[1][:, :10])
    assert not torch.allclose(pair[0][:, 10:], pair[1][:, 10:], atol=1e-6)


def test_masks_in_a_padded_batch_are_those_of_each_protein_alone(
    precise: EsmModel, precise_specs: dict[str, CodecSpec], peptides: list[Protein]
) -> None:
    tokens = to_tokens(peptides[:4], precise)
    prompts = [0, 5, 2, 1]
    codec = PackedCodec(precise_specs["auto"], torch.device("cpu"))
    with torch.no_grad():
        batch = forward.teacher_forced_with_masks(precise, tokens, prompts, codec)[1]
        for row, prompt in enumerate(prompts):
            length = int(tokens[row].ne(ESM2_ALPHABET.padding).sum())
            one = tokens[row : row + 1, :length]
            alone = forward.teacher_forced_with_masks(precise, one, [prompt], codec)[1]
            assert torch.allclose(batch[row, prompt:length], alone[0, prompt:], atol=1e-9)


@pytest.mark.parametrize("form", ["fp16", "bf16", "int8", "fp8"])
def test_dense_caches_round_as_their_codecs_say(precise: EsmModel, peptides: list[Protein], form: str) -> None:
    tokens = to_tokens(peptides[:1], precise)
    stepped = one_by_one(precise, tokens, 3, DenseCache(precise, 1, tokens.shape[1], FORMATS[form]))
    with torch.no_grad():
        passed = forward.teacher_forced(precise, tokens, [3], DenseCodec(FORMATS[form]))
        exact = forward.teacher_forced(precise, tokens, [3], None)
    assert torch.allclose(stepped, passed, atol=1e-6)
    assert not torch.allclose(stepped, exact, atol=1e-6)


def test_a_padded_batch_equals_each_protein_alone(
    tiny: EsmModel, specs: dict[str, CodecSpec], peptides: list[Protein]
) -> None:
    tokens = to_tokens(peptides[:4], tiny)
    tokens[1, 2] = ESM2_ALPHABET.mask
    prompts = [0, 5, 2, 1]
    with torch.no_grad():
        batch = forward.teacher_forced(tiny, tokens, prompts, PackedCodec(specs["flat"], torch.device("cpu")))
        for row, prompt in enumerate(prompts):
            length = int(tokens[row].ne(ESM2_ALPHABET.padding).sum())
            alone = forward.teacher_forced(
                tiny, tokens[row : row + 1, :length], [prompt], PackedCodec(specs["flat"], torch.device("cpu"))
            )
            assert torch.allclose(batch[row, :length], alone[0], atol=2e-5)


def test_fp32_decode_from_an_empty_cache_is_fair_esm_under_a_causal_mask(
    tiny: EsmModel, peptides: list[Protein]
) -> None:
    tokens = to_tokens(peptides[:1], tiny)
    causal = torch.full((tokens.shape[1],) * 2, -torch.inf).triu(1)
    with torch.no_grad():
        x = tiny.net.embed_tokens(tokens) * (1 - 0.12)
        x = x.transpose(0, 1)
        for layer in tiny.net.layers:
            x, _ = layer(x, self_attn_mask=causal)
        expected = tiny.net.emb_layer_norm_after(x).transpose(0, 1)
        found = forward.teacher_forced(tiny, tokens, [0], None)
    assert torch.allclose(found, expected, atol=1e-5)


def test_fp32_prefill_is_fair_esm_on_the_prompt(tiny: EsmModel, peptides: list[Protein]) -> None:
    tokens = to_tokens(peptides[:1], tiny)[:, :7]
    tokens[0, 3] = ESM2_ALPHABET.mask
    with torch.no_grad():
        found = forward.prefill(tiny, tokens, DenseCache(tiny, 1, 7, FORMATS["fp32"]))
        expected = tiny.net(tokens, repr_layers=[2])["representations"][2]
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_prompts_mask_fraction_stays_in_force(tiny: EsmModel, peptides: list[Protein]) -> None:
    tokens = to_tokens(peptides[:1], tiny)
    tokens[0, 2:4] = ESM2_ALPHABET.mask
    stepped = one_by_one(tiny, tokens, 8, DenseCache(tiny, 1, tokens.shape[1], FORMATS["fp32"]))
    with torch.no_grad():
        passed = forward.teacher_forced(tiny, tokens, [8], None)
    assert torch.allclose(stepped, passed, atol=2e-5)
    assert tiny.unmasked_fraction(tokens[:, :8]).item() == pytest.approx(6 / 8)


def test_layer_0_follows_from_the_token(tiny: EsmModel, peptides: list[Protein]) -> None:
    tokens = to_tokens(peptides[:1], tiny)
    seen = []

    def observe(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.append((k, v))
        return v

    with torch.no_grad():
        forward.encode(tiny, tokens, observe)
        unmasked, rope = tiny.unmasked_fraction(tokens).view(-1), forward.rope_at(tiny, 0, tokens.shape[1])
        keys, values = tiny.first_layer_tables().keys_values(tokens, unmasked, rope)
    assert torch.allclose(keys, seen[0][0], atol=1e-5)
    assert torch.allclose(values, seen[0][1], atol=1e-5)


class CausalModel(EsmModel):
    """ESM-2's weights as a model whose tokens see earlier ones alone."""

    @property
    def causal(self) -> bool:
        return True


@pytest.fixture(scope="module")
def causal(precise: EsmModel) -> CausalModel:
    return CausalModel(**{field.name: getattr(precise, field.name) for field in fields(EsmModel)})


@pytest.mark.parametrize("prompt", [0, 1, 7])
def test_a_causal_model_does_not_drift(causal: CausalModel, peptides: list[Protein], prompt: int) -> None:
    tokens = to_tokens(peptides[:1], causal)
    with torch.no_grad():
        encoded = forward.encode(causal, tokens)
        passed = forward.teacher_forced(causal, tokens, [prompt], None)
        stepped = one_by_one(causal, tokens, prompt, DenseCache(causal, 1, tokens.shape[1], FORMATS["fp32"]))
    assert torch.allclose(passed, encoded, atol=1e-9) and torch.allclose(stepped, encoded, atol=1e-4)


def test_a_causal_model_is_calibrated_and_decoded(
    causal: CausalModel, calibration_proteins: list[Protein]
) -> None:
    spec = fit(causal, collect(causal, calibration_proteins[:12]), RECIPES["auto"])
    tokens = to_tokens(calibration_proteins[20:22], causal)
    lengths = causal.alphabet.lengths(tokens).tolist()
    with torch.no_grad():
        codec = PackedCodec(spec, causal.device)
        exact, found = (forward.teacher_forced(causal, tokens, [5, 9], each) for each in (None, codec))
    for row, length in enumerate(lengths):
        assert torch.cosine_similarity(exact[row, :length], found[row, :length], dim=-1).mean() > 0.98
