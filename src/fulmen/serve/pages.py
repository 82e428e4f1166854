"""Numbered places of a fixed number: pages of keys and values, slots of states, snapshots. No tensors."""

from collections.abc import Iterable


class Slots:
    """Numbers that one holder has at a time."""

    def __init__(self, count: int):
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._taken: set[int] = set()

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """One that was free."""
        number = self._free.pop()
        self._taken.add(number)
        return number

    def release(self, number: int) -> None:
        self._taken.remove(number)  # KeyError for one that nobody has
        self._free.append(number)


class Pages:
    """Numbers that several sequences may hold, and that the prefix cache may keep when none does.

    A page is in use (a sequence holds it), idle (only the cache keeps it, and may be asked to let it go) or free.
    """

    def __init__(self, count: int, page_size: int):
        self.count, self.page_size = count, page_size
        self.idle = 0
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._kept = [False] * count

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def available(self) -> int:
        """Free, or free as soon as the cache lets go."""
        return self.free + self.idle

    @property
    def in_use(self) -> int:
        return self.count - self.available

    def needed(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def take(self) -> int:
        """A free page, held once."""
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more holder of a page that is in use or idle."""
        assert self._holders[page] or self._kept[page], f"page {page} is free"
        self.idle -= self._holders[page] == 0
        self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder less of each."""
        for page in pages:
            assert self._holders[page], f"page {page} has no holder"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._let_go(page)

    def keep(self, page: int) -> None:
        """For the cache, of a page in use; it stays when its holders leave."""
        assert self._holders[page], f"page {page} has no holder"
        assert not self._kept[page], f"page {page} is kept already"
        self._kept[page] = True

    def drop(self, page: int) -> None:
        """The cache no longer keeps it; free at once if nobody holds it."""
        assert self._kept[page], f"page {page} is not kept"
        self._kept[page] = False
        if self._holders[page] == 0:
            self.idle -= 1
            self._free.append(page)

    def is_idle(self, page: int) -> bool:
        return self._kept[page] and self._holders[page] == 0

    def _let_go(self, page: int) -> None:
        if self._kept[page]:
            self.idle += 1
        else:
            self._free.append(page)
