"""One line of the table of attacks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What came of attacks of one kind.

    Attributes
    ----------
    kind
        What was attacked, and how.
    attempts
        How many attacks.
    clear_errors
        Those that ended in an error of the project's: one line, and status 2 of a command.  What is
        neither here nor in the counts below was accepted, rightly.
    tracebacks
        Those that ended in any other exception, a crash of the process, or a time or memory limit.
    silent_wrong
        Those that were accepted and gave something false.
    lost_data
        Those after which a file of somebody else's was gone or changed.
    command
        What makes the line again.
    """

    kind: str
    attempts: int
    clear_errors: int
    tracebacks: int
    silent_wrong: int
    lost_data: int
    command: str
