"""A model and a criterion -> scores. START HERE in this folder."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers

from amprune import __version__
from amprune.errors import ScoresError
from amprune.model.architecture import PreTrainedModel
from amprune.model.loading import computing_dtype, device_of, input_device, loaded_model
from amprune.model.reader import Checkpoint, open_model
from amprune.model.shape import ModelShape
from amprune.running import Progress, no_progress
from amprune.scoring.activations import measure_activations
from amprune.scoring.blocks import block_perplexities
from amprune.scoring.catalogue import Criterion, Needs, find_criterion
from amprune.scoring.formulas import LayerStatistics, Rule
from amprune.scoring.gradients import check_memory, score_gradients
from amprune.scoring.scores import ImportanceScores, InputMeans
from amprune.scoring.weights import magnitude, random_scores
from amprune.settings import Compute, PathLike, ScoreSettings, settle, with_preset
from amprune.text.calibration import CalibrationSet, draw


def score(
    model: PathLike, settings: ScoreSettings | None = None, *, progress: Progress = no_progress, **options: Any
) -> ImportanceScores:
    """Scores every head, key-value group and neuron of a model, or every block, by one criterion.

    Where the split between heads and neurons is to be measured (`allocate`), the last eighth of the samples is left
    out, which the plan measures on.

    Args:
        model: a Hugging Face folder, a `.gguf` file, an alias or a hub id.
        settings: what else is asked for; the options of `ScoreSettings` may be given one by one, too.
        progress: told how far it is.
        options: of `ScoreSettings`, such as `criterion="amp"` or `preset="paper"`.

    Raises:
        AmpruneError: one of its children says what is wrong with the criterion, the model, the set or the activations.
    """
    asked = with_preset(settle(ScoreSettings, settings, options))
    rule = find_criterion(str(asked.criterion))
    _, dense = open_model(model, revision=asked.revision, dtype=asked.dtype)
    samples = None
    if rule.calibrated:
        samples = draw(dense, asked, trust_remote_code=asked.trust_remote_code, progress=progress)
    if samples is not None and asked.allocate and not rule.depth:
        samples, _ = samples.split()
    return score_criteria(dense, [rule], samples, asked, seed=asked.seed, progress=progress)[rule.name]


def score_criteria(
    dense: Checkpoint,
    criteria: Sequence[Criterion],
    samples: CalibrationSet | None,
    where: Compute,
    *,
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[str, ImportanceScores]:
    """Scores an opened model by several criteria; one pass over the samples serves all that need the same."""
    kind = computing_dtype(dense, where)
    name = str(kind).removeprefix("torch.")
    scored = {one.name: _score_weights(dense, one, seed) for one in criteria if not one.calibrated}
    calibrated, device = [one for one in criteria if one.calibrated], "cpu"
    if calibrated and samples is not None:
        if any(one.needs is Needs.GRADIENTS for one in calibrated):
            _check_gradients(dense, samples, kind, where)
        with loaded_model(dense, dtype=name, device=where.device, device_map=where.device_map) as loaded:
            device = input_device(loaded).type
            scored |= _score_calibrated(loaded, dense, samples, calibrated, where.batch_tokens, progress)
    settings = {
        "dtype": name,
        "amprune": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {
        one.name: ImportanceScores(
            **scored[one.name],
            shape=dense.shape,
            fingerprint=dense.fingerprint,
            criterion=one.name,
            calibration=samples.to_dict() if one.calibrated and samples is not None else {},
            settings={**settings, "device": device} if one.calibrated else {**settings, "device": "cpu", "seed": seed},
        )
        for one in criteria
    }


_Scored = dict[str, Any]
"""Those arguments of `ImportanceScores` that a criterion gives."""


def _score_weights(dense: Checkpoint, criterion: Criterion, seed: int) -> _Scored:
    """Scores without a forward pass: by the weights, read a layer at a time, or by a draw."""
    shape, architecture = dense.shape, dense.architecture
    if criterion.needs is Needs.NOTHING:
        return {"layers": tuple(random_scores(shape, seed=seed, layer=layer) for layer in range(shape.num_layers))}
    owned = (architecture.layer_tensors(layer) for layer in range(shape.num_layers))
    return {"layers": tuple(magnitude({cut: dense[name] for cut, name in cuts.items()}, shape) for cuts in owned)}


def _score_calibrated(
    model: PreTrainedModel,
    dense: Checkpoint,
    samples: CalibrationSet,
    criteria: Sequence[Criterion],
    batch_tokens: int,
    progress: Progress,
) -> dict[str, _Scored]:
    """Runs each pass that one of the criteria needs, once."""
    scored: dict[str, _Scored] = {}
    needs, architecture = {one.needs for one in criteria}, dense.architecture
    if Needs.ACTIVATIONS in needs:
        layers = measure_activations(model, architecture, samples, batch_tokens=batch_tokens, progress=progress)
        scored |= {
            one.name: _score_activations(one.score, layers, dense.shape, means=one.means)
            for one in criteria
            if one.score
        }
    if Needs.GRADIENTS in needs:
        units, blocks = score_gradients(model, architecture, samples, progress=progress)
        by_depth: _Scored = {"layers": (), "blocks": blocks}
        scored |= {
            one.name: by_depth if one.depth else {"layers": units} for one in criteria if one.needs is Needs.GRADIENTS
        }
    if Needs.LOSSES in needs:
        losses = block_perplexities(model, architecture, samples, batch_tokens=batch_tokens, progress=progress)
        scored |= {one.name: {"layers": (), "blocks": losses} for one in criteria if one.needs is Needs.LOSSES}
    return scored


def _score_activations(rule: Rule, layers: Sequence[LayerStatistics], shape: ModelShape, *, means: bool) -> _Scored:
    scored: _Scored = {"layers": tuple(rule(layer, shape) for layer in layers)}
    if means:
        scored["input_means"] = tuple(
            InputMeans(*(inputs.mean.float().numpy() for inputs in (layer.attention, layer.mlp))) for layer in layers
        )
    return scored


def _check_gradients(dense: Checkpoint, samples: CalibrationSet, dtype: torch.dtype, where: Compute) -> None:
    if where.device_map is not None:
        raise ScoresError(
            "a criterion that needs gradients needs the whole model on one device; leave out --device-map, or choose "
            "a criterion that needs none, such as amp"
        )
    check_memory(dense, samples, dtype, device=device_of(where.device))
