"""Draws every image again: ``python -m docs.drawings``."""

from . import IMAGES, draw_all

if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for name, image in draw_all().items():
        (IMAGES / name).write_text(image)
        print(IMAGES / name)
