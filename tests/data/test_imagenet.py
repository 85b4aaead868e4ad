"""The order and the names of ImageNet's classes."""

from torchvision.models import ResNet18_Weights

from src.data.imagenet import WNIDS, english_names


def test_there_are_1000_sorted_wnids() -> None:
    assert len(WNIDS) == 1000
    assert list(WNIDS) == sorted(set(WNIDS))
    assert all(len(wnid) == 9 and wnid[0] == "n" and wnid[1:].isdigit() for wnid in WNIDS)


def test_names_all_differ_and_match_torchvisions_weights() -> None:
    names = english_names(WNIDS)
    published = ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    differing = {one: other for one, other in zip(published, names, strict=True) if one != other}
    assert differing == {"Cardigan": "Cardigan Welsh corgi"}  # published networks also have the garment "cardigan"
    assert len({name.lower() for name in names}) == 1000


def test_classes_of_similar_names_are_told_apart() -> None:
    assert english_names(["n02012849", "n03126707"]) == ["crane bird", "crane"]
    assert english_names(["n03710637", "n03710721"]) == ["maillot", "maillot tank suit"]


def test_other_names_stay_the_same() -> None:
    assert english_names(["n01440764", "apple", "n99999999", ""]) == ["tench", "apple", "n99999999", ""]
    assert english_names([]) == []
