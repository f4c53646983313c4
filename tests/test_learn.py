"""Steps without Ray: alone against PyTorch's own, and several processes against one."""

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from segray import model
from segray.classes import Classes
from segray.errors import SettingsError
from segray.learn import Learner
from segray.loss import Loss
from segray.model import Checkpoint, Preprocessing
from segray.predict import Prediction, Predictor
from segray.schedule import Optimization, rate
from segray.statistics import ConfusionMatrix
from tests.conftest import CAMVID_CLASSES
from tests.s3 import free_port

CLASSES = Classes(("sky", "road", "tree"))
NUM_STEPS = 4
BATCH_SIZE = 5
# Layer norms in place of batch norms, which see their own process's images alone.
WITHOUT_BATCH_NORM = {"encoder_depth": 3, "decoder_channels": [16, 8, 8], "decoder_use_norm": "identity"}
PLAIN = Optimization(learning_rate=1e-3, warm_up=0.5)

pytestmark = pytest.mark.usefixtures("one_thread")


def begin(name: str = "unet_tu-convnext_atto", **arguments: Any) -> Checkpoint:
    arguments = arguments or WITHOUT_BATCH_NORM
    return model.untrained(name, CLASSES, arguments=arguments, preprocessing=Preprocessing())


def small(**arguments: Any) -> Checkpoint:
    """With batch norms."""
    return begin("unet_resnet18", encoder_depth=2, decoder_channels=[8, 8], **arguments)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Images, and targets that can be learned from them, a quarter of them void."""
    rng = np.random.default_rng(step)
    images = rng.integers(0, 256, (BATCH_SIZE, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    targets = (images.argmax(3)).astype(np.int64)
    targets[rng.random(targets.shape) < rng.random((BATCH_SIZE, 1, 1)) / 2] = CLASSES.ignore_index
    return torch.from_numpy(images), torch.from_numpy(targets)


def learner(
    checkpoint: Checkpoint | None = None, settings: Optimization = PLAIN, loss: str = "ce", **more: Any
) -> Learner:
    return Learner(checkpoint or begin(), settings, Loss.parse(loss, CLASSES), NUM_STEPS, **more)


def steps(of: Learner, number: int = NUM_STEPS) -> list[float]:
    first = of.num_steps_done
    return [float(of.step(*batch(step))) for step in range(first, first + number)]


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest, of tensors of the same names."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def test_a_step_is_that_of_pytorchs_own_parts() -> None:
    checkpoint = begin()
    module = model.build(checkpoint)
    decayed = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (checkpoint.preprocessing.mean, checkpoint.preprocessing.std))
    losses = []
    for step in range(NUM_STEPS):
        images, targets = batch(step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * rate(PLAIN, step, NUM_STEPS)
        output = module((images.permute(0, 3, 1, 2) / 255 - mean) / std)
        loss = F.cross_entropy(output, targets, ignore_index=CLASSES.ignore_index)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    ours = learner(checkpoint)
    np.testing.assert_allclose(steps(ours), losses, rtol=1e-5)
    # Adam makes much of the rounding of gradients that are nearly nothing, so on the mean.
    trained, expected = ours.checkpoint().tensors, module.state_dict()
    differences = torch.cat([(trained[name] - expected[name]).abs().flatten() for name in expected])
    assert float(differences.mean()) < 1e-5


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_what_is_learned_makes_the_loss_small(optimizer: Any) -> None:
    settings = Optimization(optimizer=optimizer, learning_rate=0.02 if optimizer == "sgd" else 3e-3, clip=1.0)
    ours = Learner(small(), settings, Loss.parse("ce+0.5*dice", CLASSES), 40)
    losses = [float(ours.step(*batch(0))) for _ in range(40)]
    assert losses[-1] < losses[0] / 2


def test_a_batch_in_parts_is_the_batch() -> None:
    whole = learner()
    parts = learner(settings=dataclasses.replace(PLAIN, accumulate=3))
    np.testing.assert_allclose(steps(parts), steps(whole), rtol=1e-5)
    assert difference(parts.state()[0], whole.state()[0]) < 1e-5


def test_what_is_taken_up_goes_on_as_it_would_have() -> None:
    settings = dataclasses.replace(PLAIN, ema=0.9)
    # Dropout, batch norms, a second head: all that has a state or draws numbers.
    checkpoint = begin("deeplabv3plus_resnet18", encoder_depth=4, decoder_channels=16)
    through = learner(checkpoint, settings, auxiliary=0.4)
    losses = steps(through)
    broken_off = learner(checkpoint, settings, auxiliary=0.4)
    first = steps(broken_off, 2)
    state = copy.deepcopy(broken_off.state())
    steps(broken_off, 1)  # of which nothing was kept
    taken_up = learner(checkpoint, settings, auxiliary=0.4)
    taken_up.load(*state)
    assert first + steps(taken_up, 2) == losses
    assert difference(taken_up.state()[0], through.state()[0]) == 0
    assert difference(dict(taken_up.checkpoint().tensors), dict(through.checkpoint().tensors)) == 0


def test_the_moving_average_is_what_comes_out() -> None:
    settings = dataclasses.replace(PLAIN, ema=0.5)
    ours, bare = learner(settings=settings), learner()
    average = {name: tensor.double() for name, tensor in begin().tensors.items()}
    for step in range(NUM_STEPS):
        ours.step(*batch(step))
        bare.step(*batch(step))
        decay = min(0.5, (2 + step) / (11 + step))
        for name, tensor in bare.checkpoint().tensors.items():
            average[name] = decay * average[name] + (1 - decay) * tensor
    assert difference(dict(ours.checkpoint().tensors), average) < 1e-6


def test_a_long_gradient_is_shortened() -> None:
    def moved(clip: float | None) -> float:
        settings = Optimization(
            optimizer="sgd", learning_rate=1.0, momentum=0.0, weight_decay=0.0, warm_up=0.0, clip=clip
        )
        ours = learner(settings=settings)
        ours.step(*batch(0))
        after = ours.checkpoint().tensors
        return float(torch.stack([(after[name] - old).norm() for name, old in begin().tensors.items()]).norm())

    assert moved(None) > 0.02
    assert moved(0.01) == pytest.approx(0.01, rel=1e-3)


def test_a_frozen_backbone_stays_and_a_slow_one_moves_less() -> None:
    def moved(backbone_rate: float) -> tuple[float, float]:
        settings = dataclasses.replace(PLAIN, backbone_rate=backbone_rate, weight_decay=0.0)
        ours = learner(small(), settings)
        steps(ours, 2)
        after, before = ours.checkpoint().tensors, small().tensors
        change = {name: float((after[name] - before[name]).abs().max()) for name in after if name.endswith(".weight")}
        of_backbone = max(value for name, value in change.items() if name.startswith("encoder."))
        return of_backbone, max(value for name, value in change.items() if name.startswith("decoder.blocks"))

    assert moved(0.0)[0] == 0
    assert moved(0.0)[1] > 0
    assert moved(0.1)[0] < moved(1.0)[0]


def test_a_second_head_teaches_and_is_left_behind() -> None:
    for name in ("fcn_resnet50", "pspnet_resnet18"):
        checkpoint = model.untrained(name, CLASSES)
        alone, both = (learner(checkpoint, auxiliary=weight) for weight in (0.0, 0.4))
        torch.manual_seed(0)
        assert float(both.step(*batch(0))) > float(alone.step(*batch(0)))
        assert both.checkpoint().tensors.keys() == checkpoint.tensors.keys()
        model.build(both.checkpoint())
    with pytest.raises(SettingsError, match="LRASPP has no place for a second head"):
        learner(model.untrained("lraspp_mobilenet_v3_large", CLASSES), auxiliary=0.4)


def test_a_batch_of_nothing_but_void_changes_no_weight() -> None:
    settings = Optimization(optimizer="sgd", weight_decay=0.0, momentum=0.0)
    ours = learner(settings=settings)
    images, targets = batch(0)
    assert float(ours.step(images, torch.full_like(targets, CLASSES.ignore_index))) == 0
    assert difference(dict(ours.checkpoint().tensors), dict(begin().tensors)) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_learns_nearly_the_same(dtype: Any) -> None:
    exact, ours = steps(learner(small())), steps(learner(small(), dtype=dtype))
    np.testing.assert_allclose(ours, exact, rtol=0.02)
    assert ours != exact


def test_a_scaled_loss_survives_being_taken_up() -> None:
    ours = learner(small(), dtype="float16")
    steps(ours, 2)
    tensors, scalars = ours.state()
    assert scalars["scaler"]["scale"] > 1
    other = learner(small(), dtype="float16")
    other.load(tensors, scalars)
    assert other.state()[1] == scalars


@pytest.mark.slow  # as compiling takes a minute
def test_compiled_it_learns_the_same() -> None:
    np.testing.assert_allclose(steps(learner(small(), compiled=True), 2), steps(learner(small()), 2), rtol=1e-4)


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(SettingsError, match="float16"):
        learner(dtype="float16", strategy="fsdp")


def magnified(path: Path, pixels: int) -> np.ndarray:
    """An image or target of CamVid reduced to 12×8 cells, each of so many pixels a side."""
    with Image.open(path) as image:
        cells = np.asarray(image.resize((12, 8), Image.Resampling.NEAREST if image.mode == "L" else None))
    return cells.repeat(pixels, 0).repeat(pixels, 1)


def by_heart(name: str, *, slowly: bool = True, pixels: int = 8, learning_rate: float = 3e-3, **arguments: Any) -> Any:
    """Cells of 16 pixels are for models that decide for 8 at once, whose logits are not drawn out from centres."""
    return pytest.param(name, arguments, pixels, learning_rate, marks=[pytest.mark.slow] if slowly else [])


@pytest.mark.parametrize(
    ("name", "arguments", "pixels", "learning_rate"),
    [
        by_heart("unet_resnet18", slowly=False),
        by_heart("unetplusplus_resnet18"),
        by_heart("manet_resnet18"),
        by_heart("linknet_resnet18", learning_rate=5e-3),
        by_heart("fpn_resnet18", pixels=16),
        by_heart("pspnet_resnet18", pixels=16),
        by_heart("pan_resnet18", pixels=16),
        by_heart("deeplabv3_resnet18", pixels=16),
        by_heart("deeplabv3plus_resnet18", pixels=16),
        by_heart("upernet_resnet18", pixels=16),
        by_heart("segformer_mit_b0", pixels=16),
        by_heart(
            "dpt_tu-vit_tiny_patch16_224",
            learning_rate=1e-3,
            decoder_fusion_channels=32,
            decoder_intermediate_channels=[32] * 4,
        ),
        by_heart("fcn_resnet50"),
        by_heart("deeplabv3_resnet50"),
        by_heart("lraspp_mobilenet_v3_large"),  # whose batch norms take long to know what they see
    ],
)
def test_each_architecture_learns_eight_street_scenes_by_heart(
    name: str, arguments: dict[str, Any], pixels: int, learning_rate: float, camvid: Path
) -> None:
    paths = sorted((camvid / "train").glob("*.png"))[::46]
    images = [magnified(path, pixels) for path in paths]
    targets = [magnified(path.parents[1] / "trainannot" / path.name, pixels) for path in paths]
    num_classes = len(CAMVID_CLASSES)
    settings = Optimization(learning_rate=learning_rate, weight_decay=0.0, clip=1.0)
    checkpoint = model.untrained(name, CAMVID_CLASSES, arguments=arguments)
    ours = Learner(checkpoint, settings, Loss.parse("ce+dice", CAMVID_CLASSES), 1000)
    whole = torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(targets)).long()
    confusion = ConfusionMatrix.zeros(num_classes)
    while not confusion.miou() > 0.95 and ours.num_steps_done < 1000:
        for _ in range(20):
            ours.step(*whole)
        confusion = ConfusionMatrix.zeros(num_classes)
        for target, prediction in zip(targets, Predictor(ours.checkpoint().to_bytes).predict(images), strict=True):
            assert isinstance(prediction, Prediction)
            confusion += ConfusionMatrix.of(target, prediction.label_map, num_classes, CAMVID_CLASSES.ignore_index)
    assert len(images) == 8
    assert confusion.miou() > 0.95


LOSSES = {"ddp": "ce+0.5*dice", "fsdp": "ohem+lovasz"}


def process(rank: int, port: int, folder: str) -> None:
    """One of two that train together, each with its own share: two images and three."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    settings = dataclasses.replace(PLAIN, ema=0.9, clip=1.0, accumulate=2)
    for strategy, loss in LOSSES.items():
        ours = learner(settings=settings, loss=loss, strategy=strategy)
        losses = []
        for step in range(NUM_STEPS):
            images, targets = (values[:2] if rank == 0 else values[2:] for values in batch(step))
            part = ours.step(images, targets)
            dist.all_reduce(part)
            losses.append(float(part))
            if step == 1:
                halfway = ours.state()
        tensors, _ = ours.state()
        trained = ours.checkpoint()
        again = learner(settings=settings, loss=loss, strategy=strategy)
        again.load(*halfway)
        for step in range(2, NUM_STEPS):
            images, targets = (values[:2] if rank == 0 else values[2:] for values in batch(step))
            again.step(images, targets)
        taken_up, _ = again.state()
        if rank == 0:
            found = {"losses": losses, "state": tensors, "checkpoint": dict(trained.tensors), "taken up": taken_up}
            torch.save(found | {"halfway": halfway[0], "scalars": halfway[1]}, f"{folder}/{strategy}.pth")
    # Layers that lead nowhere, batch norms in the average, and a second head.
    whole = dataclasses.replace(settings, accumulate=1)  # a batch norm wants two values
    shallow = begin("unet_tu-mobilenetv3_small_050", encoder_depth=3, decoder_channels=[16, 8, 8])
    for strategy in LOSSES:
        ours = learner(shallow, whole, strategy=strategy, auxiliary=0.4)
        for step in range(2):
            images, targets = (values[:2] if rank == 0 else values[2:] for values in batch(step))
            assert torch.isfinite(ours.step(images, targets))
        held: list[Any] = [None, None]
        dist.all_gather_object(held, ours.checkpoint().digest())
        assert held[0] == held[1], "the statistics of batch norms too"
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes learned, by strategy."""
    folder = tmp_path_factory.mktemp("together")
    spawn(process, (free_port(), str(folder)), nprocs=2)  # type: ignore[no-untyped-call]
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_learns(strategy: str, together: Path) -> None:
    found = torch.load(together / f"{strategy}.pth")
    alone = learner(settings=dataclasses.replace(PLAIN, ema=0.9, clip=1.0), loss=LOSSES[strategy])
    np.testing.assert_allclose(found["losses"], steps(alone), rtol=1e-5)
    assert difference(found["state"], alone.state()[0]) < 1e-4
    assert difference(found["checkpoint"], dict(alone.checkpoint().tensors)) < 1e-4


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_two_have_begun_goes_on_with_two_or_one(strategy: str, together: Path) -> None:
    found = torch.load(together / f"{strategy}.pth")
    assert difference(found["taken up"], found["state"]) == 0
    alone = learner(settings=dataclasses.replace(PLAIN, ema=0.9, clip=1.0), loss=LOSSES[strategy])
    alone.load(found["halfway"], found["scalars"])
    np.testing.assert_allclose(steps(alone, NUM_STEPS - 2), found["losses"][2:], rtol=1e-5)
