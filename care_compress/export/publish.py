"""A finished run as a folder that can be uploaded to the Hugging Face Hub; nothing is uploaded.

It holds what a user of the files needs: the exported files, how a picture is prepared for them, a
licence, and a model card that says what was measured, where, and what was not. Nothing in it names
a path or a user of this machine.
"""

import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.markup import escape

from care_compress.console import listed, one_line
from care_compress.device.letterbox import GREY
from care_compress.errors import RunError
from care_compress.evaluate.device_measurements import device_measurements, device_rows
from care_compress.evaluate.slim_accuracy import GIVEN, TRAINED
from care_compress.export.deploy import checked_files
from care_compress.export.to_onnx import FREE
from care_compress.files import json_text, not_writable, read_json, sha256_file, temporary_folder
from care_compress.model.checkpoint import BUILTIN_PREFIX, load_checkpoint
from care_compress.model.hub import is_hub, is_repository, parse_reference
from care_compress.quantize.artifact import quantized_header
from care_compress.recipe.target import Target, load_target
from care_compress.run.finished import FinishedRun, as_written, find_run
from care_compress.shipped import COMPARE, LIBRARY, MAKER, QUANTIZE, shipped
from care_compress.tasks.known import task_called
from care_compress.tasks.task import Task

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

HERE = Path(__file__).resolve().parent
OUR_LICENSE = "apache-2.0"  # whose text ships
LICENSE_TEXT = shipped("LICENSE")
# What the Hub knows by name, without those made for somebody's own models.
LICENSES = tuple(
    "apache-2.0 mit bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear isc zlib ncsa unlicense wtfpl "
    "bsl-1.0 mpl-2.0 epl-1.0 epl-2.0 eupl-1.1 eupl-1.2 ecl-2.0 ms-pl osl-3.0 afl-3.0 artistic-2.0 "
    "gpl-2.0 gpl-3.0 lgpl-2.1 lgpl-3.0 agpl-3.0 cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 "
    "cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 "
    "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 odbl odc-by pddl openrail".split()
)
OTHER = "other:"  # before the name of a licence that the Hub does not know
LARGE = 10_000_000  # bytes, above which the Hub takes a file through LFS alone
ALWAYS_LARGE = (".bin", ".engine", ".onnx")  # as in the attributes of a new repository
RUNTIMES = {
    "openvino": "OpenVINO",
    "onnxruntime": "ONNX Runtime",
    "tensorrt": "TensorRT",
    "tensorrt_rtx": "TensorRT for RTX",
}


@dataclass(frozen=True)
class PublishOptions:
    """What only the one who publishes knows."""

    license: str
    license_file: Path | None = None
    base_model: str | None = None
    dataset: str | None = None
    targets: tuple[str, ...] | None = None


@dataclass(frozen=True)
class PublishedFile:
    """One model of a run, and what its snippet needs to know."""

    target: Target
    precision: str
    source: tuple[Path, ...]
    entry: Mapping[str, Any]  # of export.json
    needs: str
    batch: int  # 0: any
    engine: tuple[Path, ...] = ()
    takes_bytes: bool = False

    @property
    def path(self) -> str:
        """Where it lies in the published folder."""
        return f"{self.target.name}/{self.source[0].name}"

    @property
    def shown(self) -> dict[str, Any]:
        """What the card says of it."""
        return {
            "path": self.path,
            "title": self.target.title,
            "runtime": self.target.runtime,
            "device": self.target.device.upper(),
            "requirement": f"'{_requirement(self.target)}'",
            "precision": self.precision,
            "size": f"{self.entry['size_bytes'] / 1e6:.2f} MB",
            "agreement": f"{self.entry['agreement']:.1f} %",
            "needs": self.needs,
            "batch": self.batch,
            "is_free": not self.batch,
            "takes_bytes": self.takes_bytes,
        }

    @property
    def as_json(self) -> dict[str, Any]:
        """What config.json says of it."""
        return {
            "file": self.path,
            "sha256": self.entry["sha256"],
            "size_bytes": self.entry["size_bytes"],
            "runtime": self.target.runtime,
            "requires": list(self.target.needs.packages),
            "batch": self.batch or FREE,
            **({"input": "uint8 NHWC"} if self.takes_bytes else {}),
            **({"needs": self.needs} if self.needs else {}),
            **({"engine": f"{self.target.name}/{self.engine[0].name}"} if self.engine else {}),
        }


