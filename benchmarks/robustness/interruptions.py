"""Kill commands at random moments, fill the disk at random writes, and see what is left.

Each attempt interrupts a command once, looks at what it says and at what lies where its output
goes, gives the same command again, and compares every file with those of an uninterrupted one.
"""

from __future__ import annotations

import random
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from benchmarks.robustness.row import Row
from tests.osscar.interrupted_cases import Case, plan_case, stock_case, study_case, tiny_model
from tests.osscar.interruptions import Ended, Full, Kill, Refusal, Victim, hidden, orphans

COMMAND = "python -m benchmarks.robustness"
_ATTEMPTS = 30


def rows(*, seed: int = 0, attempts: int | None = None) -> list[Row]:
    """Interrupt `prune` and `gap`, so often each (by default thirty times in each way)."""
    count = _ATTEMPTS if attempts is None else attempts
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        return list(_rows(place, seed, count))


def _rows(place: Path, seed: int, count: int) -> Iterator[Row]:
    for part in ("model", "plan", "stock", "study"):
        (place / part).mkdir()
    model = tiny_model(place / "model")
    prunes = [plan_case(model, place / "plan"), stock_case(model, place / "stock")]
    studies = [study_case(place / "study", jobs=2)]
    command = f"{COMMAND} --seed {seed}"
    for name, cases in (("prune", prunes), ("gap --jobs 2", studies)):
        draw = random.Random(f"{seed} {name}")
        victims = list(Victim) if name != "prune" else [Victim.COMMAND]
        kills = [(case, _kill(draw, case, victims)) for case in _drawn(draw, cases, count)]
        yield _row(f"{name} killed", place, kills, command)
        fulls = [(case, _full(draw, case)) for case in _drawn(draw, cases, count)]
        yield _row(f"{name} on a full disk", place, fulls, command)


def _drawn(draw: random.Random, cases: list[Case], count: int) -> list[Case]:
    return [draw.choice(cases) for _ in range(count)]


def _kill(draw: random.Random, case: Case, victims: list[Victim]) -> Kill:
    victim = draw.choice(victims)
    number = {Victim.GROUP: signal.SIGINT, Victim.WORKER: signal.SIGKILL}.get(
        victim, draw.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
    )
    return Kill(draw.randrange(1, case.events + 1), number, victim)


def _full(draw: random.Random, case: Case) -> Full:
    return Full(draw.randrange(1, case.writes + 1), draw.choice(list(Refusal)))


def _row(kind: str, place: Path, attempts: list[tuple[Case, Kill | Full]], command: str) -> Row:
    found: Counter[str] = Counter()
    for index, (case, plan) in enumerate(attempts):
        root = place / f"{kind} {index}".replace(" ", "-")
        found.update(_outcome(case, root, plan))
    names = ("clear_errors", "tracebacks", "silent_wrong", "lost_data")
    return Row(kind, len(attempts), *(found[name] for name in names), command)


def _outcome(case: Case, root: Path, plan: Kill | Full) -> Iterator[str]:
    """Say what came of one attempt: nothing where SIGKILL left no words, and all went well."""
    case.begin(root)
    ended = case.run(root, plan)
    left = [] if ended.status == -signal.SIGKILL else hidden(root, case.shown)
    if _says_clearly(ended):
        yield "clear_errors"
    elif ended.status not in (0, -signal.SIGKILL):
        yield "tracebacks"
    if orphans(ended) or left or (case.keeps_old and not case.is_whole(root)):
        yield "lost_data"
        return
    if ended.status:
        again = case.run(root)
        if again.status:
            yield "lost_data"
            return
    if case.wrong(root):
        yield "silent_wrong"


_CLEAR = ("error: cannot write ", "error: a worker was killed", "interrupted: ")


def _says_clearly(ended: Ended) -> bool:
    lines = ended.err.strip().splitlines()
    return ended.status in (2, 130, 143) and len(lines) == 1 and lines[0].startswith(_CLEAR)
