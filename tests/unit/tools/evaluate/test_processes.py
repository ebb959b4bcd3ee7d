"""What ranks of an evaluation say when they fail: two of them as threads, in an order that is given."""

from __future__ import annotations

import os
import queue
import threading
import time
from typing import Any

import pytest

from ds_longft.errors import ConfigError
from ds_longft.tools.evaluate.processes import SaidOnce


class Left(BaseException):
    """In place of the end of a process."""


def leave(code: int) -> None:
    raise Left(code)


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (1,)])
def test_an_error_is_said_once(
    order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(os, "_exit", leave)
    ports: queue.Queue[int] = queue.Queue()
    outcomes: list[Any] = []
    turn = [threading.Event() for _ in range(3)]  # claimed by nobody, by the first, by the second
    turn[0].set()

    class Store:
        """The first one goes on when the second one has come as well."""

        def __init__(self, store: Any, mine: int) -> None:
            self.store, self.mine, self.set, self.wait = store, mine, store.set, store.wait

        def add(self, key: str, more: int) -> int:
            turn[self.mine].wait(30)
            found: int = self.store.add(key, more)
            turn[self.mine + 1].set()
            turn[len(order)].wait(30)
            return found

    def rank(number: int) -> None:
        def broadcast(port: int | None) -> int:
            if port is None:
                return ports.get(timeout=30)
            ports.put(port)
            return port

        said: Any = SaidOnce(number, broadcast)
        if number not in order:
            turn[len(order)].wait(30)
            while not outcomes:  # its store is there as long as it lives
                time.sleep(0.01)
            return
        said.store = Store(said.store, order.index(number))
        try:
            said.end(ConfigError("no such model"))
        except (Left, ConfigError) as end:
            outcomes.append((number, type(end)))
        said.store = None  # the process is gone

    threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    shown = capfd.readouterr().err.count("no such model")
    raised = sum(end is ConfigError for _, end in outcomes)
    assert shown + raised == 1, outcomes
    assert raised == (order[0] == 0)
    assert sorted(number for number, _ in outcomes) == sorted(order)
    if order == (0, 1):
        assert outcomes[0][0] == 0, "rank 0 would have been ended before it said anything"
