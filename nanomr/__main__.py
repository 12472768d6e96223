"""``python -m nanomr train|attack|verify``."""

from .programs import main

if __name__ == "__main__":
    main()
