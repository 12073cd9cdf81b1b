"""What things cost: each against the plain way to compute the same, in the same run.

`measure` holds the frame: forms of one computation, paired runs, memory, the machine's ceiling.
The other modules each say which forms they compare; `plain` is the encoder as the paper writes it.
"""

from med3dvlm.benchmark.measure import Ceiling, Form, Work, closeness, compare, machine

__all__ = ["Ceiling", "Form", "Work", "closeness", "compare", "machine"]
