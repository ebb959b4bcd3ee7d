"""The two searches that LongProc shows in its prompts and scores replies by, written out as it writes them.

Its data hold the problems alone: what a reply should look like is computed from them, here as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

MOST = 2000  # an intermediate result below it
COUNTDOWN_EXAMPLES = (((40, 19, 23, 7), 29), ((9, 16, 6, 18), 12))  # of its prompt
START = "the starting point"


def countdown(numbers: Sequence[int], target: int) -> str:
    """The search for a way from the numbers to the target, and the three equations that it finds."""
    numbers = list(numbers)
    log = [f"Initial number set: {numbers}, target: {target}. Options for choosing two numbers: {_pairs(numbers)}."]
    first, second, last = _combined(numbers, target, 1, log)
    return (
        "# Search Procedure\n" + "\n".join(log) + "\n\nNow we have found the target, let's trace back the solution:\n"
        f"Final step: {last}\nThe step before: {second}\nThe first step: {first}\n\n"
        f"Output the solution in the required format:\n<Solution>\n{first}\n{second}\n{last}\n</Solution>\n"
    )


def _combined(numbers: list[int], target: int, depth: int, log: list[str]) -> list[str]:
    """The equations that lead to the target; none where none do. What is tried is appended to the log."""
    picks = len(numbers) > 2  # of two, nothing is picked
    for i, j in combinations(range(len(numbers)), 2):
        rest = [number for k, number in enumerate(numbers) if k not in (i, j)]
        small, large = sorted((numbers[i], numbers[j]))
        if picks:
            pair = f"({numbers[i]}, {numbers[j]})"
            log.append(f"{_indent(depth)}Pick two numbers {pair} (numbers left: {rest}). Try possible operations.")
        results = (large + small, large - small, large * small, large / small if small else None)
        for sign, made in zip("+-*/", results, strict=True):
            whole = made is not None and made == int(made)
            shown = f"{made:.0f}" if whole else "" if made is None else f"{made:.1f}"
            equation = f"{large} {sign} {small} = {shown}" if shown else f"{large} / {small} (invalid operation)"
            tried = f"{_indent(depth + picks)}Try {equation}. "
            if made is None or not whole or made >= MOST:
                why = "exceeds the maximum intermediate result" if whole else "is a decimal"
                log.append(tried + (f"{shown} {why}, " if shown else "") + "drop this branch.")
            elif rest:
                left = [int(made), *rest]
                options = f". Options for choosing two numbers: {_pairs(left)}."
                now = f"{left}, target: {target}{options if len(left) > 2 else ', just two numbers left.'}"
                log.append(f"{tried}Add {shown} to the number set. Current number set: {now}")
                if found := _combined(left, target, depth + picks + 1, log):
                    return [equation, *found]
            elif made == target:
                log.append(f"{tried}Evaluate {shown} == {target}, target found!")
                return [equation]
            else:
                log.append(f"{tried}Evaluate {shown} != {target}, drop this branch.")
    return []


def travel(row: dict[str, Any]) -> str:
    """The search for a trip plan, and the plan."""
    wanted = row["constraints"]
    fixed = sorted((one for one in wanted if one["type"] == "fixed"), key=lambda one: int(one["start_day"]))
    dates = {one["city"]: f", Fixed Schedule: {_days(one)}" for one in fixed}
    stays = [one for one in wanted if one["type"] == "duration"]
    free = [one for one in stays if one["city"] not in dates]
    told = {one["city"]: f"* City: {one['city']}, Duration: {one['num_days']} days" for one in stays}
    read = "Read the requirements and identify the cities that have fixed schedules and the cities that need to be"
    log = [f"{read} arranged."]
    log += [f"{told[one['city']]}{dates.get(one['city'], '')}." for one in stays] + [""]
    log.append("Cities that have fixed schedules" + (" (sorted by their arrival days):" if fixed else ": None."))
    log += [f"* City: {one['city']}{dates[one['city']]}." for one in fixed] + [""]
    log.append("Cities needing arrangement:" if free else "Cities needing arrangement: None.")
    log += [f"{told[one['city']]}." for one in free] + [""]
    flights = {tuple(pair) for pair in row["connected_cities"]}
    plan = _arranged([], int(row["num_cities"]), free, fixed, flights, log)
    lines = []
    for i, (city, begins, ends, days) in enumerate(plan):
        lines += [f"**Day {begins}:** Fly from {plan[i - 1][0]} to {city}."] if i else []
        visit = f"Visit {city}" if i else f"Arriving in {city} and visit {city}"
        lines.append(f"**Day {begins}-{ends}:** {visit} for {days} days.")
    shown = "\n".join(lines)
    return (
        "<Solving Procedure>\n" + "\n".join(log) + "\n</Solving Procedure>\n\n"
        f"Output the plan in the required format:\n<Plan>\n{shown}\n</Plan>"
    )


Stop = tuple[str, int, int, int]
"""City, first day, last day, days."""
City = dict[str, Any]
"""A constraint of the data: `city`, with `num_days`, or `start_day` and `end_day`."""


def _arranged(
    plan: list[Stop], cities: int, free: list[City], fixed: list[City], flights: set[Any], log: list[str]
) -> list[Stop]:
    """The first whole plan that begins like this one, or none. What is tried is appended to the log."""
    day = plan[-1][2] if plan else 1
    outer, inner = _indent(2 * len(plan)), _indent(2 * len(plan) + 1)
    log.append(f"{outer}Current day: {day}. Current plan: [{', '.join(stop[0] for stop in plan)}].")
    if len(plan) == cities:
        log.append(f"{outer}All {cities} cities are arranged. Complete plan is found!")
        return plan
    log.append(f"{outer}Check whether the city with an arrival day of Day {day} - is fixed.")
    due = next((one for one in fixed if one["start_day"] == day), None)
    if due:
        log.append(f"{outer}Yes. The city with an arrival day of Day {day} - is fixed: {due['city']}.")
        choices = [(due["city"], due["end_day"] - day + 1)]
    else:
        names = ", ".join(one["city"] for one in free)
        options = f"options from cities needing arrangement: [{names}] and explore these options in order."
        log.append(f"{outer}No. Consider possible {options}")
        choices = [(one["city"], one["num_days"]) for one in free]
    last = plan[-1][0] if plan else START
    following = next((one for one in fixed if one["start_day"] > day), None)
    for city, days in choices:
        leaves = day + days - 1
        schedule = f"Duration: {days} days. Schedule: Day {day} - {leaves}."
        log.append(f"{inner}Try arranging to visit {city} from Day {day}. {schedule}")
        log.append(f"{inner}Check for direct flight from {last} to {city}.")
        if plan and (last, city) not in flights:
            log.append(f"{inner}No. Drop this branch.")
            continue
        log.append(f"{inner}Yes.")
        check = f"{inner}Check whether this arrangement is compatible with the next fixed schedule after Day {day}: "
        log.append(check + (f"{following['city']} ({_days(following)})." if following else "None."))
        if following:
            arrives, late = following["start_day"], leaves > following["start_day"]
            compared = f"Day {leaves} is {'later than (>)' if late else 'not later than (<=)'} Day {arrives}."
            verdict = "incompatible. Drop this branch." if late else "compatible."
            log.append(
                f"{inner}The departure day of {city} is Day {leaves}. The arrival day of {following['city']} is Day "
                f"{arrives}. {compared} This arrangement is {verdict}"
            )
            if late:
                continue
        else:
            log.append(f"{inner}No following fixed schedules. This arrangement is compatible.")
        log.append(f"{inner}This arrangement is feasible for now. Continue to arrange the rest of the plan.")
        others = [one for one in free if one["city"] != city]
        if whole := _arranged([*plan, (city, day, leaves, days)], cities, others, fixed, flights, log):
            return whole
    log.append(f"{inner}Fail to arrange any option on day {day} in the current arrangement. Drop this branch.")
    return []


def _days(one: dict[str, Any]) -> str:
    return f"Day {one['start_day']} - {one['end_day']}"


def _indent(depth: int) -> str:
    return " " * depth + "|- " if depth else ""


def _pairs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    return list(combinations(numbers, 2))
