"""Image models written as torchvision's and timm's sources write them, small."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_attention import GMLP, Mixer, Swin, ViT
from zoo_parts import Permute, StochasticDepth


class Conv2dNormActivation(nn.Sequential):
    """torchvision.ops.misc."""

    def __init__(
        self,
        inp: int,
        out: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        activation: Callable[..., nn.Module] | None = nn.ReLU,
        dilation: int = 1,
    ) -> None:
        padding = (kernel_size - 1) // 2 * dilation
        layers: list[nn.Module] = [
            nn.Conv2d(inp, out, kernel_size, stride, padding, dilation=dilation, groups=groups, bias=False),
            nn.BatchNorm2d(out),
        ]
        if activation is not None:
            layers.append(activation(inplace=True))
        super().__init__(*layers)


class SqueezeExcitation(nn.Module):
    """A channel-wise gate computed from the channels themselves."""

    def __init__(
        self, channels: int, squeeze: int, activation: Any = nn.ReLU, scale_activation: Any = nn.Sigmoid
    ) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeeze, 1)
        self.fc2 = nn.Conv2d(squeeze, channels, 1)
        self.activation = activation()
        self.scale_activation = scale_activation()

    def _scale(self, input: Tensor) -> Tensor:
        scale = self.avgpool(input)
        scale = self.activation(self.fc1(scale))
        return self.scale_activation(self.fc2(scale))

    def forward(self, input: Tensor) -> Tensor:
        return self._scale(input) * input


class BasicBlock(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample: nn.Module | None = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """ResNet's; grouped in the middle: ResNeXt's and RegNet's."""

    def __init__(self, inplanes: int, width: int, out: int, stride: int = 1, groups: int = 1, se: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.se = SqueezeExcitation(width, 3) if se else nn.Identity()
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inplanes != out:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.se(self.relu(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, blocks: list[nn.Module], stem: int, last: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(last, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer1(x))
        return self.fc(torch.flatten(x, 1))


def resnet() -> nn.Module:
    return ResNet([BasicBlock(4, 4), BasicBlock(4, 6, 2), BasicBlock(6, 6)], 4, 6)


def resnet_bottleneck() -> nn.Module:
    return ResNet([Bottleneck(4, 3, 8), Bottleneck(8, 3, 8, 2)], 4, 8)


def resnext() -> nn.Module:
    return ResNet([Bottleneck(4, 6, 8, groups=3), Bottleneck(8, 6, 8, 2, groups=3)], 4, 8)


def regnet() -> nn.Module:
    return ResNet([Bottleneck(4, 6, 8, groups=2, se=True), Bottleneck(8, 6, 8, 2, groups=2, se=True)], 4, 8)


class InvertedResidual(nn.Module):
    """MobileNetV2's and, with ``se``, MobileNetV3's and EfficientNet's."""

    def __init__(self, inp: int, exp: int, out: int, stride: int, se: bool, activation: Any, drop: float = 0.0) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and inp == out
        layers: list[nn.Module] = [Conv2dNormActivation(inp, exp, 1, activation=activation)] if exp != inp else []
        layers.append(Conv2dNormActivation(exp, exp, 3, stride, groups=exp, activation=activation))
        if se:
            layers.append(SqueezeExcitation(exp, 3, scale_activation=nn.Hardsigmoid if drop == 0 else nn.Sigmoid))
        layers.append(Conv2dNormActivation(exp, out, 1, activation=None))
        self.block = nn.Sequential(*layers)
        self.stochastic_depth = StochasticDepth(drop)

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if self.use_res_connect:
            result = self.stochastic_depth(result)
            result += x
        return result


class Mobile(nn.Module):
    def __init__(self, se: bool, activation: Any, drop: float = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential(
            Conv2dNormActivation(3, 4, 3, 2, activation=activation),
            InvertedResidual(4, 4, 4, 1, se, activation, drop),
            InvertedResidual(4, 6, 5, 2, se, activation, drop),
            InvertedResidual(5, 7, 5, 1, se, activation, drop),
            Conv2dNormActivation(5, 8, 1, activation=activation),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(8, 6), nn.Hardswish(inplace=True), nn.Dropout(p=0.2, inplace=True), nn.Linear(6, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


def mobilenet_v2() -> nn.Module:
    return Mobile(False, nn.ReLU6)


def mobilenet_v3() -> nn.Module:
    return Mobile(True, nn.Hardswish)


def efficientnet() -> nn.Module:
    return Mobile(True, nn.SiLU, 0.2)


class _DenseLayer(nn.Module):
    def __init__(self, inp: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inp)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inp, 4, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, growth, 3, padding=1, bias=False)

    def bn_function(self, inputs: list[Tensor]) -> Tensor:
        concated_features = torch.cat(inputs, 1)
        return self.conv1(self.relu1(self.norm1(concated_features)))

    def forward(self, input: Tensor | list[Tensor]) -> Tensor:
        prev_features = [input] if isinstance(input, Tensor) else input
        return self.conv2(self.relu2(self.norm2(self.bn_function(prev_features))))


class _DenseBlock(nn.ModuleDict):
    def __init__(self, layers: int, inp: int, growth: int) -> None:
        super().__init__()
        for i in range(layers):
            self.add_module(f"denselayer{i + 1}", _DenseLayer(inp + i * growth, growth))

    def forward(self, init_features: Tensor) -> Tensor:
        features = [init_features]
        for _, layer in self.items():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            OrderedDict(
                [
                    ("conv0", nn.Conv2d(3, 4, 3, 2, 1, bias=False)),
                    ("norm0", nn.BatchNorm2d(4)),
                    ("relu0", nn.ReLU(inplace=True)),
                    ("denseblock1", _DenseBlock(2, 4, 2)),
                    ("transition_norm", nn.BatchNorm2d(8)),
                    ("transition_relu", nn.ReLU(inplace=True)),
                    ("transition_conv", nn.Conv2d(8, 4, 1, bias=False)),
                    ("transition_pool", nn.AvgPool2d(2, 2)),
                    ("denseblock2", _DenseBlock(2, 4, 2)),
                    ("norm5", nn.BatchNorm2d(8)),
                ]
            )
        )
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        out = F.relu(features, inplace=True)
        out = F.adaptive_avg_pool2d(out, (1, 1))
        return self.classifier(torch.flatten(out, 1))


class VGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2),
            nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2),
        )  # fmt: skip
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(5 * 4, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 8), nn.ReLU(True), nn.Dropout(),
            nn.Linear(8, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


class BasicConv2d(nn.Module):
    def __init__(self, inp: int, out: int, **kwargs: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inp, out, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)), inplace=True)


