"""Values that Hydra's grammar refuses are read if they can mean only one text, and explained if not."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException

from src.common.errors import UserError
from src.config.overrides import explain, forced, readable, text_options
from tests.helpers.configure import configure


@pytest.mark.parametrize(
    "value",
    [
        "epoch=9-step=100.ckpt",
        "my photos (2).npz",
        "a b.npz",
        "[1].npz",
        "{x}.npz",
        "~/größe/x.npz",
        "it's.npz",
        "a&b;c#d!.npz",
        "1_000",
        "1e5",
        "true",
        "$HOME/a=b",
        "back\\slash=1",
        " x=1 ",
    ],
)
@pytest.mark.parametrize("option", ["teacher.path", "data.root", "runs"])
def test_a_path_reaches_the_configuration_as_it_was_typed(option: str, value: str) -> None:
    (override,) = readable([f"{option}={value}"])
    node, _, key = option.rpartition(".")
    cfg = configure(override)
    assert (cfg[node] if node else cfg)[key] == value


@pytest.mark.parametrize(
    "override",
    [
        "data.path='[1].npz'",
        "data.path=null",
        "data.path=2024-05-01.npz",
        "runs=10",
        "runs=${data.root}/runs",
        "seed=0,1,2",
        "method=glob(*)",
        "data.mean=[0.1,0.2,0.3]",
        "~averaging",
        "method@also=sp",
        "++seed=1_0",
        "teacher.path=a.pth,b.pth",
    ],
)
def test_an_override_that_hydra_reads_stays_as_it_is(override: str) -> None:
    assert readable([override]) == [override]


def test_a_sweep_over_paths_stays_a_sweep() -> None:
    assert readable(["teacher.path=epoch=1.ckpt,epoch=2.ckpt", "-m"]) == [
        "-m",
        "teacher.path='epoch=1.ckpt','epoch=2.ckpt'",
    ]
    for typed in ("teacher.path=epoch=1.ckpt,epoch=2.ckpt", "teacher.path=a.pth,b.pth"):
        parsed = OverridesParser.create().parse_override(readable([typed])[0])
        assert parsed.is_sweep_override()
        assert len(list(parsed.sweep_iterator())) == 2


def test_flags_may_stand_anywhere() -> None:
    assert readable(["seed=0", "-m", "method=kd", "--cfg", "job"]) == ["-m", "--cfg", "job", "seed=0", "method=kd"]


@pytest.mark.parametrize(
    ("override", "quoted"),
    [
        ("data.mean=[0.1,0.2", "\"data.mean='[0.1,0.2'\""),
        ("data.path=photos(1),b.npz", "\"data.path='photos(1),b.npz'\""),
        ("logger.project=a=1,b=2", "\"logger.project='a=1,b=2'\""),
        ("data.path='a", None),
        ("runs=${oc.env:X", "\"runs='${oc.env:X'\""),
    ],
)
def test_an_ambiguous_value_is_refused_with_the_form_that_works(override: str, quoted: str | None) -> None:
    with pytest.raises(UserError) as caught:
        readable([override])
    assert str(caught.value).startswith(f"{override} cannot be read: close its brackets and quotes. If the value is a ")
    if quoted:
        assert str(caught.value).endswith(f"quote it twice, for the shell and for Hydra: {quoted}.")
        OverridesParser.create().parse_override(quoted.strip('"'))


def test_the_text_of_any_other_option_is_read_if_it_cannot_be_several_values() -> None:
    assert readable(["logger.project=a=b (1)"]) == ["logger.project='a=b (1)'"]
    assert "logger.project" not in text_options()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["=1"], "=1 does not name an option: write option=value. --help lists the options."),
        (["++@package=x"], "++@package=x does not name an option: write option=value. --help lists the options."),
        (["seed =1"], "seed =1 does not name an option: write option=value. --help lists the options."),
        (["seed", "=", "1"], "seed has no value: write seed=value, without spaces around the equals sign."),
        (["--epochs=5"], "--epochs=5 is not a flag of this command: an option has no dashes, as in option=value."),
        (["seed=1", "--epochs", "5"], "--epochs is not a flag of this command: an option has no dashes, as in opti"),
    ],
)
def test_an_argument_that_is_no_override_is_explained(arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        readable(arguments)
    assert str(caught.value).startswith(sentence)


NOT_FOUND = ConfigCompositionException(
    "Could not override 'trainer.max_time'.\nTo append to your config use +trainer..."
)


def test_an_option_that_is_not_in_the_configuration_is_forced_into_it() -> None:
    assert forced(["-m", "seed=1", "trainer.max_time=1"], NOT_FOUND) == ["-m", "seed=1", "++trainer.max_time=1"]
    assert forced(["seed=1", "++trainer.max_time=1"], NOT_FOUND) is None
    assert forced(["--cfg", "job", "trainer.max_time=1"], NOT_FOUND) is None
    hydras = ConfigCompositionException("Could not override 'hydra.foo'.\nTo append to your config use +hydra.foo=1")
    assert forced(["hydra.foo=1"], hydras) is None
    assert forced(["seed=1"], ValueError("seed")) is None


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["trainer.nonsense=1"], "trainer.nonsense is not an option: check its name. --help lists the options."),
        (["+seed=1"], "seed is an option already: remove the + before it."),
        (["seed.x=1"], "seed is a single value, which has no options of its own."),
        (["+teacher.path.x=1"], "teacher.path is a single value, which has no options of its own."),
    ],
)
def test_hydras_errors_are_explained_without_the_advice_to_add_an_option(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigCompositionException) as caught:
        configure(*overrides)
    assert explain(caught.value) == sentence
    assert explain(ValueError("another error")) is None
