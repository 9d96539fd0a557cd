"""The history, as TensorBoard reads it."""

import warnings

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from raycifar.engine.tensorboard import SCALARS, to_events
from raycifar.storage.records import EpochRecord


def events(content):
    """Return the events of a file: a length, its checksum, the event and its checksum, one after the other."""
    found = []
    while content:
        length = int.from_bytes(content[:8], "little")
        body = content[12 : 12 + length]
        assert int.from_bytes(content[12 + length : 16 + length], "little") == masked_crc32c(body)
        found.append(Event.FromString(body))
        content = content[16 + length :]
    return found


def test_each_epoch_is_there_once_at_its_time_and_what_is_unknown_is_left_out():
    common = {"train_top1": 0.5, "lr": 0.1, "images_per_second": 100.0, "seconds": 1.0, "workers": 1}
    records = [EpochRecord(epoch=e, train_loss=4.0 / e, time=1000.0 + e, **common) for e in (1, 2)]
    with warnings.catch_warnings(action="error"):
        content = to_events(records)
    values = [(e.step, e.wall_time, v.tag, v.simple_value) for e in events(content) for v in e.summary.value]
    losses = [value for value in values if value[2] == SCALARS["train_loss"]]
    assert [(step, time, value) for step, time, _, value in losses] == [(1, 1001.0, 4.0), (2, 1002.0, 2.0)]
    assert not any(tag == SCALARS["val_loss"] for _, _, tag, _ in values)
