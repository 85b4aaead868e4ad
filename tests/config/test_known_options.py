"""An option that nothing reads is refused, and the option that was meant is suggested."""

import pytest

from src.common.errors import UserError
from src.config.known_options import check_options, check_run_options, close_options
from src.config.schema import COMMAND_SCHEMAS
from tests.helpers.configure import changed, configure, options

GROUPS = ("data", "trainer", "schedule", "optimizer", "averaging", "logger", "serialization", "experiment")


def refused(*overrides: str) -> str:
    """Return the sentence with which a configuration is refused."""
    given = [override.lstrip("+").partition("=")[0] for override in overrides]
    with pytest.raises(UserError) as caught:
        check_options(configure(*overrides), given)
    return str(caught.value)


@pytest.mark.parametrize("command", COMMAND_SCHEMAS)
def test_every_command_reads_all_its_options(command: str) -> None:
    check_options(configure(command=command))


@pytest.mark.parametrize(
    "choice", [f"{group}={name}" for group in GROUPS for name in options(group) if name != "search"]
)
def test_every_file_of_conf_holds_only_options_that_are_read(choice: str) -> None:
    check_options(configure(choice))


@pytest.mark.parametrize("method", options("method"))
def test_every_method_reads_all_its_options(method: str) -> None:
    check_options(configure(f"method={method}", f"method@also={method}"))


@pytest.mark.parametrize("network", options("network"))
def test_every_network_reads_all_its_options(network: str) -> None:
    check_options(configure(f"network@model.student={network}", f"network@model.teacher={network}"))


@pytest.mark.parametrize(
    ("override", "suggested"),
    [
        ("+epochs=5", "schedule.epochs"),
        ("+num_epochs=5", "schedule.epochs"),
        ("+num_workers=2", "data.workers"),
        ("+batch_size=5", "schedule.batch_size"),
        ("+seeds=1", "seed"),
        ("+val_size=5", "data.val_size"),
        ("+schedule.lr=123", "schedule.learning_rate"),
        ("+schedule.weight_decay=0", "schedule.optimizer.weight_decay"),
        ("+schedule.warmup=3", "schedule.distillation_warmup"),
        ("+method.temprature=3", "method.temperature"),
        ("+teacher.temperature=3", "method.temperature or gradients.temperature"),
        ("+gradients.evry=1", "gradients.every"),
        ("+model.students=2", "model.student"),
        ("+trainer.batch_size=4", "schedule.batch_size"),
        ("+trainer.epochs=4", "schedule.epochs"),
        ("+trainer.gradient_clip=1", "trainer.gradient_clip_val or trainer.gradient_clip_algorithm"),
        ("+trainer.logger=false", "logger"),
        ("+schedule.scheduler.gama=1", "schedule.scheduler.gamma"),
    ],
)
def test_an_unknown_option_is_answered_with_the_one_that_was_meant(override: str, suggested: str) -> None:
    sentence = refused(override)
    option = override[1:].partition("=")[0]
    assert sentence.startswith(f"{option} is not an option")
    assert sentence.endswith(f": did you mean {suggested}?")


@pytest.mark.parametrize(
    "override", ["+data.batch_size=5", "+data.seed=3", "+model.student.num_classes=3", "+schedule.optimizer.lr=0.5"]
)
def test_an_argument_that_the_code_passes_itself_is_no_option(override: str) -> None:
    assert refused(override).startswith(f"{override[1:].partition('=')[0]} is not an option of ")


@pytest.mark.parametrize(
    "override",
    ["+serialization.learning_rate=1", "+method.learning_rate=1", "+data.prepare.nonsense=1", "+teacher.method.mean=1"],
)
def test_a_key_that_describes_other_nodes_is_no_option(override: str) -> None:
    assert refused(override).startswith(f"{override[1:].partition('=')[0]} is not an option of ")


@pytest.mark.parametrize("option", ["teacher.checkpoint", "method.nonsense", "data.nonsense", "model.student.nonsense"])
def test_without_a_similar_option_those_of_the_node_are_listed(option: str) -> None:
    node = option.rpartition(".")[0]
    sentence = refused(f"+{option}=1")
    assert f": the options of {node} are " in sentence
    listed = sentence.partition(f"the options of {node} are ")[2].rstrip(".").split(", ")
    assert not {"return", "self", "options", "num_classes", "batch_size", "_target_", "_partial_"} & set(listed)
    assert set(listed) & {"path", "temperature", "train_size", "name"}


