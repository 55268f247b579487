"""`turboesm.hf`: unchanged `generate` of Hugging Face models, from our packed cache."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import turboesm as te
from torch import Tensor

from turboesm_cli.codec.bundle import Bundle
from turboesm_cli.models.alphabet import AMINO_ACIDS
from turboesm_cli.models.decoder import Decoder
from turboesm_cli.sequences.fasta import Protein

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
from turboesm.hf import NAME, TurboCache, use_turboesm  # noqa: E402

CACHE = "cache" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24) else "past_key_values"
TOKENS = ("<pad>", "<bos>", "<eos>", *AMINO_ACIDS)
SIZES = {"vocab_size": len(TOKENS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = SIZES | {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64}
LLAMA = SIZES | {
    "hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2, "intermediate_size": 96,
    "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT),
    "gptj": ("gptj", GPT | {"rotary_dim": 8}),
    "llama-1:1": ("llama", LLAMA | {"num_key_value_heads": 8}),
    "llama-2:1": ("llama", LLAMA | {"num_key_value_heads": 4, "head_dim": 24}),
    "llama-8:1": ("llama", LLAMA | {"num_key_value_heads": 1}),
    "mistral": ("mistral", LLAMA | {"num_key_value_heads": 2, "sliding_window": 63}),
}
PROMPTS = ("MKTAYIAKQR", "MS", "GSHMLE")


@dataclass(frozen=True)
class Pair:
    """A model as transformers has it and as turboesm does, and a bundle of it.

    In float64, so that rounding does not tip a code over a threshold.
    """

    hf: Any
    own: Decoder
    bundle: Bundle
    folder: Path

    def prompts(self, texts: Sequence[str] = PROMPTS) -> list[Tensor]:
        return [torch.tensor([1, *map(TOKENS.index, text)]) for text in texts]

    def decoded(self, tokens: Tensor, prompt: int) -> Tensor:
        """Logits [n, V] after a prompt and each further token but the last, int64 [T], by our own engine."""
        cache = te.PackedCache(self.own, self.bundle, 1, len(tokens))
        hidden = [te.prefill(self.own, tokens[None, :prompt], cache)[:, -1]]
        hidden += [te.step(self.own, token[None], cache) for token in tokens[prompt:-1]]
        return self.own.logits(torch.cat(hidden))


def random_pair(folder: Path, kind: str, proteins: list[Protein], recipe: str = "auto@3", seed: int = 0) -> Pair:
    family, settings = CONFIGS[kind]
    config = transformers.AutoConfig.for_model(family, **settings, initializer_range=0.35)
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(TOKENS), encoding="utf-8")
    special = {"bos_token": "<bos>", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special), encoding="utf-8")
    own = te.load_model(str(folder), "cpu")
    bundle = te.calibrate(own, proteins, recipe)
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    hf.generation_config.eos_token_id = None  # they go on to the end
    assert isinstance(own, Decoder)
    return Pair(hf, own.to(torch.device("cpu"), torch.float64), bundle, folder)


@pytest.fixture(scope="module")
def short(calibration_proteins: list[Protein]) -> list[Protein]:
    """Parts of proteins that fit in the tiny models' context, enough for heads of 80 channels."""
    return [Protein(found.accession, "", found.sequence[:56]) for found in calibration_proteins[:24]]


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, short: list[Protein]) -> Pair:
    found = random_pair(tmp_path_factory.mktemp("pair"), request.param, short)
    if request.param == "gptj" and CACHE != "cache":
        with pytest.raises(te.ModelError, match=r"attention of its own.*GPT-J needs transformers 5\.24"):
            use_turboesm(found.hf, found.bundle)
        pytest.skip("transformers before 5.24 reaches GPT-J's attention by no interface")
    use_turboesm(found.hf, found.bundle)
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, short: list[Protein]) -> Pair:
    found = random_pair(tmp_path_factory.mktemp("llama"), "llama-2:1", short)
    use_turboesm(found.hf, found.bundle)
    return found


