"""Products that code takes with a weight itself, as `torch.einsum` and `F.linear` do.

A layer is observed where its module is called.  A weight that code multiplies by, wherever it does,
is observed at the function: a mode sees the functions of torch while the model runs.  Such products
are linear in the weight: taken with zeros and ones in its place, they return what they read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from osscar.network.hooks import other_forwards, running_modules
from osscar.network.model_state import version_of
from osscar.network.modules import HALVES, forward
from osscar.offload.on_disk import OnDisk

UNFOLDED_BYTES = 64 * 2**20
"""The most memory, in float64, of windows that are unfolded at once.  A single row of output
positions is unfolded whole, should it take more than that."""


@dataclass(frozen=True)
class Contraction:
    """What a product does with the dimensions of a weight.

    It sums over those of `summed`, and puts those of `made` out at `places` of its result.  Of a
    grouped convolution, so many `groups` lie in the first dimension.  The taps of a transposed one
    are `flipped`: it writes where a plain one reads.
    """

    summed: tuple[int, ...]
    made: tuple[int, ...]
    places: tuple[int, ...]
    groups: int = 1
    flipped: bool = False

    def reordered(self, order: Sequence[int]) -> Contraction:
        """Return the form in the dimensions of a weight of which the product takes a view."""
        summed, made = (tuple(order[dim] for dim in dims) for dims in (self.summed, self.made))
        return Contraction(summed, made, self.places, self.groups)


_Given: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class _Kind:
    """A function that takes a product.

    names: Of its arguments, in their order.
    defaults: Of the last of them.
    form: What it does with the argument of a name, in the dimensions of that; None where nothing is
        known of this.
    operands: What may be the weight, or is multiplied with it.
    by_sample: Whether the input has samples in its first dimension, read one by one.
    """

    names: tuple[str, ...]
    form: Callable[[_Given, str], Contraction | None]
    operands: tuple[str, ...] = ("input", "weight")
    defaults: tuple[Any, ...] = ()
    by_sample: bool = False

    def bound(self, args: Sequence[Any], kwargs: _Given) -> _Given | None:
        """Return all arguments of a call by name; None where it has others."""
        late = self.names[len(self.names) - len(self.defaults) :]
        defaults = dict(zip(late, self.defaults, strict=True))
        given = {**defaults, **dict(zip(self.names, args, strict=False)), **kwargs}
        fits = len(args) <= len(self.names) and given.keys() == set(self.names)
        return {name: given[name] for name in self.names} if fits else None


@dataclass(frozen=True, eq=False)
class Taken:
    """A product that is taken: a function with its arguments, one of which is a weight.

    `order` says which dimensions of the weight those of that argument are; `form` is in the
    dimensions of the weight.
    """

    function: Callable[..., Any]
    kind: _Kind
    given: _Given = field(repr=False)
    weight: str
    order: tuple[int, ...]
    form: Contraction

    @property
    def multiplied(self) -> Tensor:
        """The other operand."""
        found: Tensor = self.given[next(n for n in self.kind.operands if n != self.weight)]
        return found

    def output(self, module: nn.Module | None = None) -> Any:
        """Take the product once more, with the weight as it is now."""
        return self.function(*self.given.values())

    def finer(self) -> Taken:
        """Return the call with all that it is given in half precision in float32."""
        given = {
            name: one.float() if isinstance(one, Tensor) and one.dtype in HALVES else one
            for name, one in self.given.items()
        }
        return replace(self, given=given)

    def picked(self, weight: Tensor) -> Tensor:
        """Take the product with another weight, and without a bias."""
        given = {**self.given, self.weight: weight.permute(self.order)}
        if given.get("bias") is not None:
            given["bias"] = weight.new_zeros(weight.shape[self.form.made[0]])
        found: Tensor = self.function(*given.values())
        return found

    def split(self, columns: int) -> Iterator[Taken]:
        """Yield the call on some samples at once, where these are read one by one."""
        if not self.kind.by_sample or self.multiplied.ndim != self.given[self.weight].ndim:
            yield self
            return
        row = 8 * columns * self.multiplied[0, 0].numel()
        samples = max(1, UNFOLDED_BYTES // row)
        for some in torch.split(self.multiplied, samples):
            yield replace(self, given={**self.given, "input": some})


# ---- what functions do -------------------------------------------------------------------


def _linear(given: _Given, weight: str) -> Contraction | None:
    known = weight == "weight" and given[weight].ndim == 2
    return Contraction((1,), (0,), (-1,)) if known else None


def _matrix_product(given: _Given, weight: str) -> Contraction | None:
    other = given["input" if weight == "other" else "other"]
    if given[weight].ndim != 2:
        return None
    if weight == "other":
        return Contraction((0,), (1,), (-1,))
    return Contraction((1,), (0,), (-2 if other.ndim > 1 else -1,))


def _convolution(given: _Given, weight: str) -> Contraction | None:
    if weight != "weight":  # filters that are computed slide over it
        return None
    return Contraction(
        tuple(range(1, given[weight].ndim)), (0,), (1 - given[weight].ndim,), given["groups"]
    )


def _einsum(given: _Given, weight: str) -> Contraction | None:
    """Sum over the labels of the weight that the result lacks; all others it has alone."""
    if not isinstance(given["equation"], str):
        return None
    terms, arrow, made = given["equation"].replace(" ", "").partition("->")
    parts = dict(zip(("left", "right"), terms.split(","), strict=True))
    own, other = parts[weight], parts["right" if weight == "left" else "left"]
    summed = tuple(dim for dim, label in enumerate(own) if label not in made)
    rest = tuple(dim for dim in range(len(own)) if dim not in summed)
    plain = arrow and "." not in own and len(set(own)) == len(own)
    if not plain or not summed or not rest or not all(own[dim] in other for dim in summed):
        return None
    if any(own[dim] in other for dim in rest):  # as of experts, or heads on both sides
        return None
    lead, _, tail = made.partition("...")
    places = (
        lead.index(own[dim]) if own[dim] in lead else tail.index(own[dim]) - len(tail)
        for dim in rest
    )
    return Contraction(summed, rest, tuple(places))


_SPACE = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_LINEAR = _Kind(("input", "weight", "bias"), _linear, defaults=(None,))
_CONVOLUTION = _Kind(_SPACE, _convolution, defaults=(None, 1, 0, 1, 1), by_sample=True)
_MATRICES = _Kind(("input", "other"), _matrix_product, ("input", "other"))
_EINSUM = _Kind(("equation", "left", "right"), _einsum, ("left", "right"))

_KINDS: Mapping[Callable[..., Any], _Kind] = {
    F.linear: _LINEAR,
    torch.einsum: _EINSUM,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _CONVOLUTION),
    **dict.fromkeys(
        (torch.matmul, torch.mm, torch.mv, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _MATRICES
    ),
}


_VIEWS = frozenset(
    {
        *(torch.t, torch.transpose, torch.swapaxes, torch.permute, torch.movedim, torch.detach),
        *(Tensor.t, Tensor.transpose, Tensor.swapaxes, Tensor.permute, Tensor.movedim),
        *(part.__get__ for part in (Tensor.T, Tensor.mT, Tensor.data)),  # type: ignore[attr-defined]
        Tensor.detach,
    }
)
"""What shows a weight with its dimensions in another order."""

_ONLY_THE_FORMAT = frozenset(
    {Tensor.new_empty, Tensor.new_full, Tensor.new_ones, Tensor.new_tensor, Tensor.new_zeros}
)
"""What asks a tensor for its number format and device, and reads none of its values."""


# ---- watched -----------------------------------------------------------------------------

_OnProduct: TypeAlias = Callable[[str, Taken, str | None], Any]


class _MultiplicationWatch(TorchFunctionMode):
    """Shows the products that a model takes with some tensors, and what else reads these.

    tensors: Their names, by `id`.
    product: Is told the name, the product, and the name of its bias, if that is one of them; and
        returns what comes of it.
    other: Is told the name.
    """

    def __init__(
        self, tensors: Mapping[int, str], product: _OnProduct, other: Callable[[str], None]
    ) -> None:
        super().__init__()
        self._tensors, self._product, self._other = tensors, product, other
        self._views: dict[int, tuple[Tensor, str, tuple[int, ...]]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        known = [found for found in map(self._known, leaves) if found is not None]
        if not known:
            return func(*args, **kwargs)
        taken = self._taken(func, args, kwargs)
        if taken is not None:
            weight, bias = (self._known(taken.given.get(at)) for at in (taken.weight, "bias"))
            assert weight is not None
            return self._product(weight[0], taken, None if bias is None else bias[0])
        before = _writes(leaves)
        result = func(*args, **kwargs)
        if func in _VIEWS and not any(isinstance(leaf, OnDisk) for leaf in leaves):
            name, order = known[0]
            # Sizes that differ tell dimensions apart.
            sizes = torch.empty([2 + dim for dim in range(len(order))])
            given = pytree.tree_map(
                lambda leaf: leaf if self._known(leaf) is None else sizes, (args, dict(kwargs))
            )
            shown = func(*given[0], **given[1])
            view = tuple(order[size - 2] for size in shown.shape)
            self._views[id(result)] = result, name, view
            return result
        found = pytree.tree_leaves(result)
        made = any(isinstance(x, Tensor) and id(x) not in before for x in found)
        if func not in _ONLY_THE_FORMAT and (made or _writes(leaves) != before):
            for name, _ in known:
                self._other(name)
        return result

    def _known(self, leaf: Any) -> tuple[str, tuple[int, ...]] | None:
        """Return the name of a tensor, and which of its dimensions a leaf has."""
        name = self._tensors.get(id(leaf))
        if name is not None:
            return name, tuple(range(leaf.ndim))
        view = self._views.get(id(leaf))
        return None if view is None else view[1:]

    def _taken(self, func: Any, args: Any, kwargs: _Given) -> Taken | None:
        kind = _KINDS.get(func)
        if kind is _EINSUM and len(args) == 2 and isinstance(args[1], list | tuple):
            args = (args[0], *args[1])
        given = None if kind is None else kind.bound(args, kwargs)
        if kind is None or given is None:
            return None
        weights = [name for name in kind.operands if self._known(given[name]) is not None]
        form = kind.form(given, weights[0]) if len(weights) == 1 else None
        if form is None:
            return None
        known = self._known(given[weights[0]])
        assert known is not None
        return Taken(func, kind, given, weights[0], known[1], form.reordered(known[1]))


def _writes(leaves: Iterable[Any]) -> dict[int, int]:
    """Return how often tensors were written to, by `id`; 0 where nobody counts."""
    return {id(x): version_of(x) for x in leaves if isinstance(x, Tensor)}


@contextmanager
def weights_read_elsewhere(model: nn.Module) -> Iterator[set[str]]:
    """Yield a set that fills with the names of modules whose weights others read meanwhile.

    A layer is observed where it is called.  Code that also reads the weight itself, as
    ``F.linear(x, self.down.weight)`` or ``self.down.forward(x)``, uses it on inputs that are not
    seen there: such a weight is observed where code multiplies by it, or not refitted.
    """
    owners = {
        id(tensor): name
        for name, module in model.named_modules()
        for tensor in module.parameters(recurse=False)
    }
    found: set[str] = set()

    def note(owner: str) -> None:
        if owner != (running[-1] if running else ""):
            found.add(owner)

    def take(owner: str, taken: Taken, bias: str | None) -> Any:
        note(owner)
        note(owner if bias is None else bias)
        return taken.output()

    with running_modules(model) as running, _MultiplicationWatch(owners, take, note):
        yield found


def _watching(
    model: nn.Module, names: Iterable[str], product: _OnProduct, other: Callable[[str], None]
) -> AbstractContextManager[None]:
    """Watch what each forward pass does with some tensors, in a mode of its own."""
    own, tensors = model.forward, {id(attrgetter(name)(model)): name for name in names}

    @functools.wraps(own)
    def watched(*args: Any, **kwargs: Any) -> Any:
        with _MultiplicationWatch(tensors, product, other):
            return own(*args, **kwargs)

    return other_forwards([(model, watched)])


@dataclass(frozen=True)
class Product:
    """A weight that code multiplies by, always in one form.

    bias: What every product adds, which the same module has and nothing else reads, if anything.
    """

    tensor: str
    form: Contraction
    bias: str | None


@torch.no_grad()
def products_of(
    model: nn.Module, example: Mapping[str, Any], names: Collection[str]
) -> dict[str, Product]:
    """Run the model, and return by name the parameters of which it takes products of one form."""
    if not names:
        return {}
    homes = {name.rpartition(".")[0] for name in names}
    vectors = {
        name
        for name, tensor in model.named_parameters()
        if tensor.ndim == 1 and name.rpartition(".")[0] in homes
    }
    forms: dict[str, dict[Contraction, set[str | None]]] = {name: {} for name in names}
    uses: dict[str, set[tuple[str, Contraction]]] = {name: set() for name in vectors}
    others: set[str] = set()

    def take(name: str, taken: Taken, bias: str | None) -> Any:
        forms[name].setdefault(taken.form, set()).add(bias)
        if bias is not None:
            uses[bias].add((name, taken.form))
        return taken.output()

    def own_bias(name: str, form: Contraction) -> str | None:
        bias, *more = forms[name][form]
        if bias is None or more or bias in others or uses[bias] != {(name, form)}:
            return None
        same = bias.rpartition(".")[0] == name.rpartition(".")[0]
        return bias if same else None

    with _watching(model, {*names, *vectors}, take, others.add):
        forward(model, example)
    return {
        name: Product(name, form, own_bias(name, form))
        for name, found in forms.items()
        if len(found) == 1 and name not in others
        for form in found
    }


class Station(str):
    """The name of a weight whose products are observed; that of a module may look the same."""


def is_station(name: str) -> TypeGuard[Station]:
    """Whether a name is of products, and not of a module."""
    return isinstance(name, Station)


def holder(model: nn.Module, name: str) -> nn.Module:
    """Return the module of a name, or that which has the weight of products."""
    return model.get_submodule(name.rpartition(".")[0] if is_station(name) else name)


def watched_products(
    model: nn.Module,
    stations: Collection[str],
    before: Callable[[str, Any], Any],
    after: Callable[[str, Any, Any], Any],
) -> AbstractContextManager[None]:
    """Show the products of some stations, as `osscar.consumers.layers.reads` does modules."""
    if not stations:
        return nullcontext()

    def take(tensor: str, taken: Taken, _: str | None) -> Any:
        name = Station(tensor)
        before(name, taken)
        output = taken.output()
        other = after(name, taken, output)
        return output if other is None else other

    return _watching(model, stations, take, lambda _: None)
