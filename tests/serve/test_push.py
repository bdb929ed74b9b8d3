"""Sharing on the hub, against one in memory: what goes, byte by byte, what is refused, and what is written over."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import ADDRESS, FakeHub, Repo, refusal, served
from huggingface_hub import CommitInfo, HfApi, constants
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from tiny_models import find, make_model
from tiny_recovery import save_chats, train
from tiny_tokenizer import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from amprune import AmpruneError, PushedModel, prune, push, write_report
from amprune.cli.options import app
from amprune.errors import PushError

CARD = "---\nlicense: apache-2.0\n---\n# A dense model\n"
BASE = "someone/dense"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model beside the dense one, with a report and a base model in its card."""
    place = tmp_path_factory.mktemp("made")
    dense = place / "dense"
    make_model(find("llama-gqa")).save_pretrained(dense)
    make_tokenizer().save_pretrained(dense)
    (dense / "README.md").write_text(CARD, encoding="utf-8")
    (dense / "LICENSE").write_text("Apache License 2.0\n", encoding="utf-8")
    quick: dict[str, Any] = {"ratio": 0.2, "preset": "paper", "calibration": "builtin", "samples": 4}
    prune(dense, place / "pruned", **quick, max_shard_size="100KB")
    state_base(place / "pruned")
    edit(place / "pruned" / "amprune" / "verification.json", dense=BASE)  # as of a model that the hub has
    return place


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "pruned", tmp_path / "pruned"))


def state_base(folder: Path) -> None:
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8")
    card.write_text(text.replace("license: apache-2.0\n", f"license: apache-2.0\nbase_model:\n- {BASE}\n", 1), "utf-8")


def edit(file: Path, **fields: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, **fields}), encoding="utf-8")


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def as_client(hub: FakeHub) -> HfApi:
    client: Any = hub
    return client


def pushed(out: Path, repo: str, hub: FakeHub, **options: Any) -> PushedModel:
    return push(out, repo, client=as_client(hub), **options)


