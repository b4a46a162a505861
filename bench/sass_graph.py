"""Where a warp may go in a kernel: the graph of its instructions' places, and the loops in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sass import Instruction


class Loop(NamedTuple):
    """Places of instructions that reach one another, and the one where it is entered."""

    header: int
    places: frozenset[int]


def graph_of(code: list[Instruction]) -> list[list[int]]:
    """Where a warp may go from each place; len(code) is outside."""
    places, outside = {each.address: place for place, each in enumerate(code)}, len(code)
    found = []
    for place, each in enumerate(code):
        following = [] if each.always else [place + 1]
        if each.opcode == "BRA":
            following.append(places.get(each.target, outside))
        elif each.opcode in ("EXIT", "RET", "BRX"):
            following.append(outside)
        found.append(sorted(set(following)))
    return found


def loops(graph: list[list[int]]) -> list[Loop]:
    """All, outer and inner: what reaches itself; inside of it, what still does when it may not be entered anew."""
    leading: dict[int, list[int]] = {}
    for place, following in enumerate(graph):
        for other in following:
            leading.setdefault(other, []).append(place)
    found, open_ = [], [(frozenset(range(len(graph))), None)]
    while open_:
        places, header = open_.pop()
        for part in _components(graph, places, header):
            entered = [place for place in part if place == 0 or not part.issuperset(leading[place])]
            loop = Loop(min(entered, default=min(part)), part)
            found.append(loop)
            open_.append((part, loop.header))
    return sorted(found, key=lambda loop: (loop.header, len(loop.places)))


def _components(graph: list[list[int]], places: frozenset[int], closed: int | None) -> list[frozenset[int]]:
    """Strongly connected components of more than a place or with an edge to itself, without the edges into `closed`.

    (Tarjan, Depth-first search and linear graph algorithms, 1972; without recursion.)
    """
    number: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    found = []

    def following(place):
        return iter([other for other in graph[place] if other in places and other != closed])

    for root in sorted(places):
        if root in number:
            continue
        work = [(root, following(root))]
        number[root] = low[root] = len(number)
        stack.append(root)
        on_stack.add(root)
        while work:
            place, rest = work[-1]
            other = next(rest, None)
            if other is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[place])
                if low[place] == number[place]:
                    part = set()
                    while place not in part:
                        part.add(stack.pop())
                    on_stack -= part
                    if len(part) > 1 or (place in graph[place] and place != closed):
                        found.append(frozenset(part))
            elif other not in number:
                number[other] = low[other] = len(number)
                stack.append(other)
                on_stack.add(other)
                work.append((other, following(other)))
            elif other in on_stack:
                low[place] = min(low[place], number[other])
    return found


def topological(graph: list[list[int]], loop: Loop) -> list[int]:
    """The loop's places from the header on, each before those that it leads to, but for edges back."""
    seen, done = {loop.header}, []
    work = [(loop.header, iter(graph[loop.header]))]
    while work:
        place, rest = work[-1]
        other = next((other for other in rest if other in loop.places and other not in seen), None)
        if other is None:
            done.append(place)
            work.pop()
        else:
            seen.add(other)
            work.append((other, iter(graph[other])))
    return done[::-1]
