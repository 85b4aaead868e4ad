"""Factor transfer (FT): Kim et al., "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS
2018, arXiv 1802.04977.

In a first stage a paraphraser, a convolutional auto-encoder, learns to reconstruct the teacher's last feature map; its
code is the teacher's factor F_t. Then a translator, trained with the student, makes of the student's last feature map
the student's factor F_s, and the loss is | F_t / |F_t|_2 - F_s / |F_s|_2 |_1, averaged over elements.

What a factor is there: the whole code in the paper and in the authors' code, whose weight is 500 (`whole_factor: true`,
`factor_weight: 500`); in RepDistiller, whose weight 200 is the default here, its mean of squares over channels, one
number a pixel. Layers are RepDistiller's: batch norm in the translator and none in the paraphraser.
"""

import torch
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor, nn
from torch.nn import functional as F

from src.errors import UserError
from src.methods.at import attention_map
from src.methods.features import at_one_resolution, stage_pairs, stage_shapes, unit
from src.methods.method import Batch, Method, Networks, Stage, at_least_float32, cross_entropy


def factor_loss(student: Tensor, teacher: Tensor, whole: bool) -> Tensor:
    """Mean of |f_s - f_t| of both factors [B, C, H, W], brought to length 1 as a whole or as their map of squares.

    The larger is first averaged down to the resolution of the smaller. A factor of zeros stays zero.

    >>> factor = torch.rand(2, 3, 4, 4)
    >>> factor_loss(5 * factor, factor, whole=True).item() < 1e-6
    True
    """
    student, teacher = at_one_resolution(at_least_float32(student), at_least_float32(teacher))
    if whole:
        return F.l1_loss(unit(student.flatten(1), dim=1), unit(teacher.flatten(1), dim=1))
    return F.l1_loss(attention_map(student, 2.0), attention_map(teacher, 2.0))


class Encoder(nn.Sequential):
    """Three 3x3 convolutions with leaky ReLU from [B, channels, H, W] to [B, factor_channels, H, W]."""

    def __init__(self, channels: int, factor_channels: int, norm: bool) -> None:
        layers: list[nn.Module] = []
        for before, after in ((channels, channels), (channels, factor_channels), (factor_channels, factor_channels)):
            layers.append(nn.Conv2d(before, after, 3, padding=1))
            layers += [nn.BatchNorm2d(after)] if norm else []
            layers.append(nn.LeakyReLU(0.1))
        super().__init__(*layers)


class Decoder(nn.Sequential):
    """The way back, by transposed convolutions."""

    def __init__(self, channels: int, factor_channels: int) -> None:
        layers: list[nn.Module] = []
        for before, after in ((factor_channels, factor_channels), (factor_channels, channels), (channels, channels)):
            layers += [nn.ConvTranspose2d(before, after, 3, padding=1), nn.LeakyReLU(0.1)]
        super().__init__(*layers)


class Paraphrasing(Method):
    """The first stage: the mean squared error of the reconstructed features; it trains the paraphraser alone."""

    needs_features = True

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def weights(self, epoch: int) -> dict[str, float]:
        """One."""
        return {"reconstruction": 1.0}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Of the teacher's last feature map."""
        features = stage_pairs(batch)[-1][1]
        rebuilt = self.decoder(self.encoder(features))
        return {"reconstruction": F.mse_loss(at_least_float32(rebuilt), at_least_float32(features))}


class FT(Method):
    """A stage of the paraphraser, then cross_entropy_weight * CE + factor_weight * FT.

    The stage lasts initial_epochs, at least one, at initial_learning_rate_scale times the learning rate. A factor has
    `rate` times the channels of the teacher's last features.
    """

    needs_features = True
    paraphraser: Encoder
    decoder: Decoder
    translator: Encoder

    def __init__(
        self,
        *,
        cross_entropy_weight: float,
        factor_weight: float,
        whole_factor: bool,
        rate: PositiveFloat,
        initial_epochs: NonNegativeInt,
        initial_learning_rate_scale: PositiveFloat,
    ) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.factor_weight = factor_weight
        self.whole_factor = whole_factor
        self.rate = rate
        self.initial_epochs = initial_epochs
        self.initial_learning_rate_scale = initial_learning_rate_scale

    def build(self, networks: Networks) -> None:
        """Paraphraser and translator. Raises `UserError` where a network has no stages, or a map has only one pixel."""
        (student, *size), (teacher, *other_size) = stage_shapes(networks, "ft")[-1]
        if not self.whole_factor and [1, 1] in (size, other_size):
            raise UserError(
                "method=ft compares maps of length 1, and one of one pixel is always the same: add "
                "method.whole_factor=true method.factor_weight=500, or use larger images."
            )
        channels = max(1, int(self.rate * teacher))
        self.paraphraser = Encoder(teacher, channels, norm=False)
        self.decoder = Decoder(teacher, channels)
        self.translator = Encoder(student, channels, norm=True)

    def stages(self) -> tuple[Stage, ...]:
        """The paraphraser."""
        paraphrasing = Paraphrasing(self.paraphraser, self.decoder)
        return (Stage("paraphraser", paraphrasing, max(1, self.initial_epochs), self.initial_learning_rate_scale),)

    def weights(self, epoch: int) -> dict[str, float]:
        """Constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "factor": self.factor_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """CE on the student's own logits, FT at the last stage; the paraphraser learns no more."""
        student, teacher = stage_pairs(batch)[-1]
        with torch.no_grad():
            factor = self.paraphraser(teacher)
        return {
            "cross_entropy": cross_entropy(batch),
            "factor": factor_loss(self.translator(student), factor, self.whole_factor),
        }
