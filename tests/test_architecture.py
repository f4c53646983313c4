"""Models by name, against the libraries that have them."""

import subprocess
import sys

import pytest
import segmentation_models_pytorch as smp
import torchvision

from segray.architecture import SMP, TORCHVISION, known_models, parse


def test_the_known_models_are_torchvisions_and_smps() -> None:
    assert list(TORCHVISION) == torchvision.models.list_models(torchvision.models.segmentation)
    assert sorted(SMP) == sorted(smp.MODEL_ARCHITECTURES_MAPPING)
    assert all(name in known_models() for name in (*TORCHVISION, *SMP))


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("unetplusplus_resnet34", "unetplusplus"),
        ("unet_resnet34", "unet"),
        ("deeplabv3_resnet50", "deeplabv3_resnet50"),
        ("deeplabv3_resnet34", "deeplabv3"),
        ("deeplabv3plus_resnet34", "deeplabv3plus"),
    ],
)
def test_of_names_that_begin_alike_the_longer_one_is_meant(name: str, architecture: str) -> None:
    assert parse(name)[0] == architecture


def test_a_name_is_looked_at_without_torch() -> None:
    program = "import sys, segray.architecture, segray.label\nassert not {'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
