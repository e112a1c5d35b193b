"""SIGTERM: how schedulers say that they are about to take the machine away."""

import logging
import os
import signal
import threading

_LOG = logging.getLogger(__name__)

# What a shell gives for a process that SIGTERM has ended. Not 0: a run that is to go on elsewhere must look like one to
# `train && report`, to a Kubernetes Job and to whatever else asks whether it has finished.
STATUS = 128 + signal.SIGTERM


class Preemption:
    """A context in which SIGTERM ends the process at once, but once `arm` was called the first only sets `stop`.

    A thread listens for them: Python's own handlers would wait for as long as the main thread compiles or computes.
    Outside the main thread, which alone may have handlers, nothing changes.

    Example:
      >>> with Preemption() as preemption:
      ...     preemption.arm()
      ...     [number for number in range(3) if not preemption.stop]
      [0, 1, 2]
    """

    stop = False
    _armed = False

    def arm(self) -> None:
        """From now on there is something to save."""
        self._armed = True

    def __enter__(self) -> "Preemption":
        self._listener: threading.Thread | None = None
        if threading.current_thread() is threading.main_thread():
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._before = signal.signal(signal.SIGTERM, lambda *_: None)
            self._listener = threading.Thread(target=self._listen, name="preemption", daemon=True)
            self._listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._listener is not None:
            signal.signal(signal.SIGTERM, self._before)
            signal.set_wakeup_fd(self._fd_before)
            os.close(self._write)  # which ends the listener
            self._listener.join()
            os.close(self._read)

    def _listen(self) -> None:
        for number in iter(lambda: os.read(self._read, 1), b""):
            if number[0] != signal.SIGTERM:
                continue
            if self.stop or not self._armed:
                why = b"SIGTERM again" if self.stop else b"SIGTERM before the first round"
                os.write(2, b"tap-jax: " + why + b"; stopped at once\n")
                os._exit(STATUS)
            self.stop = True
            _LOG.warning(
                "SIGTERM: the run stops after what it is doing, one round or client batch; again stops at once"
            )
