import pytest

from shadowtune.config.comparison import CompareConfig
from shadowtune.config.settings import from_mapping
from shadowtune.errors import ConfigError


def config(**settings):
    given = {"tasks": {"gsm8k": None}, "methods": {"shadow": None, "lora": None}}
    return from_mapping(CompareConfig, {**given, **settings}, where="")


def test_common_settings_then_the_tasks_then_the_methods():
    made = config(
        common={"epochs": 1, "batch_size": 1, "optimizer": {"learning_rate": 1, "schedule": "cosine"}},
        tasks={"gsm8k": {"epochs": 2, "batch_size": 2, "test_limit": 5}},
        methods={"lora": {"epochs": 3, "optimizer": {"learning_rate": 3}}},
    ).train_config("gsm8k", "lora", {"lora.rank": 7})
    assert (made.epochs, made.batch_size, made.lora.rank) == (3, 2, 7)
    assert (made.optimizer.learning_rate, made.optimizer.schedule) == (3, "cosine")


def test_a_methods_name_is_its_kind_unless_it_says_otherwise():
    made = config(methods={"dora": None, "mine": {"method": "shadow", "shadow": {"rank": 3}}, "base": None})
    assert [made.kind(method) for method in made.methods] == ["dora", "shadow", "base"]
    assert made.train_config("gsm8k", "mine").shadow.rank == 3
    assert made.train_config("gsm8k", "dora").method == "dora"
    assert made.best_of() == "mine"


def test_a_task_is_the_one_of_its_name_unless_it_has_rows():
    made = config(
        tasks={"gsm8k": None, "mine": {"data": {"train": "x.jsonl"}}, "other": {"data": {"task": "mmlu"}}},
        directory="d",
    )
    assert made.train_config("gsm8k", "lora").data.task == "gsm8k"
    assert made.train_config("mine", "lora").data.task is None
    assert made.train_config("other", "lora").data.task == "mmlu"
    assert [made.train_config(task, "lora").data.directory for task in made.tasks] == ["d", None, "d"]


def test_what_only_training_knows_is_nothing_to_the_base():
    first, second = (config(common={"epochs": e, "base_dtype": "bfloat16"}, methods={"base": None}) for e in (1, 2))
    assert first.train_config("gsm8k", "base") == second.train_config("gsm8k", "base")
    assert first.train_config("gsm8k", "base").base_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ({"method": "shadow"}, "shadow.intermediate_size"),
        ({"method": "dora"}, "lora.rank"),
        ({"method": "peft", "peft": {"peft_type": "HRA"}}, "peft.r"),
        ({"method": "peft", "peft": {"peft_type": "SHADOW"}}, "peft.shadow_intermediate_size"),
        ({"method": "full"}, None),
        ({"method": "base"}, None),
        ({"method": "shadow", "size": "shadow.rank"}, "shadow.rank"),
        ({"method": "shadow", "size": "none"}, None),
    ],
)
def test_each_kind_has_a_size_that_the_budget_chooses(method, key):
    assert config(methods={"m": method}).size_key("m") == key


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tasks": {}}, "tasks must not be empty"),
        ({"seeds": []}, "seeds must not be empty"),
        ({"methods": {"a b": None}}, "'a b' cannot name a directory"),
        ({"methods": {"lora": 3}}, "methods.lora must be a mapping"),
        ({"common": {"epocs": 1}}, r"unknown key common.epocs \(did you mean epochs\?\)"),
        ({"methods": {"shadow": {"shadow": {"rnak": 1}}}}, r"methods.shadow.shadow.rnak \(did you mean rank\?\)"),
        ({"tasks": {"gsm8k": {"test_limt": 1}}}, r"unknown key tasks.gsm8k.test_limt"),
        ({"tasks": {"gsm8k": {"test_limit": 0}}}, "test_limit must be at least 1"),
        ({"common": {"output": "x"}}, "common.output is decided by output"),
        ({"common": {"seed": 1}}, "common.seed is decided by seeds"),
        ({"methods": {"lorra": None}}, r"methods.lorra.method must be one of .*got 'lorra' \(did you mean lora\?\)"),
        ({"reference": "shado"}, r"reference: there is no 'shado' \(did you mean shadow\?\); there are shadow, lora"),
        ({"only": ["gsm"]}, r"only: there is no 'gsm' \(did you mean gsm8k\?\)"),
        ({"only": ["lora"], "tasks": {"lora": None}}, "only: lora is both a task and a method"),
        ({"tasks": {"gsm8k": {"test_tasks": ["mmlu"]}}}, "tasks.gsm8k.test_tasks: there is no 'mmlu'"),
        ({"budget": {}}, "budget: set either parameters or like"),
        ({"budget": {"like": "shadow", "parameters": 3}}, "budget: set either parameters or like"),
        ({"budget": {"like": "dora"}}, "budget.like: there is no 'dora'"),
        ({"sweep": {"grid": {"optimizer.lr": [1]}}}, "unknown key sweep.grid.optimizer.lr"),
        ({"sweep": {"grid": {"epochs": 3}}}, "sweep: grid.epochs must be a list of values, got 3"),
        ({"sweep": {"grid": {"seed": [1]}}}, "sweep.grid.seed is decided by seeds"),
        ({"sweep": {"methods": {"lora": {"epochs": [1, 2]}}}}, "as many trials, but there are shadow 1, lora 2"),
        ({"sweep": {"grid": {"epochs": [1, -1]}}}, "task gsm8k, method shadow: epochs must be above 0, got -1"),
        ({"common": {"method": "full", "base_quantization": "int8"}, "methods": {"full": None}}, "base_quantization"),
        ({"methods": {"m": {"method": "peft"}}}, "method=peft and the settings in peft go together"),
        (
            {"sweep": {"grid": {"epochs": [1]}}, "tasks": {"mine": {"data": {"train": "x"}}}},
            "task mine: sweep needs validation rows: set data.validation",
        ),
        ({"jobs": 0}, "jobs must be at least 1"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_named_in_one_line(settings, said):
    with pytest.raises(ConfigError, match=said) as caught:
        config(**settings)
    assert "\n" not in str(caught.value)


def test_all_wrong_keys_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        config(common={"epocs": 1}, methods={"shadow": {"shadow": {"rnak": 1}}, "x": {"method": "y"}}, reference="z")
    for word in ("common.epocs", "rnak", "methods.x.method", "reference"):
        assert word in str(caught.value)


def test_an_error_of_several_runs_is_reported_once():
    with pytest.raises(ConfigError) as caught:
        config(common={"epochs": -1})
    assert str(caught.value).count("epochs must be") == 1
