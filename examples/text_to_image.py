"""A picture from words, in three lines; the file carries its own record, so the picture can be made again from it."""

import mezzotint
from mezzotint.image import save_png

pipe = mezzotint.load()  # the bundled model; or a folder, a file, a hub id
image = pipe("a lemon on a blue background", seed=7)
save_png(image, "lemon.png")  # image.save would leave the record behind

print(image.info["parameters"])
