import argparse
import math
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomr import __version__, programs
from nanomr.cli import fold, fraction, linf_radius, number, run
from nanomr.errors import UserError

finite = st.floats(allow_nan=False, allow_infinity=False)


@given(st.integers(-10_000, 10_000), st.integers(-10_000, 10_000).filter(bool))
def test_a_fraction_is_the_float_that_python_makes_of_it(top, bottom):
    assert fraction(f"{top}/{bottom}") == top / bottom


@given(finite)
def test_a_plain_number_is_taken_as_it_is(value):
    assert fraction(repr(value)) == value


def test_fraction_reads_what_people_write():
    assert fraction("8/255") == 8 / 255
    assert fraction(" 1.5 / 255 ") == 1.5 / 255
    assert fraction("1e-3") == 0.001


BAD = ["", "/", "8/", "/255", "8/0", "8/0.0", "0/0", "1/2/3", "8/255x", "eight"]
BAD_VALUES = ["nan", "inf", "-inf", "1/nan", "nan/1", "inf/inf", "1e308/1e-308", "1e999"]


@pytest.mark.parametrize("text", [*BAD, *BAD_VALUES])
def test_fraction_refuses_and_names_the_value(text):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        fraction(text)
    assert repr(text) in str(caught.value)


@given(st.text(max_size=20))
def test_fraction_gives_a_finite_float_or_its_own_error(text):
    try:
        value = fraction(text)
    except argparse.ArgumentTypeError:
        return
    assert type(value) is float and math.isfinite(value)


@given(st.integers(-20, 20))
def test_number_keeps_its_bounds(value):
    def accepts(parse):
        try:
            return parse(str(value)) == value
        except argparse.ArgumentTypeError:
            return False

    assert accepts(number(int, low=-3, high=5)) == (-3 <= value <= 5)
    assert accepts(number(float, above=0)) == (value > 0)
    assert accepts(number(fraction, high=0)) == (value <= 0)
    assert accepts(number(int))


def test_number_keeps_the_type_and_long_integers():
    assert type(number(int, low=0)("7")) is int
    assert type(number(float, low=0)("7")) is float
    assert number(int, low=0)("1" + "0" * 400) == 10**400


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (number(int, low=1), "0", "'0' is not a whole number >= 1"),
        (number(int, low=1), "2.5", "'2.5' is not a whole number >= 1"),
        (number(float, low=0, high=1), "1.5", "'1.5' is not a number >= 0 and <= 1"),
        (number(float, above=0), "nan", "'nan' is not a number > 0"),
        (number(float), "inf", "'inf' is not a finite number"),
        (number(fraction, low=0), "1/0", "'1/0' is not a finite number or a fraction such as 8/255"),
    ],
)
def test_number_says_what_it_wanted(parse, text, message):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        parse(text)
    assert str(caught.value) == message


def test_argparse_shows_the_message(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--eps", type=fraction)
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--eps", "8/0"])
    assert caught.value.code == 2
    assert "argument --eps: '8/0' is not a finite number" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "8/255", "0.5", "127/255"])
def test_a_linf_radius_of_up_to_a_half_is_taken_as_it_is(text, capsys):
    assert linf_radius(text) == fraction(text)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["0.6", "1", "200/255"])
def test_a_linf_radius_above_a_half_is_asked_about_in_one_line(text, capsys):
    assert linf_radius(text) == fraction(text)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("warning: ") and err.count("\n") == 1 and "[0, 1]" in err
    assert (f"did you mean {text}/255?" in err) == ("/" not in text)


@pytest.mark.parametrize("text", ["8", "1.0001", "2"])
def test_a_linf_radius_above_one_is_refused_with_what_was_meant(text, capsys):
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not a number .* did you mean {text}/255"):
        linf_radius(text)
    for bad in ("-1", "nan", "x", "1/0"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{bad}' is not"):
            linf_radius(bad)
    assert capsys.readouterr() == ("", "")


def stop(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "stderr"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (stop(MemoryError("Out\nof 4 GB")), 2, "error: out of memory: choose a smaller --batch-size (Out of 4 GB)\n"),
        (stop(UserError("no such file;\ncheck the path")), 2, "error: no such file; check the path\n"),
        (stop(KeyboardInterrupt()), 130, "\ninterrupted\n"),
    ],
)
def test_run_ends_with_a_code_and_one_line(main, code, stderr, capsys):
    with pytest.raises(SystemExit) as caught:
        run(main)
    assert (caught.value.code or 0) == code
    assert capsys.readouterr().err == stderr


