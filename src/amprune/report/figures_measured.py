"""Figures of what was measured: perplexity against ratio, latency with the ideal, where the parameters went."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from amprune.report.drawing import BASELINE_COLOUR, logarithmic, new_figure
from amprune.report.labels import ENDS, Label, write_labels
from amprune.report.measures import Measure, change, decode_steps, quartiles
from amprune.report.numbers import number, percent, scaled, shortened, times

_PARTS = {
    "embeddings": "#88ccee",
    "embeddings and the rest": "#88ccee",
    "attention": "#332288",
    "mlp": "#ddaa33",
    "norms and others": "#bbbbbb",
    "language-model head": "#44aa99",
}
_WORDS = {"mlp": "MLP"}
_LOG_RANGE = 10.0


def perplexity_figure(
    measure: Measure,
    *,
    ratios: Mapping[str, float],
    baseline: str | None,
    colours: Mapping[str, str],
    lines: Sequence[Sequence[str]],
) -> Figure:
    """Draws perplexity against the share of parameters removed; `lines` are models that differ in the ratio alone."""
    figure = new_figure(3.3)
    axes = figure.add_subplot()
    names = [name for name in measure.records if name != baseline]
    values = {name: record.value for name, record in measure.records.items()}
    for line in lines:
        points = sorted((ratios[name], values[name]) for name in line if name in values)
        axes.plot([100 * x for x, _ in points], [y for _, y in points], color="#bdbdbd", linewidth=1.2, zorder=1)
    for name in names:
        error = measure.records[name].standard_error
        x, y, colour = 100 * ratios[name], values[name], colours[name]
        axes.errorbar(x, y, yerr=error, fmt="o", color=colour, markersize=5.5, capsize=2.5, linewidth=1.2, zorder=3)
    _scale_perplexity(axes, values.values(), [ratios[name] for name in names])
    axes.set_xlabel("parameters removed, %")
    axes.set_ylabel("perplexity (lower is better)")
    axes.grid(axis="y")
    shown = {n: number(r.value, r.standard_error) for n, r in measure.records.items()}
    labels = [Label(100 * ratios[n], values[n], f"{shortened(n, 24)}\n{shown[n]}", colours[n]) for n in names]
    if baseline in values and baseline is not None:
        axes.axhline(values[baseline], color=BASELINE_COLOUR, linestyle="--", linewidth=1.1, zorder=2)
        ends = [(values[baseline], f"{shortened(baseline, 24)}: {shown[baseline]}")]
        labels = [Label(x, y, text, BASELINE_COLOUR, ENDS) for y, text in ends for x in axes.get_xlim()[:1]] + labels
    write_labels(
        figure, axes, labels, [line.get_xydata() for line in axes.lines[: len(lines)]], values.get(baseline or "")
    )
    return figure


def _scale_perplexity(axes: Axes, values: object, ratios: Sequence[float]) -> None:
    found = list(values)  # type: ignore[call-overload]
    low, high = min(found), max(found)
    left, right = min([0.0, *ratios]), max([0.0, *ratios])
    room = max(right - left, 0.05)
    axes.set_xlim(100 * (left - 0.04 * room), 100 * (right + 0.28 * room))
    if low > 0 and high / low > _LOG_RANGE:
        logarithmic(axes, "y")
        axes.set_ylim(low / (high / low) ** 0.08, high * (high / low) ** 0.16)
        logarithmic(axes, "y")
    else:
        axes.set_ylim(max(0.0, low - 0.25 * (high - low) - 0.05 * low), high + 0.22 * (high - low) + 0.05 * high)


def _parameters(value: float) -> str:
    """Returns a round number without the zeros behind its point."""
    figure, _, unit = scaled(value).partition(" ")
    return f"{figure.rstrip('0').rstrip('.') if '.' in figure else figure} {unit}".rstrip()


def latency_figure(
    measures: Sequence[Measure],
    *,
    baseline: str | None,
    ideals: Mapping[str, float],
    colours: Mapping[str, str],
) -> Figure:
    """Draws milliseconds per decoded token, a panel for each case, with a mark where the ideal lies."""
    heights = [0.62 + 0.3 * len(measure.records) for measure in measures]
    figure = new_figure(sum(heights) + 0.35)
    panels = figure.subplots(len(measures), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, measure in zip(panels, measures, strict=True):
        _latency_panel(axes, measure, baseline=baseline, ideals=ideals, colours=colours)
    panels[-1].set_xlabel("decoding, milliseconds a token (shorter is better)")
    return figure


def _latency_panel(
    axes: Axes, measure: Measure, *, baseline: str | None, ideals: Mapping[str, float], colours: Mapping[str, str]
) -> None:
    steps, records = decode_steps(measure), measure.records
    spreads = {name: [1000 * value / steps for value in quartiles(record)] for name, record in records.items()}
    milliseconds = {name: middle for name, (_, middle, _) in spreads.items()}
    dense = milliseconds.get(baseline or "")
    for row, (name, value) in enumerate(milliseconds.items()):
        low, _, high = spreads[name]
        axes.barh(row, value, height=0.68, color=colours[name])
        axes.errorbar(value, row, xerr=[[value - low], [high - value]], color="#222222", capsize=2, linewidth=1.0)
        words = number(value)
        found = change(measure, name, baseline)
        if found is not None:
            words += f"  ({times(found.difference.value)}"
        if dense is not None and name in ideals:
            ideal = dense / ideals[name]
            axes.plot([ideal, ideal], [row - 0.42, row + 0.42], color="black", linewidth=1.8)
            words += f" of {times(ideals[name])} ideal"
        words += ")" if found is not None else ""
        axes.annotate(words, (high, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(milliseconds)), [shortened(name, 22) for name in milliseconds])
    axes.invert_yaxis()
    axes.set_title(measure.label)
    axes.set_xlim(0, max(milliseconds.values()) * 1.75)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def parts_figure(parts: Mapping[str, Mapping[str, int]], *, baseline: str | None) -> Figure:
    """Draws the parameters of each model as a bar of its parts."""
    figure = new_figure(0.95 + 0.36 * len(parts))
    axes = figure.add_subplot()
    names = [part for part in _PARTS if any(part in counts for counts in parts.values())]
    most = max(sum(counts.values()) for counts in parts.values())
    dense = sum(parts[baseline].values()) if baseline in parts and baseline is not None else None
    for row, (name, counts) in enumerate(parts.items()):
        left = 0
        for part in names:
            count = counts.get(part, 0)
            axes.barh(
                row, count, left=left, height=0.7, color=_PARTS[part], label=_WORDS.get(part, part) if not row else None
            )
            if count > 0.11 * most:
                dark = part in ("attention", "language-model head")
                axes.text(left + count / 2, row, scaled(count), ha="center", va="center", fontsize=7.5,
                          color="white" if dark else "black")  # fmt: skip
            left += count
        removed = f" ({MINUS_SIGN}{percent(1 - left / dense)})" if dense and name != baseline else ""
        axes.annotate(f"{scaled(left)}{removed}", (left, row), xytext=(4, 0), textcoords="offset points", va="center",
                      fontsize=8)  # fmt: skip
    axes.set_yticks(range(len(parts)), [shortened(name, 22) for name in parts])
    axes.invert_yaxis()
    axes.set_xlim(0, most * 1.3)
    axes.xaxis.set_major_formatter(lambda value, _: _parameters(value))
    axes.set_xlabel("parameters")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(names), frameon=False,
                  fontsize=8, handlelength=1.0, columnspacing=1.2)  # fmt: skip
    return figure


MINUS_SIGN = "\u2212"
