"""Training after pruning, and the whole way in one command: recover and run."""

from amprune.cli.display import progress, show_recovery, show_report
from amprune.cli.options import Model, Out, Result, command
from amprune.errors import required
from amprune.settings import MEASURED_BY, RecoverCommandSettings, RecoverySettings, RunSettings, part


@command("recover", recipe=True, kept=lambda out: out.with_name(f"{out.name}.training"), again="--resume")
def recover_command(model: Model, out: Out, settings: RecoverCommandSettings) -> Result | None:
    """Bring a pruned model back by LoRA fine-tuning, and write it as an ordinary checkpoint."""
    from amprune import recover
    from amprune.pipeline import measure_epochs

    if settings.evaluate_each_epoch:
        required("--evaluate-each-epoch", *MEASURED_BY["zero_shot"])
    keep = settings.keep_epochs or settings.evaluate_each_epoch
    result = recover(model, out, part(RecoverySettings, settings), keep_epochs=keep, progress=progress)
    if result is None:  # one of the processes that do not write
        return None
    if settings.evaluate_each_epoch:
        measure_epochs(model, result, settings, progress=progress)
    return {"out": str(result.folder), **result.record}, lambda: show_recovery(result)


@command("run", recipe=True, kept=lambda out: out.with_name(f"{out.name}.run.json"))
def run_command(model: Model, out: Out, settings: RunSettings) -> Result:
    """Do it all: prune, recover, evaluate, report; the same command goes on where it was interrupted."""
    from amprune.pipeline import run

    files = run(model, out, settings, progress=progress)
    return {"out": str(out), "markdown": str(files.markdown), "html": str(files.html)}, lambda: show_report(files)