def written(hub: FakeHub, name: str, folder: Path) -> Path:
    """Writes what a repository holds into a folder, as a download would."""
    for path, content in hub.files(name).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["push", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


# What goes


def test_the_repository_holds_the_model_byte_by_byte_and_loads(out: Path, tmp_path: Path) -> None:
    hub = FakeHub()
    result = pushed(out, "ann/small", hub)
    assert hub.files("ann/small") == files_of(out)
    assert set(result.files) == set(files_of(out))
    assert len([path for path in result.files if path.startswith("model-0000")]) > 1
    assert {"LICENSE", "chat_template.jinja", "amprune/plan.json", "amprune/scores.safetensors"} <= set(result.files)
    assert result.bytes == sum(map(len, files_of(out).values()))

    copy = written(hub, "ann/small", tmp_path / "copy")
    ids = torch.arange(3, 40)[None]
    models = [AutoModelForCausalLM.from_pretrained(place, output_loading_info=True) for place in (out, copy)]
    assert not any(models[1][1].values())
    assert torch.equal(models[0][0](ids).logits, models[1][0](ids).logits)
    assert AutoTokenizer.from_pretrained(copy)("A fox.") == AutoTokenizer.from_pretrained(out)("A fox.")


def test_the_result_is_what_the_client_returned(out: Path) -> None:
    hub = FakeHub()
    result = pushed(out, "small", hub, message="First try")
    repo = hub.repos["ann/small"]
    assert (result.repo, result.url) == ("ann/small", f"{ADDRESS}/ann/small")
    assert result.commit == repo.head()
    assert repo.messages == ["initial commit", "First try"]
    assert result.private is False
    assert hub.calls == ["whoami", "model_info", "create_repo", "model_info", "create_commit"]


def test_what_is_no_part_of_the_model_stays(out: Path) -> None:
    others = (
        ".git/config", ".cache/x.json", ".secret.json", "amprune/.report.x.partial", "pruned.gguf.partial",
        "README.md.lock", "checkpoint-2/optimizer.pt", "checkpoint-2/config.json", "trainer_state.json", "notes.md",
        "model-00009-of-00009.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "train.log",
        "amprune/notes.txt", "amprune/epochs/model.safetensors", "credentials.json", "notes.txt", "upload.py",
        "amprune/token.json", "amprune/mine.jsonl", "config-secret.json",
    )  # fmt: skip
    before = files_of(out)
    for path in others:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text("{}", encoding="utf-8")
    also = {"pruned-q8.gguf": b"GGUF\x03", "NOTICE": b"by someone\n", "USE_POLICY.md": b"Be kind.\n"}
    for path, content in also.items():
        (out / path).write_bytes(content)
    hub = FakeHub()
    result = pushed(out, "ann/small", hub)
    assert hub.files("ann/small") == {**before, **also}
    hidden = {path for path in others if any(part.startswith(".") for part in path.split("/"))}
    assert set(result.left_out) == set(others) - hidden


def test_a_recovered_model_goes_with_its_training_and_without_its_teacher_s_folder(made: Path, tmp_path: Path) -> None:
    train(made / "pruned", save_chats(tmp_path, repeat=2), tmp_path / "recovered", teacher=made / "dense", max_steps=1)
    out, hub = tmp_path / "recovered", FakeHub()
    assert str(made / "dense") in (out / "amprune" / "recovery.json").read_text(encoding="utf-8")
    result = pushed(out, "ann/small", hub)
    assert result.shortened == {"amprune/recipe.yaml": ("data", "teacher"), "amprune/recovery.json": ("teacher",)}
    sent = hub.files("ann/small")
    assert json.loads(sent["amprune/recovery.json"])["teacher"] == "dense"
    assert b"teacher: dense\n" in sent["amprune/recipe.yaml"]
    assert "amprune/training.jsonl" in result.files
    assert set(result.files) == set(files_of(out))


def test_a_quantised_model_is_held_to_its_files_alone(out: Path) -> None:
    edit(out / "config.json", quantization_config={"quant_method": "any", "bits": 8})
    assert "config.json" in pushed(out, "ann/small", FakeHub()).files
    shard = sorted(out.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(AmpruneError, match="truncated"):
        pushed(out, "ann/small", FakeHub())


# Paths of this machine


def test_absolute_paths_are_cut_down_in_what_is_sent_and_nowhere_else(out: Path) -> None:
    write_report(out)  # which says how to measure OUT, by its path
    evaluation = {"models": [{"name": "a", "source": "/data/models/dense"}, {"name": "b", "source": str(out)},
                             {"name": "c", "source": BASE}, {"name": "d", "source": "../dense"}],
                  "records": [{"note": f"see {Path.home()}/notes/x.txt"}]}  # fmt: skip
    file = out / "amprune" / "evaluation.json"
    file.write_text(json.dumps(evaluation), encoding="utf-8")
    log = '{"step": 1, "data": "/data/set with spaces/é.jsonl"}\n{"step'
    (out / "amprune" / "training.jsonl").write_text(log, encoding="utf-8")
    edit(out / "config.json", _name_or_path="/data/models/dense")
    before, hub = files_of(out), FakeHub()
    result = pushed(out, "ann/small", hub)
    assert files_of(out) == before
    sent = hub.files("ann/small")
    assert result.shortened == {
        "amprune/evaluation.json": ("models[0].source", "models[1].source", "records[0].note"),
        "amprune/report.html": result.shortened["amprune/report.html"],
        "amprune/report.md": result.shortened["amprune/report.md"],
        "amprune/training.jsonl": ("line 1.data",),
        "config.json": ("_name_or_path",),
    }
    sources = [model["source"] for model in json.loads(sent["amprune/evaluation.json"])["models"]]
    assert sources == ["dense", "pruned", BASE, "../dense"]
    assert json.loads(sent["amprune/evaluation.json"])["records"][0]["note"] == "see x.txt"
    assert sent["amprune/training.jsonl"].decode() == '{"step": 1, "data": "é.jsonl"}\n{"step'
    assert json.loads(sent["config.json"]) == {**json.loads(before["config.json"]), "_name_or_path": "dense"}
    assert "amprune evaluate DENSE pruned -o evaluation.json" in sent["amprune/report.md"].decode()
    assert {path for path in before if sent[path] != before[path]} == set(result.shortened)
    assert not any(str(out.parent).encode() in content for content in sent.values())


def test_a_card_that_names_a_path_of_this_machine_is_refused_with_its_line(out: Path) -> None:
    card = out / "README.md"
    lines = card.read_text(encoding="utf-8").splitlines()
    text = "\n".join([*lines, f"Made on my machine from {out.parent}/dense.", "See https://x.org/home/y."])
    card.write_text(text, encoding="utf-8")
    hub = FakeHub()
    with pytest.raises(PushError, match=rf"names paths of this machine \(line {len(lines) + 1}\).*take them out"):
        pushed(out, "ann/small", hub)
    assert hub.calls == []


def test_a_vocabulary_is_no_list_of_paths(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/root")
    (out / "vocab.json").write_text('{"/root": 1, "/root/x": 2}', encoding="utf-8")
    edit(out / "tokenizer_config.json", mark="/", slash="/root")
    assert pushed(out, "ann/small", FakeHub()).shortened == {}


# Licence and base model


def front(out: Path, text: str) -> None:
    card = out / "README.md"
    card.write_text(f"---\n{text}---\n" + card.read_text(encoding="utf-8").split("---\n", 2)[2], encoding="utf-8")


def test_licence_and_base_model_are_told(out: Path) -> None:
    result = pushed(out, "ann/small", FakeHub())
    assert (result.terms.license, result.terms.base_model, result.concerns) == ("apache-2.0", (BASE,), ())


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("base_model: a/b\n", "names no licence"),
        ("base_model: a/b\nlicense: other\n", "needs `license_name` and `license_link`"),
        ("base_model: a/b\nlicense: other\nlicense_name: x\nlicense_link: TERMS.txt\n", "no such file goes along"),
        ("license: mit\n", "names no base_model"),
    ],
)
def test_a_card_that_says_too_little_is_warned_of_and_sent_as_it_is(said: str, expected: str, out: Path) -> None:
    front(out, said)
    code, output, errors = run(out, "ann/small", "--dry-run", "--json")
    assert code == 0, errors
    assert len(json.loads(output)["concerns"]) == 1
    assert expected in " ".join(errors.split())
    hub = FakeHub()
    pushed(out, "ann/small", hub)
    assert hub.files("ann/small")["README.md"] == (out / "README.md").read_bytes()


def test_a_licence_of_its_own_that_goes_along_is_enough(out: Path) -> None:
    front(out, "base_model: a/b\nlicense: other\nlicense_name: x\nlicense_link: ./LICENSE\n")
    assert pushed(out, "ann/small", FakeHub()).concerns == ()
    front(out, "base_model: a/b\nlicense: other\nlicense_name: x\nlicense_link: https://x.org/terms\n")
    assert pushed(out, "ann/small", FakeHub()).concerns == ()


# What is refused before the hub is asked


def not_verified(out: Path) -> None:
    edit(out / "amprune" / "verification.json", passed=False)


def truncated(out: Path) -> None:
    shard = sorted(out.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-8])


