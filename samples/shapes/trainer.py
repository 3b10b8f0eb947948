"""The training loop every stage shares: schedule, EMA, resumable state, loss log.

Under `torchrun` the processes share each batch: gradients are averaged over them, the first one
writes. On a CPU, two processes of one thread are 1.4 times faster than one process of two.
"""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

WARMUP = 100  # steps
DECAY_SHARE = 0.3  # share of the steps over which the learning rate falls to zero
SAVE_SECONDS = 60
LOG_EVERY = 50  # steps


def lr_factor(step: int, steps: int) -> float:
    """Warm-up, constant, linear decay to zero."""
    return min(1.0, (step + 1) / WARMUP, max(0.0, (steps - step) / (DECAY_SHARE * steps)))


def processes() -> tuple[int, int]:
    """(number of this process, how many there are); joins the others on the first call."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


class Trainer:
    """Runs optimizers on a module until a number of steps is done, from wherever it was stopped.

    Args:
        module: what is trained and saved.
        optimizers: stepped together; their learning rates follow `lr_factor`.
        loss_fn: step -> named losses, of which `loss` is minimised and all are logged.
        work: folder of `state.pt` and `loss.csv`.
        steps: how many steps the whole training has.
        ema_decay: of the moving average of the weights, `ema`, which is what gets exported.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Iterable[torch.optim.Optimizer],
        loss_fn: Callable[[int], dict[str, torch.Tensor]],
        work: Path,
        steps: int,
        ema_decay: float = 0.999,
    ):
        self.module, self.loss_fn, self.steps = module, loss_fn, steps
        self.optimizers = list(optimizers)
        self.base_lrs = [[g["lr"] for g in opt.param_groups] for opt in self.optimizers]
        self.ema_decay = ema_decay
        self.ema = {k: v.detach().clone() for k, v in module.state_dict().items()}
        self.rank, self.world_size = processes()
        self.work, self.step, self.seconds = work, 0, 0.0
        work.mkdir(parents=True, exist_ok=True)

    def save(self) -> None:
        if self.rank > 0:
            return
        state = {
            "module": self.module.state_dict(),
            "ema": self.ema,
            "optimizers": [opt.state_dict() for opt in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, self.work / "state.tmp")
        (self.work / "state.tmp").replace(self.work / "state.pt")

    def resume(self) -> None:
        path = self.work / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.ema = state["ema"]
        for opt, saved in zip(self.optimizers, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]
        log = self.work / "loss.csv"
        if log.exists() and self.rank == 0:  # steps after the last save are made once more
            with log.open(newline="") as file:
                rows = [row for row in csv.reader(file) if int(row[0]) <= self.step]
            with log.open("w", newline="") as file:
                csv.writer(file).writerows(rows)

    def run(self) -> None:
        """Train until `steps` are done; the state is saved every minute and at the end."""
        self.resume()
        saved, sums, counted = time.monotonic(), {}, 0
        bar = tqdm(
            total=self.steps,
            initial=self.step,
            mininterval=5,
            maxinterval=30,
            disable=self.rank > 0,
        )
        log_path = Path(os.devnull) if self.rank > 0 else self.work / "loss.csv"
        with bar, log_path.open("a", newline="") as log:
            writer = csv.writer(log)
            while self.step < self.steps:
                for key, value in self._train_step().items():
                    sums[key] = sums.get(key, 0.0) + value
                counted += 1
                if self.step % LOG_EVERY == 0:
                    sums = {key: value / counted for key, value in sums.items()}
                    writer.writerow([self.step, *(f"{k}={v:.5f}" for k, v in sums.items())])
                    log.flush()
                    bar.set_postfix({k: f"{v:.4f}" for k, v in sums.items()})
                    sums, counted = {}, 0
                bar.update()
                if time.monotonic() - saved > SAVE_SECONDS or self.step == self.steps:
                    self.seconds += time.monotonic() - saved
                    saved = time.monotonic()
                    self.save()

    def _train_step(self) -> dict[str, float]:
        factor = lr_factor(self.step, self.steps)
        for opt, lrs in zip(self.optimizers, self.base_lrs, strict=True):
            for group, lr in zip(opt.param_groups, lrs, strict=True):
                group["lr"] = lr * factor
        losses = self.loss_fn(self.step)
        losses["loss"].backward()
        self._average_gradients()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        for opt in self.optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        self._update_ema()
        self.step += 1
        return {key: float(value.detach()) for key, value in losses.items()}

    def _average_gradients(self) -> None:
        if self.world_size == 1:
            return
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])  # in any memory format
        dist.all_reduce(flat)
        flat /= self.world_size
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view(gradient.shape))

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        state = self.module.state_dict()
        keys = [key for key, value in state.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.ema[k] for k in keys], [state[k] for k in keys], 1 - decay)