class Inception(nn.Module):
    """torchvision's GoogLeNet block, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = BasicConv2d(3, 4, kernel_size=3, stride=2)
        self.a, self.b = self._branches(4), self._branches(9)
        self.fc = nn.Linear(9, 3)

    def _branches(self, inp: int) -> nn.ModuleList:
        return nn.ModuleList(
            [
                BasicConv2d(inp, 2, kernel_size=1),
                nn.Sequential(BasicConv2d(inp, 3, kernel_size=1), BasicConv2d(3, 3, kernel_size=3, padding=1)),
                nn.Sequential(BasicConv2d(inp, 2, kernel_size=1), BasicConv2d(2, 2, kernel_size=5, padding=2)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), BasicConv2d(inp, 2, kernel_size=1)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branches in (self.a, self.b):
            x = torch.cat([branch(x) for branch in branches], 1)
        return self.fc(x.mean([2, 3]))


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """torchvision.models.shufflenetv2."""
    batchsize, num_channels, height, width = x.size()
    channels_per_group = num_channels // groups
    x = x.view(batchsize, groups, channels_per_group, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batchsize, num_channels, height, width)


class _Shuffle(nn.Module):
    def __init__(self, inp: int, oup: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        half = oup // 2
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(
                nn.Conv2d(inp, inp, 3, stride, 1, groups=inp, bias=False), nn.BatchNorm2d(inp),
                nn.Conv2d(inp, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
            )  # fmt: skip
        self.branch2 = nn.Sequential(
            nn.Conv2d(inp if stride > 1 else half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
            nn.Conv2d(half, half, 3, stride, 1, groups=half, bias=False), nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


class ShuffleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = Conv2dNormActivation(3, 4, 3, 2)
        self.stage = nn.Sequential(_Shuffle(4, 8, 2), _Shuffle(8, 8, 1))
        self.conv5 = Conv2dNormActivation(8, 6, 1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv5(self.stage(self.conv1(x))).mean([2, 3]))


class DoubleConv(nn.Sequential):
    def __init__(self, inp: int, out: int) -> None:
        super().__init__(
            nn.Conv2d(inp, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True),
        )  # fmt: skip


class UNet(nn.Module):
    """milesial's: pads the upsampled map to the skip's size, cats, transposed convolution or upsample."""

    def __init__(self, bilinear: bool = False) -> None:
        super().__init__()
        self.inc = DoubleConv(3, 4)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(4, 5))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(5, 6))
        self.up1: nn.Module
        self.up2: nn.Module
        if bilinear:
            self.up1 = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.up2 = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        else:
            self.up1, self.up2 = nn.ConvTranspose2d(6, 6, 2, 2), nn.ConvTranspose2d(5, 5, 2, 2)
        self.conv1, self.conv2 = DoubleConv(11, 5), DoubleConv(9, 4)
        self.outc = nn.Conv2d(4, 2, 1)

    def _up(self, x1: Tensor, x2: Tensor) -> Tensor:
        diff_y, diff_x = x2.size()[2] - x1.size()[2], x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [diff_x // 2, diff_x - diff_x // 2, diff_y // 2, diff_y - diff_y // 2])
        return torch.cat([x2, x1], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x = self.conv1(self._up(self.up1(x3), x2))
        x = self.conv2(self._up(self.up2(x), x1))
        return self.outc(x)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class CNBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(dim, dim, 7, padding=3, groups=dim), Permute([0, 2, 3, 1]), nn.LayerNorm(dim, eps=1e-6),
            nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim), Permute([0, 3, 1, 2]),
        )  # fmt: skip
        self.layer_scale = nn.Parameter(torch.ones(dim, 1, 1) * 0.1)
        self.stochastic_depth = StochasticDepth(0.1)

    def forward(self, input: Tensor) -> Tensor:
        result = self.layer_scale * self.block(input)
        result = self.stochastic_depth(result)
        result += input
        return result


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 4, 4), LayerNorm2d(4), CNBlock(4), LayerNorm2d(4), nn.Conv2d(4, 6, 2, 2), CNBlock(6)
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(LayerNorm2d(6), nn.Flatten(1), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)))


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's: a batch norm that activates."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.act(self.drop(x))


class TimmNet(nn.Module):
    """timm's pre-activation style: norm_layer activates, weight standardised convolutions aside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = BatchNormAct2d(4)
        self.conv2 = nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect")
        self.bn2 = BatchNormAct2d(5)
        self.conv3 = nn.Conv2d(5, 5, 3, padding="same")
        self.gn = nn.GroupNorm(1, 5)
        self.act = nn.SiLU()
        self.head = nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        x = self.act(self.gn(self.conv3(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1)).flatten(1)


class PixelShuffleNet(nn.Module):
    """A sub-pixel super-resolution head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 5, padding=2)
        self.conv2 = nn.Conv2d(4, 8, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.conv3 = nn.Conv2d(2, 3 * 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shuffle(torch.tanh(self.conv2(torch.tanh(self.conv1(x)))))
        return self.shuffle(self.conv3(torch.tanh(x)))


class Generator(nn.Module):
    """DCGAN's."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(6, 5, 4, 1, 0, bias=False), nn.BatchNorm2d(5), nn.ReLU(True),
            nn.ConvTranspose2d(5, 4, 3, 2, 1, output_padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(True),
            nn.ConvTranspose2d(4, 3, 4, 2, 1, bias=False), nn.Tanh(),
        )  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z.view(z.size(0), -1, 1, 1))


