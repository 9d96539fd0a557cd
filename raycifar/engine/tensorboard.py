"""A run's history as event files of TensorBoard, which follows a file that grows, but not one that is replaced."""

import struct
import time
from collections.abc import Iterator, Sequence

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from raycifar.storage.run_folder import EVENTS, RunFolder
from raycifar.storage.schemas import EpochRecord

SCALARS = {
    "train_loss": "loss/train",
    "train_eval_loss": "loss/train, without augmentation",
    "val_loss": "loss/validation",
    "train_top1": "top-1/train",
    "train_eval_top1": "top-1/train, without augmentation",
    "val_top1": "top-1/validation",
    "val_top5": "top-5/validation",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "images_per_second": "images per second",
    "workers": "workers",
}
LENGTH, CHECKSUM = struct.Struct("<Q"), struct.Struct("<I")


class EventLog:
    """The event files of a run, with each epoch once, over any number of starts.

    On a disk one file grows. An object store appends nothing: there each start has a file of its own, which is
    replaced by a longer one with the same beginning.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.file = f"{EVENTS}.{time.time():.0f}" if folder.is_remote else EVENTS
        files = {name: folder.read(name) or b"" for name in folder.file_names() if name.startswith(EVENTS)}
        events = {name: list(read_events(content)) for name, content in files.items()}
        whole = sum(len(frame(event)) for event in events.get(self.file, ()))
        self.content = files.get(self.file, b"")[:whole]  # without a last event that is cut
        self.epoch = max((event.step for some in events.values() for event in some), default=0)  # that is there

    def write(self, history: Sequence[EpochRecord]) -> None:
        """Write the epochs that are not there yet."""
        new = [to_event(record) for record in history if record.epoch > self.epoch]
        if not new:
            return
        if not self.content:
            new.insert(0, Event(wall_time=new[0].wall_time, file_version="brain.Event:2"))
        added = b"".join(map(frame, new))
        self.folder.append(self.file, self.content, added)
        self.content += added
        self.epoch = new[-1].step


def to_event(record: EpochRecord) -> Event:
    event = Event(wall_time=record.time or 0, step=record.epoch)
    for name, tag in SCALARS.items():
        if (value := getattr(record, name)) is not None:
            event.summary.value.add(tag=tag, simple_value=value)
    return event


def frame(event: Event) -> bytes:
    """Return an event as a file holds it: length and content, a checksum after each."""
    body = event.SerializeToString(deterministic=True)
    length = LENGTH.pack(len(body))
    return length + CHECKSUM.pack(masked_crc32c(length)) + body + CHECKSUM.pack(masked_crc32c(body))


def read_events(content: bytes) -> Iterator[Event]:
    """Yield the events of a file, up to the first that is cut or damaged."""
    start = 0
    while start + LENGTH.size < len(content):
        (length,) = LENGTH.unpack_from(content, start)
        first = start + LENGTH.size + CHECKSUM.size
        body, checksum = content[first : first + length], content[first + length : first + length + CHECKSUM.size]
        if checksum != CHECKSUM.pack(masked_crc32c(body)):
            return
        yield Event.FromString(body)
        start = first + length + CHECKSUM.size
