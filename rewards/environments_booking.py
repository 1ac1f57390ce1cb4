"""A travel desk: find, hold, pay. The state is checked, not the words: exactly the wanted seats paid, nothing else held or paid."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from winnow.rewards.toolbox import Tool, Toolbox, ToolError, call_text, metadata, tool
from winnow.rollout.schema import Message, Task

CITIES_TEXT = "Oslo Rome Lima Cairo Quito Delhi Tokyo Perth"
CITIES = CITIES_TEXT.split()
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday")
HOLDS = 4  # at once


class Booking(Toolbox):
    """`metadata["flights"]`: what there is; `metadata["wanted"]`: flight -> seats that must be paid at the end; `purse`: the money."""

    def begin(self, task: Task) -> None:
        self.flights: dict[str, dict[str, Any]] = {f["id"]: dict(f) for f in metadata(task, "flights", "booking")}
        self.purse = int(metadata(task, "purse", "booking"))
        self.holds: dict[str, tuple[str, int]] = {}
        self.paid: dict[str, int] = {}
        self.numbers = 0

    def tools(self) -> Sequence[Tool]:
        city = {"type": "string", "enum": list(CITIES)}
        hold = "string: as hold_seats names it"
        return (
            tool("find_flights", "flights between two cities on a day", self.find_flights, origin=city, target=city,
                 day={"type": "string", "enum": list(DAYS)}),
            tool("hold_seats", "holds seats of a flight, to be paid", self.hold_seats, flight="string: its id",
                 seats={"type": "integer", "minimum": 1, "maximum": 9}),
            tool("pay", "pays what is held", self.pay, hold=hold),
            tool("release", "gives up what is held", self.release, hold=hold),
        )  # fmt: skip

    def find_flights(self, origin: str, target: str, day: str) -> str:
        found = [f for f in self.flights.values() if (f["origin"], f["target"], f["day"]) == (origin, target, day)]
        lines = [f"{f['id']} | leaves {f['leaves']} | {f['price']} a seat | {f['seats']} seats" for f in found]
        return "\n".join(lines) or "no flights"

    def hold_seats(self, flight: str, seats: int) -> str:
        if flight not in self.flights:
            raise ToolError(f"there is no flight {flight[:20]!r}")
        if len(self.holds) >= HOLDS:
            raise ToolError(f"{HOLDS} holds are open: pay or release one")
        if seats > self.flights[flight]["seats"]:
            raise ToolError(f"flight {flight} has only {self.flights[flight]['seats']} seats")
        self.flights[flight]["seats"] -= seats
        self.numbers += 1
        self.holds[f"h{self.numbers}"] = (flight, seats)
        return f"h{self.numbers}: {seats} seats of {flight}, {seats * self.flights[flight]['price']} to pay"

    def held(self, hold: str) -> tuple[str, int]:
        if hold not in self.holds:
            raise ToolError(f"there is no hold {hold[:20]!r}; open are {', '.join(self.holds) or 'none'}")
        return self.holds[hold]

    def pay(self, hold: str) -> str:
        flight, seats = self.held(hold)
        cost = seats * self.flights[flight]["price"]
        if cost > self.purse:
            raise ToolError(f"{cost} are needed, {self.purse} are left")
        del self.holds[hold]
        self.purse -= cost
        self.paid[flight] = self.paid.get(flight, 0) + seats
        return f"paid {cost}, {self.purse} left"

    def release(self, hold: str) -> str:
        flight, seats = self.held(hold)
        del self.holds[hold]
        self.flights[flight]["seats"] += seats
        return "released"

    def score(self, task: Task) -> tuple[float, dict[str, float]]:
        wanted = metadata(task, "wanted", "booking")
        right = sum(self.paid.get(flight) == seats for flight, seats in wanted.items()) / len(wanted)
        tidy = not self.holds and set(self.paid) <= set(wanted)
        return float(right == 1 and tidy), {"paid_right": right, "tidy": float(tidy)}


def generate(rng: Random, level: int) -> dict[str, Any]:
    """Level 1: the cheapest flight that leaves before a time; 2: there and back; 3: over a third city, the purse just enough."""
    cities, days = rng.sample(CITIES, 4), sorted(rng.sample(DAYS, 3), key=DAYS.index)
    seats = rng.randint(1, 4)
    legs = [(cities[0], cities[1], days[0]), (cities[1], cities[0], days[1])][:level]
    if level == 3:
        legs = [(cities[0], cities[1], days[0]), (cities[1], cities[2], days[1]), (cities[2], cities[0], days[2])]
    numbers = iter(rng.sample(range(100, 999), 60))
    flights: list[dict[str, Any]] = []
    wanted: dict[str, int] = {}
    asked: list[str] = []
    for origin, target, day in [*legs, (cities[3], cities[0], days[0]), (cities[0], cities[3], days[1])]:
        latest = rng.randint(10, 16)
        prices = rng.sample(range(40, 200), 5)
        offers: list[dict[str, Any]] = []
        for place, price in enumerate(prices):
            hour = rng.randint(6, latest - 1) if place < 3 else rng.randint(latest, 21)
            room = rng.randint(seats, 9) if place else rng.randint(0, seats - 1)  # one is too full
            offers.append({"id": f"f{next(numbers)}", "origin": origin, "target": target, "day": day,
                           "leaves": f"{hour:02d}:{rng.randint(0, 59):02d}", "price": price, "seats": room})  # fmt: skip
        if (origin, target, day) in legs:
            fitting = [f for f in offers if int(f["leaves"][:2]) < latest and f["seats"] >= seats]
            best = min(fitting, key=lambda f: f["price"])
            wanted[best["id"]] = seats
            asked.append(f"from {origin} to {target} on {day}, leaving before {latest:02d}:00")
        rng.shuffle(offers)
        flights += offers
    cost = sum(n * next(f["price"] for f in flights if f["id"] == flight) for flight, n in wanted.items())
    text = (
        f"Book {seats} seat{'s' * (seats > 1)} on the cheapest flight that has room for all: {'; then '.join(asked)}. Pay for exactly "
        "these, and leave nothing on hold."
    )
    purse = cost + (rng.randint(0, 20) if level == 3 else 200 * seats)
    return {
        "text": text,
        "metadata": {"flights": flights, "wanted": wanted, "purse": purse, "legs": [list(leg) for leg in legs]},
    }


def expert(task: Task, messages: Sequence[Message]) -> str:
    turn = sum(message["role"] == "assistant" for message in messages)
    wanted = task.metadata["wanted"]
    if turn == 0:
        return " ".join(call_text("find_flights", origin=a, target=b, day=day) for a, b, day in task.metadata["legs"])
    if turn == 1:
        return " ".join(call_text("hold_seats", flight=flight, seats=seats) for flight, seats in wanted.items())
    if turn == 2:
        return " ".join(call_text("pay", hold=f"h{number}") for number in range(1, len(wanted) + 1))
    return "Everything is booked."
