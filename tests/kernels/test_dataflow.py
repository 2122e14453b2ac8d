"""What Triton lost between the source and the chip is seen: tests/kernels/dataflow.py."""

from __future__ import annotations

import pytest

from .dataflow import Dataflow, lost_dependences

TTIR = """
#loc1 = loc("k.py":1:1)
#loc2 = loc("x"(#loc1))
module {
  tt.func public @kernel(%x_ptr: !tt.ptr<f32> loc("x_ptr"(#loc1)), %n: i32 loc("n"(#loc1))) attributes {noinline = false} {
    %c0 = arith.constant 0 : i32 loc(#loc1)
    %first = tt.load %x_ptr : !tt.ptr<f32> loc("k.py":2:3)
    %r:2 = scf.for %k = %c0 to %n step %c0 iter_args(%a = %first, %b = %first) -> (f32, f32)  : i32 {
      %c = arith.addf %a, %b : f32 loc(#loc9)
      %d = arith.addf %c, %c : f32 loc("k.py":5:5)
      scf.yield %d, %b : f32, f32 loc(#loc1)
    } loc("k.py":3:3)
    tt.store %x_ptr, %r#0 : !tt.ptr<f32> loc("k.py":6:6)
    tt.return loc(#loc1)
  } loc(#loc1)
} loc(#loc1)
#loc9 = loc(callsite("k.py":4:4 at #loc2))
"""


def test_dependences() -> None:
    found = Dataflow(TTIR).dependences()
    loop = {"argument %x_ptr", "argument %n", "loop at 3:3"}
    assert found["2:3"] == {"argument %x_ptr"}
    assert found["4:4 1:1"] == found["5:5"] == found["6:6"] == loop


@pytest.mark.parametrize(
    ("change", "gone"),
    [
        (("addf %a, %b", "addf %first, %first"), {"4:4 1:1", "5:5"}),
        (("store %x_ptr, %r#0", "store %x_ptr, %first"), {"6:6"}),
        (("tt.load %x_ptr", "tt.load %n"), {"2:3"}),
    ],
    ids=["what a loop carries", "what it gives", "an argument"],
)
def test_what_is_lost(change: tuple[str, str], gone: set[str]) -> None:
    """The sum in the loop still reaches the store by what is yielded, but for the change itself."""
    assert lost_dependences(TTIR, TTIR) == {}
    assert TTIR.count(change[0]) == 1
    assert set(lost_dependences(TTIR, TTIR.replace(*change))) >= gone