class GroupedGenerator(nn.Sequential):
    """Transposed convolutions in groups: read from a plain layer, one behind the other, and read by a grouped one."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv1d(4, 6, 3), nn.Tanh(),
            nn.ConvTranspose1d(6, 4, 4, 2, groups=2), nn.ReLU(),
            nn.ConvTranspose1d(4, 8, 3, padding=1, groups=2), nn.Tanh(),
            nn.Conv1d(8, 4, 3, groups=2), nn.Tanh(),
            nn.Conv1d(4, 3, 1),
        )  # fmt: skip


class GroupedNormed(nn.Module):
    """A grouped convolution and a GroupNorm on one axis."""

    def __init__(self, conv_groups: int, norm_groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1 = nn.GroupNorm(norm_groups, 8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=conv_groups)
        self.norm2 = nn.GroupNorm(norm_groups, 8)
        self.act = nn.SiLU()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(x)))
        x = self.act(self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


IMAGES: dict[str, Callable[[], nn.Module]] = {
    "resnet": resnet,
    "resnet_bottleneck": resnet_bottleneck,
    "resnext": resnext,
    "regnet": regnet,
    "mobilenet_v2": mobilenet_v2,
    "mobilenet_v3": mobilenet_v3,
    "efficientnet": efficientnet,
    "densenet": DenseNet,
    "vgg": VGG,
    "inception": Inception,
    "shufflenet": ShuffleNet,
    "unet": UNet,
    "unet_bilinear": partial(UNet, True),
    "convnext": ConvNeXt,
    "timm": TimmNet,
    "pixel_shuffle": PixelShuffleNet,
    "grouped_normed": partial(GroupedNormed, 2, 2),
    "grouped_normed_nested": partial(GroupedNormed, 2, 4),
    "grouped_normed_single": partial(GroupedNormed, 4, 1),
    "vit": ViT,
    "vit_glu": partial(ViT, glu=True),
    "vit_eager": partial(ViT, fused=False),
    "swin": Swin,
    "mixer": Mixer,
    "gmlp": GMLP,
    "gmlp_plain": partial(GMLP, False),
}
"""All take (samples, 3, 16, 16)."""
