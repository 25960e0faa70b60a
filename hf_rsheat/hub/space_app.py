"""A Gradio app around a model's own handler: pick or upload an image, see what the model makes of it.

Written by `hf-rsheat space`. Runs as a Hugging Face Space or with `python app.py`; the model lies in `model/`, or is
downloaded once from the repository named in `space.json`.
"""

import base64
import importlib.util
import io
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import gradio as gr
import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image, ImageDraw

HERE = Path(__file__).parent
PICTURE = 320  # side of the drawn maps in pixels
# From cold to hot, evenly spaced: dark violet, red, orange, pale yellow.
COLOURS = [(0, 0, 4), (40, 11, 84), (101, 21, 110), (159, 42, 99), (212, 72, 66), (245, 125, 21), (252, 255, 164)]


def load_handler_module(folder: Path) -> ModuleType:
    """The folder's `handler.py`, as Inference Endpoints load it."""
    spec = importlib.util.spec_from_file_location("handler", folder / "handler.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder} holds no handler.py: write the Space again with `hf-rsheat space`.")
    module = importlib.util.module_from_spec(spec)
    sys.modules["handler"] = module
    spec.loader.exec_module(module)
    return module


def picture_of(png: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(png)))


def coloured(values: np.ndarray) -> np.ndarray:
    """From `(height, width)` in 0 to 1 to colours `(height, width, 3)` in 0 to 255."""
    steps = np.linspace(0, 1, len(COLOURS))
    return np.stack([np.interp(values, steps, channel) for channel in zip(*COLOURS, strict=True)], axis=-1)


