"""The augmentation as a part of names and identities. Its views: test_view_reader.py."""

from src.data.augmentation import Augmentation
from src.data.mixing import CutMix, MixUp
from src.data.policies import RandAugment, TrivialAugment


def test_what_decides_a_view_is_part_of_the_key() -> None:
    different = [
        Augmentation(),
        Augmentation(crop_and_flip=False),
        Augmentation(policy=TrivialAugment()),
        Augmentation(policy=RandAugment()),
        Augmentation(policy=RandAugment(strength=10)),
        Augmentation(policy=RandAugment(), policy_from_view=1),
        Augmentation(mixing=MixUp(alpha=0.5)),
        Augmentation(mixing=CutMix(alpha=0.5)),
        Augmentation(policy=RandAugment(), mixing=CutMix(alpha=0.5)),
    ]
    assert len({augmentation.key for augmentation in different}) == len(different)
    assert Augmentation().key == ""  # view stores of earlier versions stay valid
    assert Augmentation(policy=RandAugment()).key == Augmentation(policy=RandAugment()).key


def test_only_crops_and_flips_are_geometric() -> None:
    assert Augmentation().is_geometric
    assert not Augmentation().is_constant
    assert Augmentation(crop_and_flip=False).is_constant
    for augmentation in (Augmentation(policy=TrivialAugment()), Augmentation(mixing=MixUp(), crop_and_flip=False)):
        assert not augmentation.is_geometric
        assert not augmentation.is_constant
