"""Which small errors in the arithmetic the tests notice: a mutation run over a random sample.

    python benchmarks/mutation_run.py --folder DIR

copies the tree to a temporary folder, changes one place of one module there (cosmic-ray's operators: another operator
or number, a condition negated, a decorator gone, ...), runs the tests that reach the function until one fails, puts the
module back, and goes on with the next of the sample. ``tests/mutation.toml`` has the modules, the files of their tests,
the seed and what is left out.

What became of each mutant is a line of ``DIR/mutants.jsonl``, and the same command goes on where it was stopped;
``DIR/summary.json`` and ``DIR/summary.md`` are written at the end. After changes of tests, ``--again`` runs the
survivors once more.

Importing torch takes longer than most tests, so it is imported once; each mutant is tested in a process forked from
that one, which has nothing of the project imported.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coverage
import pytest
import torch
from cosmic_ray.commands.init import init as list_mutations
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB
from cosmic_ray.work_item import MutationSpec

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("cosmic-ray", "pytest", "hypothesis", "torch", "numpy")
POLL = 0.05  # seconds

Span = tuple[tuple[int, int], tuple[int, int]]  # from and to, each (line, column)


@dataclass(frozen=True)
class Mutant:
    """One changed place.

    Attributes:
        path: of the module, from the top of the tree.
        operator, occurrence: as cosmic-ray counts.
        line, where: of the place, and the function or class around it.
        code: the whole module with the change.
    """

    path: str
    operator: str
    occurrence: int
    line: int
    where: str
    code: str

    @property
    def name(self) -> str:
        return f"{self.path}:{self.line} {self.operator.removeprefix('core/')} {self.occurrence}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for the results")
    parser.add_argument("--config", type=Path, default=REPOSITORY / "tests" / "mutation.toml")
    parser.add_argument("--seed", type=int, help="instead of the configured one")
    parser.add_argument("--count", type=int, help="instead of the configured one")
    parser.add_argument("--again", action="store_true", help="test the survivors once more")
    args = parser.parse_args()

    torch.set_num_threads(1)  # sums in a fixed order, and a process that may fork
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.dont_write_bytecode = True  # a cached module is told from a mutated one by second and length only
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"

    config = tomllib.loads(args.config.read_text())
    config |= {name: value for name in ("seed", "count") if (value := getattr(args, name)) is not None}
    sample, population = draw(config)
    print(f"{len(sample)} of {population} mutants, seed {config['seed']}")
    args.folder.mkdir(parents=True, exist_ok=True)
    results = Results(args.folder / "mutants.jsonl", sample, forget_survivors=args.again)
    with copied_tree() as tree:
        clean = Coverage(tree, config, args.folder / "clean.json")
        for mutant in sample:
            if mutant not in results:
                results.add(mutant, tested(tree, mutant, config, clean))
    write_summary(args.folder, config, sample, population, results)


# The sample.


def draw(config: dict[str, Any]) -> tuple[list[Mutant], int]:
    """A random sample of the mutants, sorted by place, and how many there are to draw from."""
    with tempfile.TemporaryDirectory() as folder:
        database = WorkDB(Path(folder) / "mutations.sqlite", WorkDB.Mode.create)
        list_mutations([REPOSITORY / module["path"] for module in config["modules"]], database, {})
        specs = [item.mutations[0] for item in database.work_items]
        database.close()
    sources = {module["path"]: (REPOSITORY / module["path"]).read_text() for module in config["modules"]}
    outside = {path: _left_out(path, source, config["left_out"]) for path, source in sources.items()}
    unwanted = [re.compile(pattern) for pattern in config["operators_left_out"]["patterns"]]
    specs = [s for s in specs if not any(u.fullmatch(s.operator_name) for u in unwanted)]
    specs = [s for s in specs if not _is_outside(s, outside)]
    specs.sort(key=lambda s: (str(s.module_path), s.operator_name, s.occurrence))
    random.Random(config["seed"]).shuffle(specs)
    chosen: list[Mutant] = []
    for spec in specs:
        if len(chosen) == config["count"]:
            break
        path = spec.module_path.relative_to(REPOSITORY).as_posix()
        code = mutate_code(sources[path], get_operator(spec.operator_name)(), spec.occurrence)
        if code is not None and _is_another_program(sources[path], code):
            where = spec.definition_name or ""
            chosen.append(Mutant(path, spec.operator_name, spec.occurrence, spec.start_pos[0], where, code))
    return sorted(chosen, key=lambda m: (m.path, m.line, m.operator, m.occurrence)), len(specs)


def _is_outside(spec: MutationSpec, outside: dict[str, list[Span]]) -> bool:
    spans = outside[spec.module_path.relative_to(REPOSITORY).as_posix()]
    return any(first <= spec.start_pos <= last for first, last in spans)


def _is_another_program(original: str, mutated: str) -> bool:
    try:
        return ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(original))
    except SyntaxError:
        return False


def _left_out(path: str, source: str, rules: list[dict[str, Any]]) -> list[Span]:
    """What no mutant may come from: type hints, which never run, and what is configured.

    Raises:
        ValueError: a rule names nothing.
    """
    tree = ast.parse(source)
    hints = [n.annotation for n in ast.walk(tree) if isinstance(n, ast.arg | ast.AnnAssign) and n.annotation]
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    nodes = [*hints, *(f.returns for f in functions if f.returns)]
    definitions = {n.name: n for n in [*functions, *(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef))]}
    for rule in rules:
        if rule["path"] != path:
            continue
        for name in rule.get("names", []):
            if name not in definitions:
                raise ValueError(f"left_out: {path} has no {name}")
            nodes.append(definitions[name])
        for pattern in rule.get("statements", []):
            found = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and _starts_with(n, source, pattern)]
            if not found:
                raise ValueError(f"left_out: {path} has no statement {pattern!r}")
            nodes += found
    starts = [min([n.lineno, *(d.lineno for d in getattr(n, "decorator_list", []))]) for n in nodes]
    columns = [n.col_offset for n in nodes]  # a decorator's @ is where its function starts
    return [
        ((line, column), (n.end_lineno, n.end_col_offset))
        for line, column, n in zip(starts, columns, nodes, strict=True)
    ]


def _starts_with(statement: ast.stmt, source: str, pattern: str) -> bool:
    first = source.splitlines()[statement.lineno - 1]
    return re.match(pattern, first[statement.col_offset :]) is not None


# Running tests.


@contextlib.contextmanager
def copied_tree() -> Iterator[Path]:
    """What git tracks or would track, in a temporary folder."""
    listed = ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0")
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        tree = Path(folder).resolve() / "tree"
        for name in filter(None, names):
            source, target = REPOSITORY / name, tree / name
            if source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        yield tree


class Coverage:
    """Which tests run which lines, and how long they take, from a run of each file of tests on unchanged code.

    Args:
        kept: a file for what was measured; a file of tests is measured again when it, a fixture or the package changed.

    Raises:
        RuntimeError: a test fails.
    """

    def __init__(self, tree: Path, config: dict[str, Any], kept: Path):
        self.modules = modules = config["modules"]
        self.memory_gb = config["memory_gb"]
        self.sources = {module["path"]: (tree / module["path"]).read_text() for module in modules}
        self.files: dict[str, dict[str, Any]] = {}
        known = json.loads(kept.read_text()) if kept.exists() else {}
        common = [*sorted((tree / "qdiff").rglob("*.py")), *sorted((tree / "tests").rglob("conftest.py"))]
        for name in dict.fromkeys(test for module in modules for test in module["tests"]):
            digest = hashlib.sha256(b"".join(path.read_bytes() for path in [*common, tree / name])).hexdigest()
            if name not in known or known[name]["digest"] != digest:
                known[name] = {"digest": digest, **self._measured(tree, name)}
                kept.write_text(json.dumps(known))
            self.files[name] = known[name]
        self.durations = {test: s for file in self.files.values() for test, s in file["durations"].items()}

    def _measured(self, tree: Path, name: str) -> dict[str, Any]:
        data_file = tree.parent / "coverage"
        data_file.unlink(missing_ok=True)
        outcome, seconds, test = run_tests(tree, [name], 3600.0, self.memory_gb, (data_file, list(self.sources)))
        if outcome != "survived":
            output = (tree.parent / "output.txt").read_text(errors="replace")
            raise RuntimeError(f"without a mutation {test or name} failed ({outcome}):\n{output[-3000:]}")
        print(f"{seconds:.0f} s for {name} without a mutation", flush=True)
        data = coverage.CoverageData(str(data_file))
        data.read()
        lines = {}
        for path in self.sources:
            lines[path] = data.contexts_by_lineno(str(tree / path))
            for cached in (tree / path).parent.glob(f"__pycache__/{Path(path).stem}.*"):
                cached.unlink()
        return {"durations": json.loads(data_file.with_suffix(".json").read_text()), "lines": lines}

    def tests_of(self, mutant: Mutant, seconds: float) -> list[str]:
        """Tests that run the innermost function around the mutant, or all where there is none.

        The quickest first, as many as fit into the time, and one at least.
        """
        body = _innermost_body(self.sources[mutant.path], mutant.line)
        reached: list[str] = []
        for name in next(module["tests"] for module in self.modules if module["path"] == mutant.path):
            file = self.files[name]
            own = {int(line): tests for line, tests in file["lines"][mutant.path].items()}
            running = {test for line in body for test in own.get(line, [])} if body else file["durations"].keys()
            reached += [test for test in file["durations"] if test in running]
        reached.sort(key=lambda test: self.durations[test])
        totals = itertools.accumulate(self.durations[test] for test in reached)
        return [test for i, (test, total) in enumerate(zip(reached, totals, strict=True)) if i == 0 or total <= seconds]


def _innermost_body(source: str, line: int) -> range | None:
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    around = [f for f in functions if f.lineno <= line <= (f.end_lineno or 0)]
    if not around:
        return None
    innermost = max(around, key=lambda f: f.lineno)
    return range(innermost.body[0].lineno, (innermost.end_lineno or 0) + 1)


def tested(tree: Path, mutant: Mutant, config: dict[str, Any], clean: Coverage) -> dict[str, Any]:
    """Put the mutant in its place, run the tests, put the original back."""
    place = tree / mutant.path
    original = place.read_text()
    tests = clean.tests_of(mutant, config["test_seconds"])
    timeout = config["timeout"] * (config["start_seconds"] + sum(clean.durations[test] for test in tests))
    place.write_text(mutant.code)
    try:
        outcome, seconds, test = run_tests(tree, tests, timeout, config["memory_gb"]) if tests else ("survived", 0, "")
    finally:
        place.write_text(original)
    diff = difflib.unified_diff(original.splitlines(), mutant.code.splitlines(), lineterm="", n=0)
    changed = [line for line in diff if re.match(r"[-+](?![-+]{2} )", line)]
    return {"outcome": outcome, "seconds": round(seconds, 1), "tests": len(tests), "test": test, "change": changed}


def run_tests(
    tree: Path,
    tests: list[str],
    timeout: float,
    memory_gb: float,
    measure: tuple[Path, list[str]] | None = None,
) -> tuple[str, float, str]:
    """Run tests in a forked process until one fails.

    Args:
        measure: a file for coverage of these modules; beside it, as ``.json``, how long each test took.

    Returns:
        ``survived``, ``killed``, ``timeout`` or ``crashed``; the seconds; and the test that failed, where one did.
    """
    started = time.monotonic()
    verdict = tree.parent / "verdict.json"
    verdict.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            os.setpgid(0, 0)
            _child(tree, tests, verdict, memory_gb, measure)
        finally:
            os._exit(70)  # where it gets here, it has not written a verdict
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(POLL)
        if time.monotonic() - started > timeout:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "timeout", time.monotonic() - started, ""
    with contextlib.suppress(ProcessLookupError):  # what the tests left behind
        os.killpg(child, signal.SIGKILL)
    seconds = time.monotonic() - started
    if not verdict.exists():
        return "crashed", seconds, ""
    status, test = json.loads(verdict.read_text())
    return "survived" if status == pytest.ExitCode.OK else "killed", seconds, test


def _child(
    tree: Path, tests: list[str], verdict: Path, memory_gb: float, measure: tuple[Path, list[str]] | None
) -> None:
    output = os.open(tree.parent / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if measure is not None:  # the only run of code that is not mutated
        sys.dont_write_bytecode = False
    limit = int(memory_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    os.environ["PYTHONPATH"] = str(tree)  # of what tests start
    os.environ.pop("QDIFF_GOLDEN", None)
    watch = _Watch(measure, tree)
    status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], plugins=[watch])
    watch.finish()
    if status == pytest.ExitCode.OK and Path(sys.modules["qdiff"].__file__ or "").parents[1] != tree:
        return  # tests of another copy say nothing
    verdict.write_text(json.dumps([int(status), watch.failed]))
    sys.stdout.flush()
    os._exit(0)


class _Watch:
    """A pytest plugin: the first test, or file, that fails; lines and seconds of each test where that is asked for."""

    def __init__(self, measure: tuple[Path, list[str]] | None, tree: Path):
        self.failed = ""
        self.durations: dict[str, float] = {}
        self.file = self.coverage = None
        if measure is not None:
            self.file, modules = measure
            include = [str(tree / path) for path in modules]
            self.coverage = coverage.Coverage(str(self.file), include=include, config_file=False)
            self.coverage.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self.coverage is not None:
            self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.skipped:
            self.durations[report.nodeid] = self.durations.get(report.nodeid, 0.0) + report.duration
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.failed:
            self.failed = f"{report.nodeid} (import)"

    def finish(self) -> None:
        if self.coverage is not None and self.file is not None:
            self.coverage.stop()
            self.coverage.save()
            self.file.with_suffix(".json").write_text(json.dumps(self.durations))


# The results.


class Results:
    """A line for each mutant, added as soon as it is known.

    Args:
        path: of the file; results in it of mutants that are not in the sample are dropped.
        forget_survivors: test them again.
    """

    def __init__(self, path: Path, sample: list[Mutant], *, forget_survivors: bool = False):
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        names = {mutant.name for mutant in sample}
        for line in path.read_text().splitlines() if path.exists() else []:
            row = json.loads(line)
            if row["name"] in names and not (forget_survivors and row["outcome"] == "survived"):
                self.rows[row["name"]] = row
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows.values()))

    def __contains__(self, mutant: Mutant) -> bool:
        return mutant.name in self.rows

    def add(self, mutant: Mutant, result: dict[str, Any]) -> None:
        facts = dataclasses.asdict(mutant)
        del facts["code"]
        row = self.rows[mutant.name] = {"name": mutant.name, **facts, **result}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{len(self.rows):4d} {row['outcome']:9s}{row['seconds']:6.1f} s  {mutant.name}  {row['test']}", flush=True
        )


def write_summary(
    folder: Path, config: dict[str, Any], sample: list[Mutant], population: int, results: Results
) -> None:
    """``summary.json`` and ``summary.md``."""
    rows = [results.rows[mutant.name] for mutant in sample]
    outcomes = Counter(row["outcome"] for row in rows)
    killed = len(rows) - outcomes["survived"]
    summary = {
        "seed": config["seed"],
        "count": len(rows),
        "population": population,
        "killed": killed,
        "share": round(killed / len(rows), 4),
        "outcomes": dict(outcomes),
        "seconds": round(sum(row["seconds"] for row in rows)),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
        "commit": _commit(),
        "survivors": [row for row in rows if row["outcome"] == "survived"],
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    lines = [f"{killed} of {len(rows)} mutants killed ({killed / len(rows):.1%}), seed {config['seed']}", ""]
    lines += [f"{'module or operator':60s} killed  of", *_table(rows, "path"), *_table(rows, "operator")]
    lines += ["", "Survivors:", ""]
    for row in summary["survivors"]:
        lines += [f"{row['name']} ({row['where']})", *(f"    {line}" for line in row["change"]), ""]
    (folder / "summary.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _table(rows: list[dict[str, Any]], key: str) -> list[str]:
    killed = Counter(row[key] for row in rows if row["outcome"] != "survived")
    total = Counter(row[key] for row in rows)
    return [f"{name:60s} {killed[name]:6d} {total[name]:3d}" for name in sorted(total)]


def _commit() -> str:
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