@dataclass(frozen=True)
class Measured:
    """What compare found of exactly these files."""

    accuracy: list[dict[str, Any]] = field(default_factory=list)
    speed: list[dict[str, Any]] = field(default_factory=list)
    baseline: str = ""
    machine: str = ""
    noisy: bool = False


def publish(runs: Path, name: str, folder: Path, options: PublishOptions, console: Console) -> Path:
    """Write the folder, all of it or nothing, and say how it is uploaded."""
    run = find_run(runs, name)
    license_text = checked_license(options)
    for option, given in (("--base-model", options.base_model), ("--dataset", options.dataset)):
        if given is not None and not is_repository(given):
            raise RunError(f"{option} {given!r} names no repository of the Hub.", "owner/name")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} is there and not empty.", "name a folder that is new")
    with as_written(run.path):
        files = publishable(run, options.targets)
        content = Card(run, files, options)
        with temporary_folder(folder) as beside:
            made = beside / "folder"
            for file in files:
                (made / file.target.name).mkdir(parents=True, exist_ok=True)
                for part in (*file.source, *file.engine):
                    shutil.copyfile(part, made / file.target.name / part.name)
            (made / "LICENSE").write_text(license_text, encoding="utf-8")
            (made / "config.json").write_text(json_text(content.config), encoding="utf-8")
            (made / "README.md").write_text(content.text(), encoding="utf-8")
            (made / ".gitattributes").write_text(_attributes(made), encoding="utf-8")
            check_card(made / "README.md", content.data())
            made.chmod(0o755)
            try:
                made.replace(folder)  # an empty folder of that name gives way
            except OSError as error:
                raise not_writable(folder, error) from error
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    console.print(f"{escape(str(folder))}  {len(files)} files, {size / 1e6:.1f} MB", soft_wrap=True)
    if not content.measured.speed:
        console.print(
            "the card says no latency: it was not compared, or these files were not "
            f"({COMPARE} fp32 {escape(run.path.name)})",
            soft_wrap=True,
        )
    if content.base_model is None:
        console.print("the card names no base model on the Hub: --base-model owner/name does")
    upload = f"hf upload OWNER/{content.title} {shlex.quote(str(folder))} ."
    console.print(f"read {escape(str(folder / 'README.md'))} once, then:", soft_wrap=True)
    console.print(upload, markup=False, highlight=False, soft_wrap=True)
    return folder


def checked_license(options: PublishOptions) -> str:
    """The text of the licence; `RunError` where the Hub would not know it or there is no text."""
    known = options.license in LICENSES
    named = options.license.removeprefix(OTHER).strip()
    if not known and (
        not options.license.startswith(OTHER) or not named.isprintable() or not named
    ):
        raise RunError(
            f"the Hub knows no licence {options.license!r}.",
            f"one of {', '.join(LICENSES[:8])}, ... (hf.co/docs/hub/repositories-licenses), or "
            f"{OTHER}NAME with --license-file",
        )
    path = options.license_file
    if path is None and options.license == OUR_LICENSE:
        path = LICENSE_TEXT
    if path is None:
        raise RunError(
            f"the text of {options.license} is not known here.", "give it: --license-file FILE"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}.", "give a text file") from error
    if not text.strip():
        raise RunError(f"{path} is empty.", "give the text of the licence")
    return text


