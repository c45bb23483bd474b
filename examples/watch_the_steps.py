"""The picture comes out of the noise: every step's estimate of it, side by side. Leave the loop to stop the run."""

from PIL import Image

import mezzotint

pipe = mezzotint.load()
request = mezzotint.Request(prompt="a lemon on a blue background", seed=7, steps=8, sampler="euler")

previews = []
for step in pipe.stream(request):
    print(f"step {step.index + 1}: sigma {step.sigma:.3f}, spread {step.denoised.std():.2f}")
    previews += pipe.decode(step.denoised)

width, height = previews[0].size
strip = Image.new("RGB", (width * len(previews), height))
for place, preview in enumerate(previews):
    strip.paste(preview, (place * width, 0))
strip.save("steps.png")
