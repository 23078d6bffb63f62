"""How long the fused backward's programs wait for each other, by a model of all multiprocessors.

Programs start in the order of their ids, each when a multiprocessor is free, and take one turn after the other.  A part
of dQ waits in a ring of stages for its writer, which polls the tile's counter, adds and passes the turn on.  No caches,
no contention: cycle_model.py gives the cycles of a turn, README.md says what the rest was set from.
"""

import heapq
from dataclasses import dataclass

#: Cycles of a program beside its turns: launch, first loads, the stores of dK and dV.
BESIDE = 5500
#: Cycles of the writer: to read a counter, and to add a part, have it in global memory and pass the turn on.
POLL, ADD = 700, 1300
#: The same, as FlashAttention-3's ordered times ask for.
SLOW_POLL, SLOW_ADD = 1200, 2400
#: And of an unordered addition, until shared memory has been read.
READ = 500


@dataclass(frozen=True)
class Launch:
    """A backward of ``heads`` key heads, each of ``group`` query heads, of ``blocks`` blocks of 128 keys and two tiles
    of 64 queries for each, and of :class:`.configs.BackwardConfig` what decides the waits; ``section`` as in
    :mod:`.backward_fused`."""

    heads: int
    blocks: int
    causal: bool
    section: int
    ordered: bool = True
    walk: str = "first keys first"
    writers: int = 1
    dq_stages: int = 2
    group: int = 1

    def programs(self):
        """(head, block) by program id."""
        for start in range(0, self.heads, self.section):
            for place in range(self.blocks):
                block = self.blocks - 1 - place if self.walk == "last keys first" else place
                yield from ((head, block) for head in range(start, min(start + self.section, self.heads)))

    def tiles(self, block: int):
        """The (query head of the group, tile) that a block of keys takes, in its order."""
        tiles = range(2 * block if self.causal else 0, 2 * self.blocks)
        tiles = tiles if self.walk == "last keys first" else tiles[::-1]
        return ((query_head, tile) for query_head in range(self.group) for tile in tiles)

    def parts_before(self, block: int, tile: int) -> int:
        """How many blocks add to a tile before this one."""
        if self.walk == "last keys first":
            return (tile // 2 if self.causal else self.blocks - 1) - block
        return block


def cycles(launch: Launch, turn: float, poll: float = POLL, add: float = ADD, multiprocessors: int = 132) -> float:
    """From the first program's start to the last one's end."""
    free = [0.0] * multiprocessors
    passed: dict[tuple[int, int], list[float]] = {}  # by query head and tile, when each part's turn was over
    for head, block in launch.programs():
        now = heapq.heappop(free) + BESIDE
        writers = [0.0] * launch.writers
        emptied: list[float] = []
        for i, (query_head, tile) in enumerate(launch.tiles(block)):
            now += turn
            if i >= launch.dq_stages:
                now = max(now, emptied[i - launch.dq_stages])
            begin = max(now, writers[i % launch.writers])
            if launch.ordered:
                turns = passed.setdefault((head * launch.group + query_head, tile), [])
                before = launch.parts_before(block, tile)
                if before != len(turns):
                    raise ValueError(f"block {block} of head {head} waits for a later program at tile {tile}")
                begin = max(begin, turns[-1] if turns else 0.0) + poll
                turns.append(begin + add)
            writers[i % launch.writers] = begin + (add if launch.ordered else READ)
            emptied.append(writers[i % launch.writers])
        heapq.heappush(free, max(now, *writers))
    return max(free)