def publishable(run: FinishedRun, targets: tuple[str, ...] | None) -> list[PublishedFile]:
    """Every file of a run, or of some targets; `RunError` unless all of them were proven."""
    exports = run.results["exports"]
    for target, export in exports.items():
        if "failed" in export:
            raise RunError(
                f"the export of {run.path.name} for {target} failed: {one_line(export['failed'])}.",
                "publish a run whose exports all passed",
            )
    there = [target for target, export in exports.items() if export.get("models")]
    if not there:
        raise RunError(
            f"run {run.path.name} has no exports.",
            f"{QUANTIZE} says why; export.targets names what to export to",
        )
    unknown = [target for target in targets or () if target not in there]
    if unknown:
        raise RunError(
            f"run {run.path.name} has no export for {', '.join(unknown)}.",
            f"it has {', '.join(there)}",
        )
    return [file for target in targets or there for file in _files_of(run, target)]


def _files_of(run: FinishedRun, target_name: str) -> Iterator[PublishedFile]:
    folder = run.path / "exports" / target_name
    with as_written(folder / "export.json"):
        export = read_json(folder / "export.json")
        target, needs = load_target(target_name), str(export.get("needs") or "")
        batch = 0 if export["batch"] == "dynamic" else int(export["batch"])
        takes_bytes = export.get("input") == "uint8"
        for precision, entry in export["models"].items():
            files = checked_files(folder, entry)
            engine: tuple[Path, ...] = ()
            if precision in export["engines"]:
                path = files[0].with_suffix(".engine")
                engine = (path, path.with_name(f"{path.name}.json"))
                known = export["engines"][precision]["engine_sha256"]
                if not engine[1].is_file() or not path.is_file() or sha256_file(path) != known:
                    raise RunError(
                        f"{path} is not the engine that was built.", f"export again: {QUANTIZE}"
                    )
            yield PublishedFile(target, precision, files, entry, needs, batch, engine, takes_bytes)


def check_card(path: Path, data: "ModelCardData") -> None:
    """Hold the written card against what it should say, by the Hub's own reader.

    Its last check (`ModelCard.validate`) is a request, which the Hub makes of every upload itself.
    """
    from huggingface_hub import ModelCard

    read = ModelCard.load(path)
    assert read.data.to_yaml() == data.to_yaml()
    assert read.data.eval_results == data.eval_results


