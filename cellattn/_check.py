"""Argument checks shared by the public functions: each names the argument, what came and what was expected."""

from __future__ import annotations

import difflib
import operator
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from decimal import Decimal
from numbers import Integral, Real
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as transforms_active
from torch._C import _functorch as functorch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from ._extension import AVAILABLE
from ._modes import is_plain

_SHOWN = 80  # characters of a word

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def require(condition: bool, message: str | Callable[[], str]) -> None:
    """Raise `ValueError(message)` unless `condition` holds.

    A function is called only when it fails: sizes may be symbolic while a model is compiled, and have no text then.
    """
    if not condition:
        raise ValueError(message if isinstance(message, str) else message())


def describe(value: Any) -> str:
    """What came, in a few words: dtype and shape of a tensor, type and value of anything else."""
    if isinstance(value, Tensor):
        if value.is_nested:  # has no shape
            return f"nested {str(value.dtype).removeprefix('torch.')} tensor"
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def shown(value: Any) -> str:
    """A word of a file, or of a list, as a message has it: quoted, and short."""
    if isinstance(value, str) and len(value) > _SHOWN:
        return f"{value[: _SHOWN - 20]!r}... ({len(value):,} characters)"
    text = repr(value)
    return text if len(text) <= 4 * _SHOWN else text[: 4 * _SHOWN - 3] + "..."


def listed(words: Sequence[Any], most: int = 40) -> str:
    """The first of some words as a message has them."""
    more = f" and {len(words) - most:,} more" if len(words) > most else ""
    return ", ".join(map(shown, words[:most])) + more


def plain(text: Any) -> Any:
    """A string of a subclass, as NumPy's are, as a `str`: others are in no file that `torch.load` reads by default."""
    return str.__str__(text) if isinstance(text, str) else text


def require_iterable(name: str, value: Any, expected: str) -> None:
    """Check that an argument can be gone through, and is not one string."""
    if isinstance(value, str):
        raise TypeError(f"{name}: expected {expected}, got the one string {value!r}")
    if not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}")


def tensor_of(value: Any) -> Any:
    """A NumPy array as a tensor, of the same memory where it may be written; all else as it came."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf" or value.dtype.itemsize > 8:  # no long doubles
        return value
    value = np.ascontiguousarray(value, value.dtype.newbyteorder("="))  # files may be of the other byte order
    return torch.from_numpy(value if value.flags.writeable else value.copy())


def require_tensor(name: str, value: Any, *, ndim: int | None = None, dtypes: Collection[torch.dtype] = ()) -> None:
    """Check that an argument is a dense tensor of `ndim` dimensions and one of `dtypes`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {describe(value)}")
    if value.is_nested:
        raise ValueError(f"{name}: expected a dense tensor, got a {describe(value)}")
    if value.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {value.layout}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimension(s), got a {describe(value)}")
    if dtypes and value.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: expected dtype {wanted}, got a {describe(value)}")


def require_mapping(name: str, value: Any) -> None:
    """Check that an argument is a dict by relation."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected a dict by relation, got {describe(value)}")


def require_several(name: str, value: Any, expected: str = "a sequence of names") -> None:
    """Check that an argument is a sequence, and not a string, which is one of characters."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}")


def require_same(kind: str, **values: Any) -> None:
    """Check that all values (dtypes, devices, sizes, by argument name) are equal."""
    names = iter(values.items())
    first_name, first = next(names)
    for name, value in names:
        if value != first:
            raise ValueError(f"{name}: expected the {kind} of {first_name}, {first}, got {value}")


def values_visible(x: Tensor) -> bool:
    """Whether values may be looked at: always on the CPU, elsewhere (it forces a sync) under CELLATTN_CHECKS=1."""
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor) or x.is_meta or _is_traced():
        return False
    return x.device.type == "cpu" or os.environ.get("CELLATTN_CHECKS") == "1"


def _is_traced() -> bool:
    """Whether `make_fx` records what is done to tensors, of which it lets nobody look at a value."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def refuse_recorded(name: str, x: Tensor, hint: str) -> None:
    """Refuse to find sizes out by the values of x where `make_fx` would record those of this call for every other one."""
    if _is_traced() and not isinstance(x, FakeTensor):
        raise NotImplementedError(f"{name}: sizes are found out by value, which make_fx does not record: {hint}")


def refuse_mapped(name: str, index: Tensor) -> None:
    """Refuse an index over which `torch.func.vmap` maps, where values may be looked at: PyTorch's words would not help."""
    wrapped = index
    while functorch.is_functorch_wrapped_tensor(wrapped):
        if functorch.is_batchedtensor(wrapped):
            raise NotImplementedError(
                f"cellattn.ops: {name}: torch.func.vmap over indices is not supported: sizes depend on their values; give all "
                "sets or rows in one call (sets of any sizes are one batch by their ptr), or loop over calls"
            )
        wrapped = functorch.get_unwrapped(wrapped)


