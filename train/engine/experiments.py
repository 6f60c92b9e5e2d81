"""experiments.db: every run with its settings, rows and results, to be asked while runs still write.

SQLite with a write-ahead log, so that readers never wait for a writer, nor it for them. The run folders are the truth
and this is an index of them: `import_run` makes a run's part anew from its folder, which is also how a run goes on.
"""

from __future__ import annotations

import json
import shlex
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from train.engine.config import ConfigError, differences
from train.engine.metrics import Row, read_rows
from train.engine.run_folder import is_held, now, read_json
from train.nearest import nearest

if TYPE_CHECKING:
    import pandas

SCHEMA_VERSION = 1
SCHEMA = (
    "CREATE TABLE sweeps (sweep_id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, spec TEXT NOT NULL, created TEXT)",
    """CREATE TABLE runs (
        run_id INTEGER PRIMARY KEY,
        run_dir TEXT NOT NULL UNIQUE,  -- seen from the database where it lies below, so that both can be moved
        script TEXT NOT NULL, state TEXT NOT NULL, command TEXT NOT NULL, config TEXT NOT NULL, facts TEXT,
        results TEXT, monitor TEXT, mode TEXT, sweep_id INTEGER REFERENCES sweeps ON DELETE SET NULL, trial INTEGER,
        created TEXT NOT NULL, updated TEXT NOT NULL)""",
    # The key is the order in which one score of one run is asked for, and no row can be there twice. NaN is NULL.
    """CREATE TABLE metrics (
        run_id INTEGER NOT NULL REFERENCES runs ON DELETE CASCADE,
        split TEXT NOT NULL, name TEXT NOT NULL, step INTEGER NOT NULL, value REAL,
        PRIMARY KEY (run_id, split, name, step)) WITHOUT ROWID""",
    """CREATE TABLE artifacts (
        run_id INTEGER NOT NULL REFERENCES runs ON DELETE CASCADE,
        kind TEXT NOT NULL, path TEXT NOT NULL, created TEXT NOT NULL, PRIMARY KEY (run_id, path))""",
)
# What a run folder's files are, for the table of artifacts.
ARTIFACTS = {"checkpoint": "checkpoints/[bl]*", "plot": "plots/*.png", "sample": "samples/*.txt"}
ARTIFACTS |= {"model": "*.pt", "page": "*.html"}
# Values that may be the best, as with the engine's checkpoints: after a step of training, and finite.
COUNTS = "m.step > 0 AND m.value > -9e999 AND m.value < 9e999"
COLUMNS = """runs.*, sweeps.name AS sweep,
    (SELECT MAX(step) FROM metrics WHERE run_id = runs.run_id AND split = 'train' AND name = 'loss') AS step"""
BEST_MONITORED = f"""(SELECT CASE runs.mode WHEN 'min' THEN MIN(m.value) ELSE MAX(m.value) END FROM metrics AS m
    WHERE m.run_id = runs.run_id AND m.split = 'val' AND m.name = runs.monitor AND {COUNTS})"""
RUNS = f"SELECT {COLUMNS}, {BEST_MONITORED} AS score FROM runs LEFT JOIN sweeps USING (sweep_id)"
WAIT_SECONDS = 3.0  # for another writer: training stands still meanwhile

Run = dict[str, Any]


