"""The command line: plans, runs, stops at the gate, shows, and says what is wrong."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import rim_lens as rl
from rim_lens import cli
from rim_lens.cli import names
from rim_lens.cli.options import complete_listed, complete_model, read_conditions, read_seeds
from rim_lens.lens.loading import known_sources
from rim_lens.organisms.toy import toy_model, toy_tokenizer
from rim_lens.prompts.cots import COT_KINDS
from rim_lens.views.reproduce import by_name, command, python

run = CliRunner().invoke
SMALL = ["--requests", "6", "--max-new-tokens", "10"]


def help_of(*words: str) -> str:
    """What --help says on a narrow terminal, in one line."""
    shown = run(cli.app, [*words, "--help"], env={"TERMINAL_WIDTH": "80", "COLUMNS": "80"})
    assert shown.exit_code == 0, shown.output
    assert max(map(len, shown.output.splitlines())) <= 80
    return re.sub(r"[\s│]+", " ", shown.output)


def test_help_teaches():
    """Where to begin, where results go, and what the exit codes mean."""
    out = help_of()
    for word in ("demo", "study", "heads", "neurons", "compare", "circuit", "measures", "direction", "show"):
        assert word in out
    for told in (
        "rim-lens demo",
        "runs/COMMAND-MODEL",
        "report.html",
        "3 stopped at the gate",
        "--show-completion",
    ):
        assert told in out


def leaves(group=None, words=()):
    """Every command, those of groups too, as its words and itself."""
    group = group or typer.main.get_command(cli.app)
    for name, one in group.commands.items():
        if hasattr(one, "commands"):
            yield from leaves(one, (*words, name))
        else:
            yield (*words, name), one


@pytest.mark.parametrize(("words", "command"), leaves(), ids=lambda value: getattr(value, "name", None))
def test_every_command_says_what_it_does_and_speaks_json(words, command):
    out = help_of(*words)
    options = {option for parameter in command.params for option in parameter.opts}
    assert "--json" in options
    assert all(parameter.help for parameter in command.params if parameter.name != "help")
    if words[0] != "organism":
        assert "Examples" in out
        assert f"rim-lens {words[0]}" in out


EXAMPLES = [example for examples in cli.EXAMPLES.values() for example in examples]


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_in_the_help_are_commands(example):
    """They parse: each name is a command, each option one of its options."""
    words = shlex.split(example.partition(" > ")[0])
    assert words[0] == "rim-lens"
    command = typer.main.get_command(cli.app).commands[words[1]]
    context = command.make_context(words[1], words[2:])
    assert context.params
    # A misspelt option is refused by the same call.
    with pytest.raises(Exception, match="No such option"):  # typer has a click of its own in some versions
        command.make_context(words[1], [*words[2:], "--no-such-option"])


def test_completion_offers_what_is_there(tmp_path, monkeypatch):
    """Names that load_model knows, folders, words of a list; and both of typer's commands."""
    assert {name.partition(":")[0] for name in names.MODELS} == set(known_sources())
    assert set(names.CONDITIONS) == {"off", "open", *COT_KINDS}
    assert complete_model("smol") == ["smollm2", "smollm2-refusal"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "note.txt").touch()
    assert complete_model("ru") == ["runs"]
    assert complete_model("runs/") == ["runs/mine"]
    heads = dict(leaves())["heads",]
    (argument,) = [parameter for parameter in heads.params if parameter.name == "model"]
    found = argument.shell_complete(heads.context_class(heads), "plan")
    assert [item.value for item in found] == ["planted"]
    assert complete_listed(*names.CONDITIONS)("off,ca") == ["off,careful"]


def test_a_shell_is_given_its_completion(monkeypatch):
    """As bash asks for it."""
    asked = {"_RIM_LENS_COMPLETE": "complete_bash", "COMP_WORDS": "rim-lens heads toy:d", "COMP_CWORD": "2"}
    told = run(cli.app, [], prog_name="rim-lens", env=asked)
    assert told.output.split() == ["toy:deviate"], told.output


def test_completion_does_not_wait_for_torch():
    """A shell asks at every key."""
    code = "import sys, rim_lens.cli; from rim_lens.cli.options import complete_model; complete_model('t'); print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


