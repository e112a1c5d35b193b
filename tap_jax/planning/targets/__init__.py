"""Programs of a run compiled for devices that are not here: memory, collectives, times at the peak, sizes that fit."""
