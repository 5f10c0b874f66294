"""The budget of host memory: from who should have what to orders, one at a time per holder.

An order lets a holder pin more (a grant) or tells it to give back (a revocation). All that holders
pin, that grants still allow, and that was revoked but is not given back yet, counts; only what is
left is granted. Grants expire, what is held does not: it ends when the holder says so, or when it
died. The truth is the domain's file, in which a holder reserves whatever it was granted; this only
decides whom to ask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from select_n_core.decisions.loans import HYSTERESIS, Holder, share_out
from select_n_core.decisions.orders import Order, Pool, Report


@dataclass(frozen=True, slots=True)
class Rules:
    """How memory moves.

    Attributes:
        ttl_s: a grant that was not taken is void after so long.
        deadline_s: in which revoked bytes are to be given back.
        dwell_s: a holder whose loan has just moved keeps what it gains by for so long, but against
            a higher class and against floors.
        hysteresis: see `loans.share_out`.
    """

    ttl_s: float = 2.0
    deadline_s: float = 1.0
    dwell_s: float = 1.0
    hysteresis: float = HYSTERESIS


@dataclass(frozen=True, slots=True)
class Account:
    """A holder as the controller knows it; times are by the controller's clock.

    Attributes:
        heard_s: of its last report. moved_s: when its loan last moved.
        order: that it has not answered. number, ordered_s: of the last one.
        granted_bytes: that it may hold by a grant that it has not answered; 0 without one. It may
            hold them already.
    """

    report: Report
    heard_s: float
    number: int
    moved_s: float = -math.inf
    order: Order | None = None
    ordered_s: float = -math.inf
    granted_bytes: int = 0

    @property
    def holder(self) -> Holder:
        """Whom it is about."""
        return self.report.holder

    @property
    def committed_bytes(self) -> int:
        """Its floor, or what it holds, or what a grant still lets it hold."""
        granted_bytes = 0 if self.order is None else self.granted_bytes
        return max(self.holder.floor_bytes, self.holder.held_bytes, granted_bytes)

    @property
    def revoked_bytes(self) -> int:
        """What it was told to give back, and still holds."""
        return 0 if self.order is None else max(0, -self.order.nbytes)


@dataclass(frozen=True, slots=True)
class Book:
    """All that one controller knows; every method gives the book that follows.

    Attributes:
        epoch: of this controller; larger than those of all before it.
        begun_s: when it began, on its clock.
    """

    epoch: int
    begun_s: float
    rules: Rules = Rules()
    pools: Mapping[str, Pool] = field(default_factory=dict)
    accounts: Mapping[str, Account] = field(default_factory=dict)

    @property
    def orders(self) -> tuple[Order, ...]:
        """What the holders have not answered, to be sent to them (again)."""
        return tuple(each.order for each in self.accounts.values() if each.order is not None)

    def late(self, now_s: float) -> tuple[Order, ...]:
        """Revocations whose deadline has passed."""
        since_s = now_s - self.rules.deadline_s
        return tuple(
            each.order
            for each in self.accounts.values()
            if each.order is not None and each.order.nbytes < 0 and each.ordered_s < since_s
        )

    def read(self, pool: Pool) -> Book:
        """After a domain's file was read; nothing is granted in a domain before.

        Who reported before and does not stand in the file any more has ended.
        """
        before = self.pools.get(pool.id)
        if before is not None and pool.read_s < before.read_s:
            return self
        book = replace(self, pools={**self.pools, pool.id: pool})
        for account in self._in(pool):
            order, holder = account.order, account.holder
            if account.report.sent_s >= pool.read_s:
                continue
            if holder.id not in pool.held_bytes:
                book = book._without(holder.id)
            elif order is not None and order.nbytes > 0 and order.valid_until_s <= pool.read_s:
                held = replace(holder, held_bytes=pool.held_bytes[holder.id])
                report = replace(account.report, holder=held)
                book = book._with(replace(account, report=report, order=None))
        return book

    def lost(self, domain: str) -> Book:
        """After a domain's machine was lost, with all that ran there."""
        book = replace(self, pools={name: p for name, p in self.pools.items() if name != domain})
        for account in self.accounts.values():
            if account.report.domain == domain:
                book = book._without(account.holder.id)
        return book

    def heard(self, report: Report, now_s: float) -> Book:
        """After a holder's report; one that was overtaken by a later one changes nothing."""
        before = self.accounts.get(report.holder.id)
        if before is None:
            # One order may be under way to it that was forgotten here.
            known = report.answered + 1 if report.epoch == self.epoch else 0
            return self._with(Account(report, now_s, known))
        if report.sent_s <= before.report.sent_s:
            return self
        order = before.order
        if order is not None and _is_answered(order, report):
            order = None
        moved = report.holder.held_bytes != before.holder.held_bytes
        return self._with(
            replace(
                before,
                report=report,
                heard_s=now_s,
                moved_s=now_s if moved else before.moved_s,
                order=order,
            )
        )

    def decided(self, now_s: float) -> Book:
        """After new orders were decided on, in every domain that was read."""
        book = self
        for pool in self.pools.values():
            book = book._revoked(pool, now_s)
            book = book._granted(pool, now_s)
        return book

    def committed_bytes(self, pool: Pool) -> int:
        """All that may be pinned in a domain by now, whether it is or not."""
        return self._others_bytes(pool) + sum(each.committed_bytes for each in self._in(pool))

    def _in(self, pool: Pool) -> list[Account]:
        return [each for each in self.accounts.values() if each.report.domain == pool.id]

    def _others_bytes(self, pool: Pool) -> int:
        """Held by those who do not report here."""
        return sum(
            nbytes for holder, nbytes in pool.held_bytes.items() if holder not in self.accounts
        )

    def _with(self, account: Account) -> Book:
        return replace(self, accounts={**self.accounts, account.holder.id: account})

    def _without(self, holder: str) -> Book:
        left = {name: each for name, each in self.accounts.items() if name != holder}
        return replace(self, accounts=left)

    def _wants(self, pool: Pool) -> list[tuple[Account, int]]:
        """Every account and its rungs to come, those first that others should give way to."""
        accounts = sorted(self._in(pool), key=lambda each: (-each.holder.priority, each.holder.id))
        holders = [each.holder for each in accounts]
        lendable = pool.capacity_bytes - self._others_bytes(pool)
        rungs = share_out(lendable, holders, self.rules.hysteresis)
        return list(zip(accounts, rungs, strict=True))

    def _revoked(self, pool: Pool, now_s: float) -> Book:
        """Take back what others should have and is not free; never more than that."""
        book, wants = self, self._wants(pool)
        free = pool.capacity_bytes - self.committed_bytes(pool)
        free += sum(each.revoked_bytes for each in self._in(pool))
        needs = [(math.inf, -free)] if free < 0 else []
        free = max(0, free)
        for account, rungs in wants:
            missing = account.holder.bytes_of(rungs) - account.committed_bytes
            if missing > 0:
                taken = min(free, missing)
                free -= taken
                needs.append((float(account.holder.priority), missing - taken))
        for priority, need in needs:
            for account, rungs in reversed(wants):  # the lowest class first
                if need <= 0:
                    break
                current = book.accounts[account.holder.id]
                if current.order is not None:
                    continue
                resting = now_s - current.moved_s < self.rules.dwell_s
                if resting and priority <= current.holder.priority:
                    rungs = max(rungs, current.holder.needed)
                nbytes, kept = _to_give_back(current.holder, rungs, need)
                if nbytes > 0:
                    need -= nbytes
                    book = book._ordered(current, -nbytes, kept, now_s)
        return book

    def _granted(self, pool: Pool, now_s: float) -> Book:
        """Let those pin more who should and for whom there is room."""
        book, free = self, pool.capacity_bytes - self.committed_bytes(pool)
        if not self._is_alone(pool, now_s):
            return self
        for account, rungs in self._wants(pool):
            silent = now_s - account.heard_s >= self.rules.ttl_s
            if account.order is not None or silent:
                continue
            nbytes, given = _to_pin(account.holder, rungs, free)
            if nbytes > 0:
                free -= nbytes
                book = book._ordered(account, nbytes, given, now_s)
        return book

    def _is_alone(self, pool: Pool, now_s: float) -> bool:
        """Whether no grant of a controller before this one can still be taken."""
        if now_s - self.begun_s >= self.rules.ttl_s:
            return True
        seen = all(each.report.epoch >= self.epoch for each in self._in(pool))
        return seen and not self._others_bytes(pool)

    def _ordered(self, account: Account, nbytes: int, rungs: int, now_s: float) -> Book:
        rules = self.rules
        order = Order(
            holder=account.holder.id,
            epoch=self.epoch,
            number=account.number + 1,
            nbytes=nbytes,
            rungs=rungs,
            within_s=rules.deadline_s,
            valid_until_s=account.report.sent_s + rules.ttl_s,
        )
        holder = account.holder
        granted_bytes = max(holder.floor_bytes, holder.held_bytes) + nbytes if nbytes > 0 else 0
        return self._with(
            replace(
                account,
                number=order.number,
                order=order,
                ordered_s=now_s,
                granted_bytes=granted_bytes,
            )
        )


def _is_answered(order: Order, report: Report) -> bool:
    """Whether what the report says the holder has is all that will ever come of the order."""
    void = order.nbytes > 0 and order.valid_until_s <= report.sent_s
    return void or (report.epoch == order.epoch and report.answered >= order.number)


def _to_give_back(holder: Holder, rungs: int, need: int) -> tuple[int, int]:
    """Bytes of its last rungs beyond `rungs`, as many as the need takes, and the rungs left."""
    kept = holder.lent
    # Less than a rung may lie above the last one.
    nbytes = 0 if kept < rungs else holder.held_bytes - holder.bytes_of(kept)
    while kept > rungs and nbytes < need:
        kept -= 1
        nbytes = holder.held_bytes - holder.bytes_of(kept)
    return nbytes, kept


def _to_pin(holder: Holder, rungs: int, free: int) -> tuple[int, int]:
    """Bytes of its next rungs up to `rungs`, as many as there is room for, and the rungs then."""
    nbytes, given = 0, holder.lent
    for count in range(given + 1, rungs + 1):
        more = holder.bytes_of(count) - max(holder.floor_bytes, holder.held_bytes)
        if more > free:
            break
        nbytes, given = more, count
    return nbytes, given
