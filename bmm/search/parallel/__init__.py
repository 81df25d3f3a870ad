"""Executors with workers: processes of this machine (`processes`), actors of a Ray cluster (`cluster`)."""
