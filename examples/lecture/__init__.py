"""The lecture, runnable: every claim of it trained, measured and drawn. ``python -m examples.lecture momentum``."""

#: In the order of the lecture; each is a module here.
TOPICS = (
    "gradient_descent",
    "stochastic_gradients",
    "robbins_monro",
    "step_drops",
    "momentum",
    "adam",
    "weight_decay",
    "initialisation",
    "loss_landscape",
    "batch_size",
    "memorisation",
    "double_descent",
    "dropout",
    "cost",
    "full_example",
)
