"""A protein decoded from a cache, against the same decode with an fp32 cache."""

from __future__ import annotations

import torch

from turboesm_cli.engine.prompts import Prompt
from turboesm_cli.evaluation import metrics
from turboesm_cli.evaluation.protein_results import ProteinResult
from turboesm_cli.evaluation.teacher_forced import compare_next, compare_predictions
from turboesm_cli.models import forward
from turboesm_cli.models.protocol import Model
from turboesm_cli.models.sampling import residue_logits
from turboesm_cli.outputs.work import Tensors


@torch.no_grad()
def compare(model: Model, prompt: Prompt, found: Tensors) -> list[ProteinResult]:
    """What `tasks.Forced` gave, against an fp32 cache; for an encoder also drift, fp32 against the encoder."""
    tokens, cached = prompt.tokens[None].to(model.device), prompt.cached
    predictions = None
    if model.causal:
        exact = forward.teacher_forced(model, tokens, [cached], None)[0]
        candidate = torch.cat((exact[:cached], found["hidden"]))  # a prompt is encoded exactly
        predictions = compare_next(model, tokens[0], exact, candidate, cached) if len(exact) > cached + 1 else None
        return [ProteinResult(prompt.protein, metrics.cosines(exact[cached:], found["hidden"]).cpu(), predictions)]
    if "logits" in found:
        exact, masked = (x[0, cached:] for x in forward.teacher_forced_with_masks(model, tokens, [cached], None))
        predictions = compare_predictions(
            model, tokens[0, cached:], residue_logits(model, masked), found["logits"]
        )
    else:
        exact = forward.teacher_forced(model, tokens, [cached], None)[0, cached:]
    encoded = forward.encode(model, tokens)[0, cached:]
    quantization = ProteinResult(prompt.protein, metrics.cosines(exact, found["hidden"]).cpu(), predictions)
    return [quantization, ProteinResult(prompt.protein, metrics.cosines(encoded, exact).cpu())]
