"""The training loop: one for all tasks, interruptible at every step and resumed bit by bit."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastattn.models.fields import shown
from fastattn.train import checkpoint as files
from fastattn.train.batches import epoch_batches
from fastattn.train.claim import locked
from fastattn.train.devices import resolve_device
from fastattn.train.errors import CheckpointError, TrainingError
from fastattn.train.history import History
from fastattn.train.options import TrainOptions, learning_rate_factor
from fastattn.train.output_files import write_json
from fastattn.train.progress import Progress
from fastattn.train.task import Task

#: Steps whose mean loss makes one point of the curve.
LOG_EVERY = 10
#: Attributes of a run that a checkpoint keeps as they are.
KEPT = ("step", "epoch", "position", "seconds", "best", "evaluations_without_gain", "losses")


class Run:
    """A task being trained into a directory.

    Construct, then :meth:`train`.  Nothing is written before the first step: a wrong argument leaves no
    trace.  With ``resume`` the state comes from the directory's checkpoint.
    """

    def __init__(self, task: Task, options: TrainOptions, directory: Path, resume: bool = False):
        self.task, self.options, self.directory = task, options, Path(directory)
        self.device = resolve_device(options.device)
        task.device = self.device
        task.model.to(self.device)
        decayed = [p for p in task.model.parameters() if p.dim() > 1]
        plain = [p for p in task.model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98), eps=1e-9, foreach=True)
        self.data_digest = task.digest()
        self.step = 0  # optimiser steps done
        self.epoch = 0
        self.position = 0  # batches done in this epoch
        self.seconds = 0.0  # spent training, over all sittings
        self.best: float | None = None
        self.evaluations_without_gain = 0
        self.losses: list[float] = []  # since the last point of the curve
        self.history = History()
        self.is_new = not resume
        self._checkpoint_version = files.version(self.directory / files.CHECKPOINT)
        torch.manual_seed(options.seed)
        if not resume:
            files.require_new(self.directory)
        elif files.is_only_claimed(self.directory):
            run = files.read_run(self.directory, task.name)
            self._require_configuration(run["model"], self.directory / files.RUN)
        else:
            self._restore(files.load_checkpoint(self.directory / files.CHECKPOINT, task.name))

    def train(self, progress: Progress | None = None) -> dict[str, Any]:
        """Train until a limit, early stopping or Ctrl-C; the final report (``{"interrupted": True}`` after Ctrl-C).

        Raises:
            CheckpointError: another run has claimed the directory, is training there, or has gone on from the
                checkpoint since this one read it.
        """
        if self.options.threads is not None:
            torch.set_num_threads(self.options.threads)
        with locked(self.directory):
            self._describe()
            return self._train(progress or Progress.silent())

    def _train(self, progress: Progress) -> dict[str, Any]:
        options, task = self.options, self.task
        model = torch.compile(task.model) if options.compile else task.model
        autocast = torch.autocast(self.device.type, torch.bfloat16) if options.bf16 else nullcontext()
        lengths = task.lengths()
        batches = epoch_batches(lengths, options.batch_size, options.seed, self.epoch)
        per_epoch, total = len(batches), options.total_steps(len(lengths))
        evaluate_every = options.evaluate_every or per_epoch
        checkpoint_every = options.checkpoint_every or per_epoch
        started = time.monotonic() - self.seconds

        progress.says(self._plan(len(lengths)))
        with interruptible() as interrupted, progress.running(self.step, total):
            if not (self.directory / files.CHECKPOINT).exists():
                self.save()  # an error in the first epoch leaves a run that can be resumed, too
            while self.step < total and not self._exhausted():
                if self.position >= per_epoch:
                    self.epoch, self.position = self.epoch + 1, 0
                    batches = epoch_batches(lengths, options.batch_size, options.seed, self.epoch)
                rate = options.learning_rate * learning_rate_factor(options, self.step, total)
                self._step(model, batches[self.position], rate, autocast)
                self.position, self.step = self.position + 1, self.step + 1
                self.seconds = time.monotonic() - started
                if self.step % LOG_EVERY == 0 or self.step == total:
                    self._log_loss(rate, per_epoch)
                progress.step(self.step, self.losses[-1] if self.losses else self.history.rows[-1]["loss"], rate)
                if self.step % evaluate_every == 0 or self.step == total:
                    progress.evaluated(self.step, self._evaluate(per_epoch))
                    self.seconds = time.monotonic() - started
                if self.step % checkpoint_every == 0 or self.step == total or interrupted.is_set():
                    self.save()
                if interrupted.is_set():
                    break
        if self.step < total and not interrupted.is_set():
            progress.says(f"stopped at step {self.step} of {total}: {self._exhausted()}")
        self.save()
        if interrupted.is_set():
            return {"interrupted": True, "step": self.step}
        return self._finish()

    def _plan(self, examples: int) -> str:
        """What will be done, as a line for the user."""
        options, per_epoch = self.options, self.options.steps_per_epoch(examples)
        total, warmup = options.total_steps(examples), options.warmup_steps
        text = (
            f"{counted(examples, 'training example')} in batches of {options.batch_size}, "
            f"{counted(per_epoch, 'step')} an epoch: {total / per_epoch:.4g} epochs, {counted(total, 'step')}, "
            f"{warmup} of them warm-up"
        )
        if self.step:
            text += f"; {self.step} are done"
        if warmup >= total:
            peak = learning_rate_factor(options, total - 1, total)
            text += f". The warm-up does not end before the run: the learning rate gets to {peak:.0%} of its peak"
        return text

    def save(self) -> None:
        """Write the checkpoint, the history and the curves."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        files.save_checkpoint(
            self.directory / files.CHECKPOINT,
            {
                "task": self.task.name,
                "configuration": self.task.configuration(),
                "options": asdict(self.options),
                "data": self.data_digest,
                "model": self.task.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "rng": rng,
                "history": self.history.rows,
                **{name: getattr(self, name) for name in KEPT},
            },
        )
        self._checkpoint_version = files.version(self.directory / files.CHECKPOINT)
        self.history.write(self.directory / files.HISTORY)
        if self.history.rows:
            note = f"{self.task.about_losses()} A point of the training loss is the mean of {LOG_EVERY} steps.".lstrip()
            self.history.draw(self.directory / "curves.png", f"{self.task.name}: step {self.step}", note)

    def _step(self, model, indices, rate, autocast) -> None:
        self.task.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.task.collate(indices)
        with autocast:
            loss = self.task.loss(model, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.task.model.parameters(), self.options.clip_norm)
        value = loss.item()
        if value != value:
            raise TrainingError(f"the loss is not a number at step {self.step}: lower --learning-rate")
        self.optimizer.step()
        self.losses.append(value)

    def _log_loss(self, rate: float, per_epoch: int) -> None:
        self.history.add(
            step=self.step,
            epoch=round(self.step / per_epoch, 4),
            seconds=round(self.seconds, 3),
            loss=sum(self.losses) / len(self.losses),
            learning_rate=rate,
        )
        self.losses = []

    def _evaluate(self, per_epoch: int) -> dict[str, float]:
        self.task.model.eval()
        with torch.no_grad():
            figures = self.task.evaluate()
        self.history.add(step=self.step, epoch=round(self.step / per_epoch, 4), **figures)
        value = figures[self.task.metric]
        gain = self.best is None or (value > self.best if self.task.larger_is_better else value < self.best)
        is_best = gain or value == self.best  # of equals the later: few validation examples soon show no difference
        # Before the learning rate has risen nothing can be expected.
        is_warm = self.step > self.options.warmup_steps
        self.evaluations_without_gain = self.evaluations_without_gain + 1 if is_warm and not gain else 0
        if is_best:
            self.best = value
            files.save_weights(self.directory / files.WEIGHTS, self.task.model)
        return figures

    def _exhausted(self) -> str | None:
        """Why the run ends before its last step, if it does."""
        patience, minutes = self.options.patience, self.options.minutes
        if patience is not None and self.evaluations_without_gain >= patience:
            return f"{counted(patience, 'evaluation')} without gain"
        if minutes is not None and self.seconds >= 60 * minutes:
            return f"{minutes:g} minutes are over"
        return None

    def _finish(self) -> dict[str, Any]:
        """Judge the best weights on the test data and write the report."""
        if self.best is None:
            self._evaluate(max(1, self.step))
        files.load_weights(self.directory / files.WEIGHTS, self.task.model)
        self.task.model.to(self.device).eval()
        with torch.no_grad():
            figures = self.task.report()
        report = {"task": self.task.name, "steps": self.step, "seconds": round(self.seconds, 1)}
        report |= {"best_" + self.task.metric: self.best, **figures}
        write_json(self.directory / "report.json", report)
        return report

    def _describe(self) -> None:
        run = {"format": files.FORMAT, "task": self.task.name}
        run |= {"model": self.task.configuration(), "options": asdict(self.options)}
        if self.is_new:
            files.claim(self.directory, run)
            self.is_new = False
        elif files.version(self.directory / files.CHECKPOINT) != self._checkpoint_version:
            raise CheckpointError(f"{self.directory}: another run has gone on there meanwhile; --resume it again")
        else:
            write_json(self.directory / files.RUN, run)
        self.task.save_files(self.directory)

    def _require_configuration(self, theirs: dict[str, Any], path: Path) -> None:
        """Raise unless the run in the directory has this model."""
        ours = self.task.configuration()
        if theirs != ours:
            differing = (
                f"{name} {theirs.get(name)} (here {ours.get(name)})"
                for name in {**theirs, **ours}
                if theirs.get(name) != ours.get(name)
            )
            raise CheckpointError(
                f"{path}: the model's configuration differs from this command's: {', '.join(differing)}"
            )

    def _restore(self, state: dict[str, Any]) -> None:
        path = self.directory / files.CHECKPOINT
        self._require_configuration(state["configuration"], path)
        if state["data"] != self.data_digest:
            raise CheckpointError(f"{path}: the run was trained on other data than these")
        try:
            self.task.model.load_state_dict(state["model"])
            restore_optimizer(self.optimizer, state["optimizer"])
            self.history = History.of(state["history"])
            torch.set_rng_state(state["rng"]["cpu"])
            if self.device.type == "cuda" and "cuda" in state["rng"]:
                torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise files.not_these_weights(path, error) from error
        for name in KEPT:
            setattr(self, name, state[name])


def counted(number: int, thing: str) -> str:
    return f"{number} {thing}" + "s" * (number != 1)


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict, which may say anything, into an optimizer of the same parameters and options.

    Raises:
        RuntimeError, ValueError, TypeError, LookupError, AttributeError: it is another one's, or none.
    """
    ours = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, before in zip(optimizer.param_groups, ours, strict=True):
        for name in group.keys() & before.keys() - {"params", "lr"}:  # each step sets the rate
            if group[name] != before[name]:
                raise ValueError(f"the optimizer's {name} is {shown(group[name])}, here {before[name]}")
    for parameter, moments in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if moments[name].shape != parameter.shape or not moments[name].is_floating_point():
                raise ValueError(f"the optimizer's {name} is not its parameter's")
        if moments["step"].numel() != 1 or not moments["step"] >= 0:
            raise ValueError("the optimizer's step is not a number from 0 on")


@contextmanager
def interruptible():
    """An event that Ctrl-C sets instead of raising; a second Ctrl-C raises KeyboardInterrupt.

    Outside the main thread, where Python delivers no signals, the event is never set.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(signum, frame):
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