def an_adapter(out: Path) -> None:
    (out / "config.json").unlink()
    (out / "adapter_config.json").write_text("{}", encoding="utf-8")


def changed_weight(out: Path) -> None:
    shard = sorted(out.glob("model-*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, "is no folder"),
    "no checkpoint": (lambda out: (out / "config.json").unlink(), "config.json is missing"),
    "no weights": (lambda out: [file.unlink() for file in out.glob("model*")], "holds no weights"),
    "a shard is missing": (lambda out: sorted(out.glob("model-*"))[0].unlink(), "which is missing"),
    "a shard is truncated": (truncated, "truncated or damaged"),
    "config and weights disagree": (lambda out: edit(out / "config.json", intermediate_size=7), "disagree"),
    "an adapter": (an_adapter, "which has not been merged and is no model by itself; `amprune recover PRUNED OUT`"),
    "not verified": (not_verified, "is not verified"),
    "a weight changed since": (changed_weight, "is not what amprune/verification.json tells of"),
    "no verification": (lambda out: (out / "amprune" / "verification.json").unlink(), "nothing says that"),
    "a front matter of no fields": (
        lambda out: (out / "README.md").write_text("---\n- mit\n---\nA model.\n"), "no list of `name: value`"
    ),
    "no card": (lambda out: (out / "README.md").unlink(), "`amprune report"),
    "a damaged record": (lambda out: (out / "amprune" / "plan.json").write_text("{"), "amprune/plan.json is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_a_folder_that_is_not_fit_is_refused_and_the_hub_not_asked(case: str, out: Path) -> None:
    spoil, expected = UNFIT[case]
    spoil(out)
    hub = FakeHub()
    for dry_run in (False, True):
        with pytest.raises(AmpruneError) as caught:
            pushed(out, "ann/small", hub, dry_run=dry_run)
        assert expected in str(caught.value)
    assert hub.calls == []


@pytest.mark.parametrize("name", ["a/b/c", "", "a b", "ann/-x", "ann/x--y", "../x", "ann/x.git"])
def test_a_name_that_is_none_is_refused(name: str, made: Path) -> None:
    hub = FakeHub()
    with pytest.raises(PushError, match=r"expected owner/name or name: .*[Rr]epo"):
        pushed(made / "pruned", name, hub)
    assert hub.calls == []


def test_report_writes_a_card_that_is_missing(out: Path) -> None:
    (out / "README.md").unlink()
    write_report(out)
    assert "README.md" in pushed(out, "ann/small", FakeHub()).files


# What the hub refuses


@pytest.mark.parametrize(
    ("method", "error", "expected"),
    [
        ("whoami", LocalTokenNotFoundError("Token is required"), "nobody is logged in; run `hf auth login`, or set HF"),
        ("whoami", refusal(401), "does not accept the token"),
        ("whoami", OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        ("whoami", ConnectionError("no route to host"), "cannot be reached (no route to host); check the network"),
        ("model_info", refusal(500), "refuses with status 500 (server says 500)"),
        ("create_repo", refusal(403), "the token may not write there (server says 403)"),
        ("create_repo", refusal(409), "in the way or busy"),
        ("create_commit", refusal(403), "the token may not write there"),
        ("create_commit", refusal(412), "somebody else has committed meanwhile"),
        ("create_commit", ValueError("Invalid metadata in README.md.\n- license"), "in README.md. - license"),
        ("create_commit", TimeoutError(), "cannot be reached (TimeoutError)"),
    ],
)
def test_what_the_hub_refuses_is_one_clear_error(method: str, error: Exception, expected: str, made: Path) -> None:
    hub = FakeHub()
    hub.failing[method] = error
    with pytest.raises(PushError) as caught:
        pushed(made / "pruned", "ann/small", hub)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("cannot push to ann/small: ")
    assert hub.calls[-1] == method
    assert not any(hub.files(name) for name in hub.repos)


def test_after_a_broken_connection_the_same_again_succeeds(made: Path) -> None:
    hub = FakeHub()
    hub.failing["create_commit"] = TimeoutError()
    with pytest.raises(PushError):
        pushed(made / "pruned", "ann/small", hub)
    hub.failing.clear()
    assert pushed(made / "pruned", "ann/small", hub).commit == hub.repos["ann/small"].head()


def test_a_commit_made_meanwhile_is_not_written_over(made: Path) -> None:
    class Busy(FakeHub):
        def create_commit(self, repo_id: str, operations: Any, **options: Any) -> CommitInfo:
            self.change(repo_id, {"theirs.txt": b"new"}, "theirs", "main", None)
            return super().create_commit(repo_id, operations, **options)

    hub = Busy()
    with pytest.raises(PushError, match="somebody else has committed meanwhile"):
        pushed(made / "pruned", "ann/small", hub)
    assert hub.files("ann/small") == {"theirs.txt": b"new"}


# Repositories that exist


def holding(**files: bytes) -> Repo:
    return Repo(branches={"main": {".gitattributes": b"", **files}})


def card(text: str, base: str | None = BASE) -> bytes:
    return f"---\n{f'base_model: {base}' if base else 'license: mit'}\n{text}---\n# A model\n".encode()


def test_an_earlier_model_of_the_same_base_is_replaced_and_the_rest_stays(out: Path) -> None:
    hub = FakeHub()
    pushed(out, "ann/small", hub)
    theirs = {"picture.png": b"png", "COPYING": b"terms", "docs/model.safetensors": b"x"}
    stale = {"model.safetensors": b"old", "old.gguf": b"old", "amprune/recovery.json": b"{}", "vocab.txt": b"old"}
    hub.repos["ann/small"].branches["main"] |= theirs | stale
    edit(out / "generation_config.json", top_k=3)
    result = pushed(out, "ann/small", hub)
    assert hub.files("ann/small") == {**files_of(out), **theirs}
    assert set(result.removed) == set(stale)
    assert "create_repo" not in hub.calls[5:]


def test_an_own_card_with_the_tag_is_amprune_s_still(out: Path) -> None:
    hub = FakeHub(small=holding(**{"README.md": card("tags: [amprune]\n")}))
    assert pushed(out, "ann/small", hub).commit


def test_without_base_models_the_dense_model_s_name_tells(out: Path) -> None:
    text = (out / "README.md").read_text(encoding="utf-8").replace(f"base_model:\n- {BASE}\n", "")
    (out / "README.md").write_text(text, encoding="utf-8")
    assert pushed(out, "ann/small", FakeHub(small=holding(**{"README.md": text.encode()}))).commit
    other = text.replace(
        'report`; remove this line to keep your own: "dense"', 'report`; remove this line to keep your own: "x"'
    )
    assert other != text
    with pytest.raises(PushError, match=r"card of another model.*same base \(dense\)"):
        pushed(out, "ann/small", FakeHub(small=holding(**{"README.md": other.encode()})))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"README.md": card("tags: [amprune]\n", "someone/else")}, "the card of another model"),
        ({"README.md": card("tags: [llama]\n")}, "the card of another model"),
        ({"README.md": card("tags: [amprune]\n", None)}, "the card of another model"),
        ({"data.csv": b"1,2"}, "files, but no model card"),
    ],
)
def test_another_model_is_not_written_over_unless_asked_for(files: dict[str, bytes], expected: str, out: Path) -> None:
    hub = FakeHub(small=holding(**files))
    with pytest.raises(PushError, match=rf"holds {expected}.*base \({BASE}\).*--overwrite"):
        pushed(out, "ann/small", hub)
    assert hub.files("ann/small") == files
    pushed(out, "ann/small", hub, overwrite=True)
    assert hub.files("ann/small") == {**files, **files_of(out)}


