"""The Space: the demo page of the model that the variable MODEL_ID names."""

import os

from demo_app import DemoArguments, serve


model = os.environ.get("MODEL_ID")
if not model:
    raise SystemExit(
        "error: the variable MODEL_ID is not set; put a model's id there (Settings, Variables and secrets)."
    )
serve(DemoArguments(model, host="0.0.0.0", port=int(os.environ.get("GRADIO_SERVER_PORT", "7860"))))
