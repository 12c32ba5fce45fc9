"""Vision models with bi-level routing attention; torch only."""

from __future__ import annotations

from permattn.models.vision.attention import (
    BiLevelRoutingAttention,
    VideoBiLevelRoutingAttention,
)
from permattn.models.vision.biformer import (
    BiFormer,
    biformer_base,
    biformer_small,
    biformer_tiny,
)
from permattn.models.vision.checkpoint import (
    legacy_from_nchw,
    load_biformer,
    nchw_from_legacy,
)
from permattn.models.vision.dense import Attention, AttentionLePE, NchwAttentionLePE
from permattn.models.vision.nchw import NchwBiLevelRoutingAttention
from permattn.models.vision.register import register_timm, register_transformers
from permattn.models.vision.stl import BiFormerSTL, biformer_stl, biformer_stl_nchw
from permattn.models.vision.switch import set_backend

__all__ = [
    "Attention",
    "AttentionLePE",
    "BiFormer",
    "BiFormerSTL",
    "BiLevelRoutingAttention",
    "NchwAttentionLePE",
    "NchwBiLevelRoutingAttention",
    "VideoBiLevelRoutingAttention",
    "biformer_base",
    "biformer_small",
    "biformer_stl",
    "biformer_stl_nchw",
    "biformer_tiny",
    "legacy_from_nchw",
    "load_biformer",
    "nchw_from_legacy",
    "register_timm",
    "register_transformers",
    "set_backend",
]
