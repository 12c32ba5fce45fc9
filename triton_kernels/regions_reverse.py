"""Who looks at a region: the reverse of a graph, compressed rows of static size, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Places of a graph that a program looks at in one step.
PLACES_PER_STEP = 512


@triton.jit(do_not_specialize=["num_places", "num_regions"])
def reverse_graph_kernel(
    p_graph, p_offsets, p_entries, num_places, num_regions, STEP: tl.constexpr
):
    """One row of one list: where it begins, and its entries in ascending order.

    Every program counts the places of the rows before its own: no atomics, one order.

    Args:
        p_graph: int32 [lists, places]; a place out of range belongs to row `num_regions`.
        p_offsets: int32 [lists, num_regions + 1]; p_entries: int32 [lists, places].
    """
    i_program = tl.program_id(0)
    i_list = (i_program // (num_regions + 1)).to(tl.int64)
    i_region = i_program % (num_regions + 1)
    p_graph += i_list * num_places
    p_entries += i_list * num_places
    b_before = tl.zeros([STEP], tl.int32)
    for i_place in tl.range(0, num_places, STEP):
        b_region = _regions_of_places(p_graph, i_place, num_places, num_regions, STEP)
        b_before += (b_region < i_region).to(tl.int32)
    i_entry = tl.sum(b_before, 0)
    tl.store(p_offsets + i_list * (num_regions + 1) + i_region, i_entry)
    for i_place in tl.range(0, num_places, STEP):
        b_region = _regions_of_places(p_graph, i_place, num_places, num_regions, STEP)
        b_mine = (b_region == i_region).to(tl.int32)
        b_rank = tl.cumsum(b_mine, 0)
        o_place = i_place + tl.arange(0, STEP)
        tl.store(p_entries + i_entry + b_rank - 1, o_place, mask=b_mine > 0)
        i_entry += tl.sum(b_mine, 0)


@triton.jit
def _regions_of_places(p_graph, i_place, num_places, num_regions, STEP: tl.constexpr):
    """Rows of STEP places; past the last place, one that is nobody's."""
    o_place = i_place + tl.arange(0, STEP)
    m_place = o_place < num_places
    b_region = tl.load(p_graph + o_place, mask=m_place, other=-1)
    m_named = (b_region >= 0) & (b_region < num_regions)
    b_region = tl.where(m_named, b_region, num_regions)
    return tl.where(m_place, b_region, num_regions + 1)


def launch_reverse_graph(graph: Tensor, num_kv_regions: int) -> tuple[Tensor, Tensor]:
    """`core.regions.reverse_graph`, to the last number, of a contiguous graph."""
    batch, heads, num_q_regions, topk = graph.shape
    num_places = num_q_regions * topk
    offsets = graph.new_empty(batch, heads, num_kv_regions + 1)
    entries = torch.empty_like(graph).view(batch, heads, num_places)
    if graph.numel():
        reverse_graph_kernel[(batch * heads * (num_kv_regions + 1),)](
            *(graph, offsets, entries, num_places, num_kv_regions),
            STEP=PLACES_PER_STEP,
            num_warps=2,
        )
    return offsets, entries
