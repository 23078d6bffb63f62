"""What a run does, in which order, and how long each step may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .pool import Task

#: Seconds of the run: it ends inside a command of ten minutes, start of the machine and transfers apart.
TIME_LIMIT = 500.0
START_SECONDS = 10.0  # until the first process has imported torch and found the device


@dataclass
class Step:
    """Tasks that run one after the other (timed), or side by side; ``seconds`` is the step's share of the run.

    What a step leaves of its share goes to those that follow. ``choose(rows)`` gives tasks that depend on what was
    measured so far.
    """

    name: str
    seconds: float
    tasks: list[Task] = field(default_factory=list)
    side_by_side: bool = False
    choose: Callable[[list[dict]], list[Task]] | None = None
    #: Tasks that other processes do meanwhile.
    meanwhile: list[Task] = field(default_factory=list)

    def estimate(self, workers: int) -> float:
        """Seconds that the step should take."""
        seconds = [task.estimate for task in self.tasks]
        return max(sum(seconds) / workers, max(seconds, default=0.0)) if self.side_by_side else sum(seconds)


def steps(device: str, backend: str, quick: bool = False, logs: str | None = None) -> list[Step]:
    """The steps of a whole run, what is needed most first: numbers exist early, and nothing is timed beside others.

    ``logs``: the folder that keeps what a debugger says.
    """
    from . import bench, check, devices, profile, smoke, tune

    arguments = (device, backend, quick)
    headline, rest = bench.headline_tasks(*arguments), bench.tasks(*arguments)
    checks = check.tasks(*arguments)
    first = [task for task in checks if task.key.startswith("check/bf16/")]
    others = [task for task in checks if task not in first]
    return [
        Step("smoke", 75.0, smoke.tasks(*arguments, folder=logs), meanwhile=bench.compile_tasks([*headline, *rest])),
        Step("headline", 55.0, headline),
        Step("orders", 35.0, tune.order_tasks(*arguments)),
        Step("switches", 25.0, tune.switch_tasks(*arguments)),
        Step("check", 62.0, [*first, *devices.tasks(*arguments)], side_by_side=True),
        Step("wide", 20.0, devices.wide_tasks(*arguments)),
        Step("profile", 45.0, profile.tasks(*arguments)),
        Step("bench", 80.0, rest),
        Step("tune", 43.0, tune.tasks(*arguments)),
        Step("best", 15.0, choose=lambda rows: tune.best_tasks(rows, *arguments)),
        Step("check_others", 40.0, others, side_by_side=True),
        Step("host", 5.0, bench.host_tasks(*arguments)),
    ]


def machine_task(device: str) -> Task:
    """What describes the machine: the first thing that a run does, whatever its steps."""
    return Task("machine", "machine", ".report:machine", {"device": device}, timeout=60.0, estimate=1.0)


def table(chosen: list[Step], workers: int, time_limit: float) -> str:
    """The text of --dry-run."""
    lines = [f"{'step':14}{'tasks':>7}{'estimate s':>12}{'at most s':>11}{'ends by s':>11}"]
    end = 0.0
    for step in chosen:
        end += step.seconds
        estimate = f"{step.estimate(workers):12.0f}" if step.tasks else f"{'-':>12}"
        lines.append(f"{step.name:14}{len(step.tasks):7}{estimate}{step.seconds:11.0f}{min(end, time_limit):11.0f}")
    lines.append(f"{'in all':14}{'':7}{sum(step.estimate(workers) for step in chosen):12.0f}{end:11.0f}")
    lines.append(f"(at most {time_limit:.0f} s; {workers} processes side by side)")
    return "\n".join(lines)
