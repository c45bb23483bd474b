"""A picture from a prompt. Its file carries its own record, from which the picture can be made again."""

import mezzotint

pipe = mezzotint.load()  # the bundled model; or a folder, a file, a hub id
image = pipe("a lemon on a blue background", seed=7)
image.save("lemon.png")

print(image.info["parameters"])