def require_indices(name: str, index: Tensor, size: int, what: str = "genes") -> None:
    """Check that all entries lie in [0, size), where values may be looked at."""
    if index.numel() == 0 or not values_visible(index):
        return
    refuse_mapped(name, index)
    low, high = torch.aminmax(index)
    if int(low) >= 0 and int(high) < size:
        return
    flat = index.reshape(-1)
    position = int(((flat < 0) | (flat >= size)).nonzero()[0])
    raise ValueError(f"{name}: position {position} holds {int(flat[position])}, expected an index in [0, {size}) ({what})")


def require_ragged(name: str, index: Tensor, ptr: Tensor, *, num_sets: int | None = None, ptr_name: str = "ptr") -> None:
    """Check a ragged batch: int64 `index` [nnz] and `ptr` [B + 1] that rises from 0 to nnz."""
    require_tensor(name, index, ndim=1, dtypes=(torch.int64,))
    require_tensor(ptr_name, ptr, ndim=1, dtypes=(torch.int64,))
    require_same("device", **{name: index.device, ptr_name: ptr.device})
    if num_sets is None:
        require(ptr.numel() >= 1, lambda: f"{ptr_name}: expected at least one entry, got none")
    else:
        require(
            ptr.numel() == num_sets + 1,
            lambda: f"{ptr_name}: expected {num_sets + 1} entries for {num_sets} sets, got {ptr.numel()}",
        )
    if not values_visible(ptr):
        return
    refuse_mapped(ptr_name, ptr)
    first, last = int(ptr[0]), int(ptr[-1])
    require(first == 0, lambda: f"{ptr_name}: expected to start with 0, got {first}")
    require(
        last == index.numel(), lambda: f"{ptr_name}: expected to end with {index.numel()}, the length of {name}, got {last}"
    )
    falls = (ptr.diff() < 0).nonzero()
    if falls.numel():
        at = int(falls[0])
        raise ValueError(f"{ptr_name}: expected to rise, got {int(ptr[at + 1])} after {int(ptr[at])} at position {at + 1}")


def require_ascending(name: str, index: Tensor, ptr: Tensor) -> None:
    """Check that each set of a ragged batch ascends, every entry once, where values may be looked at."""
    if index.numel() < 2 or not values_visible(index):
        return
    falls = (index.diff() <= 0).nonzero()[:, 0]
    if falls.numel():  # between sets they may
        falls = falls[~torch.isin(falls + 1, ptr)]
    if falls.numel():
        at = int(falls[0])
        raise ValueError(
            f"{name}: expected to ascend within a set, got {int(index[at + 1])} after {int(index[at])} at position {at + 1}"
        )


def require_sets(
    name: str,
    index: Any,
    ptr: Any,
    size: int,
    *,
    num_sets: int | None = None,
    ptr_name: str = "ptr",
    ascending: bool = False,
    distinct: bool = False,
) -> None:
    """Check a ragged batch of indices in [0, size), and that each set ascends, or holds none twice, if it has to."""
    if _are_sets(index, ptr, size, num_sets, ascending, distinct):
        return
    require_ragged(name, index, ptr, num_sets=num_sets, ptr_name=ptr_name)
    require_indices(name, index, size)
    if ascending:
        require_ascending(name, index, ptr)
    if distinct:
        require_distinct(name, index, ptr)


def _are_sets(index: Any, ptr: Any, size: int, num_sets: int | None, ascending: bool, distinct: bool) -> bool:
    """Whether there is nothing to say, by one look at the CPU's tensors, where they can be looked at like this."""
    both = index, ptr
    if not AVAILABLE or not is_plain(both) or transforms_active():
        return False
    for x in both:
        if not isinstance(x, Tensor) or x.dtype != torch.int64 or x.ndim != 1:
            return False
        if x.layout != torch.strided or not x.is_contiguous():
            return False
    if num_sets is not None and ptr.shape[0] != num_sets + 1:
        return False
    return bool(torch.ops.cellattn.are_sets.default(index, ptr, size, ascending, distinct))


def require_distinct(name: str, index: Tensor, ptr: Tensor) -> None:
    """Check that no set of a ragged batch holds a gene twice, where values may be looked at."""
    if index.numel() == 0 or not values_visible(index):
        return
    sample = torch.arange(ptr.numel() - 1, device=ptr.device).repeat_interleave(ptr.diff())
    key = (sample * (int(index.max()) + 1) + index).sort().values
    again = (key[1:] == key[:-1]).nonzero()
    if again.numel():
        sample_id, gene = divmod(int(key[again[0]]), int(index.max()) + 1)
        raise ValueError(f"{name}: set {sample_id} holds gene {gene} twice, expected distinct genes in a set")


