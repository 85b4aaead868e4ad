"""ImageNet's classes stand in the order of every published network's logits."""

from torchvision.models import ResNet18_Weights

from src.data.imagenet import WNIDS, readable


def test_wnids_are_the_sorted_thousand():
    assert len(WNIDS) == 1000
    assert list(WNIDS) == sorted(set(WNIDS))
    assert all(len(wnid) == 9 and wnid[0] == "n" and wnid[1:].isdigit() for wnid in WNIDS)


def test_names_are_those_of_torchvisions_weights_and_all_differ():
    names = readable(WNIDS)
    published = ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    differing = {one: other for one, other in zip(published, names, strict=True) if one != other}
    assert differing == {"Cardigan": "Cardigan Welsh corgi"}  # beside the garment
    assert len({name.lower() for name in names}) == 1000


def test_names_that_are_easily_mistaken():
    assert readable(["n02012849", "n03126707"]) == ["crane bird", "crane"]
    assert readable(["n03710637", "n03710721"]) == ["maillot", "maillot tank suit"]


def test_other_names_stay():
    assert readable(["n01440764", "apple", "n99999999", ""]) == ["tench", "apple", "n99999999", ""]
    assert readable([]) == []