class Explorer:
    """Turns a file and the controls into what the app shows."""

    def __init__(self, folder: Path) -> None:
        self.module = load_handler_module(folder)
        self.handler = self.module.EndpointHandler(str(folder))
        self.kind = self.handler.kind
        self.reconstructs = self.kind == "ForPreTraining" and hasattr(self.handler.model.config, "mask_radius_range")
        self.stages = [s for s in getattr(self._encoder(), "stages", ()) if hasattr(s, "diffusivity")]

    def _encoder(self) -> Any:
        return getattr(self.handler.trunk, "encoder", None)

    def ask(self, path: str, **parameters: Any) -> Any:
        """The handler's answer; a refusal becomes a message in the page."""
        answer = self.handler({"inputs": Path(path).read_bytes(), "parameters": parameters})
        if isinstance(answer, dict) and "error" in answer:
            raise gr.Error(answer["error"]["message"])
        return answer

    def prediction(self, answer: Any, path: str) -> Any:
        """What the output of this kind of model shows."""
        if self.kind == "ForImageClassification":
            return {item["label"]: item["score"] for item in answer["predictions"]}
        if self.kind in ("ForSemanticSegmentation", "ForInstanceSegmentation"):
            image = self.module.read_image(Path(path).read_bytes(), self.handler.limits).convert("RGB")
            masks = [(np.array(picture_of(item["mask"])) / 255, item["label"]) for item in answer["predictions"]]
            return image, masks
        if self.reconstructs:
            titles = {
                "input": "input",
                "low_cut": "low frequencies cut",
                "high_cut": "high frequencies cut",
                "reconstruction": "restored",
            }
            return [(picture_of(answer[key]), title) for key, title in titles.items()]
        features = answer["features"]
        first = ", ".join(f"{value:.4f}" for value in features[:8])
        return f"{len(features)} features, the norm is {np.linalg.norm(features):.3f}; the first: {first}, ..."

    def conduction(self, answer: Any, path: str, modality: str | None, source: list[float]) -> list:
        """The response of every stage to the heat source, over the model's input."""
        parameters = self.module.Parameters(modality=modality)
        pixel_values = self.handler.preprocess(Path(path).read_bytes(), parameters)[0]
        grey = pixel_values[0].float().mean(0).cpu().numpy()
        grey = (grey - grey.min()) / max(float(np.ptp(grey)), 1e-6)
        patch = self.module.PATCH
        top, left = (min(int(s * n), n - 1) // patch * patch for s, n in zip(source, grey.shape, strict=True))
        pictures = []
        for name, png in answer["heat_maps"].items():
            heat = np.array(picture_of(png).resize(grey.shape[::-1], Image.Resampling.BILINEAR)) / 255
            strength = np.sqrt(heat)[..., None]  # square root: the far, faint part is the interesting one
            blend = (1 - 0.85 * strength) * grey[..., None] * 255 + 0.85 * strength * coloured(np.sqrt(heat))
            picture = Image.fromarray(blend.clip(0, 255).astype(np.uint8))
            frame = (left, top, min(left + patch, picture.width) - 1, min(top + patch, picture.height) - 1)
            ImageDraw.Draw(picture).rectangle(frame, outline=(0, 255, 255))
            scale = PICTURE / max(picture.size)
            size = (math.ceil(picture.width * scale), math.ceil(picture.height * scale))
            pictures.append((picture.resize(size, Image.Resampling.NEAREST), name))
        return pictures

    def diffusivity(self) -> list:
        """How fast each frequency decays, per stage; the same for every image."""
        pictures = []
        for index, stage in enumerate(self.stages, 1):
            with torch.inference_mode():
                values = stage.diffusivity().float().mean((0, 3)).cpu().numpy()
            picture = Image.fromarray(coloured(values / max(float(values.max()), 1e-30)).astype(np.uint8))
            caption = f"stage {index}: up to {values.max():.2g}"
            pictures.append((picture.resize((PICTURE, PICTURE), Image.Resampling.NEAREST), caption))
        return pictures

    def run(self, path: str | None, modality: str | None, row: float, column: float, radius: float) -> tuple:
        """What the button does."""
        if not path:
            raise gr.Error("Upload an image or pick an example first.")
        parameters: dict[str, Any] = {"modality": modality}
        if self.stages:
            parameters["heat_source"] = [row, column]
        if self.kind in self.module.WITH_HEAD and not self.stages:
            parameters["features"] = True  # such that the answer is an object in any case
        if self.reconstructs:
            parameters["mask_radius"] = radius
        answer = self.ask(path, **parameters)
        maps = self.conduction(answer, path, modality, [row, column]) if self.stages else []
        return self.prediction(answer, path), maps


def output_of(explorer: Explorer) -> Any:
    """The component that shows what this kind of model gives."""
    if explorer.kind == "ForImageClassification":
        return gr.Label(label="Prediction", num_top_classes=5, elem_id="prediction")
    if explorer.kind in ("ForSemanticSegmentation", "ForInstanceSegmentation"):
        return gr.AnnotatedImage(label="Segmentation", height=400, elem_id="prediction")
    if explorer.reconstructs:
        gr.Markdown("### Reconstruction under frequency masking")
        return gr.Gallery(show_label=False, columns=4, height=240, elem_id="prediction")
    return gr.Textbox(label="Features", lines=3, elem_id="prediction")


def build(explorer: Explorer, title: str) -> gr.Blocks:
    """The page."""
    config, sensors = explorer.handler.model.config, explorer.handler.modalities
    files = sorted((HERE / "examples").glob("*.png"))
    examples = [[str(file), file.name.partition("_")[0]] if sensors else [str(file)] for file in files]
    low, high = getattr(config, "mask_radius_range", (0.2, 0.3))
    has_maps = bool(explorer.stages)
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(
            f"# {title}" + ("\nImage patches are heat sources; features mix by conduction." if has_maps else "")
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                image = gr.Image(type="filepath", image_mode=None, sources=["upload"], label="Image", height=280)
                sensor = gr.Dropdown(
                    sensors,
                    value=config.default_modality if sensors else None,
                    label="Sensor",
                    visible=len(sensors) > 1,
                )
                radius = gr.Slider(
                    0, 1, (low + high) / 2, label="Mask radius, share of the spectrum", visible=explorer.reconstructs
                )
                row = gr.Slider(0, 1, 0.5, label="Heat source, from the top", visible=has_maps)
                column = gr.Slider(0, 1, 0.5, label="Heat source, from the left", visible=has_maps)
                button = gr.Button("Run", variant="primary", elem_id="run")
                if examples:
                    gr.Examples(
                        examples, inputs=[image, sensor] if sensors else [image], label="Examples", examples_per_page=6
                    )
            with gr.Column(scale=3):
                output = output_of(explorer)
                gr.Markdown(
                    "### Response to a heat source\nWhere the features change when the marked patch is heated.",
                    visible=has_maps,
                )
                maps = gr.Gallery(show_label=False, columns=5, height=200, visible=has_maps, elem_id="conduction")
                gr.Markdown(
                    "### Thermal diffusivity k\nHow fast each frequency decays, bright is fast; frequency grows to the "
                    "right and downwards. The same for every image.",
                    visible=has_maps,
                )
                gr.Gallery(
                    explorer.diffusivity(),
                    show_label=False,
                    columns=4,
                    height=240,
                    visible=has_maps,
                    elem_id="diffusivity",
                )
        button.click(explorer.run, [image, sensor, row, column, radius], [output, maps], api_name="run")
    return page


def main() -> None:
    """Load the model and serve the page."""
    settings = json.loads((HERE / "space.json").read_text(encoding="utf-8"))
    local = HERE / "model"
    folder = local if local.is_dir() else Path(snapshot_download(settings["model"], revision=settings["revision"]))
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    build(Explorer(folder), settings["title"]).launch(theme=theme, max_file_size="32mb", ssr_mode=False)


if __name__ == "__main__":
    main()