class ExperimentDB:
    """The database at `path`, made where there is none. Every failure of SQLite's is a ConfigError.

    A run, as the methods return it: run_id, name, run_dir (Path), script, state (running, finished, interrupted,
    failed, or dead: it says running and no process holds its folder), command, config, facts (run.json), results,
    monitor, mode, sweep_id, sweep, trial, created, updated, step (of its last row), score (the best of what it
    monitors). Methods that take a run take its number, its folder, or the end of its name.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).resolve()
        with suppress(OSError):  # SQLite then says that it cannot open the file
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._sentences():
            self.connection = sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None)
            self.connection.row_factory = sqlite3.Row
        try:
            with self._sentences():
                self._set_up()
        except BaseException:
            self.close()
            raise

    def _set_up(self) -> None:
        execute = self.connection.execute
        execute("PRAGMA foreign_keys = ON")
        execute("PRAGMA synchronous = NORMAL")  # a power cut may take the last rows, never the database
        states = "SELECT user_version, (SELECT COUNT(*) FROM sqlite_master) FROM pragma_user_version"
        version, tables = execute(states).fetchone()
        if version > SCHEMA_VERSION:
            raise ConfigError(
                f"{self.path} has schema {version}, of a newer Tenfold than this, which knows {SCHEMA_VERSION}; "
                "update, or give another --db"
            )
        if version == 0 and tables:
            raise ConfigError(f"{self.path} is the database of something else; give another --db")
        if execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            execute("PRAGMA journal_mode = WAL")
        if version == 0:
            with self._writing():
                if execute("PRAGMA user_version").fetchone()[0] == 0:  # or another process was first
                    for statement in SCHEMA:
                        execute(statement)
                    execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def __enter__(self) -> ExperimentDB:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.connection.close()

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        try:
            yield
        except (
            sqlite3.Error,
            OverflowError,
            UnicodeEncodeError,
        ) as error:  # its integers have 64 bits, its text is UTF-8
            raise ConfigError(
                f"the experiment database {self.path} cannot be used: {error}; runs keep their rows in metrics.jsonl, "
                "from which `python train/runs.py import RUN --db PATH` fills this database or a new one"
            ) from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """All that is written inside is one transaction, whoever opened it."""
        if self.connection.in_transaction:
            yield
            return
        with self._sentences(), self.connection:
            self.connection.execute("BEGIN IMMEDIATE")
            yield

    def _query(self, sql: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        with self._sentences():
            return self.connection.execute(sql, values).fetchall()

    # ---- written by a run ----------------------------------------------------------------------------------------

    def log_run(
        self,
        run_dir: Path,
        *,
        script: str,
        config: dict[str, Any],
        command: str,
        sweep_id: int | None = None,
        trial: int | None = None,
        facts: dict[str, Any] | None = None,
    ) -> int:
        """A run that begins or goes on; its number, the same for the same folder. None leaves what was known before."""
        known = facts or {}
        values = {
            "run_dir": self._text(run_dir), "script": script, "state": "running", "command": command,
            "config": json.dumps(config), "facts": None if facts is None else json.dumps(facts),
            "monitor": known.get("monitor"), "mode": known.get("mode"), "sweep_id": sweep_id, "trial": trial,
            "created": known.get("started", now()), "updated": now(),
        }  # fmt: skip
        changes = ", ".join(f"{n} = COALESCE(excluded.{n}, {n})" for n in values if n != "run_dir")
        sql = f"INSERT INTO runs ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})"
        with self._writing():
            [(run_id,)] = self.connection.execute(
                f"{sql} ON CONFLICT (run_dir) DO UPDATE SET {changes} RETURNING run_id", [*values.values()]
            )
        return run_id

    def log_metrics(self, run_id: int, rows: Iterable[Row]) -> None:
        """Rows as in metrics.jsonl, all in one transaction; a step's score that was there is replaced."""
        values = [
            (run_id, row["split"], name, row["step"], value)
            for row in rows
            for name, value in row.items()
            if name not in ("step", "split") and isinstance(value, (int, float))
        ]
        with self._writing():
            self.connection.executemany("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?, ?)", values)
            self.connection.execute("UPDATE runs SET updated = ? WHERE run_id = ?", (now(), run_id))

    def cut_back(self, run_id: int, step: int) -> None:
        """After a rewind: rows behind the checkpoint of `step` did not happen."""
        with self._writing():
            self.connection.execute("DELETE FROM metrics WHERE run_id = ? AND step > ?", (run_id, step))

    def log_artifact(self, run_id: int, kind: str, path: Path | str) -> None:
        """path: absolute, or seen from the run's folder."""
        with self._writing():
            values = (run_id, kind, Path(path).as_posix(), now())
            self.connection.execute("INSERT OR REPLACE INTO artifacts VALUES (?, ?, ?, ?)", values)

    def finish(self, run_id: int, state: str, results: dict[str, Any] | None = None) -> None:
        values = (state, None if results is None else json.dumps(results), now(), run_id)
        with self._writing():
            self.connection.execute("UPDATE runs SET state = ?, results = ?, updated = ? WHERE run_id = ?", values)

    def log_sweep(self, name: str, spec: dict[str, Any]) -> int:
        """The sweep's number, the same for the same name."""
        sql = "INSERT INTO sweeps (name, spec, created) VALUES (?, ?, ?)"
        with self._writing():
            [(sweep_id,)] = self.connection.execute(
                f"{sql} ON CONFLICT (name) DO UPDATE SET spec = excluded.spec RETURNING sweep_id",
                (name, json.dumps(spec), now()),
            )
        return sweep_id

    def import_run(
        self, run_dir: Path, rows: bool = True, sweep_id: int | None = None, trial: int | None = None
    ) -> int:
        """Make what is known of a run anew from its folder, whatever it was; its number. rows: and its metrics.

        Raises ConfigError where the folder holds no run, or a damaged one; the database is then as it was.
        """
        with self._writing():  # before the folder is read: a living run writes to its folder first
            about, results, found = _read_folder(run_dir, rows)
            run_id = self.log_run(run_dir, **about, sweep_id=sweep_id, trial=trial)
            if rows:
                self.cut_back(run_id, -1)
                self.log_metrics(run_id, found)
            for kind, pattern in ARTIFACTS.items():
                for file in sorted(Path(run_dir).glob(pattern)):
                    self.log_artifact(run_id, kind, file.relative_to(run_dir))
            self.finish(run_id, about["facts"].get("state", "running"), results)
        return run_id

    def _text(self, run_dir: Path | str) -> str:
        folder, home = Path(run_dir).resolve(), self.path.parent
        return (folder.relative_to(home) if folder.is_relative_to(home) else folder).as_posix()

    # ---- asked by people -----------------------------------------------------------------------------------------

    def runs(
        self,
        script: str | None = None,
        state: str | None = None,
        sweep: int | str | None = None,
        limit: int | None = None,
    ) -> list[Run]:
        """The newest first. sweep: its number or name."""
        where, values = _where(script, sweep)
        found = map(self._run, self._query(f"{RUNS} WHERE {where} ORDER BY created DESC, run_id DESC", values))
        return [run for run in found if state in (None, run["state"])][:limit]

    def get_run(self, run: int | str | Path) -> Run:
        """By its number, its folder, or how its name ends. Raises ConfigError with the nearest name."""
        run = str(run).encode(errors="replace").decode().replace("\0", "?")  # what no run can be called
        number = int(run) if run.isdecimal() and len(run) < 19 else None  # SQLite's integers have 64 bits
        ends = "/" + run.strip("/")
        for where, values in (
            ("run_id = ?", [number]),
            ("run_dir = ?", [self._text(run)]),
            ("substr('/' || run_dir, -length(?)) = ?", [ends, ends]),
        ):
            found = self._query(f"{RUNS} WHERE {where}", values)
            if len(found) == 1:
                return self._run(found[0])
            if found:
                raise ConfigError(f"{run} may be {' or '.join(row['run_dir'] for row in found)}; say which")
        names = [row["run_dir"] for row in self._query("SELECT run_dir FROM runs")]
        known = {n: n for n in names} | {n.rpartition("/")[2]: n for n in names}
        raise ConfigError(f"{self.path} knows no run {run}{nearest(run, known)}; `list` shows them")

    def rows(self, run: int | str | Path) -> list[Row]:
        """As metrics.jsonl has them, in the order of steps."""
        sql = "SELECT step, split, name, value FROM metrics WHERE run_id = ? ORDER BY step, split"
        of_steps = groupby(self._query(sql, [self._number(run)]), key=lambda row: (row["step"], row["split"]))
        return [{"step": s, "split": p} | {r["name"]: _float(r["value"]) for r in rows} for (s, p), rows in of_steps]

    def metrics(self, run: int | str | Path) -> pandas.DataFrame:
        """`rows` as a table: step, split, and a column for each name."""
        return data_frame(self.rows(run))

    def artifacts(self, run: int | str | Path) -> list[dict[str, str]]:
        """kind and path of each."""
        return [
            dict(row) for row in self._query("SELECT kind, path FROM artifacts WHERE run_id = ?", [self._number(run)])
        ]

    def names(self, split: str, script: str | None = None) -> list[str]:
        """Of all scores that rows of this split have, of one script's runs or of all."""
        where, values = _where(script, None, None)
        found = self._query(
            "SELECT DISTINCT m.name FROM metrics AS m JOIN runs USING (run_id) LEFT JOIN sweeps USING (sweep_id) "
            f"WHERE m.split = ? AND {where}",
            [split, *values],
        )
        return [name for (name,) in found]

    def split_and_name(self, metric: str, script: str | None = None) -> tuple[str, str]:
        """val/loss, val_loss and loss are the validation's, train/loss and train_loss the training rows'; but a score
        that is itself called val_loss is meant where the script's runs have one."""
        split, _, name = metric.partition("/")
        if name and split in ("val", "train"):
            return split, name
        split, _, name = metric.partition("_")
        if name and split in ("val", "train") and metric not in self.names("val", script):
            return split, name
        return "val", metric

    def best_run(
        self,
        metric: str,
        mode: Literal["min", "max"],
        *,
        script: str | None = None,
        sweep: int | str | None = None,
        state: str | None = None,
    ) -> Run | None:
        """The run with the best `metric` at any of its steps (score, score_step); the earlier of equals; None if none.

        metric: val/loss, val_loss or loss; train/loss. Step 0 and what is not finite don't count.
        """
        if mode not in ("min", "max"):
            raise ConfigError(f"the mode of {metric} must be min or max, not {mode}")
        where, values = _where(script, sweep, state)
        found = self._query(
            f"SELECT {COLUMNS}, m.value AS score, m.step AS score_step "
            "FROM runs LEFT JOIN sweeps USING (sweep_id) JOIN metrics AS m USING (run_id) "
            f"WHERE m.split = ? AND m.name = ? AND {COUNTS} AND {where} "
            f"ORDER BY m.value {'ASC' if mode == 'min' else 'DESC'}, run_id, m.step LIMIT 1",
            [*self.split_and_name(metric, script), *values],
        )
        return self._run(found[0]) if found else None

    def compare_runs(self, ids: Sequence[int | str | Path]) -> pandas.DataFrame:
        """A row for each run: the settings in which they differ, then its last validation scores."""
        return data_frame(self.comparison(ids))

    def comparison(self, ids: Sequence[int | str | Path]) -> list[dict[str, Any]]:
        """`compare_runs` without pandas."""
        runs = [self.get_run(run) for run in ids]
        names = dict.fromkeys(name for run in runs for name in run["config"])
        differ = [n for n in names if any(run["config"].get(n) != runs[0]["config"].get(n) for run in runs)]
        last = "SELECT name, value, MAX(step) FROM metrics WHERE run_id = ? AND split = 'val' GROUP BY name"
        return [
            {"run": run["name"], "state": run["state"], "step": run["step"]}
            | {name: run["config"].get(name) for name in differ}
            | {f"val/{n}": _float(v) for n, v, _ in self._query(last, [run["run_id"]]) if n != "elapsed"}
            for run in runs
        ]

    def config_diff(self, a: int | str | Path, b: int | str | Path) -> dict[str, tuple[Any, Any]]:
        """Settings in which two runs differ: name -> (of a, of b)."""
        return differences(self.get_run(a)["config"], self.get_run(b)["config"])

    def _number(self, run: int | str | Path) -> int:
        return self.get_run(run)["run_id"]

    def _run(self, row: sqlite3.Row) -> Run:
        run = dict(row)
        folder = self.path.parent / run["run_dir"]
        try:
            run |= {name: json.loads(run[name]) if run[name] else None for name in ("config", "facts", "results")}
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{self.path} is damaged where it tells of {run['run_dir']}: {error}; "
                f"`python train/runs.py import {run['run_dir']} --db PATH` makes that anew"
            ) from error
        if run["state"] == "running" and not is_held(folder):
            run["state"] = "dead"
        return run | {"name": run["run_dir"], "run_dir": folder}


