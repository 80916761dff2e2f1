"""Editing without training: some cells of a picture are known, the others are drawn around them.

A picture becomes tokens by the tokenizer; the known ones enter the KV cache after the condition, and the order covers
the cells that are left. `inpaint`, `outpaint`, `class_edit` and `variations` draw at once; `plan_inpaint` and its kin
(edit_plan.py has them, and what all of these take) give a `Drawing`, whose `stream` shows each group.
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
    """Paint the masked (white) parts of pictures anew, as parts of a picture of the class.

    options as in `plan_inpaint`; the rest as in `Drawing.run`: by default images come out as the kind that went in.
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
    """Paint the masked parts of pictures as parts of another class, which the known parts are then read as too.

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
    """Continue pictures beyond their edges to the size that the model draws.

    options as in `plan_outpaint`; the rest as in `inpaint`.
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
    """Redraw pictures of which a share of the cells, chosen at random by the seed, is kept.

    options as in `plan_variations`; the rest as in `inpaint`.
    """
    check_output_type(output_type)
    return plan_variations(pipe, images, keep, class_labels, **options).run(output_type, callback_on_step_end, cancel)