def test_private_is_never_silently_public(made: Path) -> None:
    hub = FakeHub(open=Repo(), closed=Repo(private=True))
    with pytest.raises(PushError, match=r"ann/open exists and is public.*in its settings"):
        pushed(made / "pruned", "ann/open", hub, private=True, overwrite=True)
    assert hub.files("ann/open") == {}
    assert pushed(made / "pruned", "ann/closed", hub, private=True).private
    assert pushed(made / "pruned", "ann/closed", hub).private
    assert pushed(made / "pruned", "ann/new", hub, private=True).private
    assert hub.repos["ann/new"].private


def test_a_branch_is_made_from_main_and_main_stays(made: Path) -> None:
    hub = FakeHub()
    pushed(made / "pruned", "ann/small", hub, revision="30-percent")
    assert hub.files("ann/small") == {}
    assert hub.files("ann/small", "30-percent") == files_of(made / "pruned")
    pushed(made / "pruned", "ann/small", hub, revision="30-percent")
    assert hub.calls.count("create_branch") == 1
    hub = FakeHub(small=holding(**{"README.md": card("", "someone/else")}))
    with pytest.raises(PushError, match="another model"):
        pushed(made / "pruned", "ann/small", hub, revision="new")
    assert list(hub.repos["ann/small"].branches) == ["main"]


