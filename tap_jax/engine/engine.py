"""The engine of a run: the compiled side, and the cohorts made of it that methods work with."""

import concurrent.futures
from collections.abc import Mapping, Sequence

from tap_jax.data.sampling import Plan, sample_cohort
from tap_jax.engine.cohort import Cohort
from tap_jax.engine.compiled import Compiled

_DRAWING = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="draw")


class Engine(Compiled):
    """What makes cohorts, and draws their plans ahead; see `Compiled` for how it is built."""

    def drawn(self, round_: int) -> tuple[int, ...]:
        """The clients that the seed draws for a round."""
        settings = self.settings
        return tuple(sample_cohort(settings.seed, round_, len(self.data), settings.cohort_size).tolist())

    def cohort(
        self,
        clients: Sequence[int],
        round_: int | Sequence[int],
        moments: Mapping | None = None,
    ) -> Cohort:
        """The clients of round `round_` (0-based).

        Args:
          clients: all different; more than a round has where they are of a window.
          round_: one for all, or each client's own.
          moments: as in `State`, where optimizer states persist.
        """
        settings = self.settings
        size = settings.cohort_size if len(clients) <= settings.cohort_size else settings.window_clients(len(self.data))
        return Cohort(self, clients, round_, size=size, moments=moments)

    def draw_ahead(self, round_: int) -> None:
        """Draws the plans with which a round of the clients drawn for it will begin, beside what runs now.

        It is taken to begin as the last one did. A plan is a function of (seed, round, phase, clients), so whether it
        was drawn ahead changes nothing.
        """
        kept = {key: plan for key, plan in self.drawn_ahead.items() if abs(key[0] - round_) <= 1}
        key = round_, self.begins, self.drawn(round_)
        if self.begins and key not in kept:
            kept[key] = _DRAWING.submit(self._draw, *key)
        self.drawn_ahead = kept

    def _draw(self, round_: int, phase: str, clients: Sequence[int]) -> Plan:
        return self.cohort(clients, round_).plan(phase, post=False)

    def client_batches(self, round_: int, moments: Mapping | None = None) -> list[Cohort]:
        """All clients, `clients_at_once` at a time."""
        size, everyone = self.settings.clients_at_once, range(len(self.data))
        return [Cohort(self, everyone[i : i + size], round_, size=size, moments=moments) for i in everyone[::size]]
