"""`lpd study-editing`: measures the points missing from the CSV file, then writes the tables and the pictures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lpd_ext.orders import ORDER_POLICIES
from lpd_ext.pipeline import LPDPipeline
from lpd_ext.state_files import write_text
from lpd_tools.checks import check_device
from lpd_tools.data.fashion_mnist import load_fashion_mnist
from lpd_tools.data.model_files import model_files
from lpd_tools.data.token_cache import file_hash
from lpd_tools.progress import track
from lpd_tools.settings import Range, check_ranges
from lpd_tools.study.editing_measure import EditInstruments
from lpd_tools.study.editing_points import MASKS, Edited, edit_points, hidden_cells
from lpd_tools.study.results import append_result, note_beginning, read_results
from lpd_tools.study.settings import EditingStudy
from lpd_tools.study.study import check_model
from lpd_tools.training.judge import load_judge

_FEWEST = 4  # images on either side: a covariance needs two, also when a tenth of them is left out


def run_editing_study(config: EditingStudy) -> Path:
    """Measures, draws and writes; returns the CSV file.

    Raises ValueError for wrong settings, and for results begun with other models or settings.
    """
    for name, known in (("masks", MASKS), ("orders", ORDER_POLICIES)):
        if unknown := sorted(set(getattr(config, name)) - set(known)):
            raise ValueError(f"{name} must be among {', '.join(known)}, got {', '.join(unknown)}")
    files = model_files(config.model, config.tokenizer)
    pipe = LPDPipeline.from_pretrained(files.model, tokenizer=files.tokenizer, device=check_device(config.device))
    check_model(pipe)
    test, judge = load_fashion_mnist("test", config.data_dir), load_judge(config.judge)
    stride = pipe.tokenizer.config.stride
    most_steps = min((hidden_cells(mask, stride) for mask in config.masks), default=1)
    check_ranges(config, images=Range(_FEWEST, len(test) - _FEWEST), steps=Range(1, most_steps))
    used = {"model": files.weights, "tokenizer": files.tokenizer, "judge": Path(config.judge)}
    depends_on: dict[str, Any] = {f"{name}_sha256": file_hash(file) for name, file in used.items() if file}
    names = ("guidance_scale", "guidance_schedule", "temperature", "proximity_threshold", "repulsion_threshold")
    depends_on |= {name: getattr(pipe.defaults, name) for name in names}
    depends_on |= {"images": config.images, "test_images": len(test)}
    note_beginning(Path(f"{config.out}.json"), depends_on)
    table, points = Path(f"{config.out}.csv"), edit_points(config)
    instruments = EditInstruments(pipe, judge, test, config.images)
    done, begun = read_results(table, Edited), time.monotonic()
    for point in track([point for point in points if point not in done], "measuring points"):
        if time.monotonic() - begun > 60 * config.minutes:
            break
        done[point] = instruments.measure(point)
        append_result(table, done[point])
    if done:
        from lpd_tools.study.editing_report import draw_chart, draw_pictures, tables  # matplotlib only here

        write_text(f"{config.out}_tables.md", tables(done, config) + "\n")
        draw_chart(done, config, Path(f"{config.out}_chart.png"))
        draw_pictures(instruments, config, Path(f"{config.out}_pictures.png"))
    return table