# The command line


def test_a_dry_run_needs_neither_login_nor_hub(out: Path) -> None:
    (out / "notes.md").write_text("mine", encoding="utf-8")
    code, output, errors = run(out, "small", "--dry-run", "--private", "--revision", "main")
    assert code == 0, errors
    for path, content in files_of(out).items():
        assert path in output
        assert path == "notes.md" or f" {len(content):,}  {path}\n" in output
    assert "Would go to small (private), branch main:\n" in output
    assert "licence apache-2.0, base model someone/dense\nNot among them: notes.md\nNothing was sent." in output
    assert errors == ""
    found = json.loads(run(out, "small", "--dry-run", "--json")[1])
    assert {entry["path"]: entry["bytes"] for entry in found["files"]} == {
        path: len(content) for path, content in files_of(out).items() if path != "notes.md"
    }
    assert (found["commit"], found["private"], found["base_model"]) == (None, None, [BASE])


def test_without_a_hub_the_command_fails_in_one_paragraph(made: Path) -> None:
    code, output, errors = run(made / "pruned", "ann/small")  # tests are offline and logged in nowhere
    assert (code, output) == (1, "")
    assert errors.startswith("amprune: cannot push to ann/small: ")
    assert "Traceback" not in errors
    assert len(errors.strip().splitlines()) == 1


