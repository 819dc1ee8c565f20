"""What an exported file was made from: with anything else of it, it is exported again."""

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quantized import network
from rich.console import Console

from care_compress import machine
from care_compress.errors import ExportError
from care_compress.evaluate.agreement import Agreement
from care_compress.export import stage
from care_compress.export.result import Exported, File
from care_compress.export.stage import check_exports, exporter_for
from care_compress.export.tune import _Bench
from care_compress.files import fingerprint
from care_compress.machine import Machine, read_machine
from care_compress.model.compact import CompactCare
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.target import Target, load_target
from care_compress.run.context import RunContext
from care_compress.run.directory import Run
from care_compress.run.processes import World

QUIET = Console(quiet=True)
ONNX = load_target("onnxruntime-cpu")
shared = functools.cache(network)


def doubled() -> CompactCare:
    """The same network with other weights in one layer."""
    other = copy.deepcopy(shared())
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    return other


class Asked:
    """A run that would export; what its stage compares with an earlier run's, and what it says."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.recipe = folder, load_recipe("int8_ptq")
        self.kept: bytes | None = b"model"
        self.float_model = self.compact = shared()
        self.images, self.count, self.classes = "images", 8, ("cat", "dog")
        self.target: Target = ONNX
        self.seen: dict[str, str] = {}

    def once(self, context: Any, name: str, made_from: Any, make: Any) -> Any:
        self.seen.update({key: fingerprint(value) for key, value in made_from.items()})
        raise ExportError("nothing is written here")

    @property
    def exporter(self) -> Any:
        kept = None
        if self.kept is not None:
            kept = self.folder / "kept.safetensors"
            kept.write_bytes(self.kept)
        variants: Any = SimpleNamespace(model=self.float_model, compact=self.compact, kept=kept)
        samples: Any = SimpleNamespace(classes=self.classes, content_digest=lambda: self.images)
        context = RunContext(Run(self.folder, "run"), World(), QUIET)
        return exporter_for(context, self.recipe, variants, samples, self.count, lambda text: None)

    def __call__(self) -> dict[str, str]:
        self.seen.clear()
        self.exporter.to(self.target)
        assert self.seen
        return dict(self.seen)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    made = Asked(tmp_path)
    monkeypatch.setattr(stage, "once", made.once)
    return made


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kept", b"other weights"),
        ("images", "others of the same names"),
        ("count", 9),
        ("classes", ("cat", "cow")),
        ("target", ONNX.placed(next(iter(ONNX.placements)))),
        ("target", ONNX.at_full_range()),
        ("recipe", load_recipe("int8_ptq", ["export.batch=2"])),
        ("recipe", load_recipe("int8_ptq", ["data.crop_pct=0.5"])),
        ("recipe", load_recipe("int8_ptq", ["data.std=[1, 1, 1]"])),
    ],
)
def test_a_file_is_of_one_model_its_target_and_the_images_it_was_checked_on(
    asked: Asked, name: str, value: object
) -> None:
    before = asked()
    assert asked() == before, "the same run takes its files over"
    setattr(asked, name, value)
    assert asked() != before


def test_a_file_is_of_one_float_model(asked: Asked) -> None:
    before = asked()
    asked.float_model = doubled()
    assert asked() != before, "beside it stands the float file that INT8 has to beat"


def other_processor() -> Machine:
    here = read_machine()
    features = {name: not there for name, there in here.cpu.features.items()}
    return replace(here, cpu=replace(here.cpu, features=features))


def test_a_file_is_of_one_processor_and_one_set_of_libraries(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, other = asked(), other_processor()
    with monkeypatch.context() as patch:
        patch.setattr(machine, "read_machine", lambda: other)
        assert asked() != before, "of one name there are processors with dot products and without"
    for library in ("onnxruntime", "openvino", "onnxscript"):
        real = machine.installed_versions
        with monkeypatch.context() as patch:
            patch.setattr(
                machine,
                "installed_versions",
                lambda names=machine.LIBRARIES, real=real, library=library: real(
                    set(names) - {library}
                ),
            )
            assert asked() != before, library


def test_a_fingerprint_is_of_what_a_file_answers_and_not_of_its_name(asked: Asked) -> None:
    """A device's figures are of one export, wherever and under which name it was made."""
    before = asked.exporter.about
    asked.recipe = load_recipe("int8_ptq", ["name=other", "claim=another"])
    assert asked.exporter.about.fingerprint == before.fingerprint
    assert asked.exporter.about.recipe == "other"
    changes: list[Callable[[], None]] = [
        lambda: setattr(asked, "classes", ("cow", "dog")),
        lambda: setattr(asked, "recipe", load_recipe("int8_ptq", ["data.crop_pct=0.5"])),
        lambda: setattr(asked, "kept", b"other"),
        lambda: setattr(asked, "kept", None),
    ]
    known = {before.fingerprint}
    for change in changes:
        change()
        known.add(asked.exporter.about.fingerprint)
    asked.compact = doubled()
    known.add(asked.exporter.about.fingerprint)
    assert len(known) == 6


