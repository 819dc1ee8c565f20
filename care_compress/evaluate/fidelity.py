"""The forms that the model of a finished run took, from the published float model to an engine.

    published -> rewritten -> rescaled -> simulated -> simulated for a target -> its file -> engine

Up to `rescaled` the steps are exact over the reals, yet some sites compute something else
afterwards: `_moved_by_rewriting` and `_moved_by_rescaling` say which, and those are left out.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from care_compress.console import say, step_line, widened
from care_compress.data.loader import CPU, BadImages
from care_compress.data.sources import check_classes
from care_compress.errors import RunError, TargetError
from care_compress.evaluate.agreement import hold_images
from care_compress.evaluate.device_measurements import device_measurements
from care_compress.evaluate.site_distance import Absent, Version, compare_versions
from care_compress.evaluate.site_outputs import FileTap, Taken, run_graph, run_module, tap_file
from care_compress.files import digest_of, fingerprint, json_text, sha256_file, write_text
from care_compress.model.checkpoint import load_checkpoint, state_digest
from care_compress.model.compact import CompactCare
from care_compress.model.predictor import Predictor
from care_compress.model.rewrite import rewrite
from care_compress.quantize.artifact import Saved, load_saved
from care_compress.quantize.placement import QuantizedCare
from care_compress.quantize.plots import short_name
from care_compress.quantize.retarget import export_rules, retarget
from care_compress.quantize.sites import find_sites
from care_compress.quantize.spec import Site
from care_compress.recipe.sections import RewriteSection
from care_compress.recipe.target import AS_SHIPPED, Target, load_target
from care_compress.run.finished import FinishedRun, find_run
from care_compress.runtime.artifact import open_predictor
from care_compress.runtime.on_openvino import OpenVinoPredictor
from care_compress.shipped import QUANTIZE
from care_compress.tasks.distance import EXACT_DB
from care_compress.tasks.known import labelled

FLOAT, REWRITTEN, RESCALED, SIMULATED = "published", "rewritten", "rescaled", "simulated"
NOT_ALL = "left out: depthwise convs of the interactions, whose channels and bias move"
CORRECTED = "quantizers off; biases and norms as PTQ corrected them, weights as QAT left them"
NNCF_HAS_NO_SITES = "NNCF's file has layers of its own names: logits only"
ENGINE_HAS_NO_SITES = "an engine gives logits only"
DEVICE_HAS_NO_SITES = "a device gives logits only"
ATTENTION = ("attention.kv", "attention.out")
WIDTH = 150  # of the tables
HARDEST = 15
ABSENT = "not here, see below"


@dataclass
class Versions:
    """The versions of one run, in order."""

    run: FinishedRun
    wanted: tuple[str, ...] | None
    all: list[Version] = field(default_factory=list)
    gone: list[Absent] = field(default_factory=list)
    classes: int = 0

    def build(self) -> None:
        """Load every form of the model that is here."""
        recipe = self.run.recipe
        model = load_checkpoint(self.run.checked_checkpoint(), recipe.model.arch)
        compact = rewrite(model, recipe.rewrite)
        self.classes = model.num_classes
        sites = find_sites(compact, recipe.data.resolution)
        published = partial(_published, model.eval(), recipe.rewrite)
        self.all.append(Version(FLOAT, published, None))
        moved = _moved_by_rewriting(sites) if recipe.rewrite.fold_depthwise_bias else set()
        kept = [site.name for site in sites if site.name not in moved]
        self.all.append(
            Version(REWRITTEN, partial(run_module, compact), FLOAT, tuple(kept), note=NOT_ALL)
        )
        path = self.run.kept
        if path is not None and not path.is_file():
            raise RunError(f"the quantized model {path} is gone.", "make the run again")
        if path is None:
            self._files(lambda targets: (REWRITTEN, tuple(site.name for site in sites)))
        elif path.suffix == ".safetensors":
            self._quantized(load_saved(path), compact)
        else:
            name = "quantized by NNCF"
            self.all.append(_file(name, path, REWRITTEN, (), NNCF_HAS_NO_SITES, ()))
            self._files(lambda targets: (name, ()))

    def _quantized(self, saved: Saved, compact: CompactCare) -> None:
        plan = saved.model.plan
        sites = tuple(decision.site for decision in plan.decisions)
        names = tuple(site.name for site in sites)
        moved = _moved_by_rescaling(sites, compact, saved.network)
        common = tuple(name for name in names if name not in moved)
        rescaled = partial(_simulated, saved.model, False)
        self.all += [
            Version(RESCALED, rescaled, REWRITTEN, common, note=f"{CORRECTED}; {NOT_ALL}"),
            Version(SIMULATED, partial(_simulated, saved.model, True), RESCALED, names),
        ]
        made = {_content(saved.model): SIMULATED}

        def variant(targets: list[Target]) -> tuple[str, tuple[str, ...]]:
            rules = export_rules(self.run.recipe.export, saved.section, targets[0])
            model = retarget(saved.model, saved.network, rules, targets[0])
            content = _content(model)
            if content not in made:
                made[content] = f"simulated for {_in_short(targets)}"
                run = partial(_simulated, model, True)
                self.all.append(Version(made[content], run, SIMULATED, names, _names(targets)))
            return made[content], names

        self._files(variant)

    def _files(self, before: Callable[[list[Target]], tuple[str, tuple[str, ...]]]) -> None:
        """Add a version for each different file, after what it was made from; engines behind it."""
        note = NNCF_HAS_NO_SITES if self.run.results.get("backend") == "nncf" else ""
        for path, targets in self._different_files():
            origin, sites = before(targets)
            name = f"{path.name} for {_in_short(targets)}"
            self.all.append(_file(name, path, origin, sites, note, _names(targets)))
            for target in targets:
                if target.is_engine:
                    self._engine(target, name)

    def _different_files(self) -> list[tuple[Path, list[Target]]]:
        """Return each exported file once, with the targets that share it; note why others lack."""
        exports = self.run.results["exports"]
        for name in self.wanted or ():
            if name not in exports:
                raise RunError(
                    f"{self.run.path.name} has no export for {name}.",
                    f"it has {', '.join(exports) or 'none'}; {QUANTIZE} with export.targets",
                )
        shared: dict[str, tuple[Path, list[Target]]] = {}
        reasons: dict[str, list[str]] = {}
        for name in self.wanted or exports:
            export, target = exports[name], load_target(name, self.run.recipe.full_range)
            main = export.get("models", {}).get(self.run.recipe.precision)
            if main is None:
                said = export.get("skipped") or export.get("failed") or "nothing was exported"
                reasons.setdefault(said.replace(name, "it"), []).append(name)
                continue
            path = self.run.path / "exports" / name / main["file"]
            if not path.is_file():
                gone = f"{path.name} is gone; {QUANTIZE} exports it again"
                reasons.setdefault(gone, []).append(name)
                continue
            # As its file was written; older runs do not name the placement.
            placement = export.get("placement", AS_SHIPPED)
            if placement in target.placements:
                target = target.placed(placement)
            shared.setdefault(digest_of(path), (path, []))[1].append(target)
        self.gone += [
            Absent(f"file for {', '.join(names)}", reason) for reason, names in reasons.items()
        ]
        return list(shared.values())

    def _engine(self, target: Target, file: str) -> None:
        name = f"engine of {target.name}"
        precision = self.run.recipe.precision
        built = [
            *(self.run.path / "engines").glob(f"*{target.name}*/{precision}.engine"),
            self.run.path / "exports" / target.name / f"{precision}.engine",
        ]
        path = next((path for path in built if path.is_file()), None)
        if path is None:
            if target.builds_without_device:
                how = f"install the tensorrt-rtx extra, then {QUANTIZE}"
            elif target.device == "gpu":
                how = f"make engine TARGET={target.name}, on a machine with that GPU"
            else:
                how = (
                    f"make bundle TARGET={target.name} for the board, then care-compress "
                    "import-results"
                )
            self.gone.append(Absent(name, f"none was built here: {how}"))
            return
        try:
            predict = open_predictor(str(path), CPU)
        except TargetError as error:
            self.gone.append(Absent(name, str(error)))
            return
        run = partial(_read, predict, None)
        self.all.append(Version(name, run, file, (), (target.name,), ENGINE_HAS_NO_SITES))


def _names(targets: list[Target]) -> tuple[str, ...]:
    return tuple(target.name for target in targets)


def _in_short(targets: list[Target]) -> str:
    """Name the targets that share a file: the first, and how many more."""
    more = f" +{len(targets) - 1}" if len(targets) > 1 else ""
    return f"{targets[0].name}{more}"


def _file(
    name: str,
    path: Path,
    before: str,
    sites: tuple[str, ...],
    note: str,
    targets: tuple[str, ...],
) -> Version:
    """Open an exported file: logits from the file itself, sites from a copy that shows them."""
    # The target's device may be elsewhere: its file is read on the CPU, its floats in float32.
    predict = OpenVinoPredictor(path) if path.suffix == ".xml" else open_predictor(str(path), CPU)
    run = partial(_read, predict, tap_file(path, sites))
    return Version(name, run, before, sites, targets, note)


def _read(predict: Predictor, tap: FileTap | None, image: Tensor) -> Taken:
    return Taken(predict(image), {} if tap is None else tap(image))


def _published(model: nn.Module, switches: RewriteSection, image: Tensor) -> Taken:
    """Run the published model; sites have the names they have once norms are folded into them."""
    taken = run_module(model, image)
    sites = dict(taken.sites)
    if switches.fold_stem:  # the norm behind
        sites["stem.0"] = taken.sites["stem.1"]
    if switches.fold_norms:  # the norm in front
        for name, value in taken.sites.items():
            if name.endswith("downsample.1"):
                sites[name.replace("downsample.1", "downsample.0")] = value
    return Taken(taken.logits, sites)


def _simulated(model: QuantizedCare, on: bool, image: Tensor) -> Taken:
    model.enable(on)
    return run_graph(model, image)


def _content(model: QuantizedCare) -> str:
    """Return a digest that is equal only for models that compute the same."""
    plan = [str(decision) for decision in model.plan.decisions]
    return fingerprint([plan, state_digest(model.state_dict())])


def _moved_by_rewriting(sites: Iterable[Site]) -> set[str]:
    """Return the depthwise convs whose bias went to the 1x1 behind them."""
    return {s.name for s in sites if s.role == "depthwise" and (s.branch or "").startswith("inter")}


def _moved_by_rescaling(
    sites: tuple[Site, ...], before: CompactCare, after: CompactCare
) -> set[str]:
    """Return depthwise convs whose channels were scaled, attention products in another form.

    A 1x1 behind a rescaled input takes the scales into its weight, so its output stays.
    """
    modules = dict(before.named_modules()), dict(after.named_modules())
    other = set()
    for site in sites:
        core = site.name.rpartition(".")[0]
        kinds = [type(of.get(core)) for of in modules]
        if site.role in ATTENTION and kinds[0] is not kinds[1]:
            other.add(site.name)
    return _moved_by_rewriting(sites) | other


def run_fidelity(
    runs: Path,
    name: str,
    targets: tuple[str, ...] | None,
    images: int,
    json_file: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Compare version by version, print, write ``fidelity.json``."""
    run = find_run(runs, name)
    for target in targets or ():
        load_target(target)  # a misspelt one is an error
    samples = labelled(run.recipe, "val")
    with step_line(console) as notify:
        notify("loading every form of the model")
        versions = Versions(run, targets)
        versions.build()
        check_classes(samples, versions.classes)
        held = hold_images(samples, run.recipe.data, images, BadImages())
        steps = compare_versions(versions.all, held.batches(1), notify)
    value = {
        "run": name,
        "results_sha256": sha256_file(run.path / "results.json"),
        "images": len(held.labels),
        "data": {**run.recipe.data.model_dump(mode="json"), "samples": samples.fingerprint()},
        "rungs": [
            *(step.as_json() for step in steps),
            *_device_rows(versions),
            *(absent.as_json() for absent in versions.gone),
        ],
    }
    wide = widened(console, WIDTH)
    wide.print(version_table(value))
    wide.print(site_table(value))
    for absent in versions.gone:
        say(f"{absent.name}: {absent.why}", console)
    for path in filter(None, (run.path / "fidelity.json", json_file)):
        write_text(path, json_text(value, indent=1))
        console.print(f"written to {escape(str(path))}", soft_wrap=True)
    return value


