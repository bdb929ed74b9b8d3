"""What a target asks of one model: parameters that may stay, or shapes that are fast enough on this device.

weights.py   parameters and bytes of weights -> the most parameters that may stay, exactly
timing.py    models of random weights, timed side by side with the dense one
speedup.py   a speedup -> for each number of heads the most neurons that reach it
"""

from amprune.targets.speedup import SpeedupSearch, TimedShape, find_shapes
from amprune.targets.timing import Timing, shape_timer
from amprune.targets.weights import target_parameters

__all__ = ["SpeedupSearch", "TimedShape", "Timing", "find_shapes", "shape_timer", "target_parameters"]
