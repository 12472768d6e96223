"""What a person types: ``nanomr train``, ``nanomr attack`` and ``nanomr verify``, each a module here with a ``main()``.

``train_cifar.py``, ``attack_cifar.py`` and ``verify_small.py`` at the top of the repository are the same programs.
"""

import importlib
import sys
from typing import NoReturn

from .. import __version__, cli
from ..errors import UserError

PROGRAMS = {
    "train": "train a locally stable network",
    "attack": "attack it: PGD, AutoAttack, AutoAttack+, Wasserstein",
    "verify": "prove for how many images no adversarial example exists",
}


def start(name: str) -> NoReturn:
    """Run the program ``name`` with the arguments in ``sys.argv``, and exit."""
    cli.run(lambda: _module(name).main())


def _module(name: str):
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("nanomr"):
            raise
        package = (error.name or "").partition(".")[0]
        raise UserError(f"this program needs {error.name}: pip install {package}, or nanomr once more") from None


def main() -> NoReturn:
    """The command ``nanomr``: its first argument is the program's name, the others are that program's."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in PROGRAMS:
        sys.argv = [f"nanomr {name}", *sys.argv[2:]]
        start(name)
    cli.run(lambda: _other(name))


def _other(name: str) -> int:
    if name == "--version":
        print(f"nanomr {__version__}")
        return 0
    usage = "usage: nanomr PROGRAM [FLAGS]\n\n" + "".join(f"  nanomr {p:8}{text}\n" for p, text in PROGRAMS.items())
    if name in ("-h", "--help"):
        print(f"{usage}\nnanomr PROGRAM --help explains the program's flags, nanomr --version names the version.")
        return 0
    print(f"{usage}\nnanomr: error: there is no program {name!r}", file=sys.stderr)
    return 2
