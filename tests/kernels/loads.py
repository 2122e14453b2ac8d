"""How many bytes a thread of a compiled kernel loads at once, tensor by tensor: read from its PTX."""

from __future__ import annotations

import re
from collections import defaultdict

import torch

from .aot import Launch, compile_for, specialise

LOAD = re.compile(r"ld\.global[\w.:]*?(?:\.v(?P<count>[248]))?\.[bsuf](?P<bits>\d+)\s.*\[\s*(?P<address>%\w+)")
COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global\s*\[.*?\],\s*\[\s*(?P<address>%\w+).*?\],\s*(?P<bytes>\w+)")
PARAM = re.compile(r"ld\.param[\w.]*\s+(?P<to>%\w+),\s*\[\w+_param_(?P<index>\d+)")
BRANCH = re.compile(r"\bbra[\w.]*\s+(\$\w+)")
REGISTER = re.compile(r"%\w+")


def load_widths(ptx: str, *, loops_only: bool) -> dict[int, set[int]]:
    """Parameter: the widths, in bytes, of the loads from it, or of those that stand in a loop.

    An address is followed back through whatever computed it, not through what was itself loaded: that is an offset.
    """
    lines = [line.partition("//")[0].strip() for line in ptx.splitlines()]
    label = {line.rstrip(":"): i for i, line in enumerate(lines) if line.endswith(":")}
    loops = [
        (label[m[1]], i) for i, line in enumerate(lines) if (m := re.search(r"\bbra[\w.]*\s+(\$\w+)", line)) and m[1] in label
    ]
    loops = [(first, last) for first, last in loops if first < last]
    parameter: dict[str, int] = {}
    sources: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        line = re.sub(r"^@!?%\w+\s+", "", line)
        if match := PARAM.match(line):
            parameter[match["to"]] = int(match["index"])
        elif (registers := REGISTER.findall(line)) and not line.startswith(("ld.", "st.", "cp.", "bra")):
            sources[registers[0]].update(registers[1:])
    found: dict[int, set[int]] = defaultdict(set)
    for i, line in enumerate(lines):
        if loops_only and not any(first <= i <= last for first, last in loops):
            continue
        if match := LOAD.search(line):
            width = int(match["count"] or 1) * int(match["bits"]) // 8
        elif match := COPY.search(line):
            width = int(match["bytes"], 0)
        else:
            continue
        pending, seen = [match["address"]], set()
        while pending:
            register = pending.pop()
            if register in parameter:
                found[parameter[register]].add(width)
            elif register not in seen:
                seen.add(register)
                pending.extend(sources[register])
    return found


def feature_loads(launch: Launch, arch: int, *, loops_only: bool = True) -> dict[str, set[int]]:
    """Argument: widths in bytes, of the tensors of 16-bit numbers, which are features."""
    names = [name for name, kind in specialise(launch).signature.items() if kind != "constexpr"]
    features = {name for name in names if getattr(launch.args[name], "dtype", None) in (torch.float16, torch.bfloat16)}
    widths = load_widths(compile_for(launch, arch).asm["ptx"], loops_only=loops_only)
    return {names[i]: found for i, found in widths.items() if i < len(names) and names[i] in features}
