"""Complex numbers, two real numbers in one position, and the Fourier transforms that make them."""

from __future__ import annotations

from graph.call import Call, Value
from graph.groups import Role
from graph.rules.table import aten, rule

_PARTS = "its two positions are the parts of one complex number"


@rule("aten.view_as_complex")
def joined(call: Call) -> Value:
    """Drop the last dimension, which holds the real and the imaginary part."""
    value = call.value("self")
    call.freeze(value.dims[-1:], _PARTS)
    # A position where both parts are zero is zero.
    return Value(value.dims[:-1], value.origins[:-1])


@rule("aten.view_as_real")
def parted(call: Call) -> Value:
    """Add a last dimension for the real and the imaginary part."""
    value = call.value("self")
    call.record(value, Role.PASS_THROUGH)
    return Value((*value.dims, call.unknown(2, _PARTS)))


_MIXED = "a Fourier transform is taken along it"

_ONE = "fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft"
_TWO = "fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_hfft2 fft_ihfft2"
_MORE = "fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_hfftn fft_ihfftn fft_fftshift fft_ifftshift"


@rule(*aten(f"{_ONE} {_TWO} {_MORE}"))
def transformed(call: Call) -> Value:
    """Freeze the dimensions along which positions are mixed, whose number may change."""
    value = call.value("self")
    rank = len(value.dims)
    sizes = call.integers("s")
    named = call.integers("dim") or (range(rank - len(sizes), rank) if sizes else range(rank))
    along = {dim % rank for dim in named}
    call.freeze((value.dims[dim] for dim in along), _MIXED)
    call.record(value, Role.PASS_THROUGH)
    pairs = enumerate(zip(value.dims, call.shapes[0], strict=True))
    return Value(
        tuple(
            call.unknown(size, _MIXED) if dim in along else layout for dim, (layout, size) in pairs
        )
    )
