"""``care-compress sweep``: hand out trials, take rows in, time files, write the page.

    sweep file -> search -> trials on Ray -> (float models -> timings, each alone) -> page, JSON

Ray schedules; here is only a loop that keeps as many trials in flight as can run, so that a
thousand of them need no more memory than a few.
"""

import contextlib
import fcntl
import os
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from care_compress import machine
from care_compress.console import say, shortened
from care_compress.errors import BusyRunError, RecipeError, Stopped, TargetError
from care_compress.evaluate.resolve import NamedModel, float_recipe_of, named_models
from care_compress.files import (
    digest_of,
    fingerprint,
    json_text,
    not_writable,
    read_json,
    sha256_file,
    write_text,
)
from care_compress.model.checkpoint import resolve_checkpoint
from care_compress.recipe.recipe import Recipe
from care_compress.recipe.sections import DROPS, BudgetSection
from care_compress.recipe.target import load_target
from care_compress.run.stages import EVERYTHING, SHARED, recipe_parts
from care_compress.sweep.cluster import TIMING, Cluster, Node, open_cluster
from care_compress.sweep.dry_run import show_plan
from care_compress.sweep.page import write_page
from care_compress.sweep.results import best_of, judged, milliseconds, sweep_as_json
from care_compress.sweep.sections import METRICS, Sweep
from care_compress.sweep.stopping import Rungs
from care_compress.sweep.tasks import (
    LOGS,
    MARK,
    RECORDS,
    TIMINGS,
    Job,
    Place,
    Work,
    do_timing,
    do_trial,
    pipeline_digest,
    processor,
    record_file,
)
from care_compress.sweep.trials import DIGITS, RECIPE, Row, Search, Trial, make_search, trial_of
from care_compress.tasks.known import labelled, task_called

SPARE = 2  # trials in flight beyond those that run: a worker that is done finds its next one
LOST = 3  # times that a node or a process may be lost under a trial before it counts as failed
WRITE_SECONDS = 30.0  # between two writings of the page while trials run
LONGEST_REASON = 500  # letters


@dataclass(frozen=True)
class SweepOptions:
    """What a user may ask for beside the file."""

    address: str | None = None
    plan_only: bool = False
    repair: bool = False


def run_sweep(sweep: Sweep, runs: Path, options: SweepOptions, work: Work, console: Console) -> int:
    """Run every trial and write the page; return 0 if one of them is within every budget."""
    folder = (runs / sweep.name).absolute()
    search = make_search(sweep, runs, begun_before(folder, space_of(sweep)))
    sweep = judged_as_task(sweep, search, runs)
    check_trials(sweep, search)
    if options.plan_only:
        show_plan(sweep, search, console)
        return 0
    with open_cluster(options.address) as cluster:
        return drive(cluster, sweep, folder, search, work, console, options.repair)


def drive(
    cluster: Cluster,
    sweep: Sweep,
    folder: Path,
    search: Search,
    work: Work,
    console: Console,
    repair: bool = False,
) -> int:
    """Run the trials on a cluster that is there."""
    check_cluster(sweep, cluster)
    with prepared(folder) as place, ray_told_to(folder / LOGS / "ray.txt", console):
        driver = Driver(sweep, cluster, place, search, work, console, repair)
        try:
            driver.run()
        except Stopped as stopped:
            stopped.hint = "the same command goes on"
            raise
        finally:
            driver.write()
        return driver.tell()


