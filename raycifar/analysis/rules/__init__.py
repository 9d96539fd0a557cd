"""Rules: functions from the curves of a run to what they show."""
