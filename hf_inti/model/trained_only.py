"""Checkpoints of the weights that train alone, a small part of all where CLIP is frozen."""

import os

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file


TRAINED_WEIGHTS = "trained.safetensors"


class TrainedOnly:
    """For models with a `config`: saves what trains without the rest, and loads it again."""

    def save_trained_only(self, save_directory: str | os.PathLike) -> None:
        """Write the configuration and the weights that train, a small part of all where CLIP is frozen.

        `load_trained_only` puts them on a model of CLIP's weights again. Raises ValueError where everything trains.
        """
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        if not frozen:
            raise ValueError(f"all of this model trains (adaptation {self.config.adaptation!r}); use save_pretrained.")
        if self.config.adaptation_options.get("merged"):
            raise ValueError("the adapters are merged into CLIP's weights, which differ now; use save_pretrained.")
        state = {name: t.contiguous() for name, t in self.state_dict().items() if name not in frozen}
        os.makedirs(save_directory, exist_ok=True)
        self.config.save_pretrained(save_directory)
        save_file(state, os.path.join(save_directory, TRAINED_WEIGHTS), metadata={"format": "pt"})

    def load_trained_only(self, pretrained_model_name_or_path: str | os.PathLike) -> None:
        """Load what `save_trained_only` wrote, a folder or a name on the Hub, over the weights of this model.

            config = InTIClipVisionConfig.from_pretrained(folder)
            model = InTIClipForVideoClassification.from_pretrained("openai/clip-vit-base-patch16", config=config)
            model.load_trained_only(folder)

        Raises ValueError for weights of another method, class or size.
        """
        place = pretrained_model_name_or_path
        if os.path.isdir(place) and not os.path.isfile(os.path.join(place, TRAINED_WEIGHTS)):
            raise ValueError(f"{place} holds no {TRAINED_WEIGHTS}; give a folder that save_trained_only wrote.")
        theirs = type(self.config).from_pretrained(place)
        for word in ("compression", "compression_layers", "compression_options", "adaptation", "adaptation_options"):
            if getattr(theirs, word) != getattr(self.config, word):
                raise ValueError(
                    f"the weights in {place} were trained with {word} {getattr(theirs, word)!r}, this model has "
                    f"{getattr(self.config, word)!r}; make it with the configuration saved with them."
                )
        try:
            state = load_file(cached_file(place, TRAINED_WEIGHTS))
        except SafetensorError as error:
            raise ValueError(f"{TRAINED_WEIGHTS} in {place} is damaged ({error}); write or fetch it again.") from error
        own = self.state_dict()
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        wrong = [name for name in state if name not in own or own[name].shape != state[name].shape]
        wrong += sorted(trained - state.keys())
        if wrong:
            raise ValueError(
                f"the trained weights in {place} do not fit this model, as at {wrong[0]}; make the model with the "
                "configuration that lies beside them."
            )
        self.load_state_dict(state, strict=False)
