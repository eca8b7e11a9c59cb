"""The loops of a compiled kernel of Hopper: what its machine code asks of each unit of a multiprocessor (SM).

Rates are NVIDIA's for sm_90 (CUDA C++ programming guide, table of arithmetic throughput; H100 data sheet, dense bf16):
an SM takes 4,096 FLOP of 16-bit products a clock, 16 exponentials, 128 bytes of shared memory, and 4 instructions of a
warp each. Of L2 no rate is published: 25 bytes a clock are those that FlashAttention 3 reads at its published 740
TFLOP/s (arXiv 2407.08608), with 128 queries a program.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from triton import knobs

PRODUCT_FLOPS, EXPONENTIALS, WARP_INSTRUCTIONS = 4096, 16, 4
SHARED_BYTES, L2_BYTES = 128, 25
"""What an SM does a clock."""
SM_REGISTERS, SM_SHARED_BYTES, SM_WARPS = 65_536, 233_472, 64
"""What the programs of an SM share."""

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([\w.]+)\s*(.*?)\s*;", re.M)
_PRODUCT = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)\.")
_WIDTH = re.compile(r"\.(64|128)\b")


class Instruction(NamedTuple):
    """One instruction of a warp."""

    address: int
    conditional: bool
    name: str
    operands: str

    @property
    def product(self) -> tuple[int, int, int] | None:
        """The rows, columns and depth of a product of four warps, or None."""
        found = _PRODUCT.match(self.name)
        return (int(found[1]), int(found[2]), int(found[3])) if found else None

    @property
    def target(self) -> int | None:
        """The address to which a branch goes, or None."""
        return int(self.operands.split()[-1], 16) if self.name.startswith("BRA") and "0x" in self.operands else None

    @property
    def ends_block(self) -> bool:
        """Whether other code than the next instruction may follow."""
        return self.name.split(".")[0] in ("BRA", "BRX", "EXIT", "RET")


class Demand(NamedTuple):
    """What a program asks of its SM in one iteration of a loop, in clocks of each unit."""

    products: float
    """Tensor cores, with operands at hand. Warps that hold the same rows repeat each other's products."""
    l2: float
    """Rows that come from L2."""
    shared: float
    """Shared memory and L1: operands of products, loads, stores and spills of warps."""
    exponentials: float
    issue: float
    """Instructions of warps, for four schedulers."""
    exposed: float
    """Exponentials or instructions, the larger, that start while no product of the same warps runs."""

    @property
    def bound(self) -> float:
        """The largest share of the tensor cores' time that the loop can take: all units work at once."""
        return self.products / max(self)

    def share(self, programs: int) -> float:
        """Return that share if an SM holds `programs` of them, each of which waits for its own products.

        Within a program only those instructions overlap with products that are issued while one runs.
        """
        alone = max(self.products, self.shared) + self.exposed
        return programs * self.products / max(alone, programs * max(self))


class Loop(NamedTuple):
    """The instructions of an innermost loop with products, by address."""

    body: tuple[Instruction, ...]

    @property
    def products(self) -> Counter[str]:
        """The number of products of four warps by shape, "rows x columns x depth"."""
        return Counter("x".join(map(str, one.product)) for one in self.body if one.product)

    @property
    def barriers(self) -> int:
        """The number of barriers of all warps of a program, or of a group of them."""
        return self._count("BAR.SYNC")

    @property
    def spill_bytes(self) -> int:
        """The bytes that a thread writes to and reads from local memory, since no register is left."""
        return sum(_bytes(one) for one in self.body if one.name.startswith(("LDL", "STL")))

    def demand(self, num_warps: int, l2_bytes: int) -> Demand:
        """Return what `num_warps` warps ask of an SM in one iteration, in which `l2_bytes` come from L2."""
        groups, shared, flops = num_warps / 4, 0.0, 0.0
        for one in self.body:
            if one.product:
                m, n, k = one.product
                flops += 2.0 * m * n * k * groups
                # The left operand lies in shared memory or in registers; the right one always in shared memory.
                left = one.operands.split(",")[1].strip().startswith("gdesc")
                shared += 2 * k * (n + m * left) * groups
            elif one.name.startswith(("LDS", "STS", "LDL", "STL")):
                shared += 32 * _bytes(one) * num_warps
        exponentials = 32 * num_warps / EXPONENTIALS
        issue = num_warps / WARP_INSTRUCTIONS
        exposed = self._exposed()
        return Demand(
            products=flops / PRODUCT_FLOPS,
            l2=l2_bytes / L2_BYTES,
            shared=shared / SHARED_BYTES,
            exponentials=self._count("MUFU") * exponentials,
            issue=len(self.body) * issue,
            exposed=max(_count(exposed, "MUFU") * exponentials, len(exposed) * issue),
        )

    def _count(self, prefix: str) -> int:
        return _count(self.body, prefix)

    def _exposed(self) -> list[Instruction]:
        """Return the instructions that are issued while no product runs.

        A product that no instruction of the body awaits runs into the next iteration.
        """
        running, found = 0, []
        for number, one in enumerate((*self.body, *self.body)):
            if one.product:
                running += "gsb0" in one.operands  # the last of a group that is awaited together
            elif one.name.startswith("WARPGROUP.DEPBAR"):
                running = min(running, int(one.operands.split(",")[-1], 16))
            elif number >= len(self.body) and not running:
                found.append(one)
        return found


