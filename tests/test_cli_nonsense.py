"""Nonsense on the command line: every number of every command, closed and full outputs, texts in other encodings."""

import inspect
import subprocess
import sys
from dataclasses import fields
from typing import get_args

import pytest

pytest.importorskip("typer")
pytest.importorskip("tokenizers")
pytest.importorskip("sklearn")

from typer.testing import CliRunner

from fastattn.cli import app
from fastattn.train.classify import ClassificationData, ClassificationTask
from fastattn.train.cli import predict_app, train_app
from fastattn.train.loop import Run
from fastattn.train.options import TrainOptions


def invoke(*arguments, **options):
    environment = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"} | options.pop("env", {})
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment, **options)


def assert_one_line_naming(result, *names):
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output
    for name in names:
        assert str(name).replace("_", "-") in result.output.replace("_", "-"), result.output
    if result.exit_code == 1:
        assert len(result.output.strip().splitlines()) == 1 and result.output.startswith("error: "), result.output


def numbers():
    """(command, option, nonsense) for every number that the program takes; what all training takes, once."""
    shared = {field.name for field in fields(TrainOptions)}
    groups = {("train",): train_app, ("predict",): predict_app, (): app}
    for path, group in groups.items():
        for command in group.registered_commands:
            for name, parameter in inspect.signature(command.callback, eval_str=True).parameters.items():
                kind = (*get_args(parameter.annotation), parameter.annotation)[0]  # Annotated
                kinds = {int, float} & {kind, *get_args(kind)}
                if kinds and (name not in shared or command.name in ("classify", "bench")):
                    nonsense = ["x", str(10**30)] if int in kinds else ["nan", "inf"]
                    nonsense += ["-1"] if name != "seed" else []
                    yield (*path, command.name), "--" + name.replace("_", "-"), nonsense


def test_every_number_is_seen():
    assert len(list(numbers())) > 40
    assert {path[-1] for path, _, _ in numbers()} == {"bench", "translate", "classify", "detect"}


@pytest.mark.parametrize(("path", "option", "nonsense"), list(numbers()), ids=lambda v: "".join(v) if v else "")
def test_numbers_of_nonsense_are_named(tmp_path, path, option, nonsense):
    data = tmp_path / "data.tsv"
    data.write_text("text\tlabel\n" + "".join(f"text {i}\t{i % 2}\n" for i in range(20)))
    out = {"train": ("--out", tmp_path / "run", "--data", data), "predict": ("--model", tmp_path / "run", "text")}
    for value in nonsense:
        result = invoke(*path, *out.get(path[0], ()), f"{option}={value}")
        assert_one_line_naming(result, option.removeprefix("--"))
    assert [p.name for p in tmp_path.iterdir()] == ["data.tsv"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    texts = [(f"{'good' if i % 2 else 'bad'} film number {i}", "ab"[i % 2]) for i in range(12)]
    task = ClassificationTask(
        ClassificationData(texts, texts), min_frequency=1, embed_dim=8, num_heads=2, layers=1, feedforward_dim=8
    )
    directory = tmp_path_factory.mktemp("runs") / "classify"
    Run(task, TrainOptions(steps=2, batch_size=4), directory).train()
    return directory


@pytest.mark.parametrize("command", [("info",), ("check",), ("bench",), ("train", "classify")])
def test_an_instruction_set_that_is_not_there(tmp_path, monkeypatch, command):
    """As FASTATTN_CPU_ISA may name; no run begins that could not take a step."""
    pytest.importorskip("fastattn._C", reason="needs the engine")
    from fastattn.backends import cpu

    def refuse():
        raise ValueError("FASTATTN_CPU_ISA must be one of portable on this machine, got 'mmx'")

    monkeypatch.setattr(cpu, "isa", refuse)
    result = invoke(*command, *(("--out", tmp_path / "run") if command[0] == "train" else ()))
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith("error: FASTATTN_CPU_ISA must be one of")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["meta", "abacus", "cuda:99", "mps", "xla", "cpu:x", "", "\0"])
@pytest.mark.parametrize("command", [("check",), ("bench",), ("train", "classify"), ("predict", "classify")])
def test_devices_that_hold_no_numbers(tmp_path, command, device):
    where = {"train": ("--out", tmp_path / "run"), "predict": ("text", "--model", tmp_path)}.get(command[0], ())
    assert_one_line_naming(invoke(*command, *where, "--device", device), "--device")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        (("--embed-dim", 1_000_000, "--num-heads", 1), "GiB"),
        (("--feedforward-dim", 16_000_000), "GiB"),
        (("--layers", 1_000_000), "layers must be"),
        (("--embed-dim", 10, "--num-heads", 4), "embed_dim (10) must be a multiple of num_heads (4)"),
    ],
)
def test_models_beyond_the_machine(tmp_path, sizes, wanted):
    data = tmp_path / "data.csv"
    data.write_text("text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(20)))
    result = invoke("train", "classify", "--data", data, "--out", tmp_path / "run", *sizes)
    assert_one_line_naming(result, wanted)
    assert not (tmp_path / "run").exists()


def test_a_detector_that_cannot_be_built_leaves_no_demonstration(tmp_path):
    assert_one_line_naming(invoke("train", "detect", "--out", tmp_path / "run", "--embed-dim", 6), "embed_dim")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["file", "file/below", "circle"])
