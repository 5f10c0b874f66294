"""Ray Serve's request router of a model: it sends a call where the call's route says.

A call without a route, or with one that names nobody who lives, goes by Serve's own rule, the power
of two choices. It never raises, and never returns no replica while there is one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import (
    LocalityMixin,
    MultiplexMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from deployments.calls import Call, Route

ROUTER = "deployments.routing.router:CourseRouter"


class CourseRouter(LocalityMixin, MultiplexMixin, RequestRouter):  # type: ignore[misc]
    """One of these routes all calls of a process to the replicas of one model.

    Not first in, first out as Serve's own: a replica that was chosen for one call would be given to
    an older one.
    """

    # Of the chosen replica, to say how much it has to do; then the next one is asked. Serve's own
    # tenth of a second is soon over on a busy machine, and any other replica is a worse choice.
    queue_len_response_deadline_s = 0.5

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas; Serve sends the request to the first that has a slot for it."""
        if pending_request is None:
            return [candidate_replicas]
        route = route_of(pending_request.args)
        if route is not None:
            route.living = len(candidate_replicas)
            if route.prefer or route.avoid:
                # After the last rank Serve asks again; without this it would not wait in between.
                pending_request.routing_context.should_backoff = True
                return ranked(candidate_replicas, route)
        near = self.apply_locality_routing(pending_request=pending_request)
        replicas = [self.curr_replicas[each] for each in near if each in self.curr_replicas]
        if not replicas:
            pending_request.routing_context.should_backoff = True
            return [candidate_replicas]
        return [random.sample(replicas, min(2, len(replicas)))]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """The replica took the request."""
        route = route_of(pending_request.args)
        if route is not None:
            route.sent_to = replica_id.unique_id


def route_of(args: Sequence[object]) -> Route | None:
    """The route of a request's call, if it is one and has one."""
    call = args[0] if args else None
    return call.route if isinstance(call, Call) else None


def ranked(replicas: Sequence[RunningReplica], route: Route) -> list[list[RunningReplica]]:
    """Every replica once, each in a rank of its own: in one rank Serve would choose for itself.

    Those that the route does not name come after those that it prefers: they are new.
    """
    by_name = {each.replica_id.unique_id: each for each in replicas}
    named = [name for name in route.prefer if name in by_name]
    strange = [name for name in by_name if name not in route.prefer and name not in route.avoid]
    random.shuffle(strange)
    last = [name for name in route.avoid if name in by_name and name not in route.prefer]
    return [[by_name[name]] for name in (*dict.fromkeys(named), *strange, *dict.fromkeys(last))]
