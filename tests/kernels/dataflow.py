"""Whether what a kernel computes still depends on all that it depended on, once Triton has laid it out for a chip.

Triton's passes about layouts duplicate what a loop carries. Those of 3.6 and 3.7 then may take the value from before the loop
in place of the carried one: so in the bound of an inner loop that was reduced from a carried tensor, in some tiles and not in
others, legal code that leaves out part of a sum. TTIR, what the source says, is held against TTGIR, what is left after those
passes: place by place in the source, the arguments, and the loops by what they carry, on which the values made there depend.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field

ALIAS = re.compile(r"^(#loc\w*) = loc\((.*)\)$")
LOCATION = re.compile(r" loc\(((?:[^()]|\([^()]*\))*)\)")
RESULTS = re.compile(r"^(%[\w$.-]+)(?::\d+)?(?:, %[\w$.-]+)* = ")
NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")
OPERATION = re.compile(r'"?([a-z_]+\.[\w.]+)')
CARRIED = re.compile(r"(%[\w$.-]+) = (%[\w$.-]+(?:#\d+)?)")
WRITES = {"ttg.async_copy_global_to_local": 1, "ttg.local_store": 1}  # which operand is the buffer


@dataclass
class Region:
    """What stands in braces, of the operation that they belong to."""

    results: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    loop: str = ""  # the node that all values carried by this loop depend on
    operands: list[str] = field(default_factory=list)


def _place(location: str, alias: dict[str, str]) -> str:
    """Lines and columns, from the innermost call outwards, without names of variables."""
    while match := re.search(r"#loc\w*", location):
        location = location.replace(match[0], alias.get(match[0], "unknown"), 1)
    return " ".join(re.findall(r":(\d+:\d+)", location))


class Dataflow:
    """Of one kernel's IR: nodes are values, arguments and loops."""

    def __init__(self, text: str) -> None:
        self.sources: dict[str, set[str]] = defaultdict(set)
        self.at: dict[str, set[str]] = defaultdict(set)  # place: values computed there
        self.conditions: dict[str, set[str]] = defaultdict(set)  # place: of the branches around it
        self._alias = {m[1]: m[2] for line in text.splitlines() if (m := ALIAS.match(line))}
        self._scopes: list[dict[str, str]] = [{}]
        self._regions: list[Region] = []
        self._buffers: dict[str, str] = {}  # a view of a buffer: the buffer
        self._count = 0
        for line in text.splitlines():
            if (line := line.strip()) and not line.startswith(("#", "//")):
                self._read(line)

    def _define(self, name: str) -> str:
        self._count += 1
        self._scopes[-1][name] = f"{name}/{self._count}"
        return self._scopes[-1][name]

    def _find(self, name: str) -> str:
        """%x#2, the third result of an operation, is a value of its own."""
        base, _, number = name.partition("#")
        found = next((scope[base] for scope in reversed(self._scopes) if base in scope), base)
        return f"{found}#{number}" if number else found

    def _enter(self, region: Region) -> None:
        self._regions.append(region)
        self._scopes.append({})

    def _read(self, line: str) -> None:
        locations = LOCATION.findall(line)
        place = _place(locations[-1], self._alias) if locations else ""
        line = LOCATION.sub("", line)
        if line.startswith("}"):
            region = self._regions.pop()
            self._scopes.pop()
            if line.startswith("} else"):
                self._enter(region)
                return
            self.at[place].update(region.results)
            for value in region.arguments if region.loop else ():
                self.sources[value].add(region.loop)
            if region.loop:
                self.sources[region.loop].add(f"loop at {place}")
            return
        if line.startswith("^"):  # of a reduction; other blocks have no arguments
            for name in re.findall(r"(%[\w$.-]+):", line):
                self.sources[self._define(name)].update(self._regions[-1].operands)
            return
        if line.startswith(("module", "tt.func")):
            for name in re.findall(r"(%[\w$.-]+):", line):
                self.sources[self._define(name)].add(f"argument {name}")
            self._enter(Region())
            return
        self._operation(line, place)

    def _operation(self, line: str, place: str) -> None:
        match = RESULTS.match(line)
        rest = line[match.end() :] if match else line
        if not (named := OPERATION.match(rest)):
            raise ValueError(f"not understood: {line}")
        operation = named[1]
        of_types = re.search(r" : | -> ", rest)
        head = rest if operation == "scf.for" else rest[: of_types.start()] if of_types else rest
        operands = [self._find(name) for name in NAME.findall(head)]
        results = []
        if match:
            count = re.match(r"%[\w$.-]+:(\d+)", line)
            base = match[1]
            node = self._define(base)
            results = [f"{node}#{i}" for i in range(int(count[1]))] if count else [node]
        if operation == "scf.for":
            self._loop(rest, results)
        elif rest.rstrip().endswith("{"):  # scf.if, tt.reduce
            for result in results:
                self.sources[result].update(operands)
            self._enter(Region(results, operands=operands))
        elif operation in ("scf.yield", "tt.reduce.return"):
            self._yield(operands)
        else:
            for result in results:
                self.sources[result].update(operands)
                if operation.startswith("ttg.memdesc"):
                    self._buffers[result] = self._buffers.get(operands[0], operands[0])
            if operation in WRITES:
                buffer = operands[WRITES[operation]]
                self.sources[self._buffers.get(buffer, buffer)].update(operands)
            self.at[place].update(results or operands)
            for region in self._regions:
                self.conditions[place].update(region.operands)

    def _loop(self, rest: str, results: list[str]) -> None:
        header, _, carried = rest.partition(" iter_args(")
        variable, *bounds = NAME.findall(header)
        bounds = [self._find(name) for name in bounds]
        initial = [(name, self._find(value)) for name, value in CARRIED.findall(carried)]
        self._count += 1
        region = Region(results, loop=f"loop/{self._count}")
        self._enter(region)
        self.sources[region.loop].update(bounds)
        index = self._define(variable)
        for i, (name, value) in enumerate(initial):
            argument = self._define(name)
            self.sources[argument].add(value)
            self.sources[results[i]].update((value, region.loop))
            region.arguments.append(argument)
        self.sources[index].add(region.loop)
        # what is computed in a loop is computed as often as its bounds say
        if not initial:
            region.arguments.append(index)

    def _yield(self, operands: list[str]) -> None:
        region = self._regions[-1]
        for i, operand in enumerate(operands):
            if region.results:
                self.sources[region.results[i]].add(operand)
            if region.loop:
                self.sources[region.arguments[i]].add(operand)

    def dependences(self, *, control: bool = False) -> dict[str, frozenset[str]]:
        """Place: arguments, and loops by their places, on which what is computed there depends.

        With `control` by the branches around it, too.
        """
        found = {}
        for place, values in self.at.items():
            seen = values | (self.conditions[place] if control else set())
            pending = list(seen)
            while pending:
                new = self.sources[pending.pop()] - seen
                seen |= new
                pending += new
            found[place] = frozenset(x for x in seen if x.startswith(("argument ", "loop at ")))
        return found


def lost_dependences(ttir: str, ttgir: str) -> dict[str, list[str]]:
    """Place in the source, line:column from the innermost call outwards: on what it depends in TTIR and no more in TTGIR.

    A place that is gone, as of what was folded, says nothing. Within a branch its condition may have been put to use.
    """
    before, after = Dataflow(ttir).dependences(), Dataflow(ttgir).dependences(control=True)
    return {place: sorted(gone) for place in before.keys() & after.keys() if (gone := before[place] - after[place])}