@pytest.mark.skipif(os.name != "posix", reason="it sends itself a POSIX signal")
def test_sigterm_is_as_ctrl_c():
    code = f"import os; from nanomr.cli import run; run(lambda: os.kill(os.getpid(), {int(signal.SIGTERM)}))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "\ninterrupted\n")


@pytest.mark.skipif(os.name != "posix", reason="it sends itself a POSIX signal")
def test_a_second_sigterm_ends_it_at_once():
    code = f"""if True:
        import os, time
        from nanomr.cli import run

        def main():
            try:
                os.kill(os.getpid(), {int(signal.SIGTERM)})
                time.sleep(9)
            finally:
                os.kill(os.getpid(), {int(signal.SIGTERM)})
                time.sleep(9)

        run(main)
    """
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (-signal.SIGTERM, "")


def test_run_leaves_bugs_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0)


@pytest.mark.parametrize("lines", [1, 100_000], ids=["unflushed", "long"])
def test_a_closed_pipe_ends_quietly(lines):
    # Python sets SIGPIPE to be ignored, so writing to the closed pipe raises, in print or in the last flush.
    code = f"import sys; from nanomr.cli import run; sys.stdin.read(); run(lambda: print('line\\n' * {lines}))"
    arguments = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=pipe) as child:
        child.stdout.close()
        child.stdin.close()
        assert child.stderr.read() == b""
        assert child.wait() == 141


def test_fold_keeps_what_fits_and_breaks_what_does_not(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    table = "  name        1.0%     2.0 - 3.0"
    assert fold([table, "", table]).splitlines() == [table, "", table]
    lines = fold(["  warning: " + "word " * 20]).splitlines()
    assert max(map(len, lines)) <= 40 and len(lines) > 2 and all(x.startswith("    ") for x in lines[1:])
    assert " ".join(lines).split() == ["warning:", *["word"] * 20]


# --- the three commands -----------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"train": "train_cifar.py", "attack": "attack_cifar.py", "verify": "verify_small.py"}


def output(*command):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_and_the_module_are_the_same_program(name):
    """``nanomr`` itself is ``nanomr.programs:main``, as ``python -m nanomr``."""
    code, module, _ = output("-m", "nanomr", name, "--help")
    assert code == 0 and f"\nnanomr {name} --" in module
    code, script, _ = output(SCRIPTS[name], "--help")
    assert code == 0 and f"\npython {SCRIPTS[name]} --" in script
    # the line breaks of the usage depend on the name's length
    examples = [script.replace(f"python {SCRIPTS[name]}", f"nanomr {name}"), module]
    script, module = (text.split("options:")[1] for text in examples)
    assert script == module
    assert output("-m", "nanomr", name, "--nonsense")[0] == output(SCRIPTS[name], "--nonsense")[0] == 2


def test_the_installed_command_is_declared():
    with open(ROOT / "pyproject.toml", "rb") as file:
        declared = tomllib.load(file)["project"]["scripts"]
    assert declared == {"nanomr": "nanomr.programs:main"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [([], 0, "nanomr verify"), (["--help"], 0, "nanomr verify"), (["--version"], 0, __version__)],
    ids=str,
)
def test_nanomr_says_which_programs_there_are(arguments, code, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nanomr", *arguments])
    with pytest.raises(SystemExit) as stopped:
        programs.main()
    out, err = capsys.readouterr()
    assert stopped.value.code == code and words in out and err == ""


def test_a_program_that_there_is_not(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nanomr", "fly"])
    with pytest.raises(SystemExit) as stopped:
        programs.main()
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and err.endswith("error: there is no program 'fly'\n")
    assert "nanomr train" in err


def test_help_into_a_closed_pipe_ends_quietly():
    code = "import sys; sys.stdin.read(); from nanomr.programs import start; sys.argv = ['x', '--help']; start('train')"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe) as child:
        child.stdout.close()
        child.stdin.close()
        assert child.stderr.read() == b""
        assert child.wait() in (0, 141)  # argparse itself overlooks a pipe that is closed while it writes


def test_a_program_that_lacks_a_package_says_which():
    """In a process of its own: in this one the package and what imports it may be loaded already."""
    code = "import sys; sys.modules['scipy.sparse'] = None; from nanomr.programs import start; start('verify')"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (child.returncode, child.stdout) == (2, "")
    assert child.stderr == "error: this program needs scipy.sparse: pip install scipy, or nanomr once more\n"
