"""Several networks trained in lockstep: the same weights to begin with, the same batches."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from permattn.cli.errors import UserError
from permattn.cli.train_biformer.network import build, nudge
from permattn.cli.train_biformer.photographs import PhotoCrops
from permattn.cli.train_biformer.settings import Settings
from permattn.models.vision import BiFormer

_EVALUATION_BATCH = 96


@dataclass(frozen=True)
class Evaluation:
    """On the validation crops, after `step` steps."""

    step: int
    loss: float
    accuracy: float


@dataclass(eq=False)
class Run:
    """One network and what became of it.

    Args:
        kind: of `KINDS`.
        losses, seconds: of every step; seconds without the making of the batch.
    """

    kind: str
    model: BiFormer
    optimiser: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)


class Trainer:
    """Steps all runs in turns, so that none has a quieter machine than another.

    Args:
        settings: what to do.
        crops: the data.

    Invariants: the random numbers of a step follow from seed and step, so a state holds no
    generator; `load_state` goes on to the bit as if there had been no end.
    """

    def __init__(self, settings: Settings, crops: PhotoCrops) -> None:
        self.settings = settings
        self.crops = crops
        self.step = 0
        self._validation = crops.validation(settings.per_photo)
        self.runs = []
        for kind in settings.kinds:
            model = build(kind, settings, crops.num_classes)
            self.runs.append(Run(kind, model, _optimiser(model, settings)))

    def advance(self) -> None:
        """One step of every run, and a validation where one is due."""
        s = self.settings
        images, labels = self.crops.batch(s.seed, self.step, s.batch)
        images, labels = images.to(s.device), labels.to(s.device)
        rate = learning_rate(self.step, s)
        for run in self.runs:
            for group in run.optimiser.param_groups:
                group["lr"] = rate
            _wait(s.device)
            start = time.perf_counter()
            with torch.random.fork_rng(devices=_cuda(s.device)):
                # Drop path: the same paths for all runs.
                torch.manual_seed(1_000_003 * s.seed + self.step)
                loss = self._update(run, images, labels)
                _wait(s.device)
                run.seconds.append(time.perf_counter() - start)
                if run.kind == "nudged":
                    nudge(run.model)
            run.losses.append(loss)
        self.step += 1
        if self.step % s.evaluate_every == 0 or self.step == s.steps:
            self._evaluate()

    def state(self) -> dict[str, Any]:
        """Tensors, numbers, lists and dicts: all that `load_state` needs."""
        return {
            "step": self.step,
            "runs": {
                run.kind: {
                    "model": run.model.state_dict(),
                    "optimiser": run.optimiser.state_dict(),
                    "losses": run.losses,
                    "seconds": run.seconds,
                    "evaluations": [(e.step, e.loss, e.accuracy) for e in run.evaluations],
                }
                for run in self.runs
            },
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from a state of the same settings."""
        self.step = state["step"]
        for run in self.runs:
            kept = state["runs"][run.kind]
            run.model.load_state_dict(kept["model"])
            run.optimiser.load_state_dict(kept["optimiser"])
            run.losses, run.seconds = list(kept["losses"]), list(kept["seconds"])
            run.evaluations = [Evaluation(*e) for e in kept["evaluations"]]

    def _update(self, run: Run, images: Tensor, labels: Tensor) -> float:
        run.model.train()
        scores = run.model(images)
        loss = F.cross_entropy(scores, labels, label_smoothing=self.settings.label_smoothing)
        run.optimiser.zero_grad(set_to_none=True)
        value = loss.item()
        if not math.isfinite(value):
            raise UserError(f"the loss of {run.kind} is {value} at step {self.step + 1}")
        loss.backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), self.settings.clip_norm)
        run.optimiser.step()
        return value

    @torch.no_grad()
    def _evaluate(self) -> None:
        images, labels = self._validation
        for run in self.runs:
            run.model.eval()
            scores = torch.cat(
                [
                    run.model(part.to(self.settings.device)).float().cpu()
                    for part in images.split(_EVALUATION_BATCH)
                ]
            )
            accuracy = (scores.argmax(-1) == labels).double().mean().item()
            loss = F.cross_entropy(scores, labels).item()
            run.evaluations.append(Evaluation(self.step, loss, accuracy))


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a half cosine down to the final rate."""
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm:
        return settings.peak_rate * (step + 1) / warm
    done = (step - warm) / max(1, settings.steps - 1 - warm)
    fall = settings.peak_rate - settings.final_rate
    return settings.final_rate + fall * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _optimiser(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW; norms and biases do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.peak_rate)


def _cuda(device: str) -> list[int]:
    return [torch.device(device).index or 0] if torch.device(device).type == "cuda" else []


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
