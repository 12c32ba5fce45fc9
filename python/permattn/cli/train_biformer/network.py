"""The network that is trained, with one attention or another in its routed stages."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from permattn.cli.train_biformer.attention import DenseAttention, GatherRoutingAttention
from permattn.cli.train_biformer.settings import Settings
from permattn.models.vision import BiFormer, BiLevelRoutingAttention

_NUDGE = 1e-7


def build(kind: str, settings: Settings, num_classes: int) -> BiFormer:
    """A small BiFormer on the device; all kinds of one seed begin with the same weights.

    Args:
        kind: of `KINDS`.
        settings: sizes and seed.
        num_classes: outputs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = BiFormer(
            settings.depths,
            settings.dims,
            num_classes=num_classes,
            head_dim=settings.head_dim,
            mlp_ratios=(settings.mlp_ratio,) * 4,
            topks=(*settings.topks, -2),
            n_win=settings.regions,
            drop_path_rate=settings.drop_path,
            backend=settings.backend,
        )
        if kind == "nudged":
            nudge(model)
    if kind in ("dense", "gather"):
        for stage in model.stages:
            for block in stage.children():
                if isinstance(block.attn, BiLevelRoutingAttention):
                    block.attn = _replaced(block.attn, kind)
    return model.to(settings.device)


@torch.no_grad()
def nudge(model: nn.Module) -> None:
    """Multiplies every weight by 1 + 1e-7 or 1 - 1e-7 at random: the last bit of a float32."""
    for parameter in model.parameters():
        signs: Tensor = torch.randint(0, 2, parameter.shape).to(parameter) * 2 - 1
        parameter.mul_(1 + _NUDGE * signs)


def describe(settings: Settings, model: nn.Module) -> str:
    """The network in words."""
    count = sum(p.numel() for p in model.parameters()) / 1e6
    side = settings.size // 4
    regions = settings.regions**2
    return (
        f"BiFormer of {count:.1f} M parameters, depths {_dashed(settings.depths)}, channels "
        f"{_dashed(settings.dims)}; maps of {side}, {side // 2} and {side // 4} squared in "
        f"{regions} regions, top {_dashed(settings.topks)}"
    )


def _replaced(attention: BiLevelRoutingAttention, kind: str) -> nn.Module:
    """Another attention with the weights of this one."""
    dim, heads = attention.dim, attention.num_heads
    if kind == "dense":
        made: nn.Module = DenseAttention(dim, heads)
    else:
        made = GatherRoutingAttention(dim, heads, attention.n_win[0], attention.topk)
    made.load_state_dict(attention.state_dict())
    return made


def _dashed(numbers: tuple[int, ...]) -> str:
    return "-".join(map(str, numbers))
