"""``run``: the whole pipeline, doing only what is needed.

In go steps; each has a key made of its parameters, the digests of the files it reads, the keys of
the steps before it and the code's version. A step whose key is that of the last run, and whose
outputs are still what it made, is skipped; another runs, and the plan says why. What was done is
kept in ``pipeline.json``, written whole after every step, so that a killed run goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lever_data import __version__
from lever_data.errors import LeverError, UsageError
from lever_data.store.files import sha256_file, write_atomic

STATE = "pipeline.json"
Outputs = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Step:
    """One step.

    ``act`` is called with the outputs of all earlier steps and whether the same work was begun
    before; it returns its own outputs as JSON values, with every file and run folder it made in
    ``paths``. ``parameters``: JSON values. ``reads``:
    files by what they are. ``after``: the steps whose outputs it uses. ``code``: raised when what
    the step does changes. ``idle``: why there is nothing to do, where that is so. ``guard``: called
    where the step is to run, before any does; raises where it would destroy what is not its own.
    """

    name: str
    act: Callable[[Mapping[str, Outputs], bool], Outputs]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    reads: Mapping[str, Path] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    code: int = 1
    idle: str | None = None
    guard: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class PlanLine:
    """What will happen to a step: ``run``, ``skip`` (unchanged) or ``idle``, and why.

    ``parts``: what its key is made of, by name.
    """

    step: Step
    verdict: str
    why: str
    parts: Mapping[str, str]

    @property
    def key(self) -> str:
        """Digest of the parts."""
        text = json.dumps(dict(self.parts), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class Pipeline:
    """Steps in order, and what is known of their last runs.

    Args:
        folder: where ``pipeline.json`` is kept.
        steps: in an order in which each comes after those it uses.
    """

    def __init__(self, folder: Path, steps: Sequence[Step]) -> None:
        self.folder = folder
        self.steps = list(steps)
        self.state = _read_state(folder / STATE)
        self.digests: dict[Path, str] = {}
        self.planned: dict[str, PlanLine] = {}  # of the last plan, by the step's name

    def plan(self, force: Sequence[str] = ()) -> list[PlanLine]:
        """What would be done, and why; nothing is changed.

        Raises:
            UsageError: ``force`` names an unknown step.
            LeverError: a file a step reads is not there, or a guard refuses.
        """
        names = [step.name for step in self.steps]
        if unknown := sorted(set(force) - set(names)):
            raise UsageError("there is no such step", value=unknown[0], hint=", ".join(names))
        self.digests, self.planned = {}, {}
        for step in self.steps:
            self.planned[step.name] = self._judge(step, self.planned, step.name in force)
        return list(self.planned.values())

    def key_after(self, steps: Sequence[Step]) -> str:
        """The key of the last of ``steps``, were they to come after those of the last plan. They
        are not judged: no guard is asked, and none is idle.

        Raises:
            LeverError: a file a step reads is not there.
        """
        planned = dict(self.planned)
        for step in steps:
            planned[step.name] = PlanLine(step, "run", "", self._parts(step, planned))
        return planned[steps[-1].name].key

    def run(self, say: Say, force: Sequence[str] = ()) -> dict[str, Outputs]:
        """Do what is needed; returns the outputs of every step.

        Raises:
            LeverError: a step failed; what was done before it stays done.
        """
        outputs: dict[str, Outputs] = {}
        for item in self.plan(force):
            name = item.step.name
            if item.verdict == "run":
                say(f"[{name}] {item.why}")
                outputs[name] = self._do(item, outputs, name in force)
            else:
                say(f"[{name}] {'skipped: ' if item.verdict == 'skip' else ''}{item.why}")
                outputs[name] = (
                    self._known(name).get("outputs", {}) if item.verdict == "skip" else {}
                )
        return outputs

    def _do(self, item: PlanLine, outputs: Mapping[str, Outputs], forced: bool) -> Outputs:
        name = item.step.name
        begun = self._known(name).get("begun") == item.key and not forced
        self._note(name, {**self._known(name), "begun": item.key, "begun_parts": dict(item.parts)})
        done = item.step.act(outputs, begun)
        self._note(
            name, {"key": item.key, "parts": dict(item.parts), "outputs": done, "made": _made(done)}
        )
        return done

    def _judge(self, step: Step, before: Mapping[str, PlanLine], forced: bool) -> PlanLine:
        if step.idle is not None:
            return PlanLine(step, "idle", step.idle, {})
        parts = self._parts(step, before)
        known = self._known(step.name)
        item = PlanLine(step, "run", "", parts)
        if forced:
            why = "forced"
        elif known.get("begun") == item.key:
            why = "begun and not finished"
        elif "begun" in known:  # it may have replaced outputs of the run before it, too
            change = _difference(known.get("begun_parts", {}), parts)
            why = f"begun and not finished, and starts anew: {change}"
        elif "key" not in known:
            why = "not run yet"
        elif known["key"] != item.key:
            why = _difference(known["parts"], parts)
        elif fault := _fault(known):
            why = f"its output {fault}"
        else:
            return PlanLine(step, "skip", "unchanged", parts)
        step.guard()
        return PlanLine(step, "run", why, parts)

    def _parts(self, step: Step, before: Mapping[str, PlanLine]) -> dict[str, str]:
        parts = {"code": f"{__version__}/{step.code}"}
        parts |= {name: json.dumps(v, sort_keys=True) for name, v in _flat(step.parameters)}
        for name, path in step.reads.items():
            if not path.is_file():
                raise LeverError(f"the {name} are not there", where=str(path))
            if path not in self.digests:  # several steps open the same large file
                self.digests[path] = sha256_file(path)
            parts[f"file {name}"] = self.digests[path]
        for name in step.after:
            parts[f"step {name}"] = before[name].key if before[name].parts else "idle"
        return parts

    def _known(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.state.get(name, {})
        return found

    def _note(self, name: str, entry: Mapping[str, Any]) -> None:
        self.state[name] = dict(entry)
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.state, indent=1, ensure_ascii=False)
        write_atomic(self.folder / STATE, text.encode())


def is_made(folder: Path, path: Path) -> bool:
    """Whether a file is what a step of the pipeline in ``folder`` made."""
    if not path.is_file():
        return False
    for known in _read_state(folder / STATE).values():
        made = known.get("made", {}).get(str(path))
        if made is not None and made["bytes"] == path.stat().st_size:
            return bool(made["sha256"] == sha256_file(path))
    return False


def require_own(folder: Path, paths: Sequence[Path]) -> None:
    """Refuse to write over files that no step of the pipeline in ``folder`` made.

    Raises:
        LeverError: it names the first.
    """
    for path in paths:
        if path.exists() and not is_made(folder, path):
            raise LeverError(
                "a file is in the way that this pipeline did not make",
                where=str(path),
                hint="move it away, or name it in the config as one that is given",
            )


def _read_state(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise LeverError(
            f"the record of the pipeline is damaged ({error})",
            where=str(path),
            hint="delete it; every step will run again",
        ) from None
    if not isinstance(found, dict):
        raise LeverError("the record of the pipeline is damaged", where=str(path))
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested parameters by dotted name."""
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value))
    return found


