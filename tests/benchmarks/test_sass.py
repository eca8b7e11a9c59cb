"""Loops of machine code: which instructions belong to them, and the clocks that follow, by hand for a short listing."""

from __future__ import annotations

import pytest
from lib.sass import L2_BYTES, Code, Demand, programs_per_sm

LISTING = """
	code for sm_90a
        /*0000*/                   S2R R0, SR_TID.X ;                                     /* 0x0000 */
        /*0010*/              @!P1 BRA 0x50 ;                                             /* 0x0001 */
        /*0020*/                   FADD R1, R1, 1 ;                                       /* 0x0002 */
        /*0030*/               @P2 BRA 0x20 ;                                             /* 0x0003 */
        /*0040*/                   NOP ;                                                  /* 0x0004 */
        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R18 ;        /* 0x0005 */
        /*0060*/              @!P0 BRA 0x110 ;                                            /* 0x0006 */
        /*0070*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR36], RZ, !UPT ;   /* 0x0007 */
        /*0080*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;   /* 0x0008 */
        /*0090*/                   MUFU.EX2 R2, R3 ;                                      /* 0x0009 */
        /*00a0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;                        /* 0x000a */
        /*00b0*/                   MUFU.EX2 R2, R24 ;                                     /* 0x000b */
        /*00c0*/                   STL.64 [R1], R24 ;                                     /* 0x000c */
        /*00d0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;                          /* 0x000d */
        /*00e0*/                   HGMMA.64x128x16.F32.BF16 R88, R24, gdesc[UR4].tnspB, R88, gsb0 ; /* 0x000e */
        /*00f0*/                   BRA.U UP0, 0x50 ;                                      /* 0x000f */
        /*0100*/                   EXIT ;                                                 /* 0x0010 */
        /*0110*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R18 ;        /* 0x0011 */
        /*0120*/              @!P0 BRA 0x110 ;                                            /* 0x0012 */
        /*0130*/                   BRA 0x70 ;                                             /* 0x0013 */
"""


def test_the_loop_with_products_is_found_and_counted():
    [loop] = Code.read(LISTING).loops()
    assert [one.address for one in loop.body] == [*range(0x50, 0x100, 16), 0x110, 0x120, 0x130]
    assert loop.products == {"64x64x16": 2, "64x128x16": 1}
    assert (loop.barriers, loop.spill_bytes) == (1, 8)


def test_a_loop_behind_a_jump_table_is_found():
    listing = """
        /*0000*/                   BRX R2 -0x10 ;                                         /* 0x0000 */
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R18 ;        /* 0x0001 */
        /*0020*/              @!P0 BRA 0x10 ;                                             /* 0x0002 */
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;   /* 0x0003 */
        /*0040*/               @P2 BRA 0x30 ;                                             /* 0x0004 */
        /*0050*/                   NOP ;                                                  /* 0x0005 */
        /*0060*/                   BRA 0x0 ;                                              /* 0x0006 */
"""
    [loop] = Code.read(listing).loops()
    assert [one.address for one in loop.body] == [0x30, 0x40]


def test_clocks_of_a_loop():
    [loop] = Code.read(LISTING).loops()
    demand = loop.demand(num_warps=8, l2_bytes=100 * L2_BYTES)
    # Two groups of four warps. 64 x 64 x 16 takes 32 clocks, 64 x 128 x 16 takes 64.
    assert demand.products == 2 * (2 * 32 + 64)
    # Both operands of the first two, 4 KiB, the right one of the third; 8 bytes spilled by each of 256 threads.
    assert demand.shared == (2 * (2 * 4096 + 4096) + 8 * 256) / 128
    assert demand.exponentials == 2 * 256 / 16
    assert demand.issue == 14 * 8 / 4
    # The last product runs into the next iteration: no product runs from the wait at 0xa0 to the product at 0xe0.
    assert demand.exposed == 256 / 16
    assert demand.l2 == 100


def test_bounds():
    demand = Demand(products=100, l2=125, shared=50, exponentials=60, issue=40, exposed=60)
    assert demand.bound == 100 / 125
    assert demand.share(1) == pytest.approx(100 / 160)
    assert demand.share(2) == demand.bound


@pytest.mark.parametrize(("registers", "shared", "warps", "programs"), [(255, 98_848, 4, 2), (252, 164_864, 8, 1),
                         (129, 0, 4, 3), (32, 0, 4, 16), (255, 115_712, 4, 2), (255, 115_713, 4, 1)])  # fmt: skip
def test_programs_of_a_multiprocessor(registers, shared, warps, programs):
    assert programs_per_sm(registers, shared, warps) == programs
