"""What is read of the command line that replicas are started with."""

import pytest

from server.errors import ConfigError
from server.scale.plan import Plan


def test_the_words_of_a_replica_are_all_but_the_proxys_own() -> None:
    words = ["MODEL", "--adapters", "A", "--adapters", "B", "--preset", "x=a+b", "--preset", "y=ties(a)", "--skip-bad-adapters"]
    vllms = ["--max_loras", "4", "--served-model-name=my_model"]
    plan = Plan.read([*words, "--replicas", "3", "--host", "0.0.0.0", "--port=9000", *vllms])
    assert (plan.host, plan.port) == ("0.0.0.0", 9000)
    assert plan.words == (*words[:5], *words[5:], "--max-loras", "4", "--served-model-name=my_model")
    assert plan.base_models == ("my_model",)
    assert Plan.read(plan.words).words == plan.words


def test_defaults_are_the_servers() -> None:
    plan = Plan.read(["MODEL"])
    assert (plan.host, plan.port, plan.base_models) == ("127.0.0.1", 8000, ("MODEL",))
    assert (plan.gpus, plan.running, plan.drain_seconds) == (1, 256, 30)
    assert plan.options["default_method"] == "cat"


def test_several_names_gpus_and_limits() -> None:
    options = ["--served-model-name", "a", "b", "-tp", "2", "--max-num-seqs", "16", "--shutdown_timeout", "5"]
    plan = Plan.read(["MODEL", *options])
    assert plan.base_models == ("a", "b")
    assert (plan.gpus, plan.running, plan.drain_seconds) == (2, 16, 5)


@pytest.mark.parametrize("option", ["--uds", "--ssl-keyfile", "--ssl_certfile=x"])
def test_what_makes_no_sense_behind_a_proxy_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match="does not go with replicas"):
        Plan.read(["MODEL", option, "x"])


def test_a_port_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="--port"):
        Plan.read(["MODEL", "--port", "x"])
