"""Models of packages, small and with random weights: by package, what makes each of them and its call.

`PACKAGES` says what to install. mmdet 3.3 refuses mmcv 2.2, which the other tests use, so it has an environment of its
own; there mmcv-lite has no compiled operators.
"""

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

import cupy_msda.torch
from cupy_msda.torch import mmcv
from tests.helpers import model_functions

PACKAGES = {
    "transformers": "transformers==5.23.0",
    "ultralytics": "ultralytics==8.4.190",
    "rfdetr": "rfdetr==1.11.2 transformers==5.23.0",
    "mmdet": "mmdet==3.3.0 mmcv-lite==2.1.0 'numpy<2.3' 'setuptools<80'",
    "stand-in": "",
}
STAND_INS = "stand-in"
WITH_AN_ENCODER = ("deformable_detr", "grounding_dino", "mm_grounding_dino")
# The line that a user writes.
LINES = dict.fromkeys(PACKAGES, "cupy_msda.torch.patch(model)") | {"mmdet": "cupy_msda.torch.mmcv.install()"}


@dataclass(frozen=True)
class Model:
    """A model: its package and name, what makes it and a function that calls it, and its calls of the operator."""

    package: str
    name: str
    make: object
    calls: int

    @property
    def version(self):
        return "" if self.package == STAND_INS else importlib.metadata.version(self.package)

    def patch(self, model):
        return mmcv.install() if self.package == "mmdet" else cupy_msda.torch.patch(model)


def image(height=96, width=128):
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def import_torchvision():
    """torchvision of PyPI is compiled for a torch with CUDA; without that its import fails, but for two operators."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
        importlib.import_module("torchvision")


def of_transformers():
    """Each family, by the small configurations of the other tests."""
    from tests.helpers.transformers_models import MODELS

    for name, make in MODELS.items():

        def made(make=make):
            model, inputs = make()
            return model, lambda model: model(**inputs).to_tuple()

        # Two layers of a decoder, and for some two of an encoder.
        yield Model("transformers", name, made, 4 if name in WITH_AN_ENCODER else 2)


def of_ultralytics():
    """RT-DETR."""

    def rt_detr():
        from ultralytics.nn.tasks import RTDETRDetectionModel

        x = image(96, 96)
        return RTDETRDetectionModel("rtdetr-resnet50.yaml", ch=3, nc=5, verbose=False), lambda model: model(x)

    yield Model("ultralytics", "RT-DETR", rt_detr, 6)


def of_rfdetr():
    """The nano model on a small image."""

    def nano():
        config = importlib.import_module("rfdetr.config").RFDETRNanoConfig(
            pretrain_weights="none", device="cpu", resolution=128, positional_encoding_size=8, num_queries=20,
            num_select=20, group_detr=1, num_classes=5,
        )  # fmt: skip
        x = image(128, 128)
        return importlib.import_module("rfdetr.models.lwdetr").build_model_from_config(config), lambda model: model(x)

    yield Model("rfdetr", "RF-DETR nano", nano, 2)


def of_mmdet():
    """Detectors by their own configurations, with a smaller backbone and fewer layers."""

    def dino(config):
        config.backbone.update(depth=18, init_cfg=None)
        config.neck.in_channels = [128, 256, 512]
        config.num_queries, config.bbox_head.num_classes = 30, 5
        config.encoder.num_layers = config.decoder.num_layers = 2

    def mask2former(config):
        config.backbone.update(depth=18, init_cfg=None)
        head = config.panoptic_head
        head.in_channels, head.num_queries = [64, 128, 256, 512], 10
        head.pixel_decoder.encoder.num_layers = head.transformer_decoder.num_layers = 2

    for name, file, change, calls in (
        ("DINO", "dino/dino-4scale_r50_8xb2-12e_coco.py", dino, 4),
        ("Mask2Former", "mask2former/mask2former_r50_8xb2-lsj-50e_coco.py", mask2former, 2),
    ):

        def made(file=file, change=change):
            with mmcv.install():
                mmdet = importlib.import_module("mmdet.models")
            engine = importlib.import_module("mmengine")
            engine.DefaultScope.get_instance("served_models", scope_name="mmdet")
            configs = Path(mmdet.__file__).parent.parent / ".mim/configs"
            config = engine.Config.fromfile(configs / file).model
            change(config)
            sample = importlib.import_module("mmdet.structures").DetDataSample()
            shape = (96, 128)
            sample.set_metainfo({"img_shape": shape, "batch_input_shape": shape, "ori_shape": shape})
            model = importlib.import_module("mmdet.registry").MODELS.build(config)
            return model, lambda model: model(image(), [sample], mode="tensor")

        yield Model("mmdet", name, made, calls)


class Layer(torch.nn.Module):
    """Computes by a function, from parameters."""

    def __init__(self, function, convention):
        super().__init__()
        *leaves, _ = model_functions.samples(model_functions.points_of(convention))
        self.leaves = torch.nn.ParameterList(leaf.detach() for leaf in leaves)
        self.function, self.convention = function, convention

    def forward(self):
        arguments, others = model_functions.arguments_of(self.convention, self.leaves)
        return self.function(*arguments, **others)


def of_stand_ins():
    """Functions of ours by the conventions of repositories without a package."""
    for convention, (make, *_) in model_functions.CONVENTIONS.items():

        def made(make=make, convention=convention):
            return Layer(make(), convention), lambda model: model()

        yield Model(STAND_INS, convention, made, 1)


MAKERS = {"transformers": of_transformers, "ultralytics": of_ultralytics, "rfdetr": of_rfdetr, "mmdet": of_mmdet}


def models_of(package):
    """The models of a package; none where it is not installed."""
    if package == STAND_INS:
        return list(of_stand_ins())
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return []
    import_torchvision()
    return list(MAKERS[package]())
