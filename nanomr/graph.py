"""A training step as a CUDA graph: the host then starts it with one call instead of several hundred launches."""

import sys
from contextlib import suppress

from .backend import find_cupy


class Replayed:
    """``step()`` on the device: called as it is for ``warm`` times, then captured, and replayed ever after.

    Whatever ``step`` is given, and whatever of it lasts, must be in arrays that live as long as this object and stay
    where they are; numbers that change from step to step are in such arrays, too. A replay repeats launches, not
    Python. So ``step`` must not look at a value (that would wait for the device) or call cuBLAS, which CuPy refuses;
    nor move host values there, which it does not: a replay would read memory of the host that is gone.

    A step that cannot be captured, or a graph that does not start, costs speed and no more: ``failure`` says why, one
    line on stderr too, and the step is called as it is from then on.
    """

    def __init__(self, step, warm: int = 2):
        cupy = find_cupy()
        self.cupy, self.step, self.warm, self.graph, self.failure = cupy, step, warm, None, None
        # What a step allocates comes from a pool of its own, kept alive: a replay writes to the same addresses, which
        # nobody else may have been given. CuPy's pools hold memory by stream, so that the warm steps run on this one.
        self.pool, self.stream = cupy.cuda.MemoryPool(), cupy.cuda.Stream(non_blocking=True)

    def __call__(self):
        null = self.cupy.cuda.Stream.null
        if self.graph is not None:  # on the default stream, in order with all else that is done to these arrays
            return self.graph.launch(null)
        if self.failure:
            return self.step()
        if self.warm:
            self.warm -= 1  # compiles kernels, and fills the pool
            null.synchronize()
            with self.cupy.cuda.using_allocator(self.pool.malloc), self.stream:
                self.step()
            return self.stream.synchronize()
        try:
            graph = self._capture()
            graph.launch(null)
            self.graph = graph
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            self.pool.free_all_blocks()
            what = f"the step does not become a CUDA graph ({self.failure})"
            print(f"{what}: the host starts its kernels one by one, which is slower", file=sys.stderr, flush=True)
            self.step()

    def _capture(self):
        with self.cupy.cuda.using_allocator(self.pool.malloc), self.stream:
            self.stream.begin_capture()
            try:
                self.step()
            except BaseException:
                with suppress(Exception):  # the capture has failed already
                    self.stream.end_capture()
                raise
            return self.stream.end_capture()
