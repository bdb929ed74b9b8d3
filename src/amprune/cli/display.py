"""What the command line shows: progress on stderr, summaries on stdout. Imports nothing heavy."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderHook, RenderResult
from rich.segment import Segment

from amprune.running import Advance

if TYPE_CHECKING:
    from amprune.cli.demo import Shown
    from amprune.cut.inspection import Inspection
    from amprune.evaluation.records import Evaluation
    from amprune.experiments.run import ExperimentFiles
    from amprune.pipeline import PrunedModel
    from amprune.plan.artefact import PruningPlan
    from amprune.prove.checks import VerificationReport
    from amprune.recovery.run import RecoveredModel
    from amprune.report.grid import Grid
    from amprune.report.write import ReportFiles
    from amprune.scoring.scores import ImportanceScores
    from amprune.serve.gguf.run import ExportedGguf
    from amprune.serve.hub.run import PushedModel
    from amprune.serve.quantize.run import QuantizedModel
    from amprune.text.own import WrittenText

_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_ENDLESS = re.compile(r"\S{1000,}")


def printable(text: str) -> str:
    """Returns a text with what would move or colour a terminal written out, and words without an end cut.

    Names in files are a stranger's: of tensors, models and fields.
    """
    text = _ENDLESS.sub(lambda found: f"{found[0][:100]}... ({len(found[0]):,} letters)", text)
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


@dataclass(frozen=True)
class _Printable:
    """Something to print, whose text is made printable where it is rendered."""

    inner: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for part in console.render(self.inner, options):
            yield part if part.control else Segment(printable(part.text), part.style)


class _AllPrintable(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Printable(one) for one in renderables]


stdout, stderr = (
    Console(highlight=False, markup=False, emoji=False, soft_wrap=True),
    Console(stderr=True, highlight=False, markup=False, emoji=False),
)
for console in (stdout, stderr):
    console.push_render_hook(_AllPrintable())


@contextmanager
def progress(description: str, total: int) -> Iterator[Advance]:
    """A bar on stderr with the time left; nothing where stderr is no terminal."""
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description:<12}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bar(*columns, console=stderr, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda steps: bar.advance(task, steps)


def show_grid(grid: "Grid") -> None:
    """Prints a grid of figures, turned where the terminal is too narrow for it."""
    from amprune.report.grid import to_terminal

    stdout.print(to_terminal(grid, stdout.width))


def _show(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> None:
    from amprune.report.grid import Grid

    show_grid(Grid(title, tuple(heads), tuple(map(tuple, rows)), words))


def plan_summary(plan: "PruningPlan") -> dict[str, Any]:
    """Returns what `--json` prints of a plan."""
    return {
        "ratio_target": plan.ratio_target,
        "ratio_actual": plan.ratio_actual,
        "shape_before": plan.shape_before.to_dict(),
        "shape_after": plan.shape_after.to_dict(),
        **{name: value for name, value in plan.options.items() if name in ("neuron_multiple", "tensor_parallel")},
        **{name: plan.provenance[name] for name in ("preset", "allocation", "speedup") if name in plan.provenance},
    }


def result_summary(result: "PrunedModel") -> dict[str, Any]:
    """Returns what `--json` prints of a pruned model."""
    return {
        "out": str(result.folder),
        **plan_summary(result.plan),
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        "verification": result.verification.to_dict(),
    }


def show_scores(scores: "ImportanceScores", output: Path) -> None:
    """Says what was scored, by which criterion and on what."""
    shape, used = scores.shape, scores.calibration
    units = f"{shape.num_layers} layers of {shape.num_attention_heads} heads and {shape.intermediate_size:,} neurons"
    what = units if scores.blocks is None else f"{shape.num_layers} blocks"
    where = f" on {used['samples']} samples ({used['tokens']:,} tokens) of {used['name']}" if used else ""
    stdout.print(f"Scored {what} by {scores.criterion}{where}\nScores in {output}")


def show_plan(plan: "PruningPlan", title: str, sizes: tuple[int, int] | None = None) -> None:
    """Prints the shapes before and after as a table; `sizes` are the bytes of the weights, where they are known."""
    before, after = plan.shape_before, plan.shape_after
    counts = [
        ("parameters", before.parameters, after.parameters),
        *([("blocks", before.num_layers, after.num_layers)] if after.num_layers < before.num_layers else []),
        ("query heads per layer", before.num_attention_heads, after.num_attention_heads),
        ("key-value heads per layer", before.num_key_value_heads, after.num_key_value_heads),
        ("neurons per layer", before.intermediate_size, after.intermediate_size),
    ]
    rows: list[tuple[str, ...]] = [
        (name, f"{dense:,}", f"{pruned:,}", f"{1 - pruned / dense:.2%}") for name, dense, pruned in counts
    ]
    if sizes is not None:
        rows.append(("weights", *(f"{size / 1e6:,.1f} MB" for size in sizes), f"{1 - sizes[1] / sizes[0]:.2%}"))
    _show(title, ("", "dense", "pruned", "removed"), rows)
    if abs(plan.ratio_actual - plan.ratio_target) > 5e-4:
        stdout.print(f"Asked for {plan.ratio_target:.2%}; {_nearest(plan)}")
    if (devices := plan.options.get("tensor_parallel", 1)) != 1:
        stdout.print(f"Heads and neurons can be split over {devices} devices (tensor parallelism).")


def _nearest(plan: "PruningPlan") -> str:
    """Says what came of a ratio that was not met, and how it can be."""
    options, found = plan.options, f"{plan.ratio_actual:.2%}"
    multiple, neurons = options.get("neuron_multiple", 1), plan.shape_after.intermediate_size
    if multiple == 1 or options.get("neurons_ratio") is not None or neurons == plan.shape_before.intermediate_size:
        return f"the nearest with these options is {found}."
    if "allocation" in plan.provenance and "target_parameters" not in options:
        return (
            f"the split that does the least damage removes {found} (neurons are kept in multiples of {multiple}; for "
            "the exact ratio: --neuron-multiple 1)."
        )
    closer = "the exact ratio" if options.get("tensor_parallel", 1) == 1 else "a nearer ratio"
    end = f"is {found} (neurons are kept in multiples of {multiple}; for {closer}: --neuron-multiple 1)."
    return f"the least that meets the target {end}" if "target_parameters" in options else f"the nearest {end}"


def show_result(result: "PrunedModel") -> None:
    """Prints the shapes, the sizes and the checks of a pruned model."""
    show_allocation(result.plan)
    show_plan(result.plan, f"Pruned model in {result.folder}", (result.bytes_before, result.bytes_after))
    show_verification(result.verification)


def show_side_by_side(questions: Sequence[str], dense: "Shown", pruned: "Shown") -> None:
    """Prints what the two models of the demonstration do."""
    rows = [(question, *both) for question, *both in zip(questions, dense.answers, pruned.answers, strict=True)]
    rows.append(("Perplexity on texts that ship", f"{dense.perplexity:.1f}", f"{pruned.perplexity:.1f}"))
    _show("Side by side", ("", "dense", "pruned"), rows, words=3)
    stdout.print(
        "The pruned model was not trained; `amprune recover` brings back more of it (docs/recovery.md). Answers are "
        "greedy; the texts are of the calibration set `mixed`, but not among those that it was pruned on."
    )


def show_allocation(plan: "PruningPlan") -> None:
    """Prints the splits of the budget between heads and neurons that were measured, where one was chosen among them."""
    found = plan.provenance.get("allocation")
    if found is None:
        return
    rows = []
    for index, one in enumerate(found["candidates"]):
        budget, refitted = one["budget"], one["refitted"]
        rows.append((
            f"{budget['query_heads']}/{budget['key_value_heads']}", f"{budget['neurons']:,}", f"{one['ratio']:.2%}",
            f"{one['damage']['kl']:.3f}", "" if refitted is None else f"{refitted['kl']:.3f}",
            "chosen" if index == found["chosen"] else "",
        ))  # fmt: skip
    heads = ("query/key-value heads", "neurons", "removed", "divergence", "refitted", "")
    _show("Splits of the budget, by the damage on held-out text", heads, rows, words=0)
    stdout.print(
        "Divergence: Kullback-Leibler, nats a token, of the dense model's predictions; refitted: a short refit."
    )
    if any(one.get("measured_neurons") for one in found["candidates"]):
        stdout.print("Both are measured before neurons are rounded to a multiple, so that every split removes as much.")


def show_verification(report: "VerificationReport") -> None:
    """Prints each check and what it found."""
    stdout.print("Verified" if report.passed else "NOT verified", style="bold green" if report.passed else "bold red")
    for check in report.checks:
        mark = "ok " if check.passed else "BAD"
        stdout.print(f"  {mark} {check.name}: {check.detail}")


def show_inspection(found: "Inspection") -> None:
    """Prints what a model is made of and what can be removed from it."""
    shape = found.shape
    size = f", {found.bytes / 1e6:,.1f} MB in {found.dtype}" if found.bytes else ""
    stdout.print(f"{found.model}: {found.architecture}, {shape.parameters:,} parameters{size}", style="bold")
    parts = [
        (part, f"{count:,}", f"{count / shape.parameters:.1%}") for part, count in found.parameters_by_part.items()
    ]
    _show("Parameters", ("part", "parameters", "share"), parts)
    tied = "tied" if found.tied_embeddings else "separate"
    stdout.print(
        f"{shape.num_layers} layers, hidden size {shape.hidden_size:,}, {tied} embeddings\n"
        f"each with {shape.num_attention_heads} query heads of {shape.head_dim}, {shape.num_key_value_heads} key-value "
        f"heads (groups of {shape.group_size}) and {shape.intermediate_size:,} neurons"
    )
    if shape.heads_refused is not None:
        stdout.print(f"Heads cannot be removed: {shape.heads_refused}.")
    for mode in found.modes:
        name = "Neurons alone" if mode.mode == "none" else f"Heads by {mode.mode}, unit: a {mode.unit}"
        steps = f"; {ranges(mode.removable)} of {mode.units_per_layer} removable" if mode.units_per_layer else ""
        if mode.units_per_layer and not any(mode.removable):
            accepted = ", ".join(map(str, shape.query_head_counts)) or "any"
            steps = f"; none removable, since of the numbers that can be kept its config accepts {accepted} query heads"
        stdout.print(f"{name}{steps}; ratios up to {mode.largest_ratio:.4f}")
    stdout.print(f"Neurons adjust any ratio in steps of {found.smallest_step:.2e}.")
    if shape.blocks_refused is not None:
        stdout.print(f"Blocks cannot be removed as a whole: {shape.blocks_refused}.")
    else:
        step = shape.layer_parameters / shape.parameters
        most = f"{found.removable_blocks} can go beside the protected, ratios up to {found.removable_blocks * step:.4f}"
        stdout.print(f"A whole block holds {step:.2%}; {most if found.removable_blocks else 'all are protected'}.")
    for what, names in (("Carried over beside the weights", found.carried), ("Left out", found.left_out)):
        if names:
            stdout.print(f"{what}: {', '.join(names)}.")
    if found.shape_warnings:
        stdout.print("Shapes: what backends handle badly")
    for warning in found.shape_warnings:
        stdout.print(f"  {warning.backend}: {warning.what}: {warning.reason}")


def ranges(numbers: tuple[int, ...]) -> str:
    """Writes 0, 1, 2, 3, 6 as 0-3, 6."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def show_evaluation(evaluation: "Evaluation", models: Sequence[str], output: Path) -> None:
    """Prints a row for each figure of the models and a column for each, the difference from the first in brackets."""
    from amprune.report.summary import evaluation_grid

    show_grid(evaluation_grid(evaluation, models, output))
    if len(models) > 1:
        stdout.print(f"In brackets: difference from {models[0]}, paired; of a latency (median), how many times faster.")
    folder = output.parent.parent if output.parent.name == "amprune" else output.parent  # in a checkpoint
    stdout.print(f"`amprune report {folder}` draws it.")


