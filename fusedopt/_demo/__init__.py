"""The parts of ``python -m fusedopt demo``: the data and the network, the training runs, the report."""