def _read_folder(run_dir: Path, rows: bool) -> tuple[dict[str, Any], dict[str, Any] | None, list[Row]]:
    """What `log_run` takes, results.json if there is one, and the rows of metrics.jsonl if asked."""
    folder = Path(run_dir)
    results, metrics = folder / "results.json", folder / "metrics.jsonl"
    try:
        config, facts = read_json(folder / "config.json"), read_json(folder / "run.json")
        if not isinstance(config, dict) or not isinstance(facts, dict) or not isinstance(facts["command"], str):
            raise ValueError("config.json and run.json hold names with values, a command among them")
        script = Path(shlex.split(facts["command"])[2]).stem  # accelerate launch SCRIPT …
        about = {"script": script, "config": config, "command": facts["command"], "facts": facts}
        found = read_rows(metrics) if rows and metrics.exists() else []
        return about, read_json(results) if results.exists() else None, found
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} is not the folder of a run: it has no {Path(error.filename).name}") from error
    except (OSError, ValueError, LookupError) as error:
        raise ConfigError(f"the run in {folder} is damaged: {error}") from error


def _where(script: str | None, sweep: int | str | None, state: str | None = None) -> tuple[str, list[Any]]:
    """The condition that a query of runs names, and its values."""
    asked = {"script = ?": script, f"sweeps.{'sweep_id' if isinstance(sweep, int) else 'name'} = ?": sweep}
    asked = {condition: value for condition, value in {**asked, "state = ?": state}.items() if value is not None}
    return " AND ".join(asked) or "TRUE", list(asked.values())


def _float(value: float | None) -> float:
    return float("nan") if value is None else value


def data_frame(rows: list[dict[str, Any]]) -> pandas.DataFrame:
    """Raises ConfigError where pandas is not installed."""
    try:
        import pandas  # here, because only tables need it
    except ImportError as error:
        raise ConfigError("a table of runs is a DataFrame, and pandas is not here: pip install pandas") from error
    return pandas.DataFrame(rows)
