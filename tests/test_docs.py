"""The documents say what the code does: names, quotations, examples, links, printed numbers, figures."""

import doctest
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DERIVATIONS = ROOT / "docs" / "derivations"
PAGES = sorted(page.name for page in DERIVATIONS.glob("*.md") if page.name != "README.md")
DOCUMENTS = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if p.exists()]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
every_page = pytest.mark.parametrize("page", PAGES)


def _script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _resolve(name):
    """The object called ``name``; raises AttributeError. Modules first: ``nanomr.gradcheck`` is a function, too."""
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        module = ".".join(parts[:split])
        try:
            value = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not error.name.startswith("nanomr"):
                return pytest.skip(f"{name} needs {error.name}, which is not installed")
            continue
        for part in parts[split:]:
            value = getattr(value, part)
        return value
    raise AttributeError(name)


def _prose(text):
    """``text`` without its fenced blocks."""
    return BLOCK.sub("", text)


def _names(text):
    return sorted(set(re.findall(r"`(?:python -m )?(nanomr(?:\.[A-Za-z_]\w*)+)", _prose(text))))


def _quotations(text):
    """(path, code) of each ```python block that says ``# from path``."""
    for language, body in BLOCK.findall(text):
        if language == "python" and (match := re.match(r"# from (\S+)\n", body)):
            yield match[1], body[match.end() :]


def _links(text):
    return re.findall(r"\]\(([^)\s]+)\)", _prose(text))


