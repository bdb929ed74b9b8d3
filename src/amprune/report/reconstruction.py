"""The section on reconstruction: how well refitted output projections give what they should."""

from statistics import fmean

from amprune.cut.refit.record import ReconstructionRecord
from amprune.report.blocks import Block, Bullets, Picture, Section, Table, Text
from amprune.report.drawing import style
from amprune.report.figures_reconstruction import reconstruction_figure
from amprune.report.inputs import Inputs
from amprune.report.numbers import percent

RECONSTRUCTION = "Reconstruction"
_LEAD = (
    "After pruning, what is left of the output projections was refitted in closed form, layer by layer, so that each "
    "layer gives what it gave before: ridge least squares, no training. An error is the sum of squares by which a "
    "projection misses what the dense model has there, as a share of the squares of that: 100 % is as wrong as giving "
    "nothing. It is measured on held-out tokens, which no fit has seen; before the refit means with the kept weights "
    "as they were, on top of layers that are refitted already. The drift is the error of the hidden states that leave "
    "a layer, in the same terms."
)


def reconstruction_section(inputs: Inputs, colours: dict[str, str]) -> Section | None:
    """Tells of every model whose output projections were refitted."""
    known = [(s.name, s.reconstruction) for s in inputs.subjects if s.reconstruction is not None]
    known = [(name, record) for name, record in known if record.layers]
    if not known:
        return None
    header = ("model", "attention before", "after", "MLP before", "after", "drift of the last layer")
    blocks: list[Block] = [
        Text(_LEAD),
        Bullets(tuple(_sentence(name, record) for name, record in known)),
        Table("Error on held-out tokens, mean over the layers", header, tuple(_row(*one) for one in known)),
    ]
    for index, (name, record) in enumerate(known, start=1):
        suffix = f"-{index}" if index > 1 else ""
        with style():
            figure = reconstruction_figure(record, colour=colours[name])
        caption = (
            f"{name}: errors of the output projections on held-out tokens, and drift of the hidden states, as shares "
            "of what they should be. What is 0 has no place on a logarithmic axis."
        )
        blocks.append(Picture(f"reconstruction{suffix}", figure, f"{caption} {_course(record)}", caption))
    return Section(RECONSTRUCTION, tuple(blocks))


def _sentence(name: str, record: ReconstructionRecord) -> str:
    """Says on what a model was refitted, and how strongly the weights were held."""
    tokens, fits = max(one.tokens for one in record.projections), len(record.projections)
    strengths = [one.strength for one in record.projections if one.strength is not None]
    fitted = f"fitted on {tokens:,} tokens of {record.calibration}"
    held = f"{record.held_out_rows:,} of {record.rows:,} rows of {record.row_tokens:,} tokens were held out"
    whole = sum(one.strength is None and one.held_out_before == 0 for one in record.projections)
    stayed = fits - len(strengths) - whole
    sentences = [f"{name}: {fitted} ({held})"]
    if strengths:
        low, high = (f"{value:.1g}" for value in (min(strengths), max(strengths)))
        ridge = f"a ridge of {low}" if low == high else f"ridges of {low} to {high}"
        sentences[0] += f", with {ridge} times the mean square of the inputs, as the held-out tokens liked best"
    if whole:
        sentences.append(f"{whole} of {fits} projections had nothing to make up for")
    if stayed:
        sentences.append(f"{stayed} of {fits} stayed as they were, since no ridge lowered their error")
    return ". ".join(sentences) + "."


def _row(name: str, record: ReconstructionRecord) -> tuple[str, ...]:
    attention, mlp = [layer.attention for layer in record.layers], [layer.mlp for layer in record.layers]
    means = [
        fmean([getattr(one, field) for one in part])
        for part in (attention, mlp)
        for field in ("held_out_before", "held_out_after")
    ]
    return (name, *map(_share, means), _share(record.layers[-1].drift))


def _share(value: float) -> str:
    """Writes a share with as many digits as a small one needs."""
    return percent(value) if value >= 0.01 else f"{100 * value:.2g} %"


def _course(record: ReconstructionRecord) -> str:
    first, last = record.layers[0], record.layers[-1]
    parts = [
        f"{words}: {_share(one.held_out_before)} to {_share(one.held_out_after)} in the first layer, "
        f"{_share(other.held_out_before)} to {_share(other.held_out_after)} in the last"
        for words, one, other in (
            ("attention", first.attention, last.attention),
            ("MLP", first.mlp, last.mlp),
        )
    ]
    return f"{'; '.join(parts)}; drift {_share(first.drift)} and {_share(last.drift)}."
