"""What the pages name is there: links, headings, files, tests, verbs of make and care-compress."""

import re
from pathlib import Path

import pytest

from care_compress.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "recipes/**/*.md", "calibration/*.md", "examples/**/*.md")
    for page in ROOT.glob(pattern)
)
ROOMS = {path.name for path in (ROOT / "care_compress").iterdir() if path.is_dir()}
OURS = ROOMS | {"care_compress", "bench", "calibration", "docs", "eval", "examples"}
OURS |= {"recipes", "tests"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), link
        if heading:
            lines = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), flags=re.M)
            known = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}
            assert heading in known, link


@pages
def test_files_and_tests_that_are_named_exist(page: Path) -> None:
    named = None
    for quoted in re.findall(r"`+([^`\n]+)`+", page.read_text(encoding="utf-8")):
        for word in re.findall(r"(?<![\w./{$~-])(?:[\w-]+/)*[\w-]*\.(?:py|yaml|md)\b", quoted):
            if word.split("/")[0] in OURS and "/" in word and "WHAT" not in word:
                named = word
                places = (ROOT, ROOT / "care_compress", page.parent)
                assert any((place / word).exists() for place in places), word
        for test in re.findall(r"::(test_\w+)", quoted):
            assert named is not None
            assert f"def {test}(" in (ROOT / named).read_text(encoding="utf-8"), f"{named}::{test}"


@pages
def test_commands_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    fence = re.compile(r"```\w*\n(.*?)```", flags=re.S)
    code = "\n".join(fence.findall(text) + re.findall("`([^`]+)`", fence.sub("", text)))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for verb in re.findall(r"(?:^|[ \n])make ([a-z-]+)", code):
        assert re.search(rf"^{verb}:", makefile, flags=re.M), f"make {verb}"
    for what in re.findall(r"WHAT=([a-z]+)", code):
        assert (ROOT / "bench" / f"{what}.py").exists(), what
    verbs = {
        command.name or command.callback.__name__
        for command in app.registered_commands
        if command.callback
    }
    for verb in re.findall(r"care-compress ([a-z][a-z-]*)", code):
        assert verb in verbs, f"care-compress {verb}"


def test_the_front_page_stays_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert len(re.findall(r"^[a-z-]+:.* ## ", makefile, flags=re.M)) <= 15