def test_the_command_pushes_over_http(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_ann")
    hub = FakeHub()
    with served(hub, token="hf_ann") as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        code, output, errors = run(made / "pruned", "ann/small", "--private", "--json")
        assert code == 0, errors
        code, shown, _ = run(made / "pruned", "other", "--message", "Once more")
    assert hub.files("ann/small") == files_of(made / "pruned")
    assert hub.repos["ann/small"].private
    assert "made the repository ann/small" in errors
    result = json.loads(output)
    assert (result["url"], result["private"]) == (f"{address}/ann/small", True)
    assert hub.repos["ann/other"].messages[-1] == "Once more"
    assert f"Pushed to {address}/ann/other, commit {hub.repos['ann/other'].head()}" in shown
    assert f"ann/other (public), branch main: {len(result['files'])} files" in shown


def test_an_interrupted_push_says_so(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(client: HfApi) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "whoami", interrupted)
    code, output, errors = run(made / "pruned", "ann/small")
    assert (code, output) == (130, "")
    assert "interrupted; nothing was committed" in errors


def test_the_real_client_updates_branches_and_is_told_of_a_bad_token(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub = FakeHub()
    with served(hub, token="hf_ann") as address:
        client = HfApi(endpoint=address, token="hf_ann")
        push(out, "small", revision="next", client=client)
        hub.repos["ann/small"].branches["next"]["old.gguf"] = b"GGUF"
        assert push(out, "ann/small", revision="next", client=client).removed == ("old.gguf",)
        assert hub.files("ann/small", "next") == files_of(out)
        front(out, "tags: [amprune]\nbase_model: someone/else\n")
        with pytest.raises(PushError, match="card of another model"):
            push(out, "ann/small", revision="next", client=client)
        with pytest.raises(PushError, match="does not accept the token"):
            push(out, "ann/small", client=HfApi(endpoint=address, token="hf_bad"))
    with pytest.raises(PushError, match="cannot be reached"):
        push(out, "ann/small", client=client)
