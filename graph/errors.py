"""What can go wrong while the structure of a model is read, and what to do about it."""

from __future__ import annotations


class GraphError(Exception):
    """Base of all errors of this package."""


class ExampleInputError(GraphError):
    """What was asked for does not fit the model: example inputs, or a module's name."""


class TraceError(GraphError):
    """`torch.export` could not trace the model.

    Parameters
    ----------
    reason
        What the exporter said.
    module
        Qualified name of the module whose `forward` was running, empty if unknown.
    hint
        What usually helps.
    """

    def __init__(self, reason: str, module: str, hint: str) -> None:
        where = f" in module {module!r}" if module else ""
        super().__init__(
            f"the model could not be traced{where}: {reason.removesuffix('.')}.\n{hint}"
        )
        self.reason = reason
        self.module = module
        self.hint = hint


class RuleError(GraphError):
    """A propagation rule failed or returned layouts that do not fit its operator's outputs."""


class UnknownGroupError(GraphError):
    """No coupling group has the name that was asked for."""
