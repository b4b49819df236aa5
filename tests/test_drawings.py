"""The committed images are what their scripts draw."""

from xml.etree import ElementTree

from docs.drawings import IMAGES, draw_all


def test_the_images_are_what_the_scripts_draw() -> None:
    drawn = draw_all()
    committed = {path.name: path.read_text() for path in IMAGES.glob("*.svg")}
    assert sorted(committed) == sorted(drawn)
    for name, image in drawn.items():
        assert committed[name] == image, f"{name}: run `make drawings`"
        ElementTree.fromstring(image)