@contextlib.contextmanager
def ray_told_to(path: Path, console: Console) -> Iterator[None]:
    """Keep what Ray prints on this process's streams in a file: of a lost node, pages of it."""
    console.file = console.file  # bound to the stream of now
    path.parent.mkdir(exist_ok=True)
    with (
        path.open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield


def space_of(sweep: Sweep) -> str:
    """Digest of what a search chooses from; how many trials it makes changes no trial."""
    chosen = {"recipes", "checkpoints", "data", "set", "overrides", "search", "seed"}
    return fingerprint(sweep.model_dump(mode="json", include=chosen))


def begun_before(folder: Path, space: str) -> list[Row]:
    """Trials that a search asked for in an earlier process: it goes on from them."""
    found = []
    for path in sorted((folder / RECORDS).glob("*.json")):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            record = read_json(path)
            if record["space"] == space:
                found.append({"name": path.stem, "point": record["point"]})
    return found


def judged_as_task(sweep: Sweep, search: Search, runs: Path) -> Sweep:
    """The sweep with the metric of its recipes' task; raise where it asks for that of another."""
    point = search.shown[0].point
    names = {
        trial_of(sweep, {**point, RECIPE: name}, runs).recipe.task: name for name in sweep.recipes
    }
    if len(names) > 1:
        raise RecipeError(
            f"{sweep.name} has recipes for {' and '.join(sorted(names))}, which have no metric in "
            "common.",
            "write a sweep for each task",
        )
    task, (name,) = task_called(search.shown[0].recipe.task), names.values()
    for other, key in DROPS.items():
        if other != task.name and getattr(sweep.budget, key) is not None:
            raise RecipeError(
                f"budget.{key} is for {other}, and {name} is for {task.name}.",
                f"set budget.{DROPS[task.name]} instead",
            )
    objective = sweep.objective
    if not METRICS[objective.metric][1] or objective.metric == task.metric.key:
        return sweep
    if "metric" in objective.model_fields_set:
        raise RecipeError(
            f"objective.metric {objective.metric} is of another task, and {name} is for "
            f"{task.name}.",
            f"use {task.metric.key}, or leave it out",
        )
    own = objective.model_copy(update={"metric": task.metric.key})
    return sweep.model_copy(update={"objective": own})


def check_trials(sweep: Sweep, search: Search) -> None:
    """Refuse what no trial can do, before anything is written."""
    checked: set[str] = set()
    timed = () if sweep.timing is None else sweep.timing.targets
    for trial in search.shown:
        recipe = trial.recipe
        checkpoint, data = recipe.model.checkpoint, recipe.data.model_dump_json()
        if checkpoint is not None and checkpoint not in checked:
            checked.add(checkpoint)
            if not resolve_checkpoint(checkpoint).is_file():
                raise RecipeError(
                    f"{trial.recipe.name}: model.checkpoint {checkpoint} is not a file.",
                    "check the path",
                )
        if data not in checked:
            checked.add(data)
            labelled(recipe, "val")
        for target in {*(recipe.export.targets or ())} - checked:
            checked.add(target)
            load_target(target)
        for target in timed:
            if recipe.export.targets is not None and target not in recipe.export.targets:
                raise RecipeError(
                    f"{recipe.name} exports nothing to {target}, which timing.targets names.",
                    "add it to export.targets",
                )


def check_cluster(sweep: Sweep, cluster: Cluster) -> None:
    """Raise unless some node can run a trial, and one can time it where that is asked."""
    cpus, gpus = sweep.resources.cpus, sweep.resources.gpus
    if not cluster.slots(cpus, gpus):
        have = "; ".join(f"{n.name}: {n.cpus:g} CPUs, {n.gpus:g} GPUs" for n in cluster.nodes)
        raise TargetError(
            f"a trial asks for {cpus:g} CPUs and {gpus:g} GPUs, and no node has them ({have}).",
            "lower resources",
        )
    if sweep.timing is not None:
        timing_nodes(sweep, cluster)


@contextlib.contextmanager
def prepared(folder: Path) -> Iterator[Place]:
    """Make and hold the sweep's folder; the mark in it shows which nodes see it."""
    mark = uuid.uuid4().hex
    try:
        for name in (RECORDS, TIMINGS, SHARED):
            (folder / name).mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise not_writable(folder, error) from error
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BusyRunError(
                f"another sweep is working in {folder}.", "wait for it, or give this one a name"
            ) from None
        write_text(folder / MARK, mark)
        yield Place(folder, Path.cwd(), mark, pipeline_digest())


def timing_nodes(sweep: Sweep, cluster: Cluster) -> list[Node]:
    """Nodes whose figures can be compared: those of one kind of processor, and that of most."""
    assert sweep.timing is not None
    nodes = [node for node in cluster.nodes if node.times] or cluster.nodes
    ray = cluster.ray
    asked = [
        ray.remote(processor).options(num_cpus=0, scheduling_strategy=cluster.on(node)).remote()
        for node in nodes
    ]
    kinds: dict[str, list[Node]] = defaultdict(list)
    names = []
    for node, about in zip(nodes, ray.get(asked), strict=True):
        names.append(about["name"])
        if (sweep.timing.processor or "").lower() in about["name"].lower():
            kinds[about["kind"]].append(node)
    if not kinds:
        raise TargetError(
            f"no node has a processor called {sweep.timing.processor!r}.",
            f"timing.processor may be part of: {', '.join(sorted(set(names)))}",
        )
    return max(kinds.values(), key=len)


def told_by_ray(error: Exception) -> str:
    """What Ray says of a task that it could not do: its last line names the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = type(error).__name__
    return shortened(f"{kind}: {lines[-1]}" if lines else kind, LONGEST_REASON)


class Driver:
    """The loop of one sweep, and what it knows so far."""

    def __init__(
        self,
        sweep: Sweep,
        cluster: Cluster,
        place: Place,
        search: Search,
        work: Work,
        console: Console,
        repair: bool,
    ) -> None:
        self.sweep, self.cluster, self.place, self.search = sweep, cluster, place, search
        self.console, self.repair, self.ray = console, repair, cluster.ray
        self.task = task_called(search.shown[0].recipe.task)  # that of all
        self.rows: dict[str, Row] = {}  # of trials, by name
        self.baselines: dict[str, Row] = {}
        self.waiting: dict[Any, Trial] = {}  # Ray's references to rows that are under way
        self.asked: dict[str, list[Trial]] = defaultdict(list)  # whom a row is told to
        self.untimed: list[Trial] = []
        self.began, self.written = time.monotonic(), time.monotonic()
        self._floats: dict[str, Any] = {}  # rows of shared trainings, or references to them
        self._digests: dict[str, str] = {}
        self._packages = machine.installed_versions(EVERYTHING)
        self._work = self.ray.put(work)  # once, not with every trial
        resources = sweep.resources
        self._do_trial = self.ray.remote(do_trial).options(
            num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=LOST
        )
        self._do_timing = self.ray.remote(do_timing)
        self._rungs = None
        if sweep.stopping is not None:  # on the driver's node, with which it would go anyway
            here = self.ray.get_runtime_context().get_node_id()
            beside = cluster.on(next(node for node in cluster.nodes if node.id == here))
            actor = self.ray.remote(Rungs).options(num_cpus=0, scheduling_strategy=beside)
            self._rungs = actor.remote(sweep.stopping.first, sweep.stopping.factor)

    def run(self) -> None:
        """Run trials until the search has no more of them, and time what they leave."""
        nodes = self.cluster.nodes
        cpus, named = sum(node.cpus for node in nodes), shortened(", ".join(n.name for n in nodes))
        say(
            f"{self.sweep.name}: {self.search.total:,} trials on {cpus:g} CPUs ({named})",
            self.console,
        )
        while True:
            self._hand_out()
            if self.waiting:
                for reference in self.cluster.wait(list(self.waiting)):
                    self._take_in(reference)
            elif self.untimed:
                self._time()
            else:
                return
            if time.monotonic() - self.written > WRITE_SECONDS:
                self.write()

    def _hand_out(self) -> None:
        """Submit trials until as many are in flight as can run, and a few to come."""
        resources = self.sweep.resources
        slots = max(1, self.cluster.slots(resources.cpus, resources.gpus))
        if not self.search.waits:
            slots += SPARE
        while len(self.waiting) + (len(self.untimed) if self.search.waits else 0) < slots:
            trial = self.search.ask()
            if trial is None:
                return
            self.asked[trial.name].append(trial)
            if len(self.asked[trial.name]) > 1:  # a search may come back to a place
                if trial.name in self.rows and trial not in self.untimed:
                    self.search.tell(trial, judged(self.sweep, self.rows[trial.name]))
                continue
            known = self._known(trial)
            if known is not None:
                self._finish(trial, {**known, "taken_over": True})
            else:
                self.waiting[self._submit(trial.name, trial.recipe, trial.point)] = trial

    def _submit(self, name: str, recipe: Recipe, point: Any = None) -> Any:
        """Hand one run to Ray; return the reference to its row."""
        before = None
        if recipe.train is not None and (recipe.quantize is not None or recipe.slim is not None):
            before = self._float_of(recipe)
        about = {"key": self._key(recipe), "space": None, "point": None}
        if self.search.waits and point is not None:  # what a search asked for is not forgotten
            about |= {"space": space_of(self.sweep), "point": point}
            write_text(record_file(self.place.runs, name), json_text({**about, "row": None}))
        resources = self.sweep.resources
        threads, processes = max(1, int(resources.cpus)), max(1, int(resources.gpus))
        job = Job(name, recipe, self.place, about, threads, processes, self.repair)
        # A float model that several trials start from is nobody's to stop.
        rungs = None if point is None else self._rungs
        return self._do_trial.remote(job, self._work, before, rungs)

    def _float_of(self, recipe: Recipe) -> Any:
        """The row, or a reference to it, of the run that trains the float model of several trials.

        Trials take its stage over by digest (`care_compress.run.stages`), and begin after it.
        """
        digest = fingerprint(recipe_parts(recipe)["train"])
        if digest not in self._floats:
            nothing = recipe.export.model_copy(update={"targets": ()})
            plain = {"quantize": None, "slim": None, "precision": "fp32"}
            alone = recipe.model_copy(
                update={**plain, "export": nothing, "budget": BudgetSection()}
            )
            name = f"float-{digest[:DIGITS]}"
            self._floats[digest] = self._known_as(name, alone) or self._submit(name, alone)
        return self._floats[digest]

    def _known(self, trial: Trial) -> Row | None:
        return self._known_as(trial.name, trial.recipe)

    def _known_as(self, name: str, recipe: Recipe) -> Row | None:
        """The row of a run that is through, if nothing it came from or left has changed."""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            record = read_json(record_file(self.place.runs, name))
            row: Row = record["row"]
            if record["key"] != self._key(recipe):
                return None
            if row["status"] == "stopped" and self.sweep.stopping is not None:
                return row
            if row["status"] != "finished":
                return None
            run = self.place.runs / name
            outputs = read_json(run / "manifest.json")["outputs"]
            if all(sha256_file(run / file) == digest for file, digest in outputs.items()):
                return row
        return None

    def _key(self, recipe: Recipe) -> str:
        """Digest of everything that a run depends on."""
        train, quantize, data = recipe.train, recipe.quantize, recipe.data
        files = [
            recipe.model.checkpoint,
            data.classes,
            None if train is None or train.distill is None else train.distill.teacher,
            None if quantize is None else quantize.calibrate.list,
        ]
        return fingerprint(
            {
                "recipe": recipe.model_dump(mode="json"),
                "code": self.place.code,
                "packages": self._packages,
                "files": [None if file is None else self._digest(file) for file in files],
                "images": self._digest_of_images(recipe),
                "targets": [
                    load_target(name).model_dump(mode="json")
                    for name in recipe.export.targets or ()
                ],
            }
        )

    def _digest(self, file: str) -> str:
        """Digest of a file, read once."""
        if file not in self._digests:
            path = resolve_checkpoint(file)
            self._digests[file] = digest_of(path) if path.is_file() else ""
        return self._digests[file]

    def _digest_of_images(self, recipe: Recipe) -> str:
        key = recipe.data.model_dump_json()
        if key not in self._digests:
            both = [labelled(recipe, split) for split in ("train", "val")]
            self._digests[key] = fingerprint([samples.content_digest() for samples in both])
        return self._digests[key]

    def _take_in(self, reference: Any) -> None:
        """Take a row in; what Ray itself could not do is a row, too."""
        trial = self.waiting.pop(reference)
        self._finish(trial, self._row(reference))

    def _row(self, reference: Any) -> Row:
        try:
            found: Row = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            reason = told_by_ray(error)
            found = {"status": "failed", "reason": reason, "seconds": None, "node": None}
        return found

    def _finish(self, trial: Trial, found: Row) -> None:
        row = {
            "name": trial.name,
            "recipe": trial.recipe.name,
            "point": dict(trial.point),
            "command": trial.command,
            "taken_over": False,
            "latency": {},
            "baseline": None,
            **found,
        }
        self.rows[trial.name] = row
        self._say(row)
        if self.sweep.timing is not None and row["status"] == "finished":
            self.untimed.append(trial)
        else:
            self._tell_search(trial.name)

    def _tell_search(self, name: str) -> None:
        for trial in self.asked[name]:
            self.search.tell(trial, judged(self.sweep, self.rows[name]))

    def _say(self, row: Row) -> None:
        """One line for each trial that came to its end."""
        place = f"{len(self.rows):,}/{self.search.total:,} {row['name']}"
        if row["status"] != "finished":
            say(f"{place} {row['status']}: {row['reason']}", self.console)
            return
        took = "taken over" if row["taken_over"] else f"{row['seconds']:.0f} s"
        drop = f"drop {row['drop']:.2f}" if row["precision"] != "fp32" else "float"
        metric = self.task.metric
        say(f"{place} {metric.name} {row[metric.key]:.2f} %, {drop} ({took})", self.console)

    def _time(self) -> None:
        """Time what is not timed yet, while no trial of this sweep runs anywhere."""
        assert self.sweep.timing is not None
        trials, self.untimed = self.untimed, []
        baseline_of = self._baselines(trials)
        nodes = timing_nodes(self.sweep, self.cluster)
        ahead, under_way = list(trials), dict[Any, tuple[Trial, Node]]()
        free = list(nodes)
        while ahead or under_way:
            while ahead and free:
                trial, node = ahead.pop(0), free.pop(0)
                # All of the node's cores, so that nothing else of Ray's runs beside it.
                task = self._do_timing.options(
                    num_cpus=node.cpus,
                    resources={TIMING: 1} if node.times else {},
                    scheduling_strategy=self.cluster.on(node),
                    max_retries=0,
                )
                reference = task.remote(
                    self.place, baseline_of[trial.name], trial.name, self.sweep.timing
                )
                under_way[reference] = trial, node
            for reference in self.cluster.wait(list(under_way)):
                trial, node = under_way.pop(reference)
                try:
                    found = self.ray.get(reference)
                except self.ray.exceptions.RayError as error:
                    found = self._not_timed(error)
                    alive = {one.id for one in self.cluster.nodes}
                    if node.id not in alive and any(one.id in alive for one in nodes):
                        ahead.append(trial)  # another node of its kind will do
                        continue
                free.append(node)
                self.rows[trial.name] |= {
                    "latency": found,
                    "baseline": baseline_of[trial.name],
                }
                self._say_timed(self.rows[trial.name])
                self._tell_search(trial.name)
            if not free and not under_way:
                break

    def _not_timed(self, error: Exception) -> dict[str, Any]:
        assert self.sweep.timing is not None
        return {target: {"missing": told_by_ray(error)} for target in self.sweep.timing.targets}

    def _say_timed(self, row: Row) -> None:
        for target, found in row["latency"].items():
            value = milliseconds(row, target)
            if value is None:
                say(f"{row['name']} on {target} not timed: {found['missing']}", self.console)
                continue
            noisy = ", noisy" if found["noisy"] else ""
            faster = f"{found['speedup']:.2f}x float{noisy}, {found['processor']}"
            say(f"{row['name']} on {target}: {value:.2f} ms, {faster}", self.console)

    def _baselines(self, trials: Sequence[Trial]) -> dict[str, str]:
        """Make the float model of each trial a run with files to time; return their names."""
        assert self.sweep.timing is not None
        names, references = dict[str, str](), dict[str, Any]()
        for trial in trials:
            (one,) = named_models([trial.name], self.place.runs)
            assert isinstance(one, NamedModel)
            recipe = float_recipe_of(one)
            targets = tuple(name for name in self.sweep.timing.targets if name in one.files)
            recipe = recipe.model_copy(
                update={"export": recipe.export.model_copy(update={"targets": targets})}
            )
            told = recipe.model_dump(mode="json", exclude={"model"})
            name = f"fp32-{fingerprint([told, one.checkpoint_sha256])[:DIGITS]}"
            names[trial.name] = name
            if name not in self.baselines and name not in references:
                known = self._known_as(name, recipe)
                if known is None:
                    references[name] = self._submit(name, recipe)
                else:
                    self.baselines[name] = {**known, "name": name, "taken_over": True}
        for name, reference in references.items():
            self.baselines[name] = {**self._row(reference), "name": name, "taken_over": False}
        return names

    def judged_rows(self) -> list[Row]:
        """Rows of all trials so far, held against the budgets."""
        return [judged(self.sweep, row) for row in self.rows.values()]

    def write(self) -> None:
        """Write ``sweep.json`` and ``sweep.html`` of what is known by now."""
        self.written = time.monotonic()
        about = {
            "seconds": round(self.written - self.began, 2),
            "machine": machine.describe(),
            "nodes": [node.name for node in self.cluster.nodes],
            "total": self.search.total,
            "runs": os.path.relpath(self.place.runs),
        }
        baselines = list(self.baselines.values())
        value = sweep_as_json(self.sweep, self.task, self.judged_rows(), baselines, about)
        write_text(self.place.runs / "sweep.json", json_text(value))
        write_page(value, self.place.runs / "sweep.html")

    def tell(self) -> int:
        """Say what is best within the budgets, how to make it again, and where the page is."""
        rows = self.judged_rows()
        failed = sum(row["status"] == "failed" for row in rows)
        if failed:
            say(
                f"{failed:,} of {len(rows):,} trials failed; the page has the reasons", self.console
            )
        best = best_of(self.sweep, rows)
        if best is None:
            say("no trial is within every budget", self.console)
        else:
            say(f"best within the budgets: {best['name']}\n  {best['command']}", self.console)
        say(f"sweep: {self.place.runs / 'sweep.html'}", self.console)
        return 1 if best is None else 0
