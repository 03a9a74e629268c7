"""`loramix serve --replicas N`: Ray and N replicas on this machine, until it is told to stop."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

from server.errors import ConfigError
from server.keys_file import read_keys
from server.preflight import check_port
from server.scale.plan import Plan

_APPLICATION = "loramix"
_STORE_BYTES = 100 * 2**20  # of Ray's object store: requests and pieces of answers pass through it, and do not stay
_LOOK_SECONDS = 0.2
_HOST = "127.0.0.1"  # the servers themselves are nobody else's


def run(words: Sequence[str], replicas: int) -> None:
    """Serve with so many replicas.

    Args:
        words: what follows `loramix serve`.

    Raises:
        ConfigError: without Ray, with fewer GPUs than the replicas take, where the port is taken, or they do not come up.
    """
    plan = Plan.read(words)
    check_port(plan.host, plan.port)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # two servers that say the same both mean it
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise ConfigError("--replicas needs Ray: pip install 'loramix[scale]', or start several servers yourself") from error
    from server.scale.application import fleet

    ray.init(address="local", include_dashboard=False, object_store_memory=_STORE_BYTES, logging_level=logging.WARNING)
    try:
        gpus = ray.cluster_resources().get("GPU", 0)
        if 0 < gpus < plan.gpus * replicas:
            raise ConfigError(f"{replicas} replicas take {plan.gpus * replicas} GPUs, and there are {gpus:g}; use fewer")
        serve.start(proxy_location="HeadOnly", http_options={"host": plan.host, "port": plan.port})
        try:
            serve.run(fleet(plan, replicas, _HOST), name=_APPLICATION)
        except RuntimeError as error:
            raise ConfigError(f"the replicas did not come up; what they said stands above ({error})") from error
        stopped = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):  # until now they end it at once
            signal.signal(number, lambda *_: stopped.set())
        if not read_keys(plan.options["keys_file"]) and plan.host not in ("127.0.0.1", "localhost", "::1"):
            print("loramix: no keys, and not on loopback: whoever reaches this may use it (--keys-file)", file=sys.stderr)
        print(f"loramix: {replicas} replicas behind http://{plan.host}:{plan.port}", file=sys.stderr)
        stopped.wait()
        serve.delete(_APPLICATION, _blocking=False)  # what is running is finished; blocking has a limit of its own
        while _APPLICATION in serve.status().applications:
            time.sleep(_LOOK_SECONDS)
    finally:
        serve.shutdown()
        ray.shutdown()
