#!/usr/bin/env python3
"""`nanomr verify`, from this folder: proves what no attack can do. See nanomr/programs/verify.py."""

from nanomr.programs import start

if __name__ == "__main__":
    start("verify")