class Card:
    """What is known of a run, as config.json and as a model card."""

    def __init__(
        self, run: FinishedRun, files: Sequence[PublishedFile], options: PublishOptions
    ) -> None:
        self.run, self.files, self.options = run, files, options
        self.results, self.recipe = run.results, run.recipe
        manifest = run.path / "manifest.json"
        self.manifest: dict[str, Any] = read_json(manifest) if manifest.is_file() else {}
        export = read_json(run.path / "exports" / files[0].target.name / "export.json")
        self.preprocessing = dict(export["preprocessing"])
        self.classes = list(export["classes"])
        self.task = task_called(run.recipe.task)
        self.arch = _arch(run)
        self.title = f"{self.arch}-{run.path.name}"
        self.base_model = options.base_model or self._repository()
        self.measured = _measured(run, files)

    def _repository(self) -> str | None:
        """The repository that the float model came from; none where it was trained here."""
        reference = self.recipe.model.checkpoint
        if self.recipe.train is not None or reference is None or not is_hub(reference):
            return None
        return parse_reference(reference)[0]

    @property
    def _dataset(self) -> str | None:
        """The set on the Hub that it was measured on, where it is one."""
        kind, _, reference = self.recipe.data.source.partition(":")
        name = reference.partition(":")[0]
        named = kind == "hf" and not Path(reference).exists() and not name.endswith(".parquet")
        known = name if named and is_repository(name) else None
        return self.options.dataset or known

    @property
    def _images(self) -> str:
        """What the images are called, without saying where they lie."""
        source = self.recipe.data.source
        if self._dataset is not None:
            return self._dataset
        if source.startswith(BUILTIN_PREFIX):
            return f"{source} of {LIBRARY}"  # drawn by its code
        return Path(source.removeprefix("wds:").removeprefix("hf:")).name

    @property
    def config(self) -> dict[str, Any]:
        """What a program has to know to use the files."""
        side = self.preprocessing["resolution"]
        filtered = "bilinear" if self.preprocessing.get("letterbox") else "bicubic"
        files: dict[str, dict[str, Any]] = {}
        for file in self.files:
            files.setdefault(file.target.name, {})[file.precision] = file.as_json
        return {
            "architecture": self.arch,
            "task": self.task.name,
            "num_classes": len(self.classes),
            "input_size": [3, side, side],
            "classes": self.classes,
            "preprocessing": {**self.preprocessing, "interpolation": filtered},
            "quantization": self._quantization,
            **({"slim": self.results["slim"]["budget"]} if "slim" in self.results else {}),
            "base_model": self.base_model,
            "files": files,
            "made_by": MAKER,
        }

    @property
    def _quantization(self) -> dict[str, Any] | None:
        if "candidates" not in self.results:
            return None
        plan = self.results.get("plan") or {}
        return {
            "precision": self.results["precision"],
            "method": self.results["kept"],
            "backend": self.results["backend"],
            "macs": plan.get("macs"),
        }

    def data(self) -> "ModelCardData":
        """What stands in the head of the card, for the Hub."""
        from huggingface_hub import ModelCardData

        known = self.options.license in LICENSES
        is_quantized = self._quantization is not None
        more: dict[str, Any] = {}
        if not known:
            named = "-".join(self.options.license.removeprefix(OTHER).split()).lower()
            more = {"license_name": named, "license_link": "LICENSE"}
        if self.base_model is not None and is_quantized:
            more["base_model_relation"] = "quantized"
        formats = {"openvino": "openvino", "onnxruntime": "onnx"}
        found = dict.fromkeys(formats.get(file.target.runtime, "tensorrt") for file in self.files)
        tags = [*found, self.results["precision"], *(["quantized"] if is_quantized else [])]
        return ModelCardData(
            license=self.options.license if known else "other",
            base_model=self.base_model,
            pipeline_tag=self.task.card.tag,
            library_name=LIBRARY,
            tags=[*tags, "care", LIBRARY],
            datasets=[self._dataset] if self._dataset else None,
            metrics=[self.task.card.metric],
            model_name=self.title,
            eval_results=self._eval_results(),
            **more,
        )

    def _eval_results(self) -> "list[EvalResult]":
        from huggingface_hub import EvalResult

        card, own = self.task.card, self.results["accuracy"][self.task.metric.key]
        found = [("simulated" if self._quantization else "float", own)]
        found += [(row["file"], row["value"]) for row in self.measured.accuracy]
        return [
            EvalResult(
                task_type=card.tag,
                task_name=card.tag.replace("-", " ").title(),
                dataset_type=self._dataset or "imagefolder",
                dataset_name=self._images,
                dataset_split="validation",
                metric_type=card.metric,
                metric_name=f"{card.said} in percent, {of}",
                metric_value=round(value, 3),
                verified=False,
            )
            for of, value in found
        ]

    def text(self) -> str:
        """The whole card."""
        from huggingface_hub import ModelCard

        environment = Environment(  # nosec B701 # Markdown, which the filters below escape
            loader=FileSystemLoader(HERE),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        environment.filters |= {"code": _code, "plain": _plain}
        checks = [*self.results.get("checks", ())]
        warned = [f"{one['check']}: {one['text']}" for one in checks if one["status"] == "warning"]
        devices = list(self._devices())
        body = environment.get_template("card.md.j2").render(
            title=self.title,
            task=self.task,
            letterbox=GREY if self.preprocessing.get("letterbox") else None,
            arch=self.arch,
            num_classes=len(self.classes),
            side=self.preprocessing["resolution"],
            summary=self._summary,
            about_base=self._about_base,
            license=_plain(self.options.license.removeprefix(OTHER)),
            checked_images=min(int(file.entry["images"]) for file in self.files),
            files=[file.shown for file in self.files],
            left_out=self._left_out,
            images=f"{self.results['accuracy']['images']:,}",
            data=_code(self._images),
            accuracy=list(self._accuracy()),
            accuracy_note=self._accuracy_note,
            warnings=warned,
            speed=self.measured.speed,
            baseline=self.measured.baseline,
            machine=self.measured.machine,
            noisy=self.measured.noisy,
            devices=devices,
            snippets=list(self._snippets()),
            rtx=next((f.shown for f in self.files if f.target.runtime == "tensorrt_rtx"), None),
            limits=list(self._limits({row["target"] for row in devices})),
            made=list(self._made()),
        )
        return str(ModelCard(f"---\n{self.data().to_yaml()}\n---\n\n{body}"))

    @property
    def _summary(self) -> str:
        runtimes = dict.fromkeys(RUNTIMES[file.target.runtime] for file in self.files)
        kind = {"int8": "8-bit weights and activations", "fp32": "float32"}
        precision = self.results["precision"]
        return f"{kind.get(precision, precision)}, as files for {listed(list(runtimes))}"

    @property
    def _about_base(self) -> str:
        if self.base_model is not None:
            url = f"https://huggingface.co/{self.base_model}"
            return (
                f"Made from [{self.base_model}]({url}), whose float weights are not repeated here."
            )
        return "Its float weights are not part of this repository." if self._quantization else ""

    @property
    def _left_out(self) -> str:
        told = []
        if any(file.engine for file in self.files):
            told.append(
                "An `.engine` runs only with the TensorRT version and on the GPUs that the `.json` "
                "beside it names."
            )
        elif any(file.target.is_engine for file in self.files):
            told.append("Engines are built from the ONNX files on the GPU that runs them.")
        others = {file.precision for file in self.files} - {self.recipe.precision}
        if "fp16" in others and self._quantization is not None:
            told.append("A file in fp16 is the float model, which the quantized one has to beat.")
        return " ".join(told)

    def _accuracy(self) -> Iterator[dict[str, str]]:
        images = self.results["accuracy"]["images"]

        def share(found: Mapping[str, Any]) -> str:
            return _share(self.task, found, images)

        slim, as_float = self.results.get("slim"), "float model"
        if slim is not None:  # drops below are of the slimmed one, which was cut from these
            as_float = "float model, slimmed"
            for name in (GIVEN, TRAINED):
                if name in slim["models"]:
                    yield _row(f"whole network, {name}", share(slim["models"][name]))
        if self._quantization is None:
            yield _row(as_float, share(self.results["accuracy"]))
        else:
            yield _row(as_float, share(self.results["float"]))
            kept = self.results["candidates"][self.results["kept"]]
            drop = _points(kept["drop"], kept["drop_ci95"])
            same = f"{kept['agreement']:.2f}"
            yield _row("quantized model, simulated", share(self.results["accuracy"]), drop, same)
        for one in self.measured.accuracy:
            yield _row(_code(one["file"]), one["shown"], one["drop"], one["agreement"])

    @property
    def _accuracy_note(self) -> str:
        if not self.measured.accuracy:
            return "The files themselves were not scored on these images, only read back."
        return (
            f"Drops and same answers of files are against {_code(self.measured.baseline)}, the "
            "first model compared, in the same runtime and on the same images."
        )

    def _devices(self) -> Iterator[dict[str, Any]]:
        """What other machines measured of these exports, by the script of a bundle."""
        key = self.task.metric.key
        published = {(file.target.name, file.precision): file for file in self.files}
        for found in device_measurements(self.run.path):
            rows = device_rows(self.run.path.name, self.recipe.precision, found)
            for precision, (_, row) in zip(found["models"], rows, strict=True):
                file = published.get((found["target"], precision))
                if file is None:  # a bundle for a CPU has the float model, too
                    continue
                about, latency = row["measured_on"], row["latency_ms"]
                threads = about["threads"]
                failed = " (**answers wrong there**)" if about["verified"] is False else ""
                yield {
                    "target": file.target.name,
                    "file": _code(file.path),
                    "device": about["board"] + (f", {threads} threads" if threads else ""),
                    "library": about["library"],
                    "p50": "" if latency is None else _milliseconds(latency),
                    "top1": "" if row.get(key) is None else f"{row[key]:.2f}{failed}",
                }

    def _snippets(self) -> Iterator[dict[str, Any]]:
        """One file of each runtime: in the run's own precision, for the commonest device."""
        told = {file.target.runtime for file in self.files}
        for runtime in RUNTIMES:
            fitting = [file for file in self.files if file.target.runtime == runtime]
            if runtime == "tensorrt_rtx" and "tensorrt" in told:
                continue  # the same program but for two words, which the card says
            fitting.sort(
                key=lambda file: (
                    file.precision != self.recipe.precision,
                    file.target.device != "cpu",
                    file.target.device not in ("gpu", "rtx"),
                )
            )
            if fitting:
                yield fitting[0].shown

    def _limits(self, on_devices: set[str]) -> Iterator[str]:
        timed = {row["target"] for row in self.measured.accuracy} | on_devices
        names = dict.fromkeys(file.target.name for file in self.files)
        unseen = [name for name in names if name not in timed]
        if unseen:
            titles = listed([load_target(name).title for name in unseen])
            yield (
                f"**Not measured**: speed, and accuracy on all images, of the files for {titles}. "
                "All that is known of them is that, read back on a CPU, they answer as their model."
            )
        if self.measured.machine:
            yield (
                f"Speed was measured on {self.measured.machine}. On another processor the files "
                "give the same answers, up to rounding, at another speed; they may even be slower "
                "there than float32."
            )
        needs = dict.fromkeys(file.needs for file in self.files if file.needs)
        for need in needs:
            bound = [file.path for file in self.files if file.needs == need]
            yield (
                f"{listed(bound)} need {need} (x86 since Cascade Lake or Zen 4, Arm with SDOT); "
                "elsewhere sums saturate and answers are wrong."
            )
        side = self.preprocessing["resolution"]
        yield (
            f"The files take {side}x{side} images, prepared as `config.json` says; another "
            "preparation costs accuracy without a sign of it."
        )
        yield f"Accuracy is that on {_code(self._images)}; nothing is known of other images."

    def _made(self) -> Iterator[tuple[str, str]]:
        yield "tool", MAKER
        yield "recipe", f"{_code(self.results['recipe'])}: {_plain(self.recipe.claim)}"
        about = self.manifest.get("inputs", {}).get("checkpoint", {})
        if self.recipe.train is not None:
            yield "float model", "trained for this"
        elif "hub" in about:
            yield "float model", f"{_code(about['hub']['repository'])}"
            yield "at commit", _code(about["hub"]["commit"])
        elif "path" in about:
            yield "float model", _code(Path(about["path"]).name)
        if "sha256" in about and self.recipe.train is None:
            yield "sha256 of it", _code(about["sha256"])
        calibration = self.manifest.get("inputs", {}).get("calibration", {})
        if calibration.get("images"):
            yield "calibrated on", f"{calibration['images']:,} training images"
        if self._quantization is not None:
            told = {"ptq": "quantized without training", "qat": "quantization-aware training"}
            method = self._quantization["method"]
            yield "method", f"{told.get(method, method)} ({self._quantization['backend']})"


def _measured(run: FinishedRun, files: Sequence[PublishedFile]) -> Measured:
    """What compare.json says of these very files, whatever they are called there."""
    path = run.path / "compare.json"
    if not path.is_file():
        return Measured()
    with as_written(path):
        found = read_json(path)
        by_digest = {(file.target.name, file.entry["sha256"]): file for file in files}
        known: dict[tuple[str, str], PublishedFile] = {}
        for target, rows in found["targets"].items():
            for name, row in rows.items():
                file = by_digest.get((target, row.get("sha256", "")))
                if file is not None and row["floats_in"] == "f32":
                    known[target, name] = file
        task = task_called(run.recipe.task)
        if not known:  # it speaks of other files
            return Measured()
        pairs = {(one["target"], one["candidate"]): one for one in found["pairs"]}
        accuracy = []
        for place, file in known.items():
            row, pair = found["targets"][place[0]][place[1]], pairs.get(place)
            if row[task.metric.key] is None:
                continue
            accuracy.append(
                {
                    "target": file.target.name,
                    "file": file.path,
                    "value": row[task.metric.key],
                    "shown": _share(task, row, found["images"]),
                    "drop": "" if pair is None else _points(pair["drop"], pair["drop_ci95"]),
                    "agreement": "" if pair is None else f"{pair['agreement']:.2f}",
                }
            )
        speed = []
        for setting in found["latency"]:
            for row in setting["rows"]:
                file = known.get((row["target"], row["name"]))
                if file is None:
                    continue
                over = row["speedup"]
                ratio = "" if over is None else f"{over:.2f} {_ends(row['speedup_ci95'])}"
                speed.append(
                    {
                        "file": _code(file.path),
                        "batch": setting["batch"],
                        "threads": setting["threads"],
                        "p50": _milliseconds(row["latency_ms"]),
                        "throughput": f"{row['throughput']:,.0f}",
                        "speedup": ratio + (r" \*" if row["noisy"] else ""),
                    }
                )
        baseline = Path(next(iter(found["models"]))).name
        noisy = any(row["speedup"].endswith("*") for row in speed)
        return Measured(accuracy, speed, baseline, _machine(found["machine"]), noisy)


def _machine(about: Mapping[str, Any]) -> str:
    """The processor and the runtimes, without what would name somebody's machine."""
    cpu, libraries = about["cpu"], about["libraries"]
    features = [name for name, there in cpu["features"].items() if there]
    runtimes = [
        f"{title} {libraries[name]}" for name, title in RUNTIMES.items() if libraries.get(name)
    ]
    cores = f"{cpu['physical_cores']} cores"
    return _plain(f"{cpu['name']} ({', '.join([cores, *features])}), {listed(runtimes)}")


def _arch(run: FinishedRun) -> str:
    """The size of the network, by the quantized model in the run or else by its float model."""
    header = None if run.kept is None else quantized_header(run.kept)
    return load_checkpoint(run.checked_checkpoint()).arch if header is None else header.arch


def _requirement(target: Target) -> str:
    # The snippet asks for strong typing, which 10.3 does not have.
    return "tensorrt>=10.12" if target.runtime == "tensorrt" else target.needs.packages[0]


def _attributes(folder: Path) -> str:
    """What git has to keep apart, as the Hub writes it for a new repository."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    suffixes = dict.fromkeys(path.suffix for path in files if path.suffix in ALWAYS_LARGE)
    patterns = [f"*{suffix}" for suffix in suffixes]
    for path in files:
        if path.stat().st_size > LARGE and path.suffix not in suffixes:
            patterns.append(path.relative_to(folder).as_posix())
    return "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in patterns)


def _row(of: str, value: str, drop: str = "", agreement: str = "") -> dict[str, str]:
    return {"of": of, "value": value, "drop": drop, "agreement": agreement}


def _share(task: Task, found: Mapping[str, Any], images: int) -> str:
    """The metric of a model, with its interval where there is one."""
    value = found[task.metric.key]
    ends = found.get(f"{task.metric.key}_ci95") or task.interval(value, images)
    return f"{value:.2f} {_ends(ends)}" if ends else f"{value:.2f}"


def _points(value: float, ends: Sequence[float]) -> str:
    return f"{value + 0.0:.2f} {_ends(ends)}"


def _milliseconds(latency: Mapping[str, float]) -> str:
    return f"{latency['p50']:.{3 if latency['p50'] < 10 else 1}f}"


def _ends(ends: Sequence[float]) -> str:
    return f"[{ends[0]:.2f}, {ends[1]:.2f}]"


def _code(text: str) -> str:
    """Text as Markdown's code, on one line and inside one cell."""
    return f"`{one_line(text).replace('`', chr(39)).replace('|', '/')}`"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line and inside one cell."""
    safe = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    return "".join(f"\\{letter}" if letter in "`*_[]|#" else letter for letter in safe)