def unboxed(value: Any) -> Any:
    """A number of another library (NumPy's and PyTorch's scalars, arrays and tensors without dimensions among them; fractions,
    decimals, what has an `__index__`) as Python's int or float; all else as it came.

    A tensor on a GPU is waited for. One that holds no values (meta, fake, traced) stays, and so does one that requires a
    gradient, which a number would not pass on.
    """
    if value is None or isinstance(value, (int, float, str)):
        return float(value) if isinstance(value, np.floating) else value  # np.float64 is a float
    if (isinstance(value, np.generic) or type(value) is np.ndarray) and value.ndim == 0:
        number = value if value.dtype.kind in "mM" else value.item()  # of times it is an int, or none
        return float(number) if isinstance(number, np.floating) else number  # of more digits than Python's
    if isinstance(value, Tensor) and type(value) in (Tensor, Parameter) and not _is_transformed(value):
        known = value.layout == torch.strided and not value.is_nested and value.ndim == 0 and not value.is_meta
        known = known and not value.requires_grad
        if known and not torch.compiler.is_compiling():
            return value.item()
        return value
    if isinstance(value, (Real, Decimal)):
        try:
            return int(value) if isinstance(value, Integral) else float(value)
        except (OverflowError, ValueError):  # too large a fraction, a signaling NaN
            return value
    if hasattr(type(value), "__index__") and not isinstance(value, (Tensor, np.ndarray, torch.SymInt)):
        return operator.index(value)
    return value


def _is_transformed(value: Tensor) -> bool:
    """Whether a transform of torch.func may have several values for it, or a tangent."""
    if not transforms_active():
        return False
    if forward_ad._current_level >= 0:
        return True
    while functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            return True
        value = functorch.get_unwrapped(value)
    return False


def number_of(name: str, value: Any) -> float:
    """An argument that is a finite number, which NumPy or PyTorch may box, as Python's; an int stays one."""
    if isinstance(value, (int, float)) and torch.compiler.is_compiling():  # symbolic there: it has a type but no value
        return value
    number = unboxed(value)
    valid = isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) <= sys.float_info.max
    require(valid, lambda: f"{name}: expected a finite number, got {describe_number(value)}")
    return cast(float, number)


def describe_number(value: Any) -> str:
    """`describe` of what is to be a number, and why there is none where it is one in a tensor."""
    if not isinstance(value, Tensor):
        return describe(value)
    if torch.compiler.is_compiling():
        return "a tensor, whose value is not known while a function is compiled: give a Python number, made outside of it"
    if value.is_nested or value.layout != torch.strided or value.ndim > 0:
        return describe(value)
    if value.requires_grad:
        return f"a {describe(value)} whose gradient it would not pass on"
    if _is_transformed(value):
        return f"a {describe(value)} of a transform of torch.func, which it would not pass on: give a Python number"
    if value.is_meta or isinstance(value, FakeTensor):
        return f"a {describe(value)} that holds no value"
    return describe(value)


def count_of(name: str, value: Any, *, minimum: int = 0) -> int:
    """An argument that is an int of at least `minimum`, which NumPy or PyTorch may box, as Python's."""
    if type(value) is int and value >= minimum:  # at once: small problems are all calls
        return value
    number = integer_of(name, value)
    require(number >= minimum, lambda: f"{name}: expected at least {minimum}, got {value}")
    return number


def integer_of(name: str, value: Any) -> int:
    """An argument that is an int, which NumPy or PyTorch may box, as Python's."""
    number = unboxed(value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name}: expected an int, got {describe_number(value)}")
    return number


def counts_of(*, minimum: int, **values: Any) -> list[int]:
    """`count_of` each, by argument name."""
    return [count_of(name, value, minimum=minimum) for name, value in values.items()]


def seed_of(name: str, value: Any) -> int:
    """An argument that is an int that a `torch.Generator` takes, as Python's."""
    seed = count_of(name, value)
    require(seed < 2**64, lambda: f"{name}: expected less than 2**64, got {value}")
    return seed


def device_of(name: str, value: Any, *, present: bool = False) -> torch.device:
    """An argument as a device that holds values, and that is there where `present`."""
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{name}: expected a device, got {describe(value)}") from error
    require(device.type != "meta", f"{name}: expected one that holds values, got 'meta'")
    if present:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: built without CUDA
            first = str(error).strip().partition("\n")[0]
            raise ValueError(f"{name}: {str(device)!r} is not there: {first}") from error
    return device


def require_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Check that a string argument is one of `choices`, and name the nearest if it is not."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        unknown(name, value, choices)


def unknown(name: str, value: Any, choices: Iterable[str]) -> NoReturn:
    """Raise the `ValueError` for a name that is not among `choices`."""
    choices = tuple(choices)
    near = difflib.get_close_matches(str(value)[:_SHOWN], choices, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    names = listed(choices) or "nothing"
    if len(choices) > 40:  # a gene list, whose names nobody reads in a message
        names = f"{len(choices)} names"
    raise ValueError(f"{name}: unknown value {shown(value)}, expected one of {names}{hint}")
