"""Timing in turns: every implementation once per round, so that a drifting clock hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

Call = Callable[[], object]

#: A sample lasts at least this long; shorter calls are repeated within it.
SHORTEST_SAMPLE = 20e-3
#: Before each sample calls run untimed for about so long, or once: what the peers before them left in the caches and
#: in the allocator would be a good part of it, and no part of theirs in a loop. Long calls do not.
WARM_UP = 5e-3
LONG_CALL = 50e-3
ROUNDS = (3, 25)
#: A peer whose warm-up took more than this many seconds is not timed again in every round.
SLOW_PEER = 1.5


def seconds_of(call: Call, repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


@dataclass
class Turns:
    """Rounds of a call and its peers.

    ``run_peers`` is one round of all but the call itself, which pytest-benchmark times between two
    of them; ``ceiling`` returns the machine's rate (FLOP/s or B/s) at that moment.
    """

    call: Call
    peers: dict[str, Call]
    ceiling: Callable[[], float] | None
    seconds: float
    repeats: int = 1
    rounds: int = 1
    warm_ups: int = 0
    once: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    ceilings: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Warm up, and choose rounds and repeats from what that took."""
        seconds_of(self.call)
        own = seconds_of(self.call)
        self.repeats = max(1, round(SHORTEST_SAMPLE / own))
        self.warm_ups = max(1, round(WARM_UP / own)) if own < LONG_CALL else 0
        calls_a_round = self.repeats + self.warm_ups
        a_round = own * calls_a_round
        for name, peer in self.peers.items():
            first = seconds_of(peer)
            if first > SLOW_PEER:
                self.once[name] = first
            else:
                a_round += seconds_of(peer) * calls_a_round
                self.samples[name] = []
        fewest, most = ROUNDS if a_round < self.seconds else (2, ROUNDS[1])
        self.rounds = min(max(int(self.seconds / a_round), fewest), most)

    def run_peers(self) -> None:
        names = list(self.samples)
        first = len(self.ceilings) % max(1, len(names))  # whoever comes first changes every round
        for name in names[first:] + names[:first]:
            self._warm_up(self.peers[name])
            self.samples[name].append(seconds_of(self.peers[name], self.repeats))
        if self.ceiling is not None:
            self.ceilings.append(self.ceiling())
        self._warm_up(self.call)

    def _warm_up(self, call: Call) -> None:
        for _ in range(self.warm_ups):
            call()

    def run_call(self) -> None:
        for _ in range(self.repeats):
            self.call()

    def summary(self, own: list[float], work: float) -> dict:
        """Medians in seconds, ratios of peers to the call, and the share of the ceiling that ``work`` reached.

        Args:
            own: seconds of each round of ``run_call``.
            work: FLOPs or bytes of one call, in the unit of the ceiling.
        """
        own = [sample / self.repeats for sample in own]
        median = {"fastattn": statistics.median(own)} | self.once
        ratio = {name: first / median["fastattn"] for name, first in self.once.items()}
        for name, samples in self.samples.items():
            median[name] = statistics.median(samples)
            ratio[name] = statistics.median(s / o for s, o in zip(samples, own, strict=True))
        result = {"seconds": median, "ratio": ratio, "rounds": self.rounds, "repeats": self.repeats}
        if self.ceilings:
            shares = [work / o / ceiling for o, ceiling in zip(own, self.ceilings, strict=True)]
            result |= {"ceiling": statistics.median(self.ceilings), "share": statistics.median(shares)}
        return result
