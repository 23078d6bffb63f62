"""The training loop: exact resumption, interruption, checkpoints that are broken or foreign, the curves."""

import functools
import json
import math
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")

from safetensors.torch import load_file

from fastattn.train.checkpoint import FORMAT, claim, load_weights, read_run
from fastattn.train.dates import date_corpus
from fastattn.train.errors import CheckpointError, TrainingError
from fastattn.train.loop import Run
from fastattn.train.options import TrainOptions, learning_rate_factor
from fastattn.train.progress import Progress
from fastattn.train.translate import TranslationData, TranslationTask, load_translator, translate

CORPUS = date_corpus(pairs=300, held_out=0.1)
OPTIONS = TrainOptions(epochs=2, batch_size=16, warmup_steps=5, evaluate_every=10, checkpoint_every=100)
SHORT = replace(OPTIONS, steps=3)


def make_task(seed=0, corpus=CORPUS, **options):
    options = {"embed_dim": 16, "num_heads": 2, "feedforward_dim": 32, "dropout": 0.1, "attention": "torch"} | options
    return TranslationTask(TranslationData(*corpus), vocab_size=300, seed=seed, validation_limit=10, **options)


def interrupt_at(task, step):
    """Raise Ctrl-C's signal while the loss of this step is computed."""
    loss, calls = task.loss, 0

    def interrupted(model, batch):
        nonlocal calls
        calls += 1
        if calls == step:
            signal.raise_signal(signal.SIGINT)
        return loss(model, batch)

    task.loss = interrupted
    return task


