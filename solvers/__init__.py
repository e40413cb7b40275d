"""Subset-selection problems and the interchangeable backends that solve them.

The mathematics of one pruned layer, independent of any network: which k of n units stay so that the
refitted least-squares problem loses least.

>>> import torch, solvers
>>> X, W0 = torch.randn(64, 6).double(), torch.randn(6, 3).double()
>>> problem = solvers.SubsetProblem.from_gram(X.T @ X / 64, W0, keep=4)
>>> solution = solvers.solve(problem, backend="local_search")
>>> solution.verify().loss == solution.loss
True
"""

from solvers.closed_forms.refit import quadratic_loss, refit, refit_loss
from solvers.errors import BackendError, ProblemError, SolverError, VerificationError
from solvers.experts.backends import ExpertSolution, solve_experts
from solvers.experts.problem import ExpertProblem, RoutedTokens, expert_candidates
from solvers.experts.routing import GroupScore, RouterScores, RoutingRule
from solvers.problem import Consumer, SubsetProblem
from solvers.protocol import Backend, BackendKind, Capabilities, Selection, Status
from solvers.registry import (
    BACKENDS,
    EXPERT_BACKENDS,
    BackendInfo,
    backend_class,
    backend_names,
    backends,
    make_backend,
)
from solvers.solution import Solution, SolutionRecord, load_certificate, save_certificate
from solvers.solve import solve
from solvers.verification import Verification

__all__ = [
    "BACKENDS", "EXPERT_BACKENDS", "Backend", "BackendError", "BackendInfo", "BackendKind",
    "Capabilities", "Consumer", "ExpertProblem", "ExpertSolution", "GroupScore", "ProblemError",
    "RoutedTokens", "RouterScores", "RoutingRule", "Selection", "Solution", "SolutionRecord",
    "SolverError", "Status", "SubsetProblem", "Verification", "VerificationError",
    "backend_class", "backend_names", "backends", "expert_candidates", "load_certificate",
    "make_backend", "quadratic_loss", "refit", "refit_loss", "save_certificate", "solve",
    "solve_experts",
]  # fmt: skip
