"""Numbers, lists and times in words."""

from collections.abc import Sequence
from datetime import datetime, timedelta


def count(n: int, noun: str) -> str:
    """Return "1 epoch" or "2 epochs"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def listed(words: Sequence[str], last: str = "and") -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return f" {last} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def points(fraction: float) -> str:
    return f"{100 * fraction:.1f} points"


def change(fraction: float) -> str:
    """Return a fraction in points, with its sign: +0.31 or -2.00, and +0.00 of what rounds to nothing."""
    return f"{round(100 * fraction, 2) + 0.0:+.2f}"


def times(factor: float) -> str:
    return f"{factor:,.0f} times" if factor < 1000 else "more than 1,000 times"


def span(epochs: Sequence[int]) -> str:
    """Return "At epoch 3," or "From epoch 3 to 5,"."""
    return f"At epoch {epochs[0]}," if len(epochs) == 1 else f"From epoch {epochs[0]} to {epochs[-1]},"


def duration(seconds: float) -> str:
    """Return a length of time as people say it: 52 s, 12 min, 2 h 53 min or 3 days 4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days:,} days {hours} h"


def time_of_day(seconds: float) -> str:
    """Return the time of day in `seconds` from now, with the date if that is another day."""
    now = datetime.now()
    then = now + timedelta(seconds=min(seconds, 10**9))
    return f"{then:%H:%M}" if then.date() == now.date() else f"{then:%a %d %b, %H:%M}"
