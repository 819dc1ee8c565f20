"""What pyproject.toml cannot say: a wheel holds data that a checkout has beside the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("recipes", "sweeps", "examples", "eval/reference.yaml", "LICENSE")


class BuildWithData(build_py):
    """Copies it to ``care_compress/shipped``, where `care_compress.shipped` looks."""

    def run(self) -> None:
        """Build, then copy; an editable install reads the checkout itself."""
        super().run()
        if self.editable_mode:
            return
        home = Path(self.build_lib, "care_compress", "shipped")
        shutil.rmtree(home, ignore_errors=True)  # of an older build
        for name in SHIPPED:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            if Path(name).is_dir():
                shutil.copytree(name, home / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(name, home / name)


setup(cmdclass={"build_py": BuildWithData})
