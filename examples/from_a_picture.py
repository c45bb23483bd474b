"""Pictures from a picture: another fruit in its place, a whale in its corner, a wider scene; and one that tiles."""

from PIL import Image

import mezzotint

pipe = mezzotint.load()
lemon = pipe("a small lemon on a blue background", seed=7)
width, height = lemon.size
corner = Image.new("L", lemon.size)  # a mask: white areas are repainted
corner.paste(255, (width * 9 // 16, height * 9 // 16, width, height))

tangerine = pipe("a small tangerine on a blue background", image=lemon, strength=0.7, seed=2)
whale = pipe("a whale on a blue background", image=lemon, mask=corner, only_masked=0, mask_blur=2, seed=1)
wide = pipe("a whale on a blue background", image=lemon, outpaint=(0, 0, width, 0), mask_blur=2, seed=5)
tile = pipe("a lemon on a pink background", seamless="xy", seed=5)

tiles = Image.new("RGB", (2 * width, 2 * height))
for place in ((0, 0), (width, 0), (0, height), (width, height)):
    tiles.paste(tile, place)

for name, image in {"lemon": lemon, "tangerine": tangerine, "whale": whale, "wide": wide, "tile": tile}.items():
    image.save(f"{name}.png")
tiles.save("tiles.png")
