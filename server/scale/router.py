"""How requests find their replica: by session around a ring, and without one by load."""

import random
from typing import Any

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter


class SessionRouter(ConsistentHashRouter):  # type: ignore[misc]  # Ray is not typed
    """Ray's consistent hashing, which draws lots for what has no session; here that goes to the less busy of two."""

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        if pending_request is None or pending_request.metadata.session_id or not candidate_replicas:
            return await super().choose_replicas(candidate_replicas, pending_request)  # type: ignore[no-any-return]
        pending_request.routing_context.should_backoff = True
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
