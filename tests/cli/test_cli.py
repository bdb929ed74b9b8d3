"""The command line, as a user meets it: help, summaries, errors in one paragraph, exit codes."""

import io
import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from rich.console import Console
from tiny_models import find, make_model
from tiny_plans import fake_scores
from tiny_tokenizer import make_tokenizer
from typer.testing import CliRunner

from amprune import ImportanceScores, make_plan
from amprune.cli import display, options
from amprune.cli.display import ranges, show_plan
from amprune.cli.options import app
from amprune.errors import CheckpointError
from amprune.scoring.catalogue import CRITERIA, find_criterion
from amprune.search.planning import settled
from amprune.settings import PruneSettings, with_preset

COMMANDS = ("inspect", "score", "plan", "apply", "verify", "prune", "demo")


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


PAPER = ("--preset", "paper", "--calibration", "builtin", "--samples", 6)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dense"
    make_model(find("llama-gqa")).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scores(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    code, _, errors = run("score", dense, "-o", file, *PAPER)
    assert code == 0, errors
    return file


@pytest.mark.process
def test_help_is_instant_and_imports_nothing_heavy() -> None:
    code = "import sys, amprune.cli; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    start = time.perf_counter()
    shown = subprocess.run([sys.executable, "-m", "amprune", "--help"], check=True, capture_output=True, text=True)
    assert time.perf_counter() - start < 1.5
    assert all(command in shown.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_its_options(command: str) -> None:
    code, output, _ = run(command, "--help")
    assert code == 0
    assert "--json" in output
    assert "--debug" in output


def test_inspect(dense: Path) -> None:
    code, output, _ = run("inspect", dense, "--json")
    found = json.loads(output)
    assert code == 0
    assert sum(found["parameters_by_part"].values()) == found["shape"]["parameters"]
    assert [mode["mode"] for mode in found["modes"]] == ["groups", "within"]
    assert "groups of 3" in run("inspect", dense)[1]


def test_stage_by_stage(dense: Path, scores: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    code, output, _ = run("plan", scores, "--ratio", 0.2, "-o", plan, "--preset", "paper", "--json")
    assert code == 0
    assert abs(json.loads(output)["ratio_actual"] - 0.2) < 0.005
    code, output, _ = run("apply", dense, plan, out, "--max-shard-size", "20KB", "--json")
    assert code == 0
    assert json.loads(output)["verification"]["passed"]
    assert (out / "model.safetensors.index.json").is_file()
    code, output, _ = run("verify", out, "--dense", dense, "--json")
    assert code == 0
    assert json.loads(output)["passed"]


def test_a_plan_for_a_number_of_parameters(scores: Path, tmp_path: Path) -> None:
    exact = ("--neuron-multiple", 1, "--target-parameters")
    code, output, errors = run("plan", scores, *exact, "60k", "-o", tmp_path / "plan.json", "--json")
    assert code == 0, errors
    assert 59_000 < json.loads(output)["shape_after"]["parameters"] <= 60_000
    code, _, errors = run("plan", scores, "--target-parameters", "many", "-o", tmp_path / "other.json")
    assert code == 1
    assert "100M" in errors


def test_a_plan_from_a_refitted_output_is_refitted_again(dense: Path, tmp_path: Path) -> None:
    quick = ("--calibration", "builtin", "--samples", 8)
    code, _, errors = run("prune", dense, tmp_path / "a", "--ratio", 0.2, *quick)
    assert code == 0, errors
    plan = tmp_path / "a" / "amprune" / "plan.json"
    code, _, errors = run("apply", dense, plan, tmp_path / "b", *quick)
    assert code == 0, errors
    files = [tmp_path / name / "model.safetensors" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    code, _, errors = run("apply", dense, plan, tmp_path / "plain", "--no-reconstruct")
    assert code == 0, errors
    assert not (tmp_path / "plain" / "amprune" / "reconstruction.json").exists()


@pytest.mark.parametrize("options", [(), PAPER], ids=["best", "paper"])
def test_the_stages_without_options_make_what_prune_makes(
    dense: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    scores, plan = tmp_path / "scores.safetensors", tmp_path / "plan.json"
    for arguments in (
        ("score", dense, "-o", scores, *options),
        ("plan", scores, "-o", plan, "--ratio", 0.2, "--model", dense, *options),
        ("apply", dense, plan, tmp_path / "stages", "--scores", scores, *options),
        ("prune", dense, tmp_path / "prune", "--ratio", 0.2, *options),
    ):
        code, _, errors = run(*arguments)
        assert code == 0, errors
    for name in ("model.safetensors", "config.json", "amprune/plan.json", "amprune/scores.safetensors"):
        assert (tmp_path / "stages" / name).read_bytes() == (tmp_path / "prune" / name).read_bytes(), name
    refitted = (tmp_path / "stages" / "amprune" / "reconstruction.json").exists()
    assert refitted == (not options)


def test_a_split_is_not_measured_on_samples_that_were_scored_on(dense: Path, tmp_path: Path) -> None:
    scores, few = tmp_path / "scores.safetensors", ("--calibration", "builtin", "--samples", 16)
    assert run("score", dense, "-o", scores, "--no-allocate", *few)[0] == 0
    plan = ("plan", scores, "-o", tmp_path / "plan.json", "--ratio", 0.2)
    code, _, errors = run(*plan, "--model", dense, *few)
    assert code == 1
    assert "score with --allocate" in errors
    code, _, errors = run(*plan, "--allocate", *few)
    assert code == 1
    assert "give --model" in errors
    assert run(*plan, "--model", dense, "--no-allocate", *few)[0] == 0


def test_a_recipe_makes_the_same_again(dense: Path, tmp_path: Path) -> None:
    code, _, errors = run("prune", dense, tmp_path / "a", "--ratio", 0.25, "--heads-mode", "within", *PAPER)
    assert code == 0, errors
    recipe = tmp_path / "a" / "amprune" / "recipe.yaml"
    code, _, errors = run("prune", dense, tmp_path / "b", "--recipe", recipe)
    assert code == 0, errors
    for name in ("model.safetensors", "config.json", "amprune/plan.json", "amprune/recipe.yaml"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    code, _, errors = run("prune", dense, tmp_path / "c", "--recipe", recipe, "--ratio", 0.1)
    assert code == 0, errors
    assert "ratio: 0.1" in (tmp_path / "c" / "amprune" / "recipe.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ration: 0.2", "did you mean ratio?"),
        ("overwrite: true", "unknown option 'overwrite'"),
        ("ratio: a lot", 'ratio is "a lot", expected a number or null; correct it'),
        ("protect_first: 1.5", "protect_first is 1.5, expected"),
        ("order: upwards", 'order is "upwards", expected "amp" or "reversed" or "random"'),
        ("prompts_only: 1", "prompts_only is 1, expected"),
        ("- ratio", "holds a list"),
        ("ratio: [", "cannot read the recipe"),
    ],
)
def test_recipes_that_are_wrong_are_refused(dense: Path, tmp_path: Path, text: str, problem: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text, encoding="utf-8")
    code, _, errors = run("prune", dense, tmp_path / "out", "--recipe", recipe)
    assert code == 1
    assert problem in errors
    assert str(recipe.name) in errors


def test_prune_in_one_go_shows_what_happened(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["prune", dense, out, "--ratio", 0.2, "--calibration", "builtin", "--samples", 6]
    code, output, errors = run(*arguments)
    assert code == 0, errors
    assert "Verified" in output
    assert str(out.name) in output
    assert {path.name for path in (out / "amprune").iterdir()} == {
        "plan.json",
        "recipe.yaml",
        "reconstruction.json",
        "scores.safetensors",
        "verification.json",
    }
    assert "chosen" in output
    code, _, errors = run(*arguments)
    assert code == 1
    assert "--overwrite" in errors
    assert run(*arguments, "--overwrite")[0] == 0


def test_prune_gives_the_same_as_the_stages(dense: Path, scores: Path, tmp_path: Path) -> None:
    run("plan", scores, "--ratio", 0.2, "-o", tmp_path / "plan.json", "--preset", "paper")
    run("apply", dense, tmp_path / "plan.json", tmp_path / "a", "--scores", scores)
    code, _, errors = run("prune", dense, tmp_path / "b", "--ratio", 0.2, *PAPER)
    assert code == 0, errors
    for name in ("model.safetensors", "config.json", "amprune/scores.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    plans = [json.loads((tmp_path / out / "amprune" / "plan.json").read_text(encoding="utf-8")) for out in "ab"]
    assert plans[1]["provenance"]["preset"] == "paper"
    assert plans[0] == plans[1]


def test_a_tampered_output_is_not_verified(dense: Path, scores: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    run("plan", scores, "--ratio", 0.2, "-o", tmp_path / "plan.json", "--preset", "paper")
    run("apply", dense, tmp_path / "plan.json", tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] += 0.5
    save_file(weights, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    code, output, errors = run("verify", tmp_path / "out", "--dense", dense)
    assert code == 1
    assert "BAD logits" in output
    assert "logits differ" in errors


def failing(dense: Path, tmp_path: Path) -> dict[str, tuple[list[object], str]]:
    out = tmp_path / "out"
    quick = ["--calibration", "builtin", "--samples", 2]
    return {
        "ratio zero": (["prune", dense, out, "--ratio", 0, *quick], "between 0 and 1"),
        "ratio one": (["prune", dense, out, "--ratio", 1, *quick], "between 0 and 1"),
        "ratio NaN": (["prune", dense, out, "--ratio", "nan", *quick], "between 0 and 1"),
        "ratio out of reach": (["prune", dense, out, "--ratio", 0.99, *quick], "largest reachable"),
        "no ratio": (["prune", dense, out, *quick], "give a ratio"),
        "no such model": (["prune", tmp_path / "none", out, "--ratio", 0.2], "no model"),
        "hub out of reach": (["inspect", "nobody/nothing"], "hub"),
        "alpaca out of reach": (["prune", dense, out, "--ratio", 0.2, "--preset", "paper"], "builtin"),
        "no such preset": (["prune", dense, out, "--ratio", 0.2, "--preset", "papper"], "did you mean paper?"),
        "ratio and target": (["prune", dense, out, "--ratio", 0.2, "--target", "params=9k"], "give one of them"),
        "target of nothing": (["prune", dense, out, "--target", "parms=9k"], "did you mean params?"),
        "refit of whole blocks": (
            ["prune", dense, out, "--ratio", 0.5, "--criterion", "depth", "--reconstruct"], "removes whole blocks"),
        "refit and compensation": (
            ["prune", dense, out, "--ratio", 0.2, "--bias-compensation", "--reconstruct"], "leave out one of them"),
        "no such calibration set": (["prune", dense, out, "--ratio", 0.2, "--calibration", "x.jsonl"], "x.jsonl"),
        "bad shard size": (["prune", dense, out, "--ratio", 0.2, "--max-shard-size", "big", *quick], "200MB"),
        "no such device": (["prune", dense, out, "--ratio", 0.2, "--device", "cuda:99", *quick], "device"),
        "device and map": (["prune", dense, out, "--ratio", 0.2, "--device", "cpu", "--device-map", "disk", *quick],
                           "not both"),
        "nonsense map": (["prune", dense, out, "--ratio", 0.2, "--device-map", "nonsense", *quick], "device_map"),
        "scores that are none": (["plan", dense / "config.json", "--ratio", 0.2, "-o", tmp_path / "p"], "config.json"),
        "plan that is none": (["apply", dense, dense / "config.json", out], "no plan"),
        "verify what is no output": (["verify", dense, "--dense", dense], "was not made by amprune"),
    }  # fmt: skip


@pytest.mark.parametrize("case", failing(Path("x"), Path("y")))
def test_errors_are_one_paragraph_and_leave_nothing(case: str, dense: Path, tmp_path: Path) -> None:
    arguments, expected = failing(dense, tmp_path)[case]
    code, output, errors = run(*arguments)
    assert code == 1
    assert output == ""
    assert expected in errors
    assert "Traceback" not in errors
    assert len(errors.strip().splitlines()) <= 2
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "none"), "--debug"])
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "CheckpointError"


def test_wrong_usage_exits_with_2(dense: Path) -> None:
    assert run("prune", dense)[0] == 2
    assert run("plan", "x", "-o", "y", "--order", "nonsense")[0] == 2


# Criteria


@pytest.mark.parametrize("name", [name for name, criterion in CRITERIA.items() if not criterion.depth])
def test_prune_by_every_criterion(name: str, dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--ratio", 0.2, "--criterion", name, "--calibration", "builtin", "--samples", 4)
    code, output, errors = run("prune", dense, out, *arguments, "--json")
    assert code == 0, errors
    assert json.loads(output)["verification"]["passed"]
    assert ImportanceScores.load(out / "amprune" / "scores.safetensors").criterion == name


@pytest.mark.parametrize("name", ["depth", "depth-taylor"])
def test_blocks_are_scored_planned_removed_and_verified(name: str, dense: Path, tmp_path: Path) -> None:
    scores, plan, out = tmp_path / "scores.safetensors", tmp_path / "plan.json", tmp_path / "out"
    code, shown, errors = run("score", dense, "-o", scores, "--criterion", name, *PAPER)
    assert code == 0, errors
    assert f"Scored 2 blocks by {name} on 6 samples" in shown
    protect = ("--protect-first", 1, "--protect-last", 0)
    assert run("plan", scores, "--ratio", 0.4, "-o", plan, *protect)[0] == 0
    assert run("apply", dense, plan, out)[0] == 0
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 1
    assert run("verify", out, "--dense", dense)[0] == 0
    code, _, errors = run("plan", scores, "--ratio", 0.4, "-o", plan, *protect, "--only", "heads")
    assert code == 1
    assert "only is heads, but means nothing where whole blocks are removed" in " ".join(errors.split())


def test_an_unknown_criterion_is_refused_before_anything_is_loaded(dense: Path, tmp_path: Path) -> None:
    for command in (("score", dense, "-o", tmp_path / "s"), ("prune", dense, tmp_path / "o", "--ratio", 0.2)):
        code, _, errors = run(*command, "--criterion", "wanda")
        assert code == 1
        assert "unknown criterion 'wanda'; did you mean wanda-sp?" in " ".join(errors.split())
    assert not list(tmp_path.iterdir())


def test_biases_make_up_for_what_is_removed(tmp_path: Path) -> None:
    dense, out = tmp_path / "dense", tmp_path / "out"
    make_model(find("phi-gqa")).save_pretrained(dense)
    make_tokenizer().save_pretrained(dense)
    arguments = ("--ratio", 0.2, "--calibration", "builtin", "--samples", 4, "--bias-compensation")
    code, _, errors = run("prune", dense, out, *arguments)
    assert code == 1
    assert "the criterion activation-l2 lacks; use flap" in " ".join(errors.split())
    code, _, errors = run("prune", dense, out, *arguments, "--criterion", "flap")
    assert code == 0, errors
    assert run("verify", out, "--dense", dense)[0] == 0
    again = ("apply", dense, out / "amprune" / "plan.json", tmp_path / "again")
    code, _, errors = run(*again)
    assert code == 1
    assert "give scores" in errors
    assert run(*again, "--scores", out / "amprune" / "scores.safetensors")[0] == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_model_without_biases_is_refused_before_it_is_scored(dense: Path, tmp_path: Path) -> None:
    code, _, errors = run("prune", dense, tmp_path / "o", "--ratio", 0.2, "--criterion", "flap", "--bias-compensation")
    assert code == 1
    assert "needs output projections with biases" in " ".join(errors.split())


@pytest.mark.parametrize("where", ["terminal", "file", "log"])
def test_names_in_files_neither_move_nor_colour_the_terminal(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = "x[/y]z [v2] \x1b[31mred\x1b[0m \u202eback " + "w" * 3000
    shown = r"x[/y]z [v2] \x1b[31mred\x1b[0m \u202eback " + "w" * 100 + "... (3,000 letters)"
    if where == "terminal":
        made = io.StringIO()
        console = Console(file=made, markup=False, highlight=False, force_terminal=True, width=10_000)
        console.push_render_hook(display._AllPrintable())
        console.print(name, style="bold red")
        assert made.getvalue() == f"\x1b[1;31m{shown}\x1b[0m\n"
    elif where == "file":
        with pytest.raises(typer.Exit), options.reported(False):
            raise CheckpointError(name)
        assert capsys.readouterr().err.replace("\n", "") == f"amprune: {shown}"
    else:
        with options.reported(False):
            logging.getLogger("amprune").warning("%s", name)
        assert capsys.readouterr().err == f"{shown}\n"
        logging.getLogger().handlers[:] = []


def test_what_is_removed_is_told_in_shares_of_the_dense_model(capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(plan := make_plan(fake_scores("llama-gqa"), ratio=0.2, only="neurons"), "Plan")
    told = " ".join(capsys.readouterr().out.split())
    before, after = plan.shape_before, plan.shape_after
    assert f"{1 - after.parameters / before.parameters:.2%}" in told
    assert f"{1 - after.intermediate_size / before.intermediate_size:.2%}" in told
    assert f"{after.intermediate_size / before.intermediate_size:.2%}" not in told


def test_numbers_that_follow_each_other_are_told_as_ranges() -> None:
    assert ranges((0, 1, 2, 3, 6)) == "0-3, 6"
    assert ranges((0, 2, 4)) == "0, 2, 4"
    assert ranges(()) == ""


def test_best_draws_as_much_text_as_the_documents_say() -> None:
    assert with_preset(PruneSettings()).tokens == 32_768


def test_a_split_is_measured_for_the_least_important_units_alone() -> None:
    rule = find_criterion("activation-l2")
    assert settled(PruneSettings(ratio=0.2), rule).allocate
    assert not settled(PruneSettings(ratio=0.2, order="random"), rule).allocate
    assert settled(PruneSettings(ratio=0.2, order="random", allocate=True), rule).allocate
