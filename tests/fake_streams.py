"""Streams of a device that is not there, as tests need them: they do what they are given as late as they may, or at random."""

import random

import torch


class Device:
    """Streams that run what they were given as late as they may, or at random: in each stream's order and after the events it waits for.

    What was forgotten to be waited for shows as wrong bytes.
    """

    def __init__(self, seed):
        self.random = None if seed is None else random.Random(seed)
        self.streams = [Stream(self) for _ in range(3)]

    def some_steps(self):
        if self.random is not None:
            for _ in range(self.random.randrange(4)):
                self.random.choice(self.streams).step()


class Stream:
    def __init__(self, device):
        self.device, self.queue, self.done, self.given = device, [], 0, 0

    def _give(self, item):
        self.queue.append(item)
        self.given += 1
        self.device.some_steps()

    def allocate(self, size, device):
        return torch.empty(size, dtype=torch.uint8)

    def run(self, work):
        self._give(work)

    def wait_event(self, event):
        assert isinstance(event, Event)
        self._give(event)

    def record_event(self):
        return Event(self, self.given)

    def synchronize(self):
        Event(self, self.given).synchronize()

    def step(self):
        """Do the next thing, if the event it waits for has come."""
        if self.queue and (not isinstance(self.queue[0], Event) or self.queue[0].come):
            self.forced_step()

    def forced_step(self):
        item = self.queue.pop(0)
        self.done += 1
        if isinstance(item, Event):
            item.synchronize()
        else:
            item()


class Event:
    def __init__(self, stream, number):
        self.stream, self.number = stream, number

    @property
    def come(self):
        return self.stream.done >= self.number

    def synchronize(self):
        while not self.come:
            self.stream.forced_step()
