"""A folder in Broden's format of five images, every number of which was worked out by hand."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TABLES = {
    "index.csv": (
        "image,split,ih,iw,sh,sw,color,material,object,scene\n"
        "s/a.jpg,train,6,8,3,4,s/a_color.png,,s/a_object_1.png;s/a_object_2.png,5\n"
        "s/b.jpg,val,6,8,3,4,s/b_color.png,s/b_material.png,,\n"
        "s/nothing.jpg,train,6,8,3,4,,,,\n"
        "s/zero.jpg,train,6,8,3,4,,,0,\n"
        "s/c.jpg,val,6,8,3,4,,,,5;6\n"
    ),
    "category.csv": (
        "name,first,last,count,frequency\ncolor,1,2,2,3\nmaterial,3,3,1,1\nobject,3,300,2,2\nscene,5,6,2,3\n"
    ),
    "label.csv": (
        "number,name,category,frequency,coverage,syns\n"
        "1,red-c,color(2),2,1.250000,\n"
        "2,blue-c,color(1),1,0.500000,navy;azure\n"
        "3,wood,material(1);object(1),2,1.000000,\n"
        "5,street-s,scene(2),2,2.000000,\n"
        '6,"field, wide-s",scene(1),1,1.000000,\n'
        "300,car,object(1),1,0.250000,\n"
    ),
    "c_color.csv": "code,number,name,frequency,coverage\n1,1,red-c,2,1.25\n2,2,blue-c,1,0.5\n",
    "c_material.csv": "code,number,name,frequency,coverage\n1,3,wood,1,0.5\n",
    "c_object.csv": "code,number,name,frequency,coverage\n1,3,wood,1,0.5\n2,300,car,1,2.5e-1\n",
    "c_scene.csv": 'code,number,name,frequency,coverage\n1,5,street-s,2,2.0\n2,6,"field, wide-s",1,1.0\n',
}
MAPS = {
    "a_color": [[1, 1, 2, 2], [1, 1, 2, 2], [1, 1, 2, 2]],
    "a_object_1": [[3, 3, 3, 3], [3, 3, 0, 0], [0, 0, 0, 0]],
    "a_object_2": [[0, 300, 0, 0], [0, 300, 0, 0], [0, 300, 0, 0]],
    "b_color": [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]],
    "b_material": [[0, 0, 3, 3], [0, 0, 3, 3], [0, 0, 3, 3]],
}


def write_map(path: Path, numbers) -> None:
    """A label map as a PNG."""
    numbers = np.array(numbers)
    channels = [numbers % 256, numbers // 256, 0 * numbers]
    Image.fromarray(np.stack(channels, -1).astype(np.uint8)).save(path, "PNG")


@pytest.fixture
def broden_folder(tmp_path) -> Path:
    """The folder. Pictures are stored without loss, pixels [H,W,C] count up from the letter of the name."""
    folder = tmp_path / "broden"
    (folder / "images" / "s").mkdir(parents=True)
    for name, text in TABLES.items():
        (folder / name).write_text(text)
    for name, numbers in MAPS.items():
        write_map(folder / "images" / "s" / f"{name}.png", numbers)
    for name in ("a", "b", "c", "nothing", "zero"):
        pixels = (np.arange(6 * 8 * 3) + ord(name[0])).astype(np.uint8).reshape(6, 8, 3)
        Image.fromarray(pixels).save(folder / "images" / "s" / f"{name}.jpg", "PNG")
    return folder