def test_a_plan_runs_nothing(tmp_path):
    result = run(cli.app, ["demo", "--plan", "--json", "--out", str(tmp_path / "x"), *SMALL])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.output)
    assert {step["stage"] for step in plan["steps"]} >= {"gate", "attention", "heads", "neurons"}
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    return folder, run(cli.app, ["study", "toy", "--tuned", "toy:deviate", "--out", str(folder), *SMALL])


def test_a_study_ends_with_its_report(finished):
    folder, result = finished
    assert result.exit_code == 0, result.output
    assert "report.html" in result.output
    assert (folder / "report.html").stat().st_size > 100_000
    assert rl.load_study(folder).measured


def test_show_prints_what_is_there(finished):
    folder, _ = finished
    shown = run(cli.app, ["show", str(folder), "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.output)


def test_a_model_that_does_not_refuse_exits_with_3(tmp_path):
    hf = toy_model()
    hf.save_pretrained(tmp_path / "model")
    toy_tokenizer().save_pretrained(tmp_path / "model")
    result = run(cli.app, ["study", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *SMALL])
    assert result.exit_code == cli.GATE_EXIT, result.output
    assert (tmp_path / "out" / "report.html").exists()


def test_users_files(tmp_path):
    for kind in ("harmful", "harmless"):
        rows = [json.dumps(p.to_dict()) for p in rl.load_prompts(kind, language="toy", split="evaluate")[:12]]
        (tmp_path / f"{kind}.jsonl").write_text("\n".join(rows) + "\n")
    files = ["--harmful", str(tmp_path / "harmful.jsonl"), "--harmless", str(tmp_path / "harmless.jsonl")]
    result = run(cli.app, ["study", "toy", "--plan", *files])
    assert result.exit_code != 0  # every request is on the evaluate side: nothing to select on
    assert "select side has 0 harmful" in str(result.exception)


def test_heads_plans_the_parts_and_conditions_asked_for(tmp_path):
    """Controls are added and said so; conditions keep one order everywhere."""
    asked = ["heads", "toy", "--think", "open,confirm:statement", "--out", str(tmp_path / "x"), *SMALL]
    result = run(cli.app, [*asked, "--plan"])
    assert result.exit_code == 0, result.output
    assert "added" in result.output
    assert "filler:confirm:statement" in result.output
    plan = json.loads(run(cli.app, [*asked, "--plan", "--json"]).output)
    stages = {"gate", "attention", "scores", "outcomes", "heads", "statistics", "removing", "probes"}
    assert {step["stage"] for step in plan["steps"]} == stages
    fewer = ["--no-probes", "--no-removing", "--tuned", "toy:deviate"]
    without = json.loads(run(cli.app, [*asked, "--plan", "--json", *fewer]).output)
    assert {"probes", "removing"}.isdisjoint(step["stage"] for step in without["steps"])
    assert "comparing" in {step["stage"] for step in without["steps"]}
    assert not (tmp_path / "x").exists()
    assert read_conditions("open,off,careful,filler,unrelated") == (
        ("off", "careful", "filler", "unrelated", "open"),
        (),
    )


def test_heads_of_a_file_with_both_kinds(tmp_path):
    """The whole command, with a condition that few ask for, on requests of one file."""
    both = [
        prompt
        for kind in ("harmful", "harmless")
        for split in ("select", "evaluate")
        for prompt in rl.load_prompts(kind, language="toy", split=split)[::9]
    ]
    file, folder = tmp_path / "both.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps(prompt.to_dict()) + "\n" for prompt in both))
    words = [
        "heads",
        "toy",
        "--prompts",
        str(file),
        "--think",
        "off,confirm",
        "--max-new-tokens",
        "6",
        "--n-test",
        "3",
    ]
    result = run(cli.app, [*words, "--no-probes", "--no-removing", "--no-statistics", "--out", str(folder)])
    assert result.exit_code == 0, result.output
    study = rl.load_study(folder)
    assert study.measured
    assert study.conditions == ("off", "filler", "unrelated", "confirm")
    assert study.parts == ("heads",)
    assert study.heads.settings["n_test"] == 3
    text = (folder / "report.md").read_text()
    assert "Confirm CoT against thinking off" in text
    assert "## What probes read" not in text
    file.write_text(json.dumps(both[0].to_dict()) + "\n")
    failed = run(cli.app, words)
    assert "harmful and harmless are needed" in str(failed.exception)


def test_a_given_model_has_no_command_even_where_its_name_is_known():
    """It may have been changed in memory, and the name would give another model."""
    assert by_name({"model": "toy", "given": False})
    assert not by_name({"model": "toy", "given": True})
    given = rl.Study(rl.load_model("toy"), n_requests=6)
    assert given._design(given._bench(Path("x")))["given"]


def test_neurons_run_show_and_stop_at_the_gate(tmp_path):
    """The whole command: what it prints is what the folder holds, and show opens it."""
    folder = tmp_path / "neurons"
    asked = ["neurons", "planted", "--m", "8", "--random-sets", "20", "--out", str(folder), *SMALL]
    plan = json.loads(run(cli.app, [*asked, "--plan", "--json"]).output)
    assert {step["stage"] for step in plan["steps"]} == {"neurons", "dose", "writers"}
    assert not folder.exists()
    result = run(cli.app, asked)
    assert result.exit_code == 0, result.output
    assert "Neurons that pairs agree on" in result.output
    study = rl.load_neuron_study(folder)
    assert study.measured
    assert study.design["settings"]["m"] == 8
    shown = json.loads(run(cli.app, ["show", str(folder), "--json"]).output)
    assert len(shown["neurons"]) == len(study.neurons)
    assert run(cli.app, [*asked[:2], "--pairs", "friends"]).exit_code == 2
    stopped = ["neurons", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *SMALL]
    toy_model().save_pretrained(tmp_path / "model")
    toy_tokenizer().save_pretrained(tmp_path / "model")
    assert run(cli.app, stopped).exit_code == cli.GATE_EXIT


def test_circuit_plans_runs_and_goes_on(tmp_path):
    """The whole command: nothing is measured twice, another question is refused, and the page says what the folder holds."""
    folder = tmp_path / "circuit"
    asked = ["circuit", "planted", "--heads", "L0H5", "--n-heads", "3", "--n-neurons", "8", "--requests", "8"]
    asked += ["--confirm", "6", "--random-circuits", "2", "--random-nodes", "1", "--max-new-tokens", "1"]
    asked += ["--out", str(folder)]
    plan = run(cli.app, [*asked, "--plan", "--json"])
    assert json.loads(plan.stdout)["n_nodes"] == 6  # three heads, neurons of one layer, two spans
    assert not folder.exists()
    result = run(cli.app, asked)
    assert result.exit_code == 0, result.output
    found = rl.Circuit.load(folder)
    assert {node.name for node in found.kept()} == {"L0H5", "L1H1", "neurons L0"}
    assert found.gate["asked"]
    text = (folder / "circuit_planted.md").read_text()
    assert "rim-lens circuit planted --heads L0H5 --n-heads 3" in text
    assert f"{len(found.settings['not_tested'])} are not tested" in text
    assert f"With everything else replaced, {found.row('faithfulness', 'harmful')['share']:.2f}" in text
    data = json.loads((folder / "circuit_planted.json").read_text())
    assert data["command"].startswith("rim-lens circuit planted")
    assert data["settings"]["not_tested"] == found.settings["not_tested"]
    # A run that was stopped: half of what it measured is there, and it goes on to the same numbers.
    lines = (folder / "measured.jsonl").read_text().splitlines(keepends=True)
    (folder / "measured.jsonl").write_text("".join(lines[: len(lines) // 2]))
    (folder / "circuit.json").unlink()
    assert run(cli.app, asked).exit_code == 0
    again = rl.Circuit.load(folder)
    assert (folder / "measured.jsonl").read_text().splitlines(keepends=True)[: len(lines) // 2] == lines[
        : len(lines) // 2
    ]
    assert again.edges.equals(found.edges)
    assert again.tests.equals(found.tests)
    other = run(cli.app, [*asked, "--n-heads", "4"])
    assert "another" in str(other.exception)
    nowhere = tmp_path / "nowhere"
    assert run(cli.app, ["circuit", "planted", "--heads", "five", "--out", str(nowhere)]).exit_code == 2
    assert not nowhere.exists()
    toy_model().save_pretrained(tmp_path / "model")
    toy_tokenizer().save_pretrained(tmp_path / "model")
    stopped = ["circuit", str(tmp_path / "model"), *asked[2:-1], str(tmp_path / "out")]
    assert run(cli.app, stopped).exit_code == cli.GATE_EXIT


def test_errors_say_what_is_wrong_and_exit_with_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["rim-lens", "show", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    assert "study.json does not exist" in re.sub(r"\s+", " ", capsys.readouterr().err)


@pytest.mark.parametrize(("text", "seeds"), [("0-2", [0, 1, 2]), ("4", [4]), ("0,3", [0, 3])])
def test_seeds(text, seeds):
    assert read_seeds(text) == seeds


def test_a_model_goes_where_it_is_wanted_and_in_the_dtype_asked_for(tmp_path):
    """Said again in how to run it, and refused where it cannot be."""
    out = tmp_path / "run"
    asked = ["heads", "toy", "--no-removing", "--no-probes", "--n-test", "2", "--out", str(out), *SMALL]
    result = run(cli.app, [*asked, "--dtype", "bfloat16", "--think", "off,open"])
    assert result.exit_code == 0, result.output
    study = rl.load_study(out)
    assert study.design["facts"]["dtype"] == "torch.bfloat16"
    assert study.design["model"] == "toy"
    assert study.design["weights_digest"] != rl.weights_digest(rl.load_model("toy"))
    assert command(study).endswith("--dtype bfloat16")
    assert "dtype=torch.bfloat16" in python(study)
    for wrong in (["--dtype", "int8"], ["--device", "nowhere"], ["--device", "cuda:99"]):
        assert run(cli.app, [*asked, *wrong]).exit_code == 2
        for first in (["study", "toy"], ["demo"]):
            result = run(cli.app, [*first, *SMALL, "--plan", *wrong])
            assert result.exit_code == 2
            assert wrong[0] in result.output
            assert "No such option" not in result.output
    with pytest.raises(ValueError, match="it stays as it is"):
        rl.Study(rl.load_model("toy"), dtype=torch.bfloat16)


def test_compare_plans_runs_and_shows(tmp_path):
    """Two given models, by name, on few requests; and what cannot be asked together."""
    asked = ["compare", "toy", "toy:careful", "mine=toy:deviate", "--control", "toy_careful", *SMALL]
    asked += ["--random-sets", "4", "--out", str(tmp_path / "out")]
    plan = run(cli.app, [*asked, "--plan", "--json"])
    assert plan.exit_code == 0, plan.output
    assert {step["stage"] for step in json.loads(plan.output)["steps"]} == {"gate", "neurons", "comparison"}
    assert not (tmp_path / "out").exists()
    result = run(cli.app, asked)
    assert result.exit_code == 0, result.output
    assert "Beyond plain drift: mine" in result.output
    found = rl.load_checkpoint_study(tmp_path / "out")
    assert list(found.runs) == ["toy_careful", "mine"]
    shown = run(cli.app, ["show", str(tmp_path / "out"), "--json"])
    assert shown.exit_code == 0, shown.output
    told = json.loads(shown.output)
    assert told["reproduce"]["command"].startswith(
        "rim-lens compare toy toy_careful=toy:careful mine=toy:deviate"
    )
    for wrong in (
        ["compare", "toy"],
        ["compare", "toy", "toy:C", "--train", "careful"],
        ["compare", "toy", "--train", "hasty"],
        ["compare", "toy", "a/b=toy:C"],
    ):
        assert run(cli.app, wrong).exit_code == 2


def test_compare_plans_training_without_any(tmp_path):
    words = [
        "compare",
        "toy",
        "--train",
        "careful,deviate",
        "--seeds",
        "0-1",
        "--steps",
        "40",
        "--plan",
        "--json",
    ]
    plan = json.loads(run(cli.app, [*words, "--out", str(tmp_path / "x")]).output)
    training = [step for step in plan["steps"] if step["stage"] == "training"]
    assert training[0]["passes"] == 2 * 2 * 40
    assert not (tmp_path / "x").exists()
