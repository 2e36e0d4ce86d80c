"""`python -m fusedopt demo`: what it claims is read from what it prints, and what it draws is looked at."""

import re
from importlib import resources

import matplotlib.image
import numpy as np
import pytest
import torch

import child
import fusedopt
from fusedopt import demo
from fusedopt._demo import digits as demo_digits
from fusedopt._demo import report, training

RUN = """
    import runpy
    runpy.run_module("fusedopt", run_name="__main__")
"""
RECIPES = ["SGD with momentum", "AdamW"]
TORCH = ["torch loop", "torch foreach", "torch fused"]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What a quick run prints, and the picture it makes."""
    picture = tmp_path_factory.mktemp("demo") / "picture.png"
    return child.output(RUN, "demo", "--quick", "--output", str(picture)), picture


def rows(text, recipe):
    """The numbers of each implementation below the line that names `recipe`."""
    below = text[re.search(rf"^ *{recipe} *$", text, re.MULTILINE).end() :]
    found = {}
    for name in [*TORCH, "fusedopt"]:
        line = re.search(rf"^ *{name} +(\d.*)$", below, re.MULTILINE)
        found[name] = [float(cell.rstrip("%")) for cell in line[1].split()]
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_implementation_learns(shown, recipe):
    for loss, accuracy, milliseconds, *_ in rows(shown[0], recipe).values():
        assert 0 < loss < 0.5
        assert accuracy > 90
        assert milliseconds > 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_ratios_are_those_of_the_times(shown, recipe):
    table = rows(shown[0], recipe)
    ours = table["fusedopt"][2]
    # Times are printed to half a microsecond, ratios to half a hundredth.
    for name in TORCH:
        time, ratio = table[name][2:4]
        assert ratio == pytest.approx(time / ours, abs=0.005 + time / ours * (0.0005 / time + 0.0005 / ours) * 1.01)


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_are_those_of_torch(shown, recipe):
    *_, float32_difference, float64_difference = rows(shown[0], recipe)["fusedopt"]
    assert 0 <= float64_difference < 1e-10
    assert 0 < float32_difference < 1e-3, "not zero: torch rounds in another order"
    assert "float64 weights after 100 steps are torch's" in shown[0]


def test_device_and_backend_are_named(shown):
    kind, backend = ("GPU", "triton") if torch.cuda.is_available() else ("CPU", "numba")
    parameters = len(list(demo_digits.make_network().parameters()))
    assert f"Device: {kind}" in shown[0].replace("\n", " ")
    assert f"Backend of fusedopt: {backend} for {parameters} parameters." in shown[0]


@pytest.mark.parametrize(
    ("recipe", "states"),
    [("SGD with momentum", "momentum_buffer 4"), ("AdamW", "exp_avg 4, exp_avg_sq 4")],
    ids=RECIPES,
)
def test_memory_is_told_by_kind(shown, recipe, states):
    (line,) = re.findall(rf"{recipe}: bytes a parameter: ([^.]*)\.", " ".join(shown[0].split()))
    for expected in ("parameters 4, gradients 4", states):
        assert expected in line


def test_picture_shows_both_curves(shown):
    text, picture = shown
    assert f"Picture: {picture}" in text
    pixels = matplotlib.image.imread(picture)
    width, height = (round(inches * report.DOTS_PER_INCH) for inches in report.FIGURE_INCHES)
    assert pixels.shape[:2] == (height, width)
    left_half = pixels[:, : width // 2, :3]
    for color in (report.TORCH_COLOR, report.OUR_COLOR):
        wanted = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
        assert (np.abs(left_half - wanted).max(axis=2) < 0.01).sum() > 1000, f"no curve in {color}"


class SlightlyWrong(fusedopt.AdamW):
    def __init__(self, params, lr, weight_decay):
        super().__init__(params, lr=lr * (1 + 1e-9), weight_decay=weight_decay)


def test_wrong_weights_are_reported_and_fail(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(fusedopt, "AdamW", SlightlyWrong)
    monkeypatch.setattr(demo, "RECIPES", training.RECIPES[1:])
    assert demo.main(["--quick", "--device", "cpu", "--output", str(tmp_path / "picture.png")]) == 1
    printed = capsys.readouterr().out
    assert "WRONG: with AdamW float64 weights differ" in printed
    assert "are torch's" not in printed


@pytest.mark.parametrize("package", ["rich", "matplotlib", "sklearn"])
def test_missing_package_is_named_with_the_remedy(package, tmp_path):
    program = f"""
        import runpy, sys
        sys.modules["{package}"] = None
        runpy.run_module("fusedopt", run_name="__main__")
    """
    finished = child.run(program, "demo", "--output", str(tmp_path / "picture.png"))
    assert finished.returncode == 2
    assert f"{package} is not installed" in finished.stderr
    assert 'pip install "fusedopt[demo]"' in finished.stderr
    assert not finished.stdout


def test_output_in_a_missing_folder_is_refused_before_training(tmp_path, capsys):
    assert demo.main(["--output", str(tmp_path / "absent" / "picture.png")]) == 2
    captured = capsys.readouterr()
    assert "absent" in captured.err
    assert "Training" not in captured.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_missing_gpu_is_refused_before_training(tmp_path, capsys):
    assert demo.main(["--device", "cuda", "--output", str(tmp_path / "picture.png")]) == 2
    captured = capsys.readouterr()
    assert "torch finds no GPU" in captured.err
    assert "Training" not in captured.out


def test_too_few_steps_to_compare_are_refused():
    data = demo_digits.Digits.load(torch.device("cpu"))
    with pytest.raises(ValueError, match="steps=99"):
        training.compare(training.RECIPES[0], data, 99, lambda doing: None)


def test_network_is_the_same_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    first, second = demo_digits.make_network(), demo_digits.make_network()
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_minibatches_are_the_same_and_hold_no_image_twice_in_an_epoch():
    data = demo_digits.Digits.load(torch.device("cpu"))
    epoch, again = (list(data.minibatches(data.steps_per_epoch)) for _ in range(2))
    for (images, labels), (same_images, same_labels) in zip(epoch, again, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
    drawn = torch.cat([images for images, _ in epoch])
    assert len(drawn.unique(dim=0)) == len(drawn) == data.steps_per_epoch * demo_digits.BATCH_SIZE


def test_parts_of_the_demo_are_installed():
    assert resources.files("fusedopt").joinpath("_demo", "training.py").is_file()
