"""Numba compiles a kernel when it is first called with such arguments, and keeps it on the disk. Is it at that now?"""

from collections.abc import Callable

from numba.core import event


class _Watch(event.Listener):
    """Hears of every compilation, and of none that the disk makes unnecessary."""

    depth = 0  # one kernel calls another
    say: Callable[[], object] | None = None

    def on_start(self, _):
        self.depth += 1
        say, self.say = self.say, None
        if say:
            say()

    def on_end(self, _):
        self.depth -= 1


_watch = _Watch()
event.register("numba:compile", _watch)


def now() -> bool:
    """Is a kernel being compiled? What runs meanwhile, a signal's handler say, has interrupted that."""
    return _watch.depth > 0


def announce(say: Callable[[], object]):
    """Call ``say()`` before the next compilation, if there is one."""
    _watch.say = say
