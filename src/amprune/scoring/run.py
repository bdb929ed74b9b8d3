"""MODEL -> score -> scores: calibration text is drawn, and units or blocks are scored by one criterion or several."""

import os
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from amprune import __version__
from amprune.errors import ScoresError
from amprune.model.architecture import Architecture
from amprune.model.loading import default_device, input_device, loaded_model
from amprune.model.reader import Checkpoint, read_checkpoint
from amprune.model.shape import ModelShape
from amprune.model.source import open_source
from amprune.running import Progress, no_progress
from amprune.scoring.activations import measure_activations
from amprune.scoring.blocks import block_perplexities
from amprune.scoring.catalogue import DEFAULT, Criterion, Needs, find_criterion
from amprune.scoring.formulas import LayerStatistics, Rule
from amprune.scoring.gradients import check_memory, score_gradients
from amprune.scoring.scores import ImportanceScores, InputMeans
from amprune.scoring.weights import magnitude, random_scores
from amprune.settings import PRESETS
from amprune.text.calibration import CalibrationSet, calibration_for

PathLike = str | os.PathLike[str]

_BEST = PRESETS["best"]


def score(
    model: PathLike,
    *,
    criterion: str = DEFAULT,
    calibration: PathLike | list[str] | CalibrationSet = "alpaca",
    samples: int | None = None,
    tokens: int | None = None,
    max_length: int = 512,
    prompts_only: bool = False,
    seed: int = 0,
    device: str | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
    batch_tokens: int = 4096,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> ImportanceScores:
    """Scores every head, key-value group and neuron of a model, or every block, by one criterion.

    Args:
        model: a Hugging Face folder, a `.gguf` file, an alias or a hub id.
        criterion: one of `amprune.scoring.catalogue.CRITERIA`; amp is Eq. 8 and 9 of the paper.
        calibration: `alpaca`, `mixed`, `builtin`, a file, a list of texts, or token ids as a `CalibrationSet`; criteria
            over weights alone need none.
        samples: drawn at random with `seed`; None: 50, or as many as `tokens` asks for.
        tokens: draw no more samples once there are as many tokens.
        max_length: tokens kept of each sample; never more than the model's positions.
        prompts_only: leave out the responses.
        seed: of the draw, and of the criterion random.
        device: cpu, cuda, cuda:1; the default is cuda where there is one.
        dtype: of the computation; auto is that of the checkpoint (a GGUF file is dequantised to it, auto: bfloat16).
        device_map: `auto` spreads a large model over devices, memory and disk; `disk` streams each layer.
        batch_tokens: most tokens in a batch; changes no score beyond rounding.
        revision: of a hub id.
        trust_remote_code: lets a tokenizer's own code run; model code never does.
        progress: told how far it is.

    Raises:
        AmpruneError: one of its children says what is wrong with the criterion, the model, the set or the activations.
    """
    return score_criteria(
        model,
        [criterion],
        calibration=calibration,
        samples=samples,
        tokens=tokens,
        max_length=max_length,
        prompts_only=prompts_only,
        seed=seed,
        device=device,
        dtype=dtype,
        device_map=device_map,
        batch_tokens=batch_tokens,
        revision=revision,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )[criterion]


def score_criteria(
    model: PathLike,
    criteria: Sequence[str],
    *,
    calibration: PathLike | list[str] | CalibrationSet = "alpaca",
    samples: int | None = None,
    tokens: int | None = None,
    max_length: int = 512,
    prompts_only: bool = False,
    seed: int = 0,
    device: str | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
    batch_tokens: int = 4096,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> dict[str, ImportanceScores]:
    """Scores a model by several criteria; one pass serves all that need the same. The arguments are those of `score`.

    Raises:
        AmpruneError: as `score`.
    """
    chosen = [find_criterion(name) for name in dict.fromkeys(criteria)]
    source = open_source(model, revision=revision, dtype=dtype)
    checkpoint = read_checkpoint(source.folder)
    kind = checkpoint.dtype if dtype == "auto" else getattr(torch, dtype, checkpoint.dtype)
    scored = {c.name: _score_weights(checkpoint, c, seed) for c in chosen if not c.calibrated}
    calibrated, kept, where = [c for c in chosen if c.calibrated], None, "cpu"
    if calibrated:
        kept = calibration_for(
            checkpoint,
            calibration,
            samples=samples,
            tokens=tokens,
            max_length=max_length,
            prompts_only=prompts_only,
            seed=seed,
            trust_remote_code=trust_remote_code,
        )
        if any(c.needs is Needs.GRADIENTS for c in calibrated):
            _check_gradients(checkpoint, kept, kind, device=device, device_map=device_map)
        with loaded_model(source.folder, dtype=dtype, device=device, device_map=device_map) as loaded:
            where = input_device(loaded).type
            architecture = checkpoint.architecture
            scored |= _score_calibrated(
                loaded, architecture, kept, calibrated, batch_tokens=batch_tokens, progress=progress
            )
    settings = {
        "dtype": str(kind).removeprefix("torch."),
        "amprune": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {
        c.name: ImportanceScores(
            **scored[c.name],
            shape=checkpoint.shape,
            fingerprint=checkpoint.fingerprint,
            criterion=c.name,
            calibration=kept.to_dict() if c.calibrated and kept is not None else {},
            settings={**settings, "device": where} if c.calibrated else {**settings, "device": "cpu", "seed": seed},
        )
        for c in chosen
    }


_Scored = dict[str, Any]
"""Those arguments of `ImportanceScores` that a criterion gives."""


def _score_weights(checkpoint: Checkpoint, criterion: Criterion, seed: int) -> _Scored:
    """Scores without a forward pass: by the weights, read a layer at a time, or by a draw."""
    shape, architecture = checkpoint.shape, checkpoint.architecture
    if criterion.needs is Needs.NOTHING:
        return {"layers": tuple(random_scores(shape, seed=seed, layer=layer) for layer in range(shape.num_layers))}
    owned = (architecture.layer_tensors(layer) for layer in range(shape.num_layers))
    return {"layers": tuple(magnitude({cut: checkpoint[name] for cut, name in cuts.items()}, shape) for cuts in owned)}


def _score_calibrated(
    model: PreTrainedModel,
    architecture: Architecture,
    calibration: CalibrationSet,
    criteria: Sequence[Criterion],
    *,
    batch_tokens: int,
    progress: Progress,
) -> dict[str, _Scored]:
    """Runs each pass that one of the criteria needs, once."""
    scored: dict[str, _Scored] = {}
    needs = {criterion.needs for criterion in criteria}
    if Needs.ACTIVATIONS in needs:
        layers = measure_activations(model, architecture, calibration, batch_tokens=batch_tokens, progress=progress)
        scored |= {
            c.name: _score_activations(c.score, layers, architecture.shape, means=c.means) for c in criteria if c.score
        }
    if Needs.GRADIENTS in needs:
        units, blocks = score_gradients(model, architecture, calibration, progress=progress)
        by_depth: _Scored = {"layers": (), "blocks": blocks}
        scored |= {c.name: by_depth if c.depth else {"layers": units} for c in criteria if c.needs is Needs.GRADIENTS}
    if Needs.LOSSES in needs:
        losses = block_perplexities(model, architecture, calibration, batch_tokens=batch_tokens, progress=progress)
        scored |= {c.name: {"layers": (), "blocks": losses} for c in criteria if c.needs is Needs.LOSSES}
    return scored


def _score_activations(rule: Rule, layers: Sequence[LayerStatistics], shape: ModelShape, *, means: bool) -> _Scored:
    scored: _Scored = {"layers": tuple(rule(layer, shape) for layer in layers)}
    if means:
        scored["input_means"] = tuple(
            InputMeans(*(inputs.mean.float().numpy() for inputs in (layer.attention, layer.mlp))) for layer in layers
        )
    return scored


def _check_gradients(
    checkpoint: Checkpoint,
    calibration: CalibrationSet,
    dtype: torch.dtype,
    *,
    device: str | None,
    device_map: str | None,
) -> None:
    if device_map is not None:
        raise ScoresError(
            "a criterion that needs gradients needs the whole model on one device; leave out --device-map, or choose "
            "a criterion that needs none, such as amp"
        )
    check_memory(checkpoint, calibration, dtype, device=device or default_device())


def draw_calibration(
    model: PathLike,
    calibration: PathLike | list[str] = _BEST.calibration,
    *,
    samples: int | None = None,
    tokens: int | None = None,
    max_length: int = _BEST.max_length,
    prompts_only: bool = False,
    seed: int = 0,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> CalibrationSet:
    """Draws calibration samples by a model's own tokenizer, to score on, to refit on, or both.

    The arguments are those of `score`; without `samples` and `tokens`, as much is drawn as the preset `best` asks for.

    Raises:
        CalibrationError: the set cannot be read, is malformed, or holds fewer samples.
        CheckpointError: the model cannot be opened, or has no tokenizer.
    """
    if samples is None and tokens is None:
        tokens = _BEST.tokens
    checkpoint = read_checkpoint(open_source(model, revision=revision, dtype=dtype).folder)
    return calibration_for(
        checkpoint,
        calibration,
        samples=samples,
        tokens=tokens,
        max_length=max_length,
        prompts_only=prompts_only,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
