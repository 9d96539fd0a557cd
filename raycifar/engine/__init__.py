"""How one worker trains: the loop, and what it stands on."""
