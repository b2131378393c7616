"""What transformers' Trainer needs to train the models of this package as scripts/train.py does."""

from transformers import TrainerCallback


class TrainingProgressCallback(TrainerCallback):
    """Tells the model how far training is, so that STTS's noise fades to zero.

    Trainer(model, args, ..., callbacks=[TrainingProgressCallback()])
    """

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.set_training_progress(state.global_step / state.max_steps)
