"""The time that a run may take, over all its starts."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from med3dvlm.train.ranks import as_on_main


class TimeLimit(TrainerCallback, ExportableState):
    """Stops after a number of minutes, and lowers the rate so that it ends low by then.

    Warm-up and decay count steps, those of `epochs` or `max_steps`; a run cut short by the clock
    would end at a high rate. So the last fifth of the time scales the rate down to zero in a
    straight line. All ranks go by the main process's clock, or their weights would part.

    The seconds used are kept with each checkpoint, and a run that is started again has the rest.
    """

    def __init__(self, minutes: float | None):
        self.seconds = None if minutes is None else 60 * minutes
        self.used_before = 0.0  # seconds, up to the checkpoint that the run goes on from
        self.start: float | None = None
        self.passed = 0.0  # share of the time

    @property
    def used(self) -> float:
        """Seconds in all."""
        return self.used_before + (0.0 if self.start is None else time.monotonic() - self.start)

    @property
    def was_up(self) -> bool:
        """Whether none was left when the run was started again."""
        return self.seconds is not None and self.used_before >= self.seconds

    def state(self) -> dict[str, dict[str, float]]:
        """For trainer_state.json; the limit itself is the recipe's, which may raise it."""
        return {"args": {}, "attributes": {"used": self.used}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # checkpoints from before this was kept have no such entry, and the Trainer needs one
        kept = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.used_before = kept["attributes"]["used"]
        self.start = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.seconds is None:
            return
        self.passed = as_on_main(self.used / self.seconds)
        scheduler, optimizer = kwargs["lr_scheduler"], kwargs["optimizer"]
        factor = min(1.0, max(0.0, 5 * (1 - self.passed)))
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate * factor

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends as the last step does: measured, where the run is watched, and saved."""
        if self.seconds is not None and self.passed > 1:
            control.should_training_stop = control.should_save = True
            control.should_evaluate |= bool(args.eval_steps)
