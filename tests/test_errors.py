import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from segray.classes import Classes
from tests.label_store import windows, write_store
from tests.rasters import samples, write

WITHOUT_RASTERIO = """
import json, sys
sys.modules["rasterio"] = None
from segray import demo, evaluate, export, label, pack, report, verify
from segray.errors import SettingsError
from segray.tile import Scenes

scene, labels, there = sys.argv[1:]
jobs = {
    "label": (label.label, label.Label(source=scene, sink=there, model="m.onnx", scenes=Scenes(size=16))),
    "verify": (verify.verify, verify.Verify(sink=labels, source=scene)),
    "evaluate": (evaluate.evaluate, evaluate.Evaluate(sink=labels, targets=there)),
    "export": (export.export, export.Export(sink=labels, dest=there)),
    "pack": (pack.pack, pack.Pack(source=there, sink=labels, dataset="scenes")),
    "demo": (demo.draw, demo.Draw(sink=there, format="raster")),
    "report": (report.report, report.Report(sink=labels)),
}
told = {}
for name, (job, settings) in jobs.items():
    try:
        job(settings)
    except SettingsError as error:
        told[name] = str(error)
print(json.dumps(told))
"""


PLAIN = """
import sys
sys.modules |= dict.fromkeys(["affine", "onnxruntime", "pyproj", "pystac", "pystac_client", "rasterio", "shapely"])
from segray.errors import SourceError
from segray.label import Label, label

try:
    label(Label(source=sys.argv[1], sink=sys.argv[1] + "-labels", model="unet_resnet18"))
except SourceError as error:
    print(error)
"""


def test_images_need_no_extra(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PLAIN, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "holds no images and no shards" in done.stdout


def test_every_job_of_scenes_says_which_extra_it_needs(tmp_path: Path) -> None:
    scene = write(tmp_path / "a.tif", samples(16, 16))
    label_map = np.zeros((16, 16), np.uint8)
    images = windows(Path(scene), label_map, 16)
    write_store(tmp_path / "labels", images, Classes(("soil", "crop")), scenes={"size": 16, "area": None})
    arguments = (scene, str(tmp_path / "labels"), str(tmp_path / "there"))
    done = subprocess.run([sys.executable, "-c", WITHOUT_RASTERIO, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    how = "needs rasterio, which is not installed; pip install 'segray[geo]'"
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "label": f"--scenes.size {how}",
        "verify": f"a SOURCE of scenes {how}",
        "evaluate": f"a target of a scene {how}",
        "export": f"exporting scenes {how}",
        "pack": f"--dataset scenes {how.replace('rasterio', 'rasterio.features')}",
        "demo": f"--format raster {how}",
    }
    assert f"a picture of a scene {how}" in (tmp_path / "labels/report.html").read_text()
