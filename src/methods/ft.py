"""Factor transfer (FT): Kim et al., "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS
2018, arXiv 1802.04977.

    first stage   loss = mean squared error of the teacher's reconstructed features
    main stage    loss = cross_entropy_weight * CE + factor_weight * FT
                  FT   = | F_t / |F_t|_2 - F_s / |F_s|_2 |_1, averaged over elements

Notation: F_t is the teacher's factor, the code of a paraphraser. F_s is the student's factor, the output of a
translator. The paraphraser is a convolutional auto-encoder of the teacher's last feature map and is trained in the
first stage. The translator reads the student's last feature map and is trained with the student.

In RepDistiller, a factor is the mean of the squared code over channels, one number per pixel. This form and its weight
200 are the defaults here. In the paper and in the authors' code, a factor is the whole code, and the weight is 500:
`whole_factor: true`, `factor_weight: 500`. The layers are RepDistiller's: batch norm in the translator and none in the
paraphraser.
"""

import torch
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor, nn
from torch.nn import functional as F

from src.common.errors import UserError
from src.methods.at import attention_map
from src.methods.features import at_one_resolution, stage_pairs, stage_shapes, unit
from src.methods.method import Batch, Method, Networks, Stage, at_least_float32, cross_entropy


def factor_loss(student: Tensor, teacher: Tensor, whole: bool) -> Tensor:
    """Compute the mean of |f_s - f_t| of the factors [B, C, H, W] of both networks.

    Each factor is scaled to length 1, as a whole or as its map of squares. The larger is first averaged down to the
    resolution of the smaller. A factor of zeros stays zero.

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
    """Three transposed 3x3 convolutions with leaky ReLU, from [B, factor_channels, H, W] to [B, channels, H, W]."""

    def __init__(self, channels: int, factor_channels: int) -> None:
        layers: list[nn.Module] = []
        for before, after in ((factor_channels, factor_channels), (factor_channels, channels), (channels, channels)):
            layers += [nn.ConvTranspose2d(before, after, 3, padding=1), nn.LeakyReLU(0.1)]
        super().__init__(*layers)


class Paraphrasing(Method):
    """The first stage: the mean squared error of the reconstructed features. It trains the paraphraser alone."""

    needs_features = True

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def weights(self, epoch: int) -> dict[str, float]:
        """Return the weight 1."""
        return {"reconstruction": 1.0}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return the reconstruction error of the teacher's last feature map."""
        features = stage_pairs(batch)[-1][1]
        rebuilt = self.decoder(self.encoder(features))
        return {"reconstruction": F.mse_loss(at_least_float32(rebuilt), at_least_float32(features))}


class FT(Method):
    """A first stage that trains the paraphraser, then cross_entropy_weight * CE + factor_weight * FT.

    The first stage lasts initial_epochs, at least one, at initial_learning_rate_scale times the learning rate. A factor
    has `rate` times the channels of the teacher's last features.
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

    def allocate(self, networks: Networks) -> None:
        """Make paraphraser and translator.

        Raises `UserError` if a network has no stages, or if `whole_factor` is false and a map has only one pixel.
        """
        (student, *size), (teacher, *other_size) = stage_shapes(networks, "ft")[-1]
        if not self.whole_factor and [1, 1] in (size, other_size):
            raise UserError(
                "method=ft compares maps scaled to length 1, which are always equal for a map of one pixel: add "
                "method.whole_factor=true method.factor_weight=500, or use larger images."
            )
        channels = max(1, int(self.rate * teacher))
        self.paraphraser = Encoder(teacher, channels, norm=False)
        self.decoder = Decoder(teacher, channels)
        self.translator = Encoder(student, channels, norm=True)

    def stages(self) -> tuple[Stage, ...]:
        """List the stage that trains the paraphraser."""
        paraphrasing = Paraphrasing(self.paraphraser, self.decoder)
        return (Stage("paraphraser", paraphrasing, max(1, self.initial_epochs), self.initial_learning_rate_scale),)

    def weights(self, epoch: int) -> dict[str, float]:
        """Return constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "factor": self.factor_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return cross-entropy on the student's own logits, and FT at the last stage.

        The paraphraser is not trained further.
        """
        student, teacher = stage_pairs(batch)[-1]
        with torch.no_grad():
            factor = self.paraphraser(teacher)
        return {
            "cross_entropy": cross_entropy(batch),
            "factor": factor_loss(self.translator(student), factor, self.whole_factor),
        }
