"""`python -m med3dvlm.cli`: the same as `med3dvlm`."""

from med3dvlm.cli import main

main()
