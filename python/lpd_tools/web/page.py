"""The page: controls, editor and gallery, connected to the studio's functions."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # which Gradio reads as it loads

import gradio as gr
from PIL import Image

from lpd_ext.orders import ORDER_POLICIES
from lpd_tools.web.painted import enlarged
from lpd_tools.web.studio import ANY_CLASS, Studio
from lpd_tools.web.visit import Choice, Visit
from lpd_tools.web.watch import Shown

COMPARED = ("locality", "random", "raster")
_REFUSALS = (ValueError, TypeError, OSError, RuntimeError)  # of the library; the engine being full is the last
_ANY = -1  # of the classes, in the list
_FORGET_SECONDS = 24 * 3600  # for how long a picture can be seen

Start = Callable[..., Awaitable[AsyncGenerator[Shown, None]]]  # of the state of a visit and what is chosen
Updates = dict[Any, Any]  # new values by component


def build_page(studio: Studio) -> gr.Blocks:
    """Builds the page of a studio. Pictures of a visitor live in the state of their page only."""
    height, width = studio.size
    title = f"{studio.name}: pictures by locality-aware parallel decoding"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, _FORGET_SECONDS)) as page:
        visit = gr.State(Visit(), delete_callback=lambda left: left.cancel())
        gr.Markdown(f"## {studio.name}\n{width} x {height} pixels, {studio.pipe.model.config.num_tokens} tokens")
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                choices = _controls(studio)
                seed = choices[-2]
            with gr.Column(scale=3):
                with gr.Tabs() as tabs:
                    with gr.Tab("Draw", id="draw"):
                        draw = gr.Button("Draw", variant="primary", elem_id="draw")
                        picture = _picture("Picture", "picture")
                    with gr.Tab("Inpaint", id="inpaint"):
                        with gr.Row():
                            take = gr.Button("Take my newest picture", elem_id="take")
                            inpaint = gr.Button("Draw what is painted over", variant="primary", elem_id="inpaint")
                        with gr.Row():
                            editor = gr.ImageEditor(
                                label="Paint over what is to be drawn anew",
                                type="pil",
                                format="png",
                                image_mode="RGBA",
                                sources=("upload", "clipboard"),
                                brush=gr.Brush(default_size=24, colors=["#e8265e"], color_mode="fixed"),
                                eraser=gr.Eraser(default_size=24),
                                transforms=(),
                                layers=False,
                                canvas_size=enlarged_size(studio),
                                elem_id="editor",
                            )
                            inpainted = _picture("Inpainted", "inpainted")
                    with gr.Tab("Compare orders", id="compare"):
                        compare = gr.Button("Draw in three orders", variant="primary", elem_id="compare")
                        with gr.Row():
                            compared = [_picture(order, f"compared-{order}") for order in COMPARED]
                with gr.Row():
                    status = gr.Textbox("Nothing drawn yet.", label="Status", elem_id="status", scale=4)
                    cancel = gr.Button("Cancel", variant="stop", elem_id="cancel", scale=1)
        gallery = gr.Gallery(
            label="Your pictures, newest first; one that is chosen can be painted over",
            format="png",
            columns=8,
            object_fit="contain",
            allow_preview=False,
            interactive=False,
            elem_id="gallery",
        )

        def updates(visit: Visit, shown: Shown, before: list[Image.Image], pictures: list[gr.Image]) -> Updates:
            # Gradio would rewrite the file of an unchanged picture while the browser reads it.
            changed = [i for i, drawn in enumerate(shown.pictures) if not before or drawn is not before[i]]
            new: Updates = {status: shown.status, **{pictures[i]: shown.pictures[i] for i in changed}}
            if shown.finished:
                new[gallery] = [(entry.picture, entry.caption) for entry in visit.entries]
                new[seed] = visit.entries[0].choice.seed
            return new

        def watching(pictures: list[gr.Image], start: Start) -> Callable[..., AsyncGenerator[Updates, None]]:
            async def watch(visit: Visit, *values: Any) -> AsyncGenerator[Updates, None]:
                try:
                    async with aclosing(await start(visit, *values)) as frames:
                        before: list[Image.Image] = []
                        async for shown in frames:
                            yield updates(visit, shown, before, pictures)
                            before = shown.pictures
                except _REFUSALS as error:
                    yield {status: f"Error: {error}"}
                    raise gr.Error(str(error), title="This cannot be drawn", print_exception=False) from error

            return watch

        on_draw = watching([picture], lambda visit, *chosen: studio.draw(visit, choice(*chosen)))
        on_compare = watching(compared, lambda visit, *chosen: studio.compare(visit, choice(*chosen), COMPARED))
        on_inpaint = watching(
            [inpainted], lambda visit, painting, *chosen: studio.inpaint(visit, choice(*chosen), painting)
        )

        def on_cancel(visit: Visit) -> Any:
            return gr.skip() if visit.cancel() else "Nothing is being drawn."

        def on_take(visit: Visit) -> Any:
            if not visit.entries:
                raise gr.Error("Nothing is drawn yet: draw a picture, or upload one.", print_exception=False)
            return enlarged(visit.entries[0].picture)

        def on_select(visit: Visit, event: gr.SelectData) -> Updates:
            return {editor: enlarged(visit.entries[event.index].picture), tabs: gr.Tabs(selected="inpaint")}

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        draw.click(on_draw, [visit, *choices], [picture, status, gallery, seed], **quiet)
        compare.click(on_compare, [visit, *choices], [*compared, status, gallery, seed], **quiet)
        inpaint.click(on_inpaint, [visit, editor, *choices], [inpainted, status, gallery, seed], **quiet)
        cancel.click(on_cancel, visit, status, queue=False, **quiet)
        take.click(on_take, visit, editor, **quiet)
        gallery.select(on_select, visit, [editor, tabs], **quiet)
    # The engine is the queue, so Gradio's must hold nothing back.
    page.queue(default_concurrency_limit=None)
    return page


def choice(
    label: int, steps: float, guidance: float, temperature: float, order: str, seed: float | None, new_seed: bool
) -> Choice:
    """Reads the controls, in their order; ValueError for a seed that is not a whole number."""
    if not new_seed and (seed is None or seed != int(seed)):
        raise ValueError(f"seed must be a whole number, got {seed}")
    number = None if new_seed or seed is None else int(seed)
    return Choice(None if label == _ANY else label, int(steps), guidance, temperature, order, number)


def enlarged_size(studio: Studio) -> tuple[int, int]:
    """Returns width and height of the editor's canvas."""
    width, height = enlarged(Image.new("RGB", studio.size[::-1])).size
    return width, height


def _controls(studio: Studio) -> list[Any]:
    """Returns the controls that `choice` reads."""
    defaults, config = studio.pipe.defaults, studio.pipe.model.config
    classes = [(studio.class_name(label), label) for label in range(config.num_classes)]
    return [
        gr.Dropdown([*classes, (ANY_CLASS, _ANY)], value=0, label="Class", filterable=True, elem_id="class"),
        gr.Slider(1, config.num_tokens, defaults.num_inference_steps, step=1, label="Steps", elem_id="steps"),
        gr.Slider(0, 20, defaults.guidance_scale, step=0.1, label="Guidance (1: none)", elem_id="guidance"),
        gr.Slider(0, 2, defaults.temperature, step=0.05, label="Temperature (0: the likeliest)", elem_id="temperature"),
        gr.Dropdown(list(ORDER_POLICIES), value=defaults.order, label="Order", elem_id="order"),
        gr.Number(0, label="Seed", elem_id="seed"),
        gr.Checkbox(True, label="A new seed each time", elem_id="new-seed"),
    ]


def _picture(label: str, name: str) -> gr.Image:
    return gr.Image(label=label, format="png", type="pil", interactive=False, buttons=["download"], elem_id=name)