def test_a_run_needs_a_directory(tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "circle").symlink_to("circle")
    assert_one_line_naming(invoke("train", "classify", "--out", tmp_path / place), "--out", tmp_path / place)


@pytest.mark.parametrize("option", ["--html", "--png"])
def test_a_bad_output_is_refused_before_the_model_is_read(tmp_path, option):
    for place in (tmp_path, tmp_path / "absent" / "a"):
        assert_one_line_naming(invoke("predict", "classify", "--model", "absent", option, place, "text"), option, place)
    result = invoke("predict", "translate", "--model", "absent", "--attention-map", tmp_path, "text")
    assert_one_line_naming(result, "--attention-map", tmp_path)


def test_an_output_into_a_fifo_and_through_a_symlink(classifier, tmp_path):
    target, link = tmp_path / "page.html", tmp_path / "link"
    link.symlink_to("page.html")
    result = invoke("predict", "classify", "--model", classifier, "--html", link, "text")
    assert result.exit_code == 0 and link.is_symlink() and target.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("data", "message"), [(b"good\nM\xe4rz\n", "standard input:2: not UTF-8 (byte 0xe4)"), (b"\n \n", "no text given")]
)
def test_texts_on_standard_input_are_utf8(classifier, data, message):
    assert_one_line_naming(invoke("predict", "classify", "--model", classifier, input=data), message)


def test_texts_of_any_letters(classifier):
    result = invoke("predict", "classify", "--model", classifier, input="März\r\n日本\0\n".encode())
    assert result.exit_code == 0 and len(result.output.splitlines()) == 2


def test_bytes_that_are_no_letters(classifier):
    """Python gives them as lone surrogates."""
    result = invoke("predict", "classify", "--model", classifier, "M\udce4rz")
    assert_one_line_naming(result, "the argument TEXTS:1: not UTF-8 (byte 0xe4)")


def test_output_that_goes_nowhere(classifier):
    """A reader that has enough, a full disk, letters that the terminal lacks: one line or none."""
    script = """
        "$0" -m fastattn predict classify --model "$1" text >/dev/full
        "$0" -m fastattn predict classify --model "$1" < <(yes | head -n 5000) | head -c 1 >/dev/null
        PYTHONIOENCODING=ascii "$0" -m fastattn predict classify --model "$1" März
    """
    run = subprocess.run(["bash", "-c", script, sys.executable, str(classifier)], capture_output=True, text=True)
    assert run.stderr == "error: [Errno 28] No space left on device\n"
    assert run.returncode == 0 and run.stdout.rstrip().endswith(r"M\xe4rz")


def test_a_terminal_one_letter_wide():
    assert invoke("info", env={"COLUMNS": "1"}).exit_code == 0
    result = invoke("check", "--device", "meta", env={"COLUMNS": "1"})
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
