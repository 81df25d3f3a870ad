"""How the zoo was made: ``python -m bmm.zoo.build --work DIR`` repeats it from public packages."""
