"""What the workers, and Ray Train's controller, tell the driver while a run is under way."""

import os
import time
from typing import Any

import ray.train

from raycifar.board import Board

SHOW_SECONDS = 0.5  # between two looks at a step's figures
VERDICT_SECONDS = 0.05  # between two looks for a verdict


class Reporter:
    """Tells the driver, by the board, how the run stands; only the first worker speaks."""

    def __init__(self, board: Board, *, leader: bool) -> None:
        self.board, self.leader = board, leader
        self.content: dict[str, Any] = {
            "attempt": os.getpid(),
            "history": [],
            "notices": [],
            "step": None,
            "about": {},
        }
        self.last = 0.0

    def phase(self, name: str) -> None:
        self._put(phase=name)

    def notice(self, sentence: str) -> None:
        self._put(notices=[*self.content["notices"], sentence])

    def about(self, facts: dict[str, Any]) -> None:
        self._put(about=facts)

    def epoch(self, history: list[dict[str, Any]]) -> None:
        self._put(history=history, step=None)

    def verdict(self, epoch: int) -> bool:
        """Wait until the search has said whether the run stops after `epoch`."""
        self.phase("comparing with other trials")
        while (stop := self.board.get(f"stop after {epoch}")) is None:
            time.sleep(VERDICT_SECONDS)
        self.phase("training")
        return stop

    def due(self) -> bool:
        return self.leader and time.perf_counter() - self.last >= SHOW_SECONDS

    def step(self, **figures: Any) -> None:
        self.last = time.perf_counter()
        self._put(step=figures)

    def _put(self, **changes: Any) -> None:
        self.content |= changes
        if self.leader:
            self.board.put("worker", self.content)


class FailureNotices(ray.train.UserCallback):
    """Tells the driver, from Ray Train's controller, that workers died and the run is restarted."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.told: list[str] = []

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        ranks = ", ".join(str(rank) for rank in sorted(worker_exceptions))
        reason = (str(next(iter(worker_exceptions.values()))).strip().splitlines() or ["no reason given"])[0]
        self.told.append(f"Worker {ranks} failed ({reason}); the workers are restarted from the last checkpoint.")
        self.board.put("failures", self.told)