def snapshot(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def without_times(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 30 steps, never interrupted."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    run = Run(make_task(), OPTIONS, directory)
    run.report = run.train()
    return run


@pytest.mark.parametrize("step", [4, 15, 22])
def test_an_interrupted_run_resumes_bit_by_bit(tmp_path, finished, step):
    directory = tmp_path / "run"
    first = Run(interrupt_at(make_task(), step), OPTIONS, directory)
    assert first.train() == {"interrupted": True, "step": step}
    torch.manual_seed(99)  # a new process would have another RNG state
    second = Run(make_task(), OPTIONS, directory, resume=True)
    assert second.step == step
    report = second.train()
    ours = torch.load(directory / "checkpoint.pt", weights_only=True)
    whole = torch.load(finished.directory / "checkpoint.pt", weights_only=True)
    for name, tensor in whole["model"].items():
        assert torch.equal(ours["model"][name], tensor), name
    for ours_state, whole_state in zip(
        ours["optimizer"]["state"].values(), whole["optimizer"]["state"].values(), strict=True
    ):
        assert all(torch.equal(ours_state[k], whole_state[k]) for k in whole_state)
    assert torch.equal(ours["rng"]["cpu"], whole["rng"]["cpu"])
    assert without_times(ours["history"]) == without_times(whole["history"])
    assert {k: v for k, v in report.items() if k != "seconds"} == {
        k: v for k, v in finished.report.items() if k != "seconds"
    }
    assert (
        load_file(directory / "model.safetensors").keys() == load_file(finished.directory / "model.safetensors").keys()
    )


def test_ctrl_c_in_a_process_leaves_a_usable_checkpoint(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-c", "from fastattn.train.cli import train_app; train_app()", "translate"]
    command += ["--data", str(small_file(tmp_path)), "--out", str(out), "--embed-dim", "16", "--num-heads", "2"]
    command += ["--epochs", "100000", "--checkpoint-every", "1", "--evaluate-every", "100000", "--attention", "torch"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not (out / "checkpoint.pt").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume" in output
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["step"] >= 1
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def small_file(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{s}\t{t}\n" for s, t in CORPUS[0]))
    return path


def test_the_directory_of_a_run(finished):
    names = {p.name for p in finished.directory.iterdir()}
    assert names == {
        "run.json",
        "model.safetensors",
        "checkpoint.pt",
        "history.jsonl",
        "curves.png",
        "report.json",
        "tokenizer.json",
    }
    assert (finished.directory / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (finished.directory / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [10, 20, 30]
    assert rows[-2]["loss"] < rows[0]["loss"]
    report = json.loads((finished.directory / "report.json").read_text())
    assert report["steps"] == 30 and report["pairs"] == 30 and {"exact_match", "bleu"} <= report.keys()


def test_saved_weights_predict_the_same(finished):
    model, tokenizer = load_translator(finished.directory, torch.device("cpu"))
    sources = [s for s, _ in CORPUS[2][:5]]
    task = finished.task
    assert translate(model, tokenizer, sources, torch.device("cpu")) == translate(
        task.model.eval(), task.tokenizer, sources, torch.device("cpu")
    )


def test_a_run_is_never_overwritten(finished):
    before = snapshot(finished.directory)
    with pytest.raises(CheckpointError, match="already holds a run"):
        Run(make_task(), OPTIONS, finished.directory)
    assert snapshot(finished.directory) == before


def test_of_two_runs_made_on_one_new_directory_one_trains(tmp_path):
    runs = [Run(make_task(), SHORT, tmp_path / "run") for _ in range(2)]
    assert not (tmp_path / "run").exists()
    runs[0].train()
    before = snapshot(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"run: already holds a run \(run\.json\); continue it with --resume"):
        runs[1].train()
    assert snapshot(tmp_path / "run") == before


@pytest.mark.parametrize("resume", [False, True])
def test_while_a_run_trains_no_other_one_does(tmp_path, resume):
    """In the same process or another; the lock is gone when its holder is."""
    directory = tmp_path / "run"
    task = make_task()
    collate, errors = task.collate, []

    def busy(indices):
        if not errors:
            try:
                Run(make_task(), SHORT, directory, resume=resume).train()
            except CheckpointError as error:
                errors.append(str(error))
        return collate(indices)

    task.collate = busy
    assert Run(task, SHORT, directory).train()["steps"] == 3
    message = "another run is training there now" if resume else "already holds a run"
    assert message in errors[0] and str(directory) in errors[0]
    assert Run(make_task(), SHORT, directory, resume=True).train()["steps"] == 3


def test_a_claim_is_made_once(tmp_path):
    """Also where the file system has no locks: run.json alone tells."""

    def attempt(_):
        try:
            claim(tmp_path, {})
        except CheckpointError as error:
            return str(error)
        return "mine"

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(attempt, range(8)))
    assert answers.count("mine") == 1
    assert all("already holds a run (run.json)" in answer for answer in answers if answer != "mine")


def test_a_run_that_went_on_elsewhere_is_read_anew(tmp_path):
    directory = tmp_path / "run"
    Run(interrupt_at(make_task(), 2), SHORT, directory).train()
    first, second = (Run(make_task(), SHORT, directory, resume=True) for _ in range(2))
    assert first.train()["steps"] == 3
    with pytest.raises(CheckpointError, match="another run has gone on there meanwhile; --resume it again"):
        second.train()


def test_a_run_that_crashed_before_its_first_checkpoint_starts_when_resumed(tmp_path, finished, monkeypatch):
    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", lambda self: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            Run(make_task(), OPTIONS, directory).train()
    assert {p.name for p in directory.iterdir()} == {"run.json", "tokenizer.json"}
    with pytest.raises(CheckpointError, match="already holds a run"):
        Run(make_task(), OPTIONS, directory)
    with pytest.raises(CheckpointError, match=r"run\.json: .*embed_dim 16 \(here 32\)"):
        Run(make_task(embed_dim=32), OPTIONS, directory, resume=True)
    report = Run(make_task(), OPTIONS, directory, resume=True).train()
    assert without_times([report]) == without_times([finished.report])


def test_a_directory_that_holds_no_run_is_not_resumed(tmp_path):
    with pytest.raises(CheckpointError, match="missing; the run cannot be resumed"):
        Run(make_task(), OPTIONS, tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_one_run_may_train_on_after_an_interruption(tmp_path, finished):
    run = Run(interrupt_at(make_task(), 4), OPTIONS, tmp_path / "run")
    assert run.train() == {"interrupted": True, "step": 4}
    assert without_times([run.train()]) == without_times([finished.report])


def copy_run(finished, tmp_path):
    directory = tmp_path / "copy"
    directory.mkdir()
    for name, data in snapshot(finished.directory).items():
        (directory / name).write_bytes(data)
    return directory


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "checkpoint.pt").write_bytes((d / "checkpoint.pt").read_bytes()[:5000]), "truncated, or not"),
        (lambda d: (d / "checkpoint.pt").write_bytes(b"PK nonsense"), "truncated, or not a checkpoint"),
        (lambda d: torch.save({"model": {}}, d / "checkpoint.pt"), "not a checkpoint of fastattn train"),
        (
            lambda d: torch.save({"format": FORMAT, "task": "translate", "model": {}}, d / "checkpoint.pt"),
            "not a whole checkpoint: configuration, data, optimizer, .* missing",
        ),
        (lambda d: (d / "checkpoint.pt").unlink(), "missing; the run cannot be resumed"),
    ],
    ids=["truncated", "nonsense", "foreign", "in part", "missing"],
)
def test_a_spoilt_checkpoint_is_an_error_and_left_alone(finished, tmp_path, spoil, message):
    directory = copy_run(finished, tmp_path)
    spoil(directory)
    before = snapshot(directory)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: .*" + message):
        Run(make_task(), OPTIONS, directory, resume=True)
    assert snapshot(directory) == before


def test_a_checkpoint_of_another_model_or_other_data(finished, tmp_path):
    directory = copy_run(finished, tmp_path)
    before = snapshot(directory)
    with pytest.raises(CheckpointError, match=r"configuration differs .*: embed_dim 16 \(here 32\)$"):
        Run(make_task(embed_dim=32), OPTIONS, directory, resume=True)
    with pytest.raises(CheckpointError, match="trained on other data"):
        other = [(s, t + "?") for s, t in CORPUS[0]]
        Run(make_task(corpus=(other, *CORPUS[1:])), OPTIONS, directory, resume=True)
    assert snapshot(directory) == before


def test_weights_that_are_truncated_or_of_another_model(finished, tmp_path):
    directory = copy_run(finished, tmp_path)
    weights = directory / "model.safetensors"
    with pytest.raises(CheckpointError, match="weights are not this model's"):
        load_weights(weights, make_task(embed_dim=32).model)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a safetensors file, or truncated"):
        load_weights(weights, make_task().model)


def test_a_directory_without_a_run(finished, tmp_path):
    with pytest.raises(CheckpointError, match="holds no run"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a run's description"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="not written by fastattn train"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"format": FORMAT, "task": "translate", "model": {"depth": 3}}))
    with pytest.raises(CheckpointError, match="not written by fastattn train"):
        read_run(tmp_path)
    run = {"format": FORMAT, "task": "translate", "model": {"depth": 3}, "options": {}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(CheckpointError, match=r"run\.json: not of this version of fastattn .*'depth'"):
        load_translator(tmp_path, torch.device("cpu"))
    with pytest.raises(CheckpointError, match="a run of the task 'translate', not 'classify'"):
        read_run(finished.directory, "classify")


def test_early_stopping_keeps_the_best_weights(tmp_path):
    task = make_task()
    # The fourth is no gain, so the fifth is never asked for; of equals the later is kept.
    figures = iter([0.1, 0.5, 0.4, 0.5, 0.9])
    best = {}

    def evaluate():
        value = next(figures)
        if value == 0.5:
            best.update({k: v.clone() for k, v in task.model.state_dict().items()})
        return {"exact_match": value}

    task.evaluate = evaluate
    options = TrainOptions(epochs=100, batch_size=16, evaluate_every=2, patience=2, warmup_steps=2)
    report = Run(task, options, tmp_path / "run").train()
    assert report["steps"] == 8 and report["best_exact_match"] == 0.5
    for name, tensor in task.model.state_dict().items():
        assert torch.equal(tensor, best[name])


def test_patience_begins_after_the_warm_up(tmp_path):
    """Evaluations at steps 2, 4, 6, ... of which the first is the best: those at 4 and 6 are not counted."""
    task = make_task()
    task.evaluate = lambda: {"exact_match": 0.0}
    options = TrainOptions(epochs=100, batch_size=16, evaluate_every=2, patience=2, warmup_steps=6)
    progress, said = Progress.silent(), []
    progress.says = said.append
    assert Run(task, options, tmp_path / "run").train(progress)["steps"] == 10
    assert said == [
        "240 training examples in batches of 16, 15 steps an epoch: 100 epochs, 1500 steps, 6 of them warm-up",
        "stopped at step 10 of 1500: 2 evaluations without gain",
    ]


def test_bf16_autocast_trains(tmp_path):
    options = TrainOptions(steps=30, batch_size=16, warmup_steps=5, bf16=True)
    run = Run(make_task(), options, tmp_path / "run")
    run.train()
    _, losses = run.history.series("loss")
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in run.task.model.parameters())


def test_compile_trains_the_same_model(tmp_path, monkeypatch):
    """Traced and differentiated ahead of time, but not compiled to C++, which takes a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    losses = []
    for name in (False, True):
        options = TrainOptions(steps=10, batch_size=16, warmup_steps=5, compile=name)
        run = Run(make_task(dropout=0.0, attention="fastattn"), options, tmp_path / str(name))
        run.train()
        losses += run.history.series("loss")[1]
        assert not any("_orig_mod" in key for key in load_file(tmp_path / str(name) / "model.safetensors"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path):
    task = make_task()
    task.loss = lambda model, batch: model(batch[0], batch[1]).sum() * float("nan")
    with pytest.raises(TrainingError, match="not a number at step 0"):
        Run(task, OPTIONS, tmp_path / "run").train()


def test_schedules():
    options = TrainOptions(schedule="inverse_sqrt", warmup_steps=10)
    factors = [learning_rate_factor(options, step, 100) for step in (0, 4, 9, 39)]
    assert factors == pytest.approx([0.1, 0.5, 1.0, 0.5])
    options = TrainOptions(schedule="cosine", warmup_steps=10)
    factors = [learning_rate_factor(options, step, 100) for step in (0, 9, 54, 99)]
    assert factors == pytest.approx([0.1, 1.0, 0.5, 0.0])


def test_a_run_that_fails_in_its_first_epoch_can_be_resumed(tmp_path, finished):
    task = make_task()
    task.collate = lambda indices: (_ for _ in ()).throw(TrainingError("a file cannot be read"))
    with pytest.raises(TrainingError, match="cannot be read"):
        Run(task, OPTIONS, tmp_path / "run").train()
    assert Run(make_task(), OPTIONS, tmp_path / "run", resume=True).train()["steps"] == 30
    ours = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    whole = torch.load(finished.directory / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(ours[name], tensor) for name, tensor in whole.items())


def test_options_that_a_resumed_run_may_change():
    options = TrainOptions(epochs=3)
    assert options.resumed_with(epochs=5, learning_rate=options.learning_rate).epochs == 5
    with pytest.raises(TrainingError, match=r"started with learning_rate=0.001; it cannot be resumed with 0.1"):
        options.resumed_with(learning_rate=0.1)
    with pytest.raises(TrainingError, match="'linear'"):
        TrainOptions(schedule="linear")


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        *((name, 0, "at least 1 and at most") for name in ("epochs", "steps", "batch_size", "patience", "threads")),
        *((name, -1, "at least 1 and at most") for name in ("evaluate_every", "checkpoint_every")),
        *((name, 0, "above 0 and finite") for name in ("minutes", "clip_norm", "learning_rate")),
        *((name, math.nan, "above 0 and finite") for name in ("minutes", "clip_norm", "learning_rate")),
        *((name, math.inf, "above 0 and finite") for name in ("minutes", "clip_norm", "learning_rate")),
        ("weight_decay", -0.1, "at least 0 and finite"),
        ("weight_decay", math.nan, "at least 0 and finite"),
        ("warmup_steps", -1, "at least 0"),
        ("threads", 1_000_000, "at most 1024"),
        ("seed", 1 << 70, "at most"),
        ("learning_rate", 10**400, "finite"),
        ("epochs", True, "an int"),
        ("epochs", "3", "an int"),
        ("epochs", 3.0, "an int"),
        ("minutes", True, "a number"),
        ("bf16", 1, "a bool"),
        ("schedule", ["cosine"], "a str"),
        ("device", None, "a str"),
    ],
)
def test_options_of_nonsense_are_refused(name, value, wanted):
    with pytest.raises(TrainingError, match=f"^{name} must be .*{wanted}.*, got "):
        TrainOptions(**{name: value})


@pytest.mark.parametrize("device", ["abacus", "meta", "cuda:99"])
def test_a_device_that_is_not_there(tmp_path, device):
    with pytest.raises(TrainingError, match=f"--device {device}"):
        Run(make_task(), TrainOptions(device=device), tmp_path / "run")
    assert not (tmp_path / "run").exists()