class Code(NamedTuple):
    """The machine code of a kernel."""

    instructions: tuple[Instruction, ...]

    @classmethod
    def of(cls, cubin: bytes) -> Code:
        """Return the code of a compiled kernel, as cuobjdump, which comes with Triton, prints it."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
            return cls.read(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    @classmethod
    def read(cls, text: str) -> Code:
        """Return the code that cuobjdump printed."""
        found = (
            # A branch has its condition before its name or, if it is uniform, before its target.
            Instruction(
                int(address, 16), bool(predicate) or (name.startswith("BRA") and "," in operands), name, operands
            )
            for address, predicate, name, operands in _LINE.findall(text)
        )
        return cls(tuple(found))

    def loops(self) -> list[Loop]:
        """Return the innermost loops with products, in the order of their addresses."""
        found = {header: body for header, body in self._natural_loops() if any(x.product for x in body)}
        inner = [
            body
            for header, body in found.items()
            if not any(other != header and any(x.address == other for x in body) for other in found)
        ]
        return [Loop(body) for body in inner]

    def _natural_loops(self) -> Iterator[tuple[int, tuple[Instruction, ...]]]:
        """Yield the address of the first instruction of each loop, and its body.

        A branch back to a block through which every way to the branch leads closes a loop. Waits that spin stand
        behind the code and branch back too, but to blocks that are reached without them. What no branch reaches begins
        at a target of a jump table.
        """
        blocks, following = self._blocks()
        entries: set[int] = set()
        reached: set[int] = set()
        for first in sorted(blocks):
            todo = [] if first in reached else [first]
            entries.update(todo)
            while todo:
                if (at := todo.pop()) not in reached:
                    reached.add(at)
                    todo += following[at]
        preceding: dict[int, list[int]] = {start: [] for start in blocks}
        for start, stops in following.items():
            for stop in stops:
                preceding[stop].append(start)
        dominators = {start: {start} if start in entries else set(blocks) for start in blocks}
        changed = True
        while changed:
            changed = False
            for start in blocks:
                before = [dominators[x] for x in preceding[start]]
                new = {start} | (set() if start in entries else set.intersection(*before))
                changed |= new != dominators[start]
                dominators[start] = new
        bodies: dict[int, set[int]] = {}
        for start, stops in following.items():
            for header in stops & dominators[start]:
                body, todo = {header}, [start]
                while todo:
                    if (at := todo.pop()) not in body:
                        body.add(at)
                        todo += preceding[at]
                bodies[header] = bodies.get(header, set()) | body
        for header, body in bodies.items():
            yield header, tuple(one for start in sorted(body) for one in blocks[start])

    def _blocks(self) -> tuple[dict[int, list[Instruction]], dict[int, set[int]]]:
        """Return the straight pieces of code by their first address, and those that may follow each."""
        targets = {one.target for one in self.instructions}
        blocks: dict[int, list[Instruction]] = {}
        following: dict[int, set[int]] = {}
        start = 0
        for before, one in zip((None, *self.instructions), self.instructions, strict=False):
            ended = before is not None and before.ends_block
            if before is None or ended or one.address in targets:
                if before is not None and (not ended or before.conditional):
                    following[start].add(one.address)
                start = one.address
                blocks[start], following[start] = [], set()
            blocks[start].append(one)
            if one.target is not None:
                following[start].add(one.target)
        return blocks, following


def programs_per_sm(registers: int, shared_bytes: int, num_warps: int) -> int:
    """Return the number of programs that an SM holds at once; registers are those of a thread."""
    rounded = -(-registers // 8) * 8  # a warp's registers are given in units of 256
    return min(
        SM_REGISTERS // (rounded * 32 * num_warps), SM_SHARED_BYTES // (shared_bytes + 1024), SM_WARPS // num_warps
    )


def _count(instructions: Iterable[Instruction], prefix: str) -> int:
    return sum(one.name.startswith(prefix) for one in instructions)


def _bytes(one: Instruction) -> int:
    """Return the bytes that a thread reads or writes."""
    width = _WIDTH.search(one.name)
    return int(width[1]) // 8 if width else 4
