"""What Ray has, and what a run asks of it."""

WorkerCount = int | tuple[int, int] | None  # so many; from so many to so many; or what fits