def _anchors(text):
    headings = re.findall(r"^#+ (.+)$", _prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _mentions(path):
    """The pages that a source file names: ``derivations/relu.md``, or ``derivations/relu.md, hamming.md``."""
    lists = re.findall(
        r"derivations/((?:`*,? ?(?:docs/derivations/)?`*[a-z_]+\.md)+)", path.read_text(encoding="utf-8")
    )
    return {page for pages in lists for page in re.findall(r"[a-z_]+\.md", pages)}


def _names_cases():
    return [
        pytest.param(name, id=f"{document.relative_to(ROOT).as_posix()}:{name}")
        for document in DOCUMENTS
        for name in _names(document.read_text(encoding="utf-8"))
    ]


def test_there_is_something_to_check():
    texts = [(DERIVATIONS / page).read_text(encoding="utf-8") for page in PAGES]
    assert len(PAGES) >= 10
    assert all(_names(text) for text in texts)
    assert sum(len(list(_quotations(text))) for text in texts) >= 10
    assert sum(">>>" in text for text in texts) >= 9


@pytest.mark.parametrize("name", _names_cases())
def test_names_exist(name):
    _resolve(name)


@pytest.mark.parametrize("name", ["nanomr.losses.haming", "nanomr.lossses.hamming", "nanomr.gradcheck.gradcheck.x"])
def test_a_name_that_does_not_exist_is_found_out(name):
    with pytest.raises(AttributeError):
        _resolve(name)


@every_document
def test_quoted_code_is_verbatim(document):
    for path, code in _quotations(document.read_text(encoding="utf-8")):
        assert code.strip(), f"an empty quotation from {path}"
        source = (ROOT / path).read_text(encoding="utf-8")
        assert f"\n{code}" in source, f"not in {path}:\n{code}"


@every_page
def test_examples_print_what_the_page_says(page):
    """All ``>>>`` blocks of a page are one session. A python block is an example or a quotation: all are checked."""
    text = (DERIVATIONS / page).read_text(encoding="utf-8")
    session = []
    for language, body in BLOCK.findall(text):
        if language == "python":
            assert body.startswith(("# from nanomr/", ">>> ")), f"neither an example nor a quotation:\n{body}"
            session += [body] if body.startswith(">>> ") else []
    out = []
    test = doctest.DocTestParser().get_doctest("\n".join(session), {}, page, page, 0)
    assert doctest.DocTestRunner().run(test, out=out.append).failed == 0, "".join(out)


@every_document
def test_relative_links_lead_somewhere(document):
    for link in _links(document.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.is_relative_to(ROOT) and target.exists(), f"{link} leads nowhere"
        if anchor and target.suffix == ".md":
            assert anchor in _anchors(target.read_text(encoding="utf-8")), f"{target.name} has no section {anchor}"


@every_page
def test_every_page_is_in_the_index(page):
    assert page in _links((DERIVATIONS / "README.md").read_text(encoding="utf-8"))


def test_the_code_names_every_page_and_no_other():
    mentioned = set().union(*(_mentions(path) for path in (ROOT / "nanomr").rglob("*.py")))
    assert mentioned == set(PAGES)


@every_page
def test_formulas_survive_markdown(page):
    """GitHub eats a backslash before punctuation, and ``*`` and ``|`` mean something to it."""
    text = re.sub(r"`[^`\n]*`", "", _prose((DERIVATIONS / page).read_text(encoding="utf-8")))
    for paragraph in text.split("\n\n"):
        assert paragraph.count("$$") % 2 == 0, paragraph
        inline = re.sub(r"\$\$.*?\$\$", "", paragraph, flags=re.S)
        assert all(line.count("$") % 2 == 0 for line in inline.splitlines()), paragraph
    for formula in re.findall(r"\$\$(.*?)\$\$", text, re.S) + re.findall(r"(?<!\$)\$([^$\n]+)\$(?!\$)", text):
        assert not re.search(r"\\[^A-Za-z]|[*|<>]", formula), formula
        assert formula.count("{") == formula.count("}"), formula
        assert formula.count(r"\big") + formula.count(r"\Big") in (0, 2, 4), formula


CHECK = _script(DERIVATIONS / "check.py")


@every_page
def test_gradient_check_of_the_page(page):
    found = CHECK.errors(page)
    assert found, "checks nothing"
    for method, error in found.items():
        assert error < CHECK.BOUNDS[method]


@pytest.mark.parametrize("place", ["page", "index"])
@every_page
def test_printed_gradient_check(page, place):
    """The printed line has the columns of check.py's, and errors within the bounds (digits differ by machine)."""
    text = (DERIVATIONS / (page if place == "page" else "README.md")).read_text(encoding="utf-8")
    printed = re.findall(rf"^{re.escape(page)} +(\S+) +(\S+)$", text, re.M)
    assert len(printed) == 1
    found = CHECK.errors(page)
    for (method, bound), column in zip(CHECK.BOUNDS.items(), printed[0], strict=True):
        assert (column == "-") == (method not in found)
        assert column == "-" or 0 <= float(column) < bound
    assert re.search("^page +" + " +".join(CHECK.BOUNDS) + "$", text, re.M)


def test_check_finds_a_wrong_gradient(monkeypatch):
    right = CHECK.losses.intrinsic
    monkeypatch.setattr(
        CHECK.losses, "intrinsic", lambda a, b: (right(a, b)[0], right(a, b)[1] * (1 + 1e-9), right(a, b)[2])
    )
    with pytest.raises(AssertionError, match="relative error"):
        CHECK.errors("intrinsic.md")


def test_check_finds_a_wrong_table(monkeypatch):
    right = CHECK.offsets
    monkeypatch.setattr(CHECK, "offsets", lambda *axes: right(*axes)[::-1])
    with pytest.raises(AssertionError):
        assert CHECK.errors("convolution.md")["complex"] < CHECK.BOUNDS["complex"]


def test_figure_1(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install 'nanomr[plots]')")
    picture = _script(ROOT / "docs" / "figures" / "figure1.py").draw(tmp_path / "new" / "figure1.png")
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert 20_000 < len(data) < 150_000
    assert (ROOT / "docs" / "img" / "figure1.png").stat().st_size < 150_000


# --- the front door ---------------------------------------------------------------------------------------------------


def test_the_readmes_python_runs_as_it_stands():
    (block,) = [body for language, body in BLOCK.findall((ROOT / "README.md").read_text()) if language == "python"]
    exec(compile(block, "README.md", "exec"), {})


def test_the_example_runs(tmp_path, capsys):
    found = _script(ROOT / "examples" / "own_network.py").main(tmp_path / "out")
    assert 0.9 < found["verified"] <= found["attacked"] <= found["clean"] == 1
    assert "epoch" in capsys.readouterr().out


def test_importing_nanomr_shows_what_there_is():
    """In a process of its own: nothing is imported before it is asked for, and everything by its name alone."""
    code = (
        "import sys, nanomr as mr\n"
        "assert not {'numba', 'matplotlib', 'safetensors', 'nanomr.models'} & set(sys.modules), 'imported at once'\n"
        "assert set(mr.__all__) <= set(dir(mr))\n"
        "for name in mr.__all__: getattr(mr, name)\n"
        "import nanomr.gradcheck, nanomr.programs.train\n"
        "assert callable(mr.gradcheck) and callable(mr.load) and mr.attacks.pgd and mr.data.load and mr.train.Trainer\n"
        "try: mr.nonsense\n"
        "except AttributeError as error: print(error)\n"
        "from nanomr import *; verify\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "'nonsense'" in done.stdout and "attacks" in done.stdout
