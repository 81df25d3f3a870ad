"""Hostile files against every reader: python -m benchmarks.fuzz [--mutations 1100] [--seed 0] [--reader NAME]

Valid files are mutated by a seeded generator and opened as a user's would be. A reader may open what it is given or
refuse it with a `BmmError`; anything else is a crash. Each reader runs in a process of its own that may not take more
than `ROOM` beyond what it had, and every file that Python opens outside the reader's folder is counted. The table says
how many mutations were opened, refused and crashed, the most memory Python took for one, and the slowest.
"""