def _difference(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """What changed since the last run, in words; at most three things."""
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    words = []
    for name in changed[:3]:
        if name.startswith("file "):
            words.append(f"the {name.removeprefix('file ')} changed")
        elif name.startswith("step "):
            words.append(f"the step {name.removeprefix('step ')} changed")
        else:
            words.append(f"{name}: {old.get(name, 'unset')} → {new.get(name, 'unset')}")
    return "; ".join(words) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")


def _made(outputs: Outputs) -> dict[str, dict[str, Any]]:
    """Size and sha256 of the files a step made; a run folder has its own in the store."""
    files = [Path(path) for path in outputs.get("paths", []) if Path(path).is_file()]
    return {str(p): {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in files}


def _fault(known: Mapping[str, Any]) -> str | None:
    """What is wrong with the first output that is no longer what the step made."""
    for name in known["outputs"].get("paths", []):
        path, made = Path(name), known.get("made", {}).get(name)
        if not path.exists():
            return f"{name} is gone"
        if made is None:
            continue
        size = path.stat().st_size
        if size != made["bytes"]:
            return f"{name} is damaged: {size:,} bytes, it made {made['bytes']:,}"
        if sha256_file(path) != made["sha256"]:
            return f"{name} is damaged: its content is not what it made"
    return None
