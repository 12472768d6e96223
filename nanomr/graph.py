"""A training step as a CUDA graph: the host then starts it with one call instead of several hundred launches."""

from contextlib import suppress

from .backend import find_cupy
from .errors import UserError


class Replayed:
    """``step()`` on the device: called as it is for ``warm`` times, then captured, and replayed ever after.

    Whatever ``step`` is given, and whatever of it lasts, must be in arrays that live as long as this object and stay
    where they are; numbers that change from step to step are in such arrays, too. A replay repeats launches, not
    Python. So ``step`` must not look at a value (that would wait for the device), move host values there, or call
    cuBLAS. Raises UserError when it cannot be captured.
    """

    def __init__(self, step, warm: int = 2):
        cupy = find_cupy()
        self.cupy, self.step, self.warm, self.graph = cupy, step, warm, None
        # What a step allocates comes from a pool of its own, kept alive: a replay writes to the same addresses, which
        # nobody else may have been given. CuPy's pools hold memory by stream, so that the warm steps run on this one.
        self.pool, self.stream = cupy.cuda.MemoryPool(), cupy.cuda.Stream(non_blocking=True)

    def __call__(self):
        if self.graph is None and not self.warm:
            self.graph = self._capture()
        if self.graph is not None:  # on the default stream, in order with all else that is done to these arrays
            return self.graph.launch(self.cupy.cuda.Stream.null)
        self.warm -= 1  # compiles kernels, and fills the pool
        self.cupy.cuda.Stream.null.synchronize()
        with self.cupy.cuda.using_allocator(self.pool.malloc), self.stream:
            self.step()
        self.stream.synchronize()

    def _capture(self):
        with self.cupy.cuda.using_allocator(self.pool.malloc), self.stream:
            self.stream.begin_capture()
            try:
                self.step()
            except Exception as error:
                with suppress(Exception):  # the capture has failed already
                    self.stream.end_capture()
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                raise UserError(f"the step cannot become a CUDA graph ({reason}): use --no-graph") from error
            return self.stream.end_capture()