def _device_rows(versions: Versions) -> list[dict[str, Any]]:
    """Return what devices measured on their bundles' samples, beside their simulation's logits."""
    before = {target: version.before for version in versions.all for target in version.targets}
    precision = versions.run.recipe.precision
    rows = []
    for board in device_measurements(versions.run.path):
        target = board["target"]
        of = f"engine of {target}" if load_target(target).is_engine else f"file for {target}"
        accuracy = board["models"].get(precision, {}).get("accuracy")
        if accuracy is not None and target in before:
            rows.append(
                {
                    "rung": f"{of} on {board['board']['name']}",
                    "before": before[target],
                    "targets": [target],
                    "sqnr_db": accuracy["sqnr_db"],
                    "to_float_db": None,
                    "same_percent": accuracy["agreement"],
                    "same_as_float_percent": None,
                    "parts_at": None,
                    "sites": {},
                    "note": f"{DEVICE_HAS_NO_SITES}; on {accuracy['images']} images, by the board",
                }
            )
    return rows


def version_table(value: dict[str, Any]) -> Table:
    """Show each version beside the one before it."""
    table = Table(title=f"Version by version, {value['images']:,} images", title_justify="left")
    table.add_column("version", no_wrap=True)
    table.add_column("made from", no_wrap=True)
    for column in ("logits", "to float", "same answers"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("first parts at", no_wrap=True)
    for row in value["rungs"]:
        if "missing" in row:
            cells = [row["rung"], "", "", "", "", ABSENT]
        else:
            cells = [
                row["rung"],
                row["before"] or "",
                decibels(row["sqnr_db"]),
                decibels(row["to_float_db"]),
                f"{row['same_percent']:.1f} %",
                parting_text(row),
            ]
        table.add_row(*(escape(cell) for cell in cells))
    return table


def decibels(value: float | None) -> str:
    """Write ``31.0 dB``; nothing for the first version, words for no difference."""
    return "" if value is None else "exact" if value >= EXACT_DB else f"{value:.1f} dB"


def parting_text(row: dict[str, Any]) -> str:
    """Say where a version parts from the one before it, or why that is not known."""
    parting = row["parts_at"]
    if parting is not None:
        return f"{short_name(parting['site'])}, {decibels(parting['sqnr_db'])}"
    if row["sites"]:
        return "nowhere"
    return "" if row["before"] is None else str(row["note"]).partition(":")[0]


def hardest_sites(value: dict[str, Any]) -> tuple[list[str], list[tuple[str, list[float | None]]]]:
    """Return versions that show sites, and the worst sites with a distance for each version."""
    shown = [row for row in value["rungs"] if row.get("sites")]
    worst: dict[str, float] = {}
    for row in shown:
        for site, found in row["sites"].items():
            worst[site] = min(found, worst.get(site, found))
    sites = sorted(worst, key=lambda site: worst[site])[:HARDEST]
    cells = [(site, [row["sites"].get(site) for row in shown]) for site in sites]
    return [row["rung"] for row in shown], cells


def site_table(value: dict[str, Any]) -> Table:
    """Show the hardest sites from version to version, each beside what it was made from."""
    versions, cells = hardest_sites(value)
    title = "Hardest sites, dB of each step (left out where a site's meaning moved)"
    table = Table(title=title, title_justify="left")
    table.add_column("site", no_wrap=True)
    for version in versions:
        table.add_column(escape(version), justify="right")
    for site, found in cells:
        table.add_row(short_name(site), *(decibels(one).removesuffix(" dB") for one in found))
    return table