def test_weights_that_lie_beside_a_graph_count(asked: Asked, tmp_path: Path) -> None:
    """NNCF's model is OpenVINO's: an .xml, whose weights are in the .bin beside it."""
    graph = tmp_path / "nncf.xml"
    graph.write_bytes(b"graph")
    known = set()
    for weights in (b"weights", b"others"):
        graph.with_suffix(".bin").write_bytes(weights)
        exporter = asked.exporter
        variants: Any = SimpleNamespace(model=shared(), compact=shared(), kept=graph)
        samples: Any = SimpleNamespace(classes=("cat", "dog"), content_digest=lambda: "images")
        made = exporter_for(exporter.context, asked.recipe, variants, samples, 8, lambda text: None)
        known.add(made.about.fingerprint)
    assert len(known) == 2


def near(same: int, sqnr_db: float) -> Agreement:
    return Agreement(1000, same, 0, sqnr_db, 25.0)


@pytest.mark.parametrize(
    ("agreement", "said"),
    [
        (near(1000, 40.0), None),
        (near(990, 40.0), r"does not compute .*99\.0 % .* 40\.0 dB\); it parts at stem\.0"),
        (near(1000, 20.0), "does not compute"),
        (near(0, -float("inf")), r"answers NaN or infinity; it parts from the model at stem\.0"),
    ],
)
def test_a_run_ends_badly_where_a_file_is_not_its_model(
    agreement: Agreement, said: str | None
) -> None:
    done = Exported(ONNX, {"int8": File(Path("int8.onnx"), agreement, "stem.0")})
    if said is None:
        check_exports([done])
    else:
        with pytest.raises(ExportError, match=said):
            check_exports([done])


def test_placements_are_measured_again_for_another_model_target_or_library(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bench(images: int = 8, target: Target = ONNX) -> Any:
        exporter = asked.exporter
        # Which training images judge, by their content.
        pixels = torch.full((images, 3, 2, 2), len(str(asked.images)), dtype=torch.uint8)
        judges: Any = SimpleNamespace(pixels_BCHW=pixels, labels=torch.zeros(images))
        nothing: Any = None
        return _Bench(
            exporter.context, asked.recipe, target, exporter.variants, nothing, judges, nothing
        )

    keys = [bench().key, bench(images=9).key, bench(target=ONNX.at_full_range()).key]
    for name, other in (
        ("kept", b"other weights"),
        ("float_model", doubled()),
        ("images", "others of the same names"),
        ("recipe", load_recipe("int8_ptq", ["data.crop_pct=0.5"])),
    ):
        before = getattr(asked, name)
        setattr(asked, name, other)
        keys.append(bench().key)
        setattr(asked, name, before)
    assert bench().key == keys[0]
    with monkeypatch.context() as patch:
        patch.setattr(machine, "installed_versions", lambda names=(): {"onnxruntime": "0.0"})
        keys.append(bench().key)
    record, elsewhere = bench().record, other_processor()
    named = replace(elsewhere, cpu=replace(elsewhere.cpu, name="Another (R) Processor"))
    with monkeypatch.context() as patch:
        patch.setattr(machine, "read_machine", lambda: elsewhere)
        keys.append(bench().key)
        patch.setattr(machine, "read_machine", lambda: named)
        assert bench().record.name == "onnxruntime-cpu-another-r-processor.json" != record.name
    assert len(set(keys)) == len(keys) == 9
