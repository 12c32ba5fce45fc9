"""Token <-> slot: the order in which a part of a plan reads its queries or keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Permutation:
    """A map from slots (permuted, padded order) to tokens (the caller's order) and back.

    A slot whose token is -1 is a hole: nobody sees it. A token whose slot is -1 is not in this
    part.

    Args:
        token_of_slot: int32 [Bx, Hx, num_slots]; -1 = hole. Bx and Hx are 1 (broadcast) or B, H.
        slot_of_token: int32 [Bx, Hx, S]; derived, never written by hand; -1 = not in this part.
        is_identity: a hint that `token_of_slot[..., i] == i` for all S slots, so that a backend may
            skip the look-up. It never changes a result.

    Invariants: a token has at most one slot; both maps agree.
    """

    token_of_slot: Tensor
    slot_of_token: Tensor
    is_identity: bool = False

    def __post_init__(self) -> None:
        for name in ("token_of_slot", "slot_of_token"):
            x = getattr(self, name)
            if x.dtype != torch.int32 or x.dim() != 3:
                raise ValueError(
                    f"Permutation.{name}: wants int32 [Bx, Hx, n], got {x.dtype} {list(x.shape)}"
                )
        if self.token_of_slot.shape[:2] != self.slot_of_token.shape[:2]:
            raise ValueError(
                "Permutation: token_of_slot and slot_of_token must share batch and head axes, got "
                f"{list(self.token_of_slot.shape[:2])} and {list(self.slot_of_token.shape[:2])}"
            )

    @property
    def num_slots(self) -> int:
        return self.token_of_slot.shape[-1]

    @property
    def num_tokens(self) -> int:
        return self.slot_of_token.shape[-1]

    @classmethod
    def identity(cls, num_tokens: int, device: torch.device | str | None = None) -> Permutation:
        """Slots in token order, shared by every batch row and head."""
        token = torch.arange(num_tokens, dtype=torch.int32, device=device)[None, None]
        return cls(token, token, is_identity=True)

    @classmethod
    def from_token_of_slot(
        cls, token_of_slot: Tensor, num_tokens: int, *, validate: bool = True
    ) -> Permutation:
        """Derives the inverse map.

        Args:
            token_of_slot: integer [Bx, Hx, num_slots], or fewer leading axes; -1 = hole.
            num_tokens: S, the length of the caller's sequence.
            validate: check values (one device sync). Switch off in code that made them itself.

        Raises:
            ValueError: a token out of [-1, S), or in two slots of one row.
        """
        token = token_of_slot.to(torch.int32)
        while token.dim() < 3:
            token = token[None]
        if validate:
            check_tokens(token, num_tokens)
        slots = torch.arange(token.shape[-1], dtype=torch.int32, device=token.device)
        # Holes are written to a column of their own, which the slice drops again.
        slot = token.new_full((*token.shape[:2], num_tokens + 1), -1)
        target = torch.where(token < 0, num_tokens, token).long()
        slot.scatter_(-1, target, slots.expand_as(token))
        return cls(token.contiguous(), slot[..., :num_tokens].contiguous())

    def without_tokens(self, dropped: Tensor) -> Permutation:
        """The same slots, with holes where `dropped` (bool [Bx, Hx, S]) names the token."""
        token = self.token_of_slot
        bx = max(token.shape[0], dropped.shape[0])
        hx = max(token.shape[1], dropped.shape[1])
        token = token.expand(bx, hx, -1)
        slot = self.slot_of_token.expand(bx, hx, -1)
        dropped = dropped.expand(bx, hx, -1)
        if self.is_identity:
            token = token.masked_fill(dropped, -1).contiguous()
            return Permutation(token, token)
        hole = (token < 0) | dropped.gather(-1, token.clamp_min(0).long())
        return Permutation(
            token.masked_fill(hole, -1).contiguous(), slot.masked_fill(dropped, -1).contiguous()
        )

    def validate(self) -> None:
        """Checks every value (one device sync). Raises ValueError naming what is wrong."""
        check_tokens(self.token_of_slot, self.num_tokens)
        derived = Permutation.from_token_of_slot(
            self.token_of_slot, self.num_tokens, validate=False
        )
        if not torch.equal(derived.slot_of_token, self.slot_of_token):
            raise ValueError("Permutation.slot_of_token is not the inverse of token_of_slot")
        if self.is_identity:
            want = torch.arange(
                self.num_tokens, dtype=torch.int32, device=self.token_of_slot.device
            )
            if self.num_slots != self.num_tokens or not (self.token_of_slot == want).all():
                raise ValueError(
                    "Permutation.is_identity is set, but token_of_slot is not 0, 1, 2, ..."
                )


def check_tokens(token_of_slot: Tensor, num_tokens: int) -> None:
    """Raises ValueError unless every token lies in [-1, num_tokens) and none has two slots."""
    if token_of_slot.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(token_of_slot))
    if low < -1 or high >= num_tokens:
        raise ValueError(
            f"token_of_slot: values must lie in [-1, {num_tokens}), got a range of [{low}, {high}]"
        )
    ordered = token_of_slot.sort(dim=-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if bool(twice.any()):
        token = int(ordered[..., 1:][twice][0])
        raise ValueError(f"token_of_slot: token {token} has more than one slot in a row")
