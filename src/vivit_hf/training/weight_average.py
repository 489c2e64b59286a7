"""An exponential moving average of the weights, which is evaluated and saved in place of the trained ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerState


AVERAGE_FILE = "weight_average.pt"


class WeightAverage(TrainerCallback):
    """The moving average of the trained parameters of a model, updated after each optimiser step.

    The decay grows as min(decay, (1 + step) / (10 + step)), as in TensorFlow's `ExponentialMovingAverage`, so that the
    first steps, with a new classifier, do not last. The average is in float32 whatever the dtype of the model. At the
    end of training, the model gets the average, unless `forget` has been called.

    Args:
        model: the model that is trained, not wrapped.
        decay: the largest decay, at least 0 and below 1.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.average: dict[str, torch.Tensor] = {}  # empty before and after training

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """Return the parameters that are trained, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **settings: Any) -> None:
        if not self.average:  # else `load` has filled it
            self.average = {name: one.detach().float().clone() for name, one in self.trained().items()}

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **settings: Any) -> None:
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        current = [one.detach().float() for one in self.trained().values()]
        get_ema_multi_avg_fn(decay)(list(self.average.values()), current, None)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **settings: Any) -> None:
        with torch.no_grad():
            for name, average in self.average.items():
                self.model.get_parameter(name).copy_(average)
        self.forget()

    def forget(self) -> None:
        """Drop the average, after which `applied` has no effect."""
        self.average = {}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model have the averaged weights within the block."""
        trained = self.trained() if self.average else {}
        kept = {name: one.data for name, one in trained.items()}
        try:
            for name, one in trained.items():
                one.data = self.average[name].to(one.dtype)
            yield
        finally:
            for name, one in trained.items():
                one.data = kept[name]

    def save(self, folder: str | Path) -> None:
        """Write the average and the trained weights, from which training resumes, into a checkpoint."""
        trained = {name: one.detach() for name, one in self.trained().items()}
        torch.save({"average": self.average, "trained": trained}, Path(folder, AVERAGE_FILE))

    def load(self, folder: str | Path) -> None:
        """Restore what `save` wrote."""
        parameters = self.trained()
        stored = torch.load(Path(folder, AVERAGE_FILE), map_location="cpu", weights_only=True)
        self.average = {name: stored["average"][name].to(one.device) for name, one in parameters.items()}
        with torch.no_grad():
            for name, one in parameters.items():
                one.copy_(stored["trained"][name])
