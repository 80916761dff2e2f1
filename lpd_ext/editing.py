"""Editing without training: some cells of a picture are known, and the others are drawn around them.

The tokenizer encodes the picture; known tokens enter the KV cache after the condition, and the order covers the other
cells. `inpaint`, `outpaint`, `class_edit` and `variations` draw at once; `plan_inpaint` and its kin in edit_plan.py,
which describes all arguments, return a `Drawing`, whose `stream` shows each group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lpd_ext.cancel import Cancel
from lpd_ext.drawing import LPDPipelineOutput, OutputType, StepCallback, check_output_type
from lpd_ext.edit_plan import Margins, Pipeline, plan_inpaint, plan_outpaint, plan_variations
from lpd_ext.image_input import Pictures

__all__ = [
    "Margins",
    "class_edit",
    "inpaint",
    "outpaint",
    "plan_inpaint",
    "plan_outpaint",
    "plan_variations",
    "variations",
]


def inpaint(
    pipe: Pipeline,
    images: Pictures,
    masks: Pictures,
    class_labels: Any,
    *,
    output_type: OutputType | None = None,
    callback_on_step_end: StepCallback | None = None,
    cancel: Cancel | None = None,
    **options: Any,
) -> LPDPipelineOutput:
    """Redraws the masked (white) parts of pictures, conditioned on the class.

    options as in `plan_inpaint`; the other arguments as in `Drawing.run`. By default images have the kind of the input.
    """
    check_output_type(output_type)
    return plan_inpaint(pipe, images, masks, class_labels, **options).run(output_type, callback_on_step_end, cancel)


def class_edit(
    pipe: Pipeline,
    images: Pictures,
    masks: Pictures,
    new_labels: Any,
    *,
    output_type: OutputType | None = None,
    callback_on_step_end: StepCallback | None = None,
    cancel: Cancel | None = None,
    **options: Any,
) -> LPDPipelineOutput:
    """Redraws the masked parts of pictures as another class, on which the known parts are conditioned too.

    Arguments as in `inpaint`.
    """
    check_output_type(output_type)
    return plan_inpaint(pipe, images, masks, new_labels, **options).run(output_type, callback_on_step_end, cancel)


def outpaint(
    pipe: Pipeline,
    images: Pictures,
    margins: Margins | Sequence[Margins],
    class_labels: Any = None,
    *,
    output_type: OutputType | None = None,
    callback_on_step_end: StepCallback | None = None,
    cancel: Cancel | None = None,
    **options: Any,
) -> LPDPipelineOutput:
    """Continues pictures beyond their edges to the size that the model draws.

    options as in `plan_outpaint`; the other arguments as in `inpaint`.
    """
    check_output_type(output_type)
    return plan_outpaint(pipe, images, margins, class_labels, **options).run(output_type, callback_on_step_end, cancel)


def variations(
    pipe: Pipeline,
    images: Pictures,
    keep: float | Sequence[float],
    class_labels: Any = None,
    *,
    output_type: OutputType | None = None,
    callback_on_step_end: StepCallback | None = None,
    cancel: Cancel | None = None,
    **options: Any,
) -> LPDPipelineOutput:
    """Redraws pictures, keeping a share of the cells chosen at random by the seed.

    options as in `plan_variations`; the other arguments as in `inpaint`.
    """
    check_output_type(output_type)
    return plan_variations(pipe, images, keep, class_labels, **options).run(output_type, callback_on_step_end, cancel)
