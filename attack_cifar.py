#!/usr/bin/env python3
"""`nanomr attack`, from this folder: attacks a network. See nanomr/programs/attack.py."""

from nanomr.programs import start

if __name__ == "__main__":
    start("attack")
