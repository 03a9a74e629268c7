"""What tests of the simulated fleet share: costs that are easy to reckon with, and a replica written the long way."""

from dataclasses import dataclass, field

from benchmarks.fleet.costs import Costs

COSTS = Costs(
    seats=4, first_seconds=0.5, token_seconds=0.25, way_seconds=0.25, merge_seconds=1.0, host_seconds=0.0, read_seconds=0.0,
    nbytes=10,
)  # fmt: skip
"""A request of three tokens has its seat for a second; a build takes one and a quarter."""
TOKENS = 3


@dataclass
class Reference:
    """One replica, step by step: nothing is known before it happens, and every queue is a list that is looked through.

    Answers (hit, seconds to the first token) for each request.
    """

    slots: int
    costs: Costs = COSTS
    threads: int = 2
    answers: dict[int, tuple[bool, float]] = field(default_factory=dict)

    def serve(self, requests: list[tuple[float, int]]) -> list[tuple[bool, float]]:
        resident: list[int] = []  # longest unused first
        line: list[int] = []
        at_threads: list[int] = []
        building: list[tuple[float, int]] = []  # until when a thread has it
        coming: list[tuple[float, int]] = []  # until when it is on its way to the engine
        waiting: list[int] = []  # requests, for their composition
        at_seats: list[tuple[float, int]] = []  # since when it was ready
        sitting: list[tuple[float, int]] = []
        hits: dict[int, bool] = {}
        left = list(range(len(requests)))
        while left or sitting or waiting or at_seats:
            moments = [requests[left[0]][0]] if left else []
            moments += [moment for moment, _ in (*building, *coming, *sitting)]
            now = min(moments)
            for end, request in [seat for seat in sitting if seat[0] == now]:
                sitting.remove((end, request))
                composition = requests[request][1]
                resident.remove(composition)
                resident.append(composition)
            for end, composition in [job for job in building if job[0] == now]:
                building.remove((end, composition))
                coming.append((now + self.costs.way_seconds, composition))
            for end, composition in [job for job in coming if job[0] == now]:
                coming.remove((end, composition))
                resident.append(composition)
                ready = [request for request in waiting if requests[request][1] == composition]
                at_seats += [(now, request) for request in ready]
                waiting = [request for request in waiting if request not in ready]
            while left and requests[left[0]][0] == now:
                request = left.pop(0)
                composition = requests[request][1]
                hits[request] = composition in resident
                if hits[request]:
                    at_seats.append((now, request))
                else:
                    if all(requests[other][1] != composition for other in waiting):
                        line.append(composition)
                    waiting.append(request)
            while at_seats and len(sitting) < self.costs.seats:
                _, request = at_seats.pop(0)
                seconds = self.costs.request_seconds(TOKENS)
                sitting.append((now + seconds, request))
                self.answers[request] = hits[request], now - requests[request][0] + self.costs.first_seconds
            while line:
                used = {requests[request][1] for _, request in (*sitting, *at_seats)}
                idle = [composition for composition in resident if composition not in used]
                taken = len(resident) + len(at_threads) + len(building) + len(coming)
                if taken == self.slots and not idle:
                    break
                if taken == self.slots:
                    resident.remove(idle[0])
                at_threads.append(line.pop(0))
            while at_threads and len(building) < self.threads:
                building.append((now + self.costs.merge_seconds, at_threads.pop(0)))
        return [self.answers[request] for request in range(len(requests))]
