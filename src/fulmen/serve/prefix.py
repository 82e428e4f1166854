"""The prefix cache of hybrid models: pages by the tokens in them, and states at some of their ends. No tensors.

A softmax layer can go on from any page of a prompt that was seen before, a lightning layer only from a token whose
state was kept: a snapshot. So a tree has a node for each page of tokens, some nodes have a snapshot, and what a prompt
may reuse ends at the deepest node on its path that has one. Pages and snapshots are let go separately, longest unused
first.
"""

import hashlib
import heapq
import itertools
from array import array
from collections.abc import Iterator, Sequence

from fulmen.serve.pages import Pages, Slots


class Node:
    """The tokens of one page after those of its ancestors; of fewer, a tail: a leaf for its snapshot's sake."""

    __slots__ = ("children", "is_queued", "key", "length", "page", "parent", "snapshot", "used")

    def __init__(self, parent: "Node | None", key: tuple[int, ...], page: int):
        self.parent, self.key, self.page = parent, key, page
        self.length: int = len(key) + (parent.length if parent else 0)  # tokens from the beginning to its end
        self.children: dict[tuple[int, ...], Node] = {}
        self.snapshot: int | None = None
        self.used = 0
        self.is_queued = False

    def path(self) -> list["Node"]:
        """From the first page to this one."""
        nodes, node = [], self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class PrefixCache:
    """What was computed and may be asked for again. It keeps pages of `pages`; snapshots are its own."""

    def __init__(self, pages: Pages, snapshots: int):
        self.pages, self.snapshots = pages, Slots(snapshots)
        self._root = Node(None, (), -1)
        self._holders: dict[int, Node] = {}  # by snapshot
        self._digests: dict[int, bytes] = {}
        self._count = 0
        self._leaves: list[tuple[int, int, Node]] = []  # a heap by last use; entries may be out of date
        self._clock = itertools.count(1)
        self._serial = itertools.count()

    def __len__(self) -> int:
        """Pages that it keeps."""
        return self._count

    def match(self, tokens: Sequence[int]) -> tuple[list[Node], Node | None]:
        """(nodes of whole pages that `tokens` begin with, the deepest node among them or of a tail with a snapshot).

        At least one token remains to be computed, for its logits.
        """
        node, path, deepest, size = self._root, [], None, self.pages.page_size
        last = len(tokens) - 1
        while node.length + size <= last:
            child = node.children.get(tuple(tokens[node.length : node.length + size]))
            if child is None:
                break
            path.append(child)
            node = child
            deepest = node if node.snapshot is not None else deepest
        tail = self._tail(node, tokens[node.length : min(last, node.length + size - 1)])
        deepest = tail or deepest
        now = next(self._clock)
        for touched in (*path, *([tail] if tail else ())):
            touched.used = now
        return path, deepest

    def insert(self, tokens: Sequence[int], pages: list[int], after: Node | None) -> Node | None:
        """Keep all whole pages of `tokens` below `after`, what an earlier call for the same sequence gave back.

        A page whose tokens are there already is exchanged in `pages` for the one that is kept, so that who holds a
        page holds those before it. Gives back the last node, None if there is none yet.
        """
        node, size = after or self._root, self.pages.page_size
        now = next(self._clock)
        for start in range(node.length, len(tokens) - size + 1, size):
            key, index = tuple(tokens[start : start + size]), start // size
            child = node.children.get(key)
            if child is None:
                child = self._add(node, key, pages[index])
            elif child.page != pages[index]:
                self.pages.share(child.page)
                self.pages.release([pages[index]])
                pages[index] = child.page
            child.used = now
            node = child
        return node if node.parent else None

    def insert_tail(self, tokens: Sequence[int], page: int, after: Node | None) -> Node | None:
        """Keep the tokens behind the last whole page, which are in `page`; None if they are kept already."""
        node = after or self._root
        key = tuple(tokens[node.length :])
        assert 0 < len(key) < self.pages.page_size, key
        return None if key in node.children else self._add(node, key, page)

    def new_snapshot(self) -> int | None:
        """A snapshot's number to be filled and given to `attach` or `discard`; None if all are spoken for.

        The longest unused is let go for it if need be.
        """
        if not self.snapshots.free:
            if not self._holders:
                return None
            self._forget(min((node.used, number) for number, node in self._holders.items())[1])
        return self.snapshots.take()

    def attach(self, node: Node, snapshot: int, tokens: Sequence[int]) -> None:
        """`snapshot` holds the states behind `tokens`, which end where `node` does."""
        assert node.length == len(tokens), (node.length, len(tokens))
        if node.snapshot is not None:
            self.discard(snapshot)
            return
        node.snapshot, node.used = snapshot, next(self._clock)
        self._holders[snapshot] = node
        self._digests[snapshot] = digest(tokens)

    def discard(self, snapshot: int) -> None:
        """A number of `new_snapshot` that is not needed after all."""
        self.snapshots.release(snapshot)

    def check(self, snapshot: int, tokens: Sequence[int]) -> None:
        """It is about to be copied to the slot of a sequence that begins with `tokens`.

        Raises RuntimeError if its states are of other tokens, which would be a fault of this cache.
        """
        if self._digests.get(snapshot) != digest(tokens):
            raise RuntimeError(f"snapshot {snapshot} is not of the {len(tokens)} tokens that it was found for")

    def free_pages(self, count: int) -> None:
        """Let idle pages go, leaves first, longest unused first, until `count` are free or none is idle."""
        in_use = []
        while self.pages.free < count and self._leaves:
            used, _, node = heapq.heappop(self._leaves)
            node.is_queued = False
            if node.children or node.parent is None:
                continue  # no longer a leaf, or gone
            if node.used != used:
                self._push(node)
            elif not self.pages.is_idle(node.page):
                in_use.append(node)
            else:
                self._remove(node)
        for node in in_use:
            self._push(node)

    def clear(self) -> None:
        """Let everything go that no sequence holds."""
        self.free_pages(self.pages.count)

    def nodes(self) -> Iterator[Node]:
        """All of them, parents first."""
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def _tail(self, node: Node, rest: Sequence[int]) -> Node | None:
        """The longest tail below `node` that `rest` begins with."""
        for length in range(len(rest), 0, -1):
            child = node.children.get(tuple(rest[:length]))
            if child is not None and child.snapshot is not None:
                return child
        return None

    def _add(self, parent: Node, key: tuple[int, ...], page: int) -> Node:
        self.pages.keep(page)
        node = parent.children[key] = Node(parent, key, page)
        node.used = next(self._clock)
        self._count += 1
        self._push(node)
        return node

    def _push(self, node: Node) -> None:
        if not node.is_queued:
            node.is_queued = True
            heapq.heappush(self._leaves, (node.used, next(self._serial), node))
        if len(self._leaves) > 2 * self._count + 64:  # tails come and go without anybody asking for pages
            self._leaves = [entry for entry in self._leaves if entry[2].parent is not None]
            heapq.heapify(self._leaves)

    def _remove(self, node: Node) -> None:
        if node.snapshot is not None:
            self._release(node.snapshot)
        parent = node.parent
        del parent.children[node.key]
        node.parent = None
        self._count -= 1
        self.pages.drop(node.page)
        if not parent.children and parent.parent is not None:
            self._push(parent)

    def _forget(self, snapshot: int) -> None:
        """Let a snapshot go; a tail goes with it, a whole page stays."""
        node = self._holders[snapshot]
        if len(node.key) < self.pages.page_size:
            self._remove(node)
        else:
            self._release(snapshot)

    def _release(self, snapshot: int) -> None:
        self._holders.pop(snapshot).snapshot = None
        del self._digests[snapshot]
        self.snapshots.release(snapshot)


def digest(tokens: Sequence[int]) -> bytes:
    """Of the tokens alone, and so of nothing that the cache may have mixed up."""
    return hashlib.blake2b(array("q", tokens).tobytes(), digest_size=16).digest()
