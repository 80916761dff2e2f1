"""Draw four pictures with the bundled model: python examples/sample.py [FOLDER]."""

import sys
from pathlib import Path

from lpd_ext import LPDPipeline

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")

pipe = LPDPipeline.from_pretrained()  # "lpd_l_256" for a published model
labels = ["heart", "clock", "happy-face", None]  # class names or indices; None: no class
out = pipe(labels, num_inference_steps=[12, 20, 20, 64], guidance_scale=3.0, seeds=[1, 2, 3, 4])
for index, image in enumerate(out.images):
    image.save(folder / f"picture_{index}.png")
