"""One thread per process, as in the tests; one undisturbed run to compare all others with."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty import Product, small_recipe

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes the tests start
torch.set_num_threads(1)

TARGETS = ["onnxruntime-cpu", "openvino-cpu", "tensorrt-jetson-orin"]


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains with a decoding worker, quantizes, trains again, exports and evaluates."""
    return small_recipe(tmp_path_factory.mktemp("recipe"), TARGETS, workers=1)


@pytest.fixture(scope="module")  # a module may have a recipe of its own
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Product:
    """Through, and nothing happened on the way."""
    product = Product(recipe, tmp_path_factory.mktemp("finished"))
    product.finish()
    return product


@pytest.fixture(scope="module")
def undisturbed(finished: Product) -> dict[str, Any]:
    """What the recipe leaves when nothing happens."""
    return finished.left()


@pytest.fixture
def product(recipe: Path, tmp_path: Path) -> Product:
    """The recipe, to be disturbed."""
    return Product(recipe, tmp_path / "runs")
