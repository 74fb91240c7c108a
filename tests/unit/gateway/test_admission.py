"""Places of a process: a limit, and a fair division when everybody wants more than there is."""

from collections import Counter, deque
from contextlib import ExitStack

import pytest

from common.errors import Overloaded
from gateway.admission import Admission, Holder

NUM_PLACES = 100


class Crowd:
    """Clients that always want more, and a queue that is served in order, one a tick."""

    def __init__(self, *holders: Holder, demand: int = 1000) -> None:
        self.now = 0.0
        self.served: Counter[Holder] = Counter()
        self.open: Counter[Holder] = Counter()
        self._admission = Admission(max_requests=NUM_PLACES, clock=lambda: self.now)
        self._queue: deque[tuple[Holder, ExitStack]] = deque()
        self.holders = list(holders)
        self._demand = demand

    def run(self, num_ticks: int) -> None:
        for _ in range(num_ticks):
            self.now += 0.01
            if self._queue:
                holder, permit = self._queue.popleft()
                permit.close()
                self.served[holder] += 1
                self.open[holder] -= 1
            for holder in self.holders:
                self._ask(holder)

    def _ask(self, holder: Holder) -> None:
        while self.open[holder] < self._demand:
            permit = ExitStack()
            try:
                permit.enter_context(self._admission.permit(holder=holder))
            except Overloaded:
                return
            self._queue.append((holder, permit))
            self.open[holder] += 1


def test_the_limit():
    admission = Admission(max_requests=3)
    with admission.permit(), admission.permit(2):
        assert admission.num_open == 3
        with pytest.raises(Overloaded), admission.permit():
            pass
        with admission.permit(0):
            pass
    assert admission.num_open == 0


def test_one_alone_may_have_all():
    crowd = Crowd(Holder("a"))
    crowd.run(1000)
    assert crowd.open[Holder("a")] == NUM_PLACES


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 4, 5)])
def test_shares_of_tokens_follow_the_weights(weights):
    holders = [Holder(str(number), weight) for number, weight in enumerate(weights)]
    crowd = Crowd(*holders)
    crowd.run(
        1000
    )  # until the first, who came when there was nobody else, has gone down to its share
    crowd.served.clear()
    crowd.run(10_000)
    for holder in holders:
        fair = 10_000 * holder.weight / sum(weights)
        assert crowd.served[holder] == pytest.approx(fair, rel=0.05)


def test_who_comes_to_a_full_house_gets_a_share_of_what_becomes_free():
    flood, guest = Holder("flood"), Holder("guest")
    crowd = Crowd(flood)
    crowd.run(500)
    assert crowd.open[flood] == NUM_PLACES
    crowd.holders.append(guest)
    crowd.run(NUM_PLACES // 2 + 2)
    assert crowd.open[guest] >= NUM_PLACES // 2 - 1


def test_places_that_nobody_else_wants_are_not_kept_free():
    flood, modest = Holder("flood"), Holder("modest", weight=9)
    crowd = Crowd(flood, modest)
    crowd.run(500)
    crowd.holders.remove(modest)
    crowd.run(2000)
    assert crowd.open[flood] == NUM_PLACES