def padded(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """What a tokenizer that pads on the left gives."""
    width = max(map(len, rows))
    ids = torch.stack([torch.cat((row.new_zeros(width - len(row)), row)) for row in rows])
    mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def generate(pair: Pair, rows: Sequence[Tensor], cache: TurboCache | None, new: int = 12, **settings: Any) -> Any:
    given = padded(rows) | ({} if cache is None else {CACHE: cache})
    return pair.hf.generate(
        **given, max_new_tokens=new, return_dict_in_generate=True, output_logits=True, **settings
    )


def check_logits(pair: Pair, rows: Sequence[Tensor], found: Any, tolerance: float = 1e-4) -> None:
    """Each sequence's logits are those of our own engine, which decodes it alone."""
    width, logits = max(map(len, rows)), torch.stack(found.logits, 1)
    each = len(found.sequences) // len(rows)
    for index, sequence in enumerate(found.sequences):
        prompt = len(rows[index // each])
        alone = pair.decoded(sequence[width - prompt :], prompt)
        assert (logits[index] - alone).abs().max() < tolerance


def test_greedy_decoding_is_that_of_our_engine(pair: Pair) -> None:
    rows = pair.prompts()
    cache = TurboCache(pair.hf)
    found = generate(pair, rows, cache, do_sample=False)
    check_logits(pair, rows, found)
    assert len(set(found.sequences[:, -12:].flatten().tolist())) > 4  # no loop of one token
    dense = torch.stack(generate(pair, rows, None, do_sample=False).logits, 1)
    packed = torch.stack(found.logits, 1)
    assert torch.equal(dense[:, 0], packed[:, 0])  # prompts are exact
    assert (dense[:, 1] - packed[:, 1]).abs().max() > 1e-4  # and what comes after is packed
    assert cache.get_seq_length() == len(rows[0]) + 11 and cache.nbytes > 0 and not cache.is_compileable


def test_samples_of_several_prompts(pair: Pair) -> None:
    rows = pair.prompts()
    settings = {"do_sample": True, "num_return_sequences": 2, "temperature": 1.5, "top_k": 0}
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        drawn.append(generate(pair, rows, TurboCache(pair.hf, max_tokens=40), **settings))
    assert torch.equal(drawn[0].sequences, drawn[1].sequences)
    assert len({tuple(row.tolist()) for row in drawn[0].sequences[:, -12:]}) == 6
    check_logits(pair, rows, drawn[0])


def test_beams(pair: Pair) -> None:
    rows = pair.prompts()
    settings = {
        "do_sample": False,
        "num_beams": 3,
        "num_return_sequences": 2,
        "length_penalty": 0.0,
        "output_scores": True,
    }
    found = generate(pair, rows, TurboCache(pair.hf), **settings)
    width = max(map(len, rows))
    for index, (sequence, score) in enumerate(zip(found.sequences, found.sequences_scores, strict=True)):
        prompt = len(rows[index // 2])
        likely = pair.decoded(sequence[width - prompt :], prompt).log_softmax(-1)
        assert abs(likely.gather(1, sequence[width:, None]).sum() - score) < 1e-4
    for index, row in enumerate(rows):
        alone = generate(pair, [row], TurboCache(pair.hf), **settings)
        assert torch.equal(alone.sequences[:, len(row) :], found.sequences[2 * index : 2 * index + 2, width:])


def test_candidates_of_assisted_decoding_are_forgotten(pair: Pair) -> None:
    row = pair.prompts(["MKMKMKAKMK"])
    plain = generate(pair, row, TurboCache(pair.hf), do_sample=False)
    guessed = generate(pair, row, TurboCache(pair.hf), do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(plain.sequences, guessed.sequences)


def forward(pair: Pair, tokens: Tensor, cache: TurboCache, **settings: Any) -> Tensor:
    with torch.no_grad():
        return pair.hf(tokens, **{CACHE: cache}, **settings).logits


def test_several_tokens_at_once_are_decoded_one_by_one(llama: Pair) -> None:
    tokens = llama.prompts(["MKTAYIAKQRLMW"])[0]
    cache = TurboCache(llama.hf)
    forward(llama, tokens[None, :4], cache)
    found = forward(llama, tokens[None, 4:], cache)[0]
    assert (found[:-1] - llama.decoded(tokens, 4)[1:]).abs().max() < 1e-4
    cache.crop(-5)
    assert cache.get_seq_length() == len(tokens) - 5
    assert (forward(llama, tokens[None, -5:], cache)[0] - found[-5:]).abs().max() < 1e-9
    cache.crop(0)
    cache.crop(len(tokens) - 2)
    assert (forward(llama, tokens[None, -2:], cache)[0] - found[-2:]).abs().max() < 1e-9


def test_a_prompt_is_gone_on_from_twice(llama: Pair) -> None:
    start, *ends = llama.prompts(["MKTAYI", "AKQW", "LLE"])
    first = TurboCache(llama.hf)
    forward(llama, start[None], first)
    for end in ends:
        whole = torch.cat((start, end[1:]))
        found = forward(llama, whole[None, len(start) :], copy.deepcopy(first))[0]
        assert (found[:-1] - llama.decoded(whole, len(start))[1:]).abs().max() < 1e-4
    assert first.get_seq_length() == len(start)
    whole = torch.cat((start, ends[0][1:]))
    found = llama.hf.generate(whole[None], **{CACHE: copy.deepcopy(first)}, max_new_tokens=5, do_sample=False)
    alone = llama.decoded(found[0], len(start)).argmax(-1)
    assert torch.equal(alone[len(whole) - len(start) :], found[0, len(whole) :])


def test_sequences_are_chosen_repeated_and_reordered(llama: Pair) -> None:
    rows, then = llama.prompts(), torch.tensor([5, 9, 13])

    def after(cache: TurboCache, order: Sequence[int], length: int) -> None:
        given = padded([rows[index] for index in order])
        mask = torch.nn.functional.pad(
            given["attention_mask"], (max(map(len, rows)) - given["input_ids"].shape[1], 1)
        )
        mask[:, -1] = 1
        found = forward(
            llama, then[list(order)][:, None], cache, attention_mask=mask, position_ids=mask.sum(-1)[:, None] - 1
        )
        for place, index in enumerate(order):
            tokens = torch.cat((rows[index], then[index, None], then[:1]))
            assert (found[place, 0] - llama.decoded(tokens, len(rows[index]))[1]).abs().max() < 1e-4
        assert cache.batch_size == length

    def fresh() -> TurboCache:
        cache, given = TurboCache(llama.hf), padded(rows)
        places = (given["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        forward(llama, given["input_ids"], cache, attention_mask=given["attention_mask"], position_ids=places)
        return cache

    cache = fresh()
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    after(cache, [2, 0, 0], 3)
    cache = fresh()
    cache.batch_repeat_interleave(2)
    after(cache, [0, 0, 1, 1, 2, 2], 6)
    cache = fresh()
    cache.batch_select_indices(torch.tensor([True, False, True]))
    after(cache, [0, 2], 2)
    cache.reset()
    assert cache.get_seq_length() == 0
    check_logits(llama, rows, generate(llama, rows, cache, do_sample=False))
    with pytest.raises(te.InputError, match="cannot be forgotten"):
        cache.crop(-16)  # of a prompt of 3 tokens and 11 more


def test_padding_on_the_right(llama: Pair) -> None:
    rows = llama.prompts()
    given = padded([row.flip(0) for row in rows])
    ids, mask = given["input_ids"].flip(1), given["attention_mask"].flip(1)
    cache = TurboCache(llama.hf)
    exact = forward(llama, ids, cache, attention_mask=mask)
    mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), 1)
    found = forward(
        llama, torch.full((3, 1), 7), cache, attention_mask=mask, position_ids=mask.sum(-1)[:, None] - 1
    )
    for index, row in enumerate(rows):
        alone = llama.decoded(torch.tensor([*row, 7, 7]), len(row))
        assert (exact[index, len(row) - 1] - alone[0]).abs().max() < 1e-4
        assert (found[index, 0] - alone[1]).abs().max() < 1e-4


def test_without_a_packed_cache_nothing_changes(llama: Pair) -> None:
    rows = llama.prompts()
    mine = generate(llama, rows, None, do_sample=False)
    plain = transformers.AutoModelForCausalLM.from_pretrained(llama.folder, dtype=torch.float64).eval()
    plain.generation_config.eos_token_id = None
    assert torch.equal(mine.sequences, generate(replace(llama, hf=plain), rows, None, do_sample=False).sequences)


REFUSED: dict[str, tuple[str, Callable[[Pair, TurboCache], Any]]] = {
    "too long": ("65 tokens do not fit", lambda p, c: forward(p, torch.full((1, 65), 5), c)),
    "gradients": ("no gradients", lambda p, c: p.hf(torch.full((1, 3), 5), **{CACHE: c})),
    "a mask of its own": (
        "attention mask is",
        lambda p, c: forward(p, torch.full((1, 3), 5), c, attention_mask=torch.ones(1, 1, 3, 3)),
    ),
    "padding without positions": (
        "position_ids",
        lambda p, c: forward(p, torch.full((1, 3), 5), c, attention_mask=torch.tensor([[0, 1, 1]])),
    ),
    "nothing but padding": (
        "no token that is not padding",
        lambda p, c: forward(p, torch.full((1, 3), 5), c, attention_mask=torch.zeros(1, 3)),
    ),
    "attention weights": (
        "no attention weights",
        lambda p, c: forward(p, torch.full((1, 3), 5), c, output_attentions=True),
    ),
    "embeddings": (
        "give input_ids",
        lambda p, c: p.hf.generate(inputs_embeds=torch.ones(1, 3, 64).double(), **{CACHE: c}, max_new_tokens=2),
    ),
    "one layer alone": ("change together", lambda p, c: c.layers[0].reorder_cache(torch.tensor([0]))),
    "no forward pass": ("has not been prepared", lambda p, c: c.update(torch.ones(1), torch.ones(1), 0)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_right_is_refused(llama: Pair, what: str) -> None:
    told, call = REFUSED[what]
    with pytest.raises(te.InputError, match=told):
        call(llama, TurboCache(llama.hf))


def test_later_tokens_are_checked_too(llama: Pair) -> None:
    cache = TurboCache(llama.hf, max_tokens=6)
    forward(llama, torch.full((2, 5), 5), cache)
    with pytest.raises(te.InputError, match="3 sequences, and the cache holds 2"):
        forward(llama, torch.full((3, 1), 5), cache)
    with pytest.raises(te.InputError, match="must stand at the positions"):
        forward(llama, torch.full((2, 1), 5), cache, position_ids=torch.tensor([[4]]))
    hidden = torch.tensor([[1, 1, 0, 1, 1, 1]]).expand(2, -1)
    with pytest.raises(te.InputError, match="must stand at the positions"):
        forward(llama, torch.full((2, 1), 5), cache, attention_mask=hidden)
    forward(llama, torch.full((2, 1), 5), cache)
    with pytest.raises(te.InputError, match="7 tokens do not fit in a TurboCache of max_tokens 6"):
        forward(llama, torch.full((2, 1), 5), cache)
    with pytest.raises(te.InputError, match="takes 1 to 64"):
        TurboCache(llama.hf, max_tokens=65)


def test_a_pass_that_broke_off_is_noticed(llama: Pair) -> None:
    cache = TurboCache(llama.hf)
    hook = llama.hf.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forward(llama, torch.full((1, 3), 5), cache)
    hook.remove()
    with pytest.raises(te.InputError, match="broke off"):
        forward(llama, torch.full((1, 3), 5), cache)
    cache.reset()
    forward(llama, torch.full((1, 3), 5), cache)


def test_bundles_and_models_that_do_not_belong_together(llama: Pair, short: list[Protein], tmp_path: Path) -> None:
    other = random_pair(tmp_path, "llama-2:1", short, seed=1)
    with pytest.raises(te.InputError, match="call use_turboesm"):
        TurboCache(other.hf)
    with pytest.raises(te.BundleError, match="their weights differ"):
        use_turboesm(other.hf, llama.bundle)
    with pytest.raises(te.BundleError, match="for models of family 'gpt2'"):
        use_turboesm(other.hf, replace(llama.bundle, family="gpt2"))
    with pytest.raises(te.InputError, match="has not been prepared"):
        forward(other, torch.full((1, 3), 5), TurboCache(llama.hf))
    use_turboesm(other.hf, other.bundle)
    with pytest.raises(te.InputError, match="another model's"):
        forward(other, torch.full((1, 3), 5), TurboCache(llama.hf))
    older = TurboCache(other.hf)
    use_turboesm(other.hf, other.bundle)
    with pytest.raises(te.InputError, match="older than its use_turboesm"):
        forward(other, torch.full((1, 3), 5), older)
    other.hf.set_attn_implementation("sdpa")
    with pytest.raises(te.InputError, match="attention is 'sdpa' now"):
        forward(other, torch.full((1, 3), 5), TurboCache(other.hf))
    other.hf.set_attn_implementation(NAME)
    other.hf.train()
    with pytest.raises(te.InputError, match="no gradients"):
        forward(other, torch.full((1, 3), 5), TurboCache(other.hf))


def test_a_rounded_model_is_known_by_its_files(llama: Pair) -> None:
    def rounded() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(llama.folder, dtype=torch.bfloat16).eval()

    model = rounded()
    use_turboesm(model, llama.bundle)
    found = model.generate(llama.prompts()[0][None], **{CACHE: TurboCache(model)}, max_new_tokens=4)
    assert found.shape[1] == len(llama.prompts()[0]) + 4
    changed = rounded()
    changed.model.embed_tokens.weight.data[3] *= 2
    with pytest.raises(te.BundleError, match=r"not those of .*, rounded to bfloat16"):
        use_turboesm(changed, llama.bundle)
    moved = rounded()
    moved.config.name_or_path = "nowhere"
    with pytest.raises(te.BundleError, match=r"is not to be seen .*nowhere"):
        use_turboesm(moved, llama.bundle)


def test_what_is_no_decoder_is_refused(llama: Pair) -> None:
    config = transformers.EsmConfig(
        vocab_size=33,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        pad_token_id=1,
    )
    with pytest.raises(te.ModelError, match=r"'esm' is not served.*turboesm\.prefill"):
        use_turboesm(transformers.EsmForMaskedLM(config), llama.bundle)
    with pytest.raises(te.ModelError, match="no model of transformers"):
        use_turboesm(torch.nn.Linear(2, 2), llama.bundle)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ar_llama_18M_gqa", "ar_gptj_25M_d80"])
def test_trained_models(name: str, checkpoint_path: Callable[[str], Path], short: list[Protein]) -> None:
    path = checkpoint_path(name)
    if "gptj" in name and CACHE != "cache":
        pytest.skip("transformers before 5.24 reaches GPT-J's attention by no interface")
    own = te.load_model(str(path), "cpu")
    bundle = te.calibrate(own, short, "auto@3")
    hf = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    hf.generation_config.eos_token_id = None
    assert isinstance(own, Decoder)
    pair = Pair(hf, own.to(torch.device("cpu"), torch.float64), bundle, path)
    use_turboesm(hf, pair.bundle)
    starts = zip(short, (4, 7, 10), strict=False)
    rows = [torch.tensor(own.alphabet.prompt(protein, residues)) for protein, residues in starts]
    found = generate(pair, rows, TurboCache(hf), new=24, do_sample=False)
    packed, width, apart = torch.stack(found.logits, 1), max(map(len, rows)), []
    for index, (row, sequence) in enumerate(zip(rows, found.sequences, strict=True)):
        real = sequence[width - len(row) :]
        with torch.no_grad():
            dense = hf(real[None, :-1]).logits[0, len(row) - 1 :]
        error = packed[index] - pair.decoded(real, len(row))
        apart.append(float(error.abs().max()))
        assert error.square().mean() < (packed[index] - dense).square().mean() / 4
    # Keys agree but for their last digits, which in one row may tip a code over a threshold.
    assert sorted(apart)[1] < 1e-4


@pytest.mark.slow
def test_the_example_on_the_page_runs(llama: Pair, short: list[Protein], tmp_path: Path) -> None:
    page = Path(__file__).resolve().parents[1] / "turboesm_cli" / "guides" / "python.md"
    (code,) = re.findall(r"^```py\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert "use_turboesm" in code
    shutil.copytree(llama.folder, tmp_path / "my_model")
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / "my_model" / name).unlink()
    residue_tokenizer().save_pretrained(tmp_path / "my_model")
    records = "".join(f">{protein.accession}\n{protein.sequence}\n" for protein in short)
    (tmp_path / "train.fasta").write_text(records, encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.replace(" ", "").count("MKTAYIAKQR") == 4


def residue_tokenizer() -> Any:
    """`<bos>`, then a token for each letter."""
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel({text: n for n, text in enumerate(TOKENS)}, "<pad>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    fast.post_processor = tokenizers.processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
