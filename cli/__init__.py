"""The command line of bmm; installed as ``bmm_cli``."""
