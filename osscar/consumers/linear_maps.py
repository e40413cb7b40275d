"""The consumers of a model: layers, groups of convolutions, and experts; which can be refitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from operator import attrgetter

from torch import Tensor, nn

from graph.groups import CouplingGroup, Freeze, Slot
from osscar.consumers.consumer import ExpertMap, LinearMap
from osscar.consumers.layers import RECURRENT, ROWS, layer_of
from osscar.consumers.mixtures import ListedMixture, Mixture, sound_mixtures
from osscar.consumers.products import Contraction, Product, Station, holder, products_of
from osscar.offload.on_disk import OnDisk
from osscar.proof.lineage import stored_dtype
from osscar.routing.find import ExpertMixture, WholeMixture, whole_mixture

_KERNEL_BYTES = 16

_NO_REFIT = "the output matrices of its experts are not found, so that they cannot be refitted"
_NO_LINEAR = (
    f"{_NO_REFIT}: an expert must end in a torch.nn.Linear with a plain weight; remove weight norm "
    "(remove_parametrizations or remove_weight_norm of torch) from it"
)


def _mixture_of(model: nn.Module, slots: Sequence[Slot]) -> Mixture | None:
    """Return the module with the matrices of several experts that reads a group, if one does."""
    name, _, parameter = slots[0].tensor.rpartition(".")
    weight = attrgetter(slots[0].tensor)(model)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 3 or slots[0].dim == 0:
        return None
    module = model.get_submodule(slots[0].module)
    plain = name != slots[0].module or isinstance(module, nn.modules.conv._ConvNd)
    return None if plain else Mixture(name, module, parameter, slots[0].dim)


def linear_maps(
    model: nn.Module, group: CouplingGroup, products: Mapping[str, Product] | None = None
) -> tuple[LinearMap, ...]:
    """Return the consumers of a group, which can be refitted (`refittable`), in execution order."""
    found: list[LinearMap] = []
    for slots in _by_tensor(group):
        product, mixture = (products or {}).get(slots[0].tensor), _mixture_of(model, slots)
        if product is not None:
            found += _of_product(model, slots, product)
        elif mixture is not None:
            dim, module = mixture.dim - 1, mixture.module
            form = Contraction((dim,), (1 - dim,), (-1,))
            read = mixture.name, module, mixture.parameter, None, dim, form, _owned(slots)
            experts = range(mixture.count)
            found += [ExpertMap(*read, mixture=mixture, expert=expert) for expert in experts]
        else:
            found += _of_layer(model, slots)
    return tuple(found)


def _of_product(model: nn.Module, slots: Sequence[Slot], product: Product) -> Iterator[LinearMap]:
    name, bias = Station(product.tensor), product.bias
    for part in range(product.form.groups):
        yield LinearMap(
            name,
            holder(model, name),
            product.tensor.rpartition(".")[2],
            None if bias is None else bias.rpartition(".")[2],
            slots[0].dim,
            product.form,
            _owned(slots),
            part,
        )


def _of_layer(model: nn.Module, slots: Sequence[Slot]) -> Iterator[LinearMap]:
    name, dim, owned = slots[0].module, slots[0].dim, _owned(slots)
    module = model.get_submodule(name)
    layer = layer_of(module)
    assert layer is not None
    form, names = layer.form(module), layer.weights(module)
    own = slots[0].tensor.rpartition(".")[2]
    (number, bias), *_ = [(i, b) for i, (w, b) in enumerate(names) if w == own]
    read = name, module, own, bias if _has_bias(model, module, bias) else None, dim, form
    for part in range(form.groups) if len(names) == 1 else [number]:
        # The first dimension of a weight counts all channels of a convolution in groups, and the
        # others those inside of a group.
        here = owned
        if dim == 0 and form.groups > 1:
            count = module.get_parameter(own).shape[0] // form.groups
            here = [[i - part * count for i in unit if i // count == part] for unit in owned]
        if any(here):
            yield LinearMap(*read, here, part)


def _owned(slots: Sequence[Slot]) -> list[list[int]]:
    """Return what each unit owns of the dimension of some slots."""
    units = range(slots[0].units)
    return [[i for slot in slots for i in slot.indices([unit])] for unit in units]


def _has_bias(model: nn.Module, module: nn.Module, name: str) -> bool:
    """Whether a bias can be written to: nothing computes it, and no other module has it."""
    bias = getattr(module, name, None)
    owners = (p for other in model.modules() for p in other.parameters(recurse=False))
    return isinstance(bias, nn.Parameter) and sum(p is bias for p in owners) == 1


def _by_tensor(group: CouplingGroup) -> tuple[tuple[Slot, ...], ...]:
    by_tensor: dict[str, list[Slot]] = {}
    for slot in group.consumers:
        by_tensor.setdefault(slot.tensor, []).append(slot)
    return tuple(tuple(slots) for slots in by_tensor.values())


def last_matrices(
    model: nn.Module,
    mixture: ExpertMixture,
    groups: Sequence[CouplingGroup],
    products: Mapping[str, Product] | None = None,
) -> tuple[LinearMap, ...]:
    """Return what reads the neurons of a mixture, one matrix an expert; none if not known."""
    name, experts = mixture.experts, model.get_submodule(mixture.experts)
    if not isinstance(experts, nn.ModuleList):
        reading = (
            group
            for group in groups
            if not group.frozen and any(slot.module == name for slot in group.consumers)
        )
        found = (linear_maps(model, group, products) for group in reading)
        return next((maps for maps in found if len(maps) == mixture.group.units), ())
    if mixture.last_layer is None:
        return ()
    listed = ListedMixture(name, experts, mixture.last_layer, 1)
    layers = [listed.last(expert) for expert in range(listed.count)]
    owned = [[i] for i in range(layers[0].in_features)]
    return tuple(
        ExpertMap(name, layer, "weight", None, 1, ROWS, owned, mixture=listed, expert=expert)
        for expert, layer in enumerate(layers)
    )


# ---- what cannot be refitted -------------------------------------------------------------


def refittable(
    model: nn.Module,
    example: Mapping[str, Tensor],
    groups: Sequence[CouplingGroup],
    elsewhere: Collection[str] = (),
) -> tuple[tuple[CouplingGroup, ...], dict[str, Product]]:
    """Freeze the groups whose consumers cannot be refitted, and say why.

    `elsewhere` are modules whose weights other code than their own reads, too.  Returned are also
    the weights, by name, that are observed where code multiplies by them.
    """
    consumers = {group.name: _by_tensor(group) for group in groups if not group.frozen}
    read = [slots for some in consumers.values() for slots in some]
    possible = {slots[0].tensor: _mixture_of(model, slots) for slots in read}
    mixtures = sound_mixtures(
        model, example, {name: one for name, one in possible.items() if one is not None}
    )
    reasons = {slots: _reason(model, slots, elsewhere, mixtures) for slots in read}
    wanted = {
        slots[0].tensor
        for slots, reason in reasons.items()
        if reason is not None and _may_be_product(model, slots[0], mixtures)
    }
    products = {
        name: product
        for name, product in products_of(model, example, wanted).items()
        if all(
            _is_matrix(model.get_parameter(name), product, slots[0].dim)
            for slots in read
            if slots[0].tensor == name
        )
    }
    found = []
    for group in groups:
        if not group.frozen:
            alone = [slots for slots in consumers[group.name] if slots[0].tensor not in products]
            freezes = tuple(
                Freeze(reason, "refit", slots[0].module)
                for slots in alone
                if (reason := reasons[slots]) is not None
            )
            group = dataclasses.replace(group, frozen=freezes)
            group = group if freezes else _with_steps(model, group, alone)
        found.append(group)
    return tuple(found), products


def _may_be_product(model: nn.Module, slot: Slot, mixtures: Collection[str]) -> bool:
    """Whether a weight that no layer reads may be observed where code multiplies by it."""
    weight = attrgetter(slot.tensor)(model)
    owner = model.get_submodule(slot.tensor.rpartition(".")[0])
    return (
        isinstance(weight, nn.Parameter)
        and weight.is_floating_point()
        and not isinstance(weight, OnDisk)
        and not isinstance(owner, RECURRENT)
        and _mixture_around(slot.module, mixtures) is None
    )


def _is_matrix(weight: Tensor, product: Product, dim: int) -> bool:
    """Whether products that sum over a dimension of a weight are linear maps with a view of it."""
    form = product.form
    if dim not in form.summed or (form.groups > 1 and (form.made != (0,) or dim != 1)):
        return False
    columns = weight.permute(*form.made, *form.summed).flatten(0, len(form.made) - 1)
    return columns.data_ptr() == weight.data_ptr()


def _mixture_around(module: str, mixtures: Collection[str]) -> str | None:
    """Return the mixture that a module is inside of, if it is; given are its last matrices."""
    outer = {name.rpartition(".")[0] for name in mixtures}
    return next((name for name in outer if module.startswith(f"{name}.")), None)


def _reason(
    model: nn.Module, slots: tuple[Slot, ...], elsewhere: Collection[str], mixtures: Collection[str]
) -> str | None:
    """Return why a consumer cannot be refitted where its module is called, or None."""
    tensor, name = slots[0].tensor, slots[0].module
    module, weight = model.get_submodule(name), attrgetter(tensor)(model)
    mixture, around = _mixture_of(model, slots), _mixture_around(name, mixtures)
    kind = type(module).__name__
    if name in elsewhere:
        return (
            f"is read by {tensor!r}, whose weight or bias is also used outside of {name!r}, in a "
            "way that cannot be observed"
        )
    if mixture is not None and tensor not in mixtures:
        return (
            f"is read by {tensor!r} in {name!r}, a {kind}, which is an unsupported mixture: it is "
            "not called with tokens, experts and weights, or its output is not the weighted sum of "
            "its experts"
        )
    if around is not None:
        return (
            f"is read by {tensor!r} inside of {around!r}, a mixture whose experts are refitted: it "
            "is run with other inputs for that, and what lies inside of it cannot be measured on "
            "the calibration data"
        )
    if not isinstance(weight, nn.Parameter):
        return f"is read by a buffer, which is not refitted: {tensor!r}"
    if not weight.is_floating_point():
        return (
            f"is read by {tensor!r} of {weight.dtype}, and only real weights are refitted: a least-"
            "squares problem over complex numbers is another one"
        )
    layer = layer_of(module)
    weights = [] if layer is None else layer.weights(module)
    known = any(getattr(module, own) is weight for own, _ in weights)
    if not known and "forward" in vars(module):
        return (
            f"is read by {tensor!r} in {name!r}, whose forward was replaced on this very module, "
            "as hooks of accelerate do: remove them"
        )
    if not known and mixture is None:
        return (
            f"is read by {tensor!r} in {name!r}, a {kind}, whose forward pass needs a row in "
            "osscar.consumers.layers.LAYERS: only Linear, Conv1D, convolution and recurrent "
            "layers, mixtures of experts, and weights that code only multiplies by, in one way "
            "(linear, matmul, einsum, conv), can be refitted without one"
        )
    if layer is not None and known and slots[0].dim not in layer.form(module).summed:
        return (
            f"is read by dimension {slots[0].dim} of {tensor!r}, and the row of {kind} in "
            f"osscar.consumers.layers.LAYERS sums over {layer.form(module).summed}: correct its "
            "form"
        )
    users = [
        user
        for user, other in model.named_modules()
        for parameter in other.parameters(recurse=False)
        if parameter is weight
    ]
    if len(users) > 1:
        return f"is read by {tensor!r}, which {' and '.join(users)} share; a refit changes them all"
    return None


def _with_steps(
    model: nn.Module, group: CouplingGroup, consumers: Sequence[tuple[Slot, ...]]
) -> CouplingGroup:
    """Note which widths kernels take that multiply all experts at once: rows of 16 bytes.

    The model may run another kernel now, or in another number format than that of its files; what
    is saved of it is run by any, in that format.
    """
    mixtures = [one for slots in consumers if (one := _mixture_of(model, slots)) is not None]
    if not mixtures:
        return group
    saved = stored_dtype(model).itemsize
    step = max(_KERNEL_BYTES // min(one.weight.element_size(), saved) for one in mixtures)
    if step < group.units:
        return dataclasses.replace(group, step=step)
    reason = (
        "is read by kernels for all experts at once, which take widths that are multiples of "
        f"{step}, and has no more units than that"
    )
    return dataclasses.replace(group, frozen=(Freeze(reason, "refit", mixtures[0].name),))


def refittable_mixtures(
    model: nn.Module,
    mixtures: Sequence[ExpertMixture | WholeMixture],
    groups: Sequence[CouplingGroup],
    products: Mapping[str, Product],
) -> tuple[ExpertMixture | WholeMixture, ...]:
    """Freeze the mixtures whose `last_matrices` are not found, and say why."""
    return tuple(
        whole_mixture(model, one.experts, _NO_REFIT if one.listed is None else _NO_LINEAR)
        if isinstance(one, ExpertMixture) and not last_matrices(model, one, groups, products)
        else one
        for one in mixtures
    )