def test_without_any_similar_option_help_is_named() -> None:
    assert refused("+nonsense=1") == "nonsense is not an option: --help lists the options."


@pytest.mark.parametrize("group", ["averaging", "optimizer", "also"])
def test_an_option_of_a_group_that_is_switched_off_is_refused(group: str) -> None:
    assert refused(f"+{group}.decay=0.9") == (
        f"{group}.decay is not an option while {group} is switched off: choose a file of conf/ for it first. --help "
        "lists the groups."
    )
    for override in ("+logger.project=x", "+logger={project: x}", "+logger.a.b=1"):
        assert "while logger is switched off" in refused("logger=none", override)


@pytest.mark.parametrize("group", ["averaging", "optimizer", "also", "logger"])
def test_a_file_of_such_a_group_needs_a_target(group: str) -> None:
    cfg = changed(configure(), **{group: {"decay": 0.9}})
    with pytest.raises(
        UserError, match=rf"^{group}\._target_ is missing: add the key '_target_' to its file in conf/\.$"
    ):
        check_options(cfg)


def test_an_option_that_another_target_leaves_behind_is_removed_by_name() -> None:
    sentence = refused("schedule.optimizer._target_=torch.optim.AdamW")
    assert sentence == (
        "schedule.optimizer.momentum is not an option of torch.optim.AdamW: remove it with "
        "~schedule.optimizer.momentum, or choose another _target_."
    )
    check_options(configure("schedule.optimizer._target_=torch.optim.AdamW", "~schedule.optimizer.momentum"))


@pytest.mark.parametrize(
    "override",
    [
        "+trainer.gradient_clip_val=1.0",
        "+trainer.accumulate_grad_batches=2",
        "+trainer.callbacks=[{_target_:lightning.pytorch.callbacks.EarlyStopping,monitor:test/accuracy}]",
        "+method.pairs.my_pair.beta=2",
        "+model.student.published_accuracy.mine=90",
        "+schedule.optimizer.nesterov=true",
        "method.cross_entropy_weight=0.5",
        "trainer.plugins=null",
    ],
)
def test_arguments_of_a_target_and_free_tables_are_options(override: str) -> None:
    check_options(configure("trainer=slurm", override))


def test_an_option_within_a_list_is_checked_too() -> None:
    callback = "{_target_:lightning.pytorch.callbacks.EarlyStopping,monitor:test/accuracy,patients:3}"
    sentence = refused(f"+trainer.callbacks=[{callback}]")
    assert sentence == (
        "trainer.callbacks[0].patients is not an option of lightning.pytorch.callbacks.EarlyStopping: remove it from "
        "trainer.callbacks."
    )


def test_names_in_the_place_of_the_option_are_preferred() -> None:
    names = ["method.temperature", "gradients.temperature", "teacher.path", "student.path"]
    assert close_options("gradients.temprature", names) == ["gradients.temperature"]
    assert close_options("temperature", names) == ["method.temperature", "gradients.temperature"]
    assert close_options("teacher.pth", names) == ["teacher.path"]
    assert close_options("x", names) == close_options("x", []) == []


OF_RUN = {
    "evaluate": ("data.path=a.npz", "data.root=photos", "trainer=cpu", "trainer.accelerator=cpu"),
    "export": ("format=onnx", "images=5"),
    "measure": ("teacher.path=a.pth", "rounds=1"),
}


@pytest.mark.parametrize("command", OF_RUN)
def test_options_that_a_run_replaces_are_refused(command: str) -> None:
    cfg = configure("run=runs/x", command=command)
    check_run_options(cfg, {override.partition("=")[0] for override in ("run=runs/x", *OF_RUN[command])})
    for option in ("data.val_size", "method", "seed", *(() if command == "measure" else ("teacher.path",))):
        with pytest.raises(UserError, match=rf"^{option} cannot be given together with run=\.\.\., because"):
            check_run_options(cfg, {"run", option})
        check_run_options(configure("checkpoint=a.pth", command=command), {"checkpoint", option})
    check_run_options(configure(), {"seed"})


def test_fine_tuning_an_export_reads_the_teacher() -> None:
    cfg = configure("run=runs/x", "finetune_epochs=1", command="export")
    check_run_options(cfg, {"run", "finetune_epochs", "teacher.path"})
