"""Ranks as threads, of which one runs at a time, and a clock that stands still while any of them does.

So what takes minutes of waiting takes none, and happens in the same order in every run.
"""

import threading


class Simulation:
    """Stands in for the module ``time``: `sleep` lets other ranks run."""

    def __init__(self):
        self._now = 0.0
        self._turn = threading.Condition()
        self._wakes = {}  # when each rank goes on, by its number
        self._running = None
        self._numbers = {}  # of ranks, by their threads

    def monotonic(self):
        return self._now

    def sleep(self, seconds):
        rank = self._numbers[threading.get_ident()]
        with self._turn:
            self._wakes[rank] = self._now + seconds
            self._hand_over()
            self._turn.wait_for(lambda: self._running == rank)

    def _hand_over(self):
        """Have the rank go on that is to wake first."""
        if self._wakes:
            self._running = min(self._wakes, key=lambda rank: (self._wakes[rank], rank))
            self._now = max(self._now, self._wakes.pop(self._running))
        self._turn.notify_all()

    def run(self, *ranks):
        """Run functions, each told its rank, to their ends; returns their results, or their exceptions."""
        results = [None] * len(ranks)

        def body(rank):
            self._numbers[threading.get_ident()] = rank
            with self._turn:
                self._turn.wait_for(lambda: self._running == rank)
            try:
                results[rank] = ranks[rank](rank)
            except Exception as error:
                results[rank] = error
            with self._turn:
                self._running = None
                self._hand_over()

        threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(len(ranks))]
        for thread in threads:
            thread.start()
        with self._turn:
            self._wakes = dict.fromkeys(range(len(ranks)), self._now)
            self._hand_over()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a rank waits for ever"
        return results
