"""The self-test's child process on the stand-in for CuPy: stand_in_child.py KERNEL=FAULT,... NAME..."""

import sys

import fake_cupy
from pytest import MonkeyPatch

from nanomr.ops.gpu import selftest

misbehave = fake_cupy.misbehave


def spoil(fault, *launch):
    """With the fault "unusable", nothing on the device works after a launch, as behind an illegal address."""

    def broken(*_):
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered")

    if fault != "unusable":
        return misbehave(fault, *launch)
    fake_cupy.run = broken
    broken()


fake_cupy.install(MonkeyPatch())
fake_cupy.faults.update(pair.split("=") for pair in sys.argv[1].split(",") if pair)
fake_cupy.misbehave = spoil
selftest.child(sys.argv[2:])