def show_recovery(result: "RecoveredModel") -> None:
    """Says how the losses changed and where the model is."""
    record = result.record
    stdout.print(f"Recovered model in {result.folder}, {record['steps']} steps on {record['data']['name']}")
    if record["validation_before"] is not None:
        what = "Divergence from the teacher" if record["validation"] == "divergence" else "Validation loss"
        stdout.print(f"{what} {record['validation_before']:.4f} -> {record['validation_after']:.4f}")
    merged = "" if record["settings"]["full"] else "Merged: logits equal those of the model with its adapter; "
    stdout.print(
        f"{merged}{'R' if not merged else 'r'}ounding to the checkpoint's dtype moves the logits by "
        f"{record['rounding']:.1e} of their standard deviation"
    )


def show_written(written: "WrittenText", output: Path) -> None:
    """Says how much text a model wrote, how fast, and what was dropped of it."""
    stdout.print(
        f"Wrote {written.tokens:,} tokens in {written.texts:,} texts, {written.chats:,} of them chats, "
        f"{written.tokens_per_second:,.0f} tokens/s\nDropped: {written.dropped(written.empty):.1%} of all texts as "
        f"empty, {written.dropped(written.loops):.1%} as loops\nText in {output}"
    )


def show_export(exported: "ExportedGguf") -> None:
    """Prints the types of an exported file's tensors, what was proven, and rows that its type does not suit."""
    file = exported.file
    rows = [
        (kind.lower(), f"{count:,}", f"{size / 1e6:,.1f}", f"{size / file.weight_bytes:.1%}")
        for kind, (count, size) in file.types.items()
    ]
    whole = ("all", f"{len(file.tensors):,}", f"{file.weight_bytes / 1e6:,.1f}", "")
    _show(f"{file.type} in {file.path}", ("type", "tensors", "MB", "share"), [*rows, whole])
    if exported.odd_rows:
        odd = ", ".join(f"{row:,} ({count} tensors)" for row, count in exported.odd_rows.items())
        stdout.print(
            f"Rows that the blocks of {file.type} do not divide took a larger type: {odd}. Neurons in multiples of "
            "256 (32 for q8_0 and q4_0) avoid it for the down projections: --neuron-multiple 256",
        )
    if (check := exported.check) is None:
        stdout.print("Converted; not run in llama.cpp", style="bold yellow")
    else:
        gap = f", the worst {check.largest_gap:.2g} standard deviations below the best" if check.largest_gap else ""
        stdout.print("Runs in llama.cpp", style="bold green")
        stdout.print(
            f"  ok  {check.runtime}: {check.agreed} of {check.tokens} greedy tokens are those of transformers in "
            f"float32{gap}",
        )


