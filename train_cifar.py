#!/usr/bin/env python3
"""`nanomr train`, from this folder: trains a locally stable network. See nanomr/programs/train.py."""

from nanomr.programs import start

if __name__ == "__main__":
    start("train")
