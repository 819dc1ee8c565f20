"""Where the data that ships lies: beside the package in a checkout, inside it in a wheel."""

from pathlib import Path

VERSION = "0.1.0"
LIBRARY = "care-compress"
MAKER = f"{LIBRARY} {VERSION}"  # what files say they were made by

PACKAGE = Path(__file__).resolve().parent
# ``setup.py`` copies what a checkout has beside the package into the wheel's `PACKAGE`/shipped.
IN_CHECKOUT = (PACKAGE.parent / "setup.py").is_file() and not (PACKAGE / "shipped").is_dir()


def shipped(name: str) -> Path:
    """Return the path of something that ships, by its name in a checkout: ``recipes``."""
    return (PACKAGE.parent if IN_CHECKOUT else PACKAGE / "shipped") / name


# What to type to install another package as this one was.
PIP = ".venv/bin/python -m pip install -c constraints.txt" if IN_CHECKOUT else "pip install"


def install_command(extra: str = "") -> str:
    """Return what to type to install the package with an extra."""
    extras = f"[{extra}]" if extra else ""
    return f"{PIP} -e '.{extras}'" if IN_CHECKOUT else f"{PIP} 'care-compress{extras}'"


QUANTIZE = "make quantize" if IN_CHECKOUT else "care-compress quantize"
COMPARE = "python eval/compare.py" if IN_CHECKOUT else "care-compress compare"


def quantize_command(recipe: str) -> str:
    """Return what to type to make a run of a recipe."""
    return f"{QUANTIZE} RECIPE={recipe}" if IN_CHECKOUT else f"{QUANTIZE} {recipe}"
