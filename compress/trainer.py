"""The loop itself: `transformers.Trainer`, made quiet and repeatable. Passes call `compress.training.train`."""

from __future__ import annotations

import hashlib
import logging
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from compress import processes
from compress.devices import device_of, on_device
from compress.errors import Unproved
from compress.model import Inputs
from compress.passes.base import Context
from compress.progress import Task, task
from compress.training import Loss, Trained, Training

WEIGHTS = "model.safetensors"
"""The file of a checkpoint that holds the trained parameters."""

log = logging.getLogger(__name__)


def fit(
    module: nn.Module,
    batches: Sequence[Inputs],
    loss: Loss,
    settings: Training,
    context: Context,
    what: str,
    rates: Mapping[str, float],
    before_step: Callable[[int], None] | None,
) -> Trained:
    """What `compress.training.train` says, for arguments that it has checked."""
    begun = time.perf_counter()
    with (
        _folder(module, batches, settings, context, what) as folder,
        _own_randomness(),
        task(context.observer, what, settings.steps) as running,
        on_device(module, context.device),
        torch.enable_grad(),
    ):
        arguments = _arguments(settings, context, folder, device_of(module))
        trainer = _Trainer(_Objective(module, loss), batches, settings, arguments, rates, running, what)
        if before_step is not None:
            trainer.add_callback(_BeforeStep(before_step))
        trainer.train(resume_from_checkpoint=trainer.resumed)
        module.zero_grad()
    module.eval()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tenth = max(1, settings.steps // 10)
    means = fmean(losses[:tenth]), fmean(losses[-tenth:])
    return Trained(settings.steps, *means, seconds=time.perf_counter() - begun)


def order(count: int, length: int, seed: int) -> list[int]:
    """`length` numbers below `count`: one shuffled round of all of them after the other."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-length // count))]
    return torch.cat(rounds)[:length].tolist()


class _Objective(nn.Module):
    """The loss as a module, which is what is trained: `module` stays in evaluation mode within it."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module = module
        self.loss = loss

    def forward(self, inputs: Inputs) -> Tensor:
        return self.loss(self.module, inputs)

    def train(self, mode: bool = True) -> _Objective:
        super().train(mode)
        self.module.eval()
        return self


class _Trainer(transformers.Trainer):
    """Trainer with our loss, order of batches, optimizer, and checkpoints that hold what trains and nothing else."""

    # Each batch's loss is a mean, and is divided by the number of batches a step.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        objective: _Objective,
        batches: Sequence[Inputs],
        settings: Training,
        arguments: TrainingArguments,
        rates: Mapping[str, float],
        running: Task,
        what: str,
    ) -> None:
        self.batches, self.settings, self.rates, self.what = batches, settings, rates, what
        # Trainer has several devices of one process share a batch; here devices are shared by processes.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        super().__init__(objective, arguments, callbacks=[_Progress(running)])
        self.remove_callback(PrinterCallback)
        self.resumed = processes.shared(_last_checkpoint(Path(arguments.output_dir)))

    def get_train_dataloader(self) -> DataLoader:
        """This process's share of all the batches of all the steps, in order."""
        settings = self.settings
        planned = order(len(self.batches), settings.steps * settings.accumulate, self.args.seed)
        own = planned[processes.rank() :: processes.count()]
        return DataLoader(self.batches, batch_size=1, sampler=own, collate_fn=lambda rows: dict(rows[0]))  # type: ignore[arg-type]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW, one group of parameters for each learning rate and weight decay."""
        del model
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.model.module.named_parameters():  # type: ignore[union-attr]
            if parameter.requires_grad:
                rate = self.rates.get(name, self.settings.learning_rate)
                decay = self.settings.weight_decay if parameter.dim() > 1 else 0.0
                groups.setdefault((rate, decay), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": own, "lr": rate, "weight_decay": decay} for (rate, decay), own in groups.items()],
            betas=self.settings.betas,
        )
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: Inputs, *_: Any, **__: Any) -> Tensor:
        """The loss of a batch. Raises `Unproved` if it is not finite."""
        loss = model(inputs)
        if not torch.isfinite(loss):
            raise Unproved(
                f"{self.what}: the loss is {loss.item()} at step {self.state.global_step + 1} "
                f"of {self.settings.steps}.",
                "Lower the learning rate, and check the training data; a model in float16 may overflow, load it in "
                "float32.",
            )
        return loss

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        del state_dict
        if self.args.should_save:
            folder = Path(str(output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file(_trained(self.model), folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        del model
        kept = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        with torch.no_grad():
            for name, parameter in _trained(self.model).items():
                parameter.copy_(kept[name])


class _Progress(TrainerCallback):
    """Tells the observer of each step, and the log of each loss."""

    def __init__(self, running: Task) -> None:
        self.running = running

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, control
        self.running.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, state, control
        self.running.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        del args, control
        if "loss" in (logs or {}):
            log.debug("step %d of %d: loss %.6g", state.global_step, state.max_steps, logs["loss"])


class _BeforeStep(TrainerCallback):
    """Tells the number of each step before it."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self.tell = tell

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, control
        self.tell(state.global_step)


def _arguments(
    settings: Training, context: Context, folder: Path, device: torch.device | None
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.accumulate // processes.count(),
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup * settings.steps),
        max_grad_norm=settings.clip,
        seed=context.seed,
        bf16=settings.in_bfloat16(context.device),
        use_cpu=torch.device(context.device).type == "cpu",
        save_strategy="no" if context.scratch is None else "steps",
        save_steps=max(1, settings.steps // 10),
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=True,
        ddp_broadcast_buffers=False,
    )
    if processes.count() == 1:
        # Trainer takes the first accelerator that there is, and here it is told which.
        arguments._setup_devices = arguments.distributed_state.device = device  # type: ignore[union-attr]
    return arguments


@contextmanager
def _folder(
    module: nn.Module, batches: Sequence[Inputs], settings: Training, context: Context, what: str
) -> Iterator[Path]:
    """The folder of this run's checkpoints, the same in all processes; one that is removed without a scratch folder."""
    if context.scratch is None:
        with tempfile.TemporaryDirectory() as unused:
            yield Path(unused)
        return
    key = _digest(module, len(batches), settings, context.seed, what)
    yield processes.shared(context.scratch / key)


def _digest(module: nn.Module, batches: int, settings: Training, seed: int, what: str) -> str:
    """What a run depends on, its first weights included."""
    digest = hashlib.sha256(f"{what} {batches} {seed} {settings.model_dump_json()}".encode())
    for name, tensor in module.named_parameters():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint in `folder`: Trainer writes its state last."""
    whole = [file.parent for file in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    return str(max(whole, key=lambda found: int(found.name.rpartition("-")[2]))) if whole else None


def _trained(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that train, by name, each once."""
    return {name: value.data for name, value in module.named_parameters() if value.requires_grad}


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Trainer seeds all generators there are; after the block they go on as if it had not."""
    states: list[tuple[Callable[[Any], object], Any]] = [
        (random.setstate, random.getstate()),
        (np.random.set_state, np.random.get_state()),
    ]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            for restore, state in states:
                restore(state)