def show_quantized(model: "QuantizedModel") -> None:
    """Says how large a quantised model is, what quantising did to it and what was proven."""
    from amprune.model.quantization import quantization_sentences

    stdout.print(f"Quantised model in {model.folder}", style="bold")
    for sentence in quantization_sentences(model.record):
        stdout.print(f"  {sentence}")


def show_report(files: "ReportFiles") -> None:
    """Says what was written."""
    stdout.print(f"Report in {files.html} and {files.markdown}, {len(files.figures) // 2} figures")
    if files.card is not None:
        stdout.print(f"Model card renewed: {files.card}")
    if files.card_kept is not None:
        stdout.print(files.card_kept)


def show_experiment(files: "ExperimentFiles") -> None:
    """Says what became of the cells and where the report is."""
    from amprune.experiments.tables import results_grid

    show_grid(results_grid(files.results))
    stdout.print(f"Report in {files.report.html} and {files.report.markdown}; {files.record} is the record")


def show_push(result: "PushedModel") -> None:
    """Says what went, or what would go file by file."""
    sent, terms = result.url is not None, result.terms
    visible = {True: "private", False: "public", None: "public unless its owner's default is private"}[result.private]
    where = f"{result.repo} ({visible}), branch {result.revision or 'main'}"
    lines = [f"Pushed to {result.url}, commit {result.commit}"] if sent else [f"Would go to {where}:"]
    if not sent:
        lines += [f"{size:>16,}  {path}" for path, size in result.files.items()]
    lines.append(
        f"{f'{where}: ' if sent else ''}{len(result.files)} files, {result.bytes / 1e6:,.1f} MB; licence "
        f"{terms.license or 'not named'}, base model {', '.join(terms.base_model) or 'not named'}"
    )
    lines += [f"Not among them: {', '.join(result.left_out)}"] if result.left_out else []
    lines += [f"Removed there, of an earlier model: {', '.join(result.removed)}"] if result.removed else []
    lines += [] if sent else ["Nothing was sent."]
    stdout.print("\n".join(lines))
