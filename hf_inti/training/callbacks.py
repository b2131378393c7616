"""Callbacks for training this package's models with transformers' Trainer."""

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class TrainingProgressCallback(TrainerCallback):
    """Tells the model how far training has come, as STTS needs to anneal its noise.

    Trainer(model, args, ..., callbacks=[TrainingProgressCallback()])
    """

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs,
    ) -> None:
        model.set_training_progress(state.global_step / state.max_steps)
