"""Watch a picture form, as an animation: python examples/stream.py [FILE.gif]."""

import sys

from lpd_ext import LPDPipeline

file = sys.argv[1] if len(sys.argv) > 1 else "clock.gif"

pipe = LPDPipeline.from_pretrained()
frames = []
for preview in pipe.stream("clock", num_inference_steps=20, seeds=7):  # after each group; undrawn cells are grey
    frames.append(preview.images[0].resize((256, 256)))
    print(f"step {preview.step}: {int((preview.tokens >= 0).sum())} of 256 cells")

frames[0].save(file, save_all=True, append_images=frames[1:], duration=200, loop=0)
