"""The lecture: each of its numbers, in quick runs; the reader of CIFAR-10's files; the page, and the one that is kept in docs."""

import ast
import functools
import html.parser
import pickle
import re
import struct
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="not installed: pip install 'fusedopt[lecture]'")
pytest.importorskip("markdown_it", reason="not installed: pip install 'fusedopt[lecture]'")
pytest.importorskip("sklearn", reason="not installed: pip install 'fusedopt[lecture]'")
pytest.importorskip("matplotlib", reason="not installed: pip install 'fusedopt[lecture]'")

from matplotlib.figure import Figure

import child
import fusedopt
from examples.lecture import TOPICS, __main__, full_example
from examples.lecture.shared import data, page, plotting, topic

ROOT = Path(__file__).resolve().parents[1]
LECTURE = ROOT / "examples" / "lecture"
DIGITS = data.digits()
#: Lines of code below a topic's text, empty ones not counted.
LONGEST_TOPIC = 80
DEPTH = "scale at layer 30"

# For each topic what its numbers have to show: all of them are looked at.
CLAIMS = {
    "gradient_descent": {
        "stays below the bound": lambda n: n["softmax regression: largest ratio to the bound"] < 1,
        "the bound is the one of that smoothness": lambda n: (
            n["softmax regression: smallest gradient norm"] < n["softmax regression: bound on it"] < 0.5
            and n["smoothness L of softmax regression"] > 1
        ),
        "softmax regression nears a stationary point": lambda n: (
            n["softmax regression: smallest gradient norm"] < 0.1 * n["softmax regression: gradient norm at first"]
        ),
        "a network nears a stationary point": lambda n: (
            n["hidden layer: gradient norm at the end"] < 0.1 * n["hidden layer: gradient norm at first"]
        ),
    },
    "stochastic_gradients": {
        "unbiased": lambda n: n["largest difference of the epoch's mean from the full gradient"] < 1e-14,
        "variance falls as one over the size": lambda n: (
            abs(n["fitted slope of log variance by log size"] + 1) < 0.1
            and n["largest ratio of the variance to the predicted one"] < 1.1
        ),
        "small minibatches make more of the same images": lambda n: (
            n["loss in the last epoch, 8 in a minibatch"]
            < 0.5 * n["loss in the last epoch, 64 in a minibatch"]
            < 0.25 * n["loss in the last epoch, 1024 in a minibatch"]
        ),
    },
    "robbins_monro": {
        "constant steps stall where computed": lambda n: (
            n["constant: mean squared error, last half"] == pytest.approx(n["constant: the floor, computed"], rel=0.02)
        ),
        "decreasing steps pass the floor": lambda n: (
            n["Robbins-Monro: mean squared error at the end"] < 0.01 * n["constant: the floor, computed"]
        ),
        "error falls as 1 / t": lambda n: abs(n["Robbins-Monro: slope of log error by log t"] + 1) < 0.1,
        # 1 is what chance makes on average; the places of a path hang together, so it strays.
        "the mean path is gradient descent's": lambda n: (
            n["mean path against gradient descent: root mean square of standard errors"] < 3
        ),
        # a log 2 for each doubling of the time; for the squares a^2 / t, at most.
        "the sum of steps goes on growing": lambda n: (
            n["what its second half adds to the sum of alpha"] == pytest.approx(5 * 0.6931, rel=0.02) and n["sum of alpha"] > 20
        ),
        "the sum of squares does not": lambda n: n["what its second half adds to the sum of alpha squared"] < 5**2 / 1000,
    },
    "step_drops": {
        "accuracy rises at the drop": lambda n: (
            n["drops: test accuracy, three epochs after it, %"]
            > 1 + n["drops: test accuracy, three epochs before the first drop, %"]
        ),
        "both schedules beat constant steps": lambda n: (
            n["constant: test accuracy, last three epochs, %"] + 1
            < min(n[f"{name}: test accuracy, last three epochs, %"] for name in ("drops", "Robbins-Monro"))
        ),
        "drops are as good as Robbins-Monro": lambda n: (
            n["drops: test accuracy, last three epochs, %"] > n["Robbins-Monro: test accuracy, last three epochs, %"] - 1
        ),
    },
    "momentum": {
        f"{name}: converges up to the formula's rate": lambda n, name=name: (
            n[f"{name}: largest learning rate that converges"] == pytest.approx(n[f"{name}: the same by the formula"], rel=0.01)
        )
        for name in ("SGD", "momentum", "averaged momentum", "Nesterov")
    }
    | {
        "fewer steps with momentum": lambda n: (
            3 * n["momentum: steps to a distance of 1e-6"] < n["SGD: steps to a distance of 1e-6"]
            and 3 * n["Nesterov: steps to a distance of 1e-6"] < n["SGD: steps to a distance of 1e-6"]
        ),
        "the averaged form walks the same path": lambda n: (
            n["averaged momentum: steps to a distance of 1e-6"] == n["momentum: steps to a distance of 1e-6"]
        ),
        "larger learning rates survive": lambda n: (
            n["averaged momentum: largest learning rate that converges"]
            > 4 * n["momentum: largest learning rate that converges"]
            > 4 * n["SGD: largest learning rate that converges"]
        ),
    },
    "adam": {
        "the lecture's equations": lambda n: n["largest difference from the equations, 1,000 steps"] < 1e-12,
        "ahead on badly scaled inputs": lambda n: (
            2 * n["badly scaled inputs, Adam: loss at the end"] < n["badly scaled inputs, SGD: loss at the end"]
        ),
        "closer together on the others": lambda n: (
            n["inputs as they are, SGD: loss at the end"] / n["inputs as they are, Adam: loss at the end"]
            < n["badly scaled inputs, SGD: loss at the end"] / n["badly scaled inputs, Adam: loss at the end"]
        ),
        "no best rate at an end of its grid": lambda n: all(
            1.1 * low < n[f"{inputs}, {name}: best learning rate"] < high / 1.1
            for inputs in ("inputs as they are", "badly scaled inputs")
            for name, low, high in (("SGD", 1e-3, 100), ("Adam", 1e-4, 1))
        ),
    },
    "weight_decay": {
        "one form for plain SGD": lambda n: n["SGD: largest difference between the forms, 100 steps"] < 1e-13,
        "two for momentum": lambda n: n["momentum: largest difference between the forms, 100 steps"] > 0.01,
        "two for Adam": lambda n: n["Adam: largest difference between the forms, 100 steps"] > 0.01,
    }
    | {
        f"{name}: shrinks weights and error": lambda n, name=name: (
            n[f"{name}: norm of the weights, most decay"] < 0.5 * n[f"{name}: norm of the weights, no decay"]
            and n[f"{name}: test error, best decay, %"] < n[f"{name}: test error, no decay, %"] - 1
        )
        for name in ("Adam", "AdamW")
    },
    "initialisation": {
        f"{name}: scale as computed": lambda n, name=name: (
            n[f"no activation, {name}: {DEPTH}"] == pytest.approx(n[f"no activation, {name}: the same by the formula"], rel=0.3)
        )
        for name in ("too small, 0.25 / d", "Xavier, 1 / d", "too large, 4 / d")
    }
    | {
        "tanh: small ones vanish, others stay": lambda n: (
            n[f"tanh, too small, 0.25 / d: {DEPTH}"] < 1e-6
            and 0.05 < n[f"tanh, Xavier, 1 / d: {DEPTH}"] < 0.5
            and 1 < n[f"tanh, too large, 4 / d: {DEPTH}"] < 2
        ),
        "tanh: large ones saturate": lambda n: (
            n["tanh, too large, 4 / d: units beyond 0.9 at layer 30, %"] > 20
            and n["tanh, Xavier, 1 / d: units beyond 0.9 at layer 30, %"] < 1
            and n["tanh, too small, 0.25 / d: units beyond 0.9 at layer 30, %"] == 0
        ),
        "symmetry never breaks": lambda n: (
            n["all equal: largest difference between units after training"] < 1e-6
            and n["random: largest difference between units after training"] > 0.1
        ),
        "one unit learns little": lambda n: n["all equal: training error, %"] > 40 > 10 > n["random: training error, %"],
    },
    "loss_landscape": {
        "skips make the slice flatter": lambda n: (
            n["with skips: part of the slice with a loss below 1, %"]
            > 1.5 * n["without skips: part of the slice with a loss below 1, %"]
            and n["with skips: median loss over the slice, nats"] < n["without skips: median loss over the slice, nats"]
        ),
        "both are trained, better with skips": lambda n: (
            n["with skips: training loss, nats"] < n["without skips: training loss, nats"] < 0.3
            and n["with skips: test error, %"] < n["without skips: test error, %"] < 30
        ),
        "the plane holds most of the path": lambda n: (
            80 < min(n[f"{title}: share of the path in its plane, %"] for title in ("with skips", "without skips")) <= 100
        ),
    },
    "batch_size": {
        "both have learnt the images": lambda n: max(n[f"{size}: training loss, nats"] for size in ("small", "large")) < 0.01,
        "large minibatches end sharper": lambda n: (
            n["large: training loss with weights changed by a fifth, nats"]
            > 2 * n["small: training loss with weights changed by a fifth, nats"]
            and n["large: training loss beyond it, at x = 1.5, nats"] > 2 * n["small: training loss beyond it, at x = -0.5, nats"]
        ),
        "and err more": lambda n: n["large: test error, %"] > 1 + n["small: test error, %"],
    },
    "memorisation": {
        "all is learnt by heart": lambda n: all(
            n[f"{name}: training error at the end, %"] == 0 for name in ("true labels", "random labels", "random pixels")
        ),
        "random labels take more epochs": lambda n: (
            n["random labels: epochs until then"]
            > 2 * max(n["true labels: epochs until then"], n["random pixels: epochs until then"])
        ),
        "only what is true is of use": lambda n: (
            n["true labels: test error, %"] < 15 and min(n["random labels: test error, %"], n["random pixels: test error, %"]) > 80
        ),
    },
    "double_descent": {
        "the error peaks, and falls again": lambda n: (
            n["test error, as many features as images, %"]
            > 3 * max(n["test error, best of fewer features than images, %"], n["test error, 3,000 features, %"])
        ),
        "to the best of the other side": lambda n: (
            abs(n["test error, 3,000 features, %"] - n["test error, best of fewer features than images, %"]) < 3
        ),
        "everything fits from there on": lambda n: n["training error from as many features as images on, %"] == 0,
        "gradient descent arrives at the smallest": lambda n: (
            n["widest: relative difference of gradient descent's outputs on test images"] < 0.1
        ),
    },
    "dropout": {
        f"{title}: the weights put back are the best ones": lambda n, title=title: (
            n[f"{title}: held-out loss of the weights put back, nats"] == n[f"{title}: best held-out loss on the way, nats"]
            and n[f"{title}: test error of the weights put back, %"] <= n[f"{title}: test error at the end, %"] + 1
        )
        for title in ("without dropout", "with dropout")
    }
    | {
        "the held-out loss turns": lambda n: (
            n["without dropout: held-out loss at the end, nats"] > 1.2 * n["without dropout: best held-out loss on the way, nats"]
        ),
        "later with dropout": lambda n: n["with dropout: stopped after epoch"] > n["without dropout: stopped after epoch"],
        "and it ends lower": lambda n: (
            n["with dropout: held-out loss at the end, nats"] < 0.9 * n["without dropout: held-out loss at the end, nats"]
        ),
    },
    "cost": {
        f"CPU, {name}: a share and a time": lambda n, name=name: (
            0 < n[f"CPU, {name}: share of the optimizer, %"] < 100 and n[f"CPU, {name}: optimizer step, ms"] > 0
        )
        for name in ("torch loop", "torch foreach", "torch fused", "fusedopt")
    }
    | {
        "the same weights": lambda n: n["CPU: largest difference of any weight from the loop's, 40 steps in float64"] < 1e-12,
    },
    "full_example": {
        "the losses are torch's": lambda n: n["fusedopt from torch.optim, float64: largest difference of a loss"] < 1e-10,
        # Of single minibatches of four images, whose losses differ by nats among themselves.
        "no further away than its roundings": lambda n: (
            n["torch's fused from its loop, float32: largest difference of a loss"] < 3
            and n["fusedopt from torch's loop, float32: largest difference of a loss"] < 3
        ),
        "the curves stay together": lambda n: (
            abs(n["fusedopt: loss of the last steps, nats"] - n["torch.optim: loss of the last steps, nats"]) < 0.05
        ),
        "both learn": lambda n: (
            max(n[f"{name}: loss of the last steps, nats"] for name in ("fusedopt", "torch.optim"))
            < 0.3 * n["loss of the first steps, nats"]
            and max(n[f"{name}: test error, %"] for name in ("fusedopt", "torch.optim")) < 20
        ),
    },
}
EACH_CLAIM = [(name, claim) for name, claims in CLAIMS.items() for claim in claims]
each_topic = pytest.mark.parametrize("name", TOPICS)


class Noting(dict):
    """Notes which of its values were asked for."""

    def __init__(self, *values):
        super().__init__(*values)
        self.asked = set()

    def __getitem__(self, name):
        self.asked.add(name)
        return super().__getitem__(name)


@functools.cache
def found(name):
    """What a quick run of a topic on the digits finds; each topic runs once."""
    return topic.run(name, topic.Setting(DIGITS, quick=True))


@pytest.mark.parametrize(("name", "claim"), EACH_CLAIM, ids=[f"{name}: {claim}" for name, claim in EACH_CLAIM])
def test_claim(name, claim):
    assert CLAIMS[name][claim](found(name).numbers), found(name).numbers


def on_a_gpu(number):
    return number.startswith("GPU")


@each_topic
def test_every_number_is_checked(name):
    numbers = Noting(found(name).numbers)
    for claim in CLAIMS[name].values():
        claim(numbers)
    assert numbers.asked == {number for number in numbers if not on_a_gpu(number)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_cost_says_so():
    assert found("cost").numbers["GPU"] == "not measured: torch finds no GPU here"


@pytest.mark.gpu
def test_cost_on_a_gpu():
    numbers = {number.removeprefix("GPU"): value for number, value in found("cost").numbers.items() if on_a_gpu(number)}
    on_the_cpu = {number.removeprefix("CPU"): value for number, value in found("cost").numbers.items() if number.startswith("CPU")}
    assert numbers.keys() == on_the_cpu.keys()
    assert numbers[": largest difference of any weight from the loop's, 40 steps in float64"] < 1e-12
    assert all(value > 0 for number, value in numbers.items() if "difference" not in number)


@each_topic
def test_figure_can_be_read(name):
    """Each panel has its title and both axes named, and what is drawn has a name where there are several."""
    for axes in found(name).figure.axes:
        if axes.get_label() != "<colorbar>":
            assert axes.get_title(loc="left") or axes.get_title()
            assert axes.get_xlabel()
        assert axes.get_ylabel()
        named = [line for line in axes.lines if not line.get_label().startswith("_")]
        assert axes.get_legend() is not None or len(named) < 2


@each_topic
def test_same_lines_have_different_looks(name):
    """Lines with a name differ in more than their hue: in dashes, markers or lightness."""
    for axes in found(name).figure.axes:
        looks = [
            (line.get_linestyle(), line.get_marker(), round(luminance(line.get_color()), 1))
            for line in axes.lines
            if line.get_label() and not line.get_label().startswith("_")
        ]
        assert len(set(looks)) == len(looks), looks


def luminance(color):
    red, green, blue = plotting.mpl.colors.to_rgb(color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("name", ["memorisation", "momentum", "dropout"])
def test_same_numbers_on_every_run(name):
    """Whatever ran before, and however many threads are set; both are left as they were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(12345)
    state = torch.get_rng_state()
    try:
        again = topic.run(name, topic.Setting(DIGITS, quick=True))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert again.numbers == found(name).numbers
    assert torch.equal(torch.get_rng_state(), state)


@each_topic
def test_topic_fits_on_a_screen(name):
    text = (LECTURE / f"{name}.py").read_text(encoding="utf-8")
    code = text.splitlines()[ast.parse(text).body[0].end_lineno :]
    assert sum(bool(line.strip()) for line in code) <= LONGEST_TOPIC


def test_every_module_is_a_topic():
    assert {path.stem for path in LECTURE.glob("*.py")} - {"__init__", "__main__"} == set(TOPICS)


def test_library_knows_nothing_of_examples():
    for path in [*(ROOT / "fusedopt").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        assert not re.search(r"^\s*(?:from|import) examples", path.read_text(encoding="utf-8"), re.MULTILINE), path


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------------------


def published_batch(images, labels):
    """A batch as its authors published it: a pickle by Python 2 of a dict, with NumPy of that time."""
    number = struct.Struct("<i").pack
    text = lambda words: b"U" + bytes([len(words)]) + words  # noqa: E731  # SHORT_BINSTRING
    array = b"".join(
        [
            b"cnumpy.core.multiarray\n_reconstruct\n",
            b"(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR",
            b"(K\x01J" + number(len(images)) + b"M\x00\x0c\x86",
            b"cnumpy\ndtype\n("
            + text(b"u1")
            + b"K\x00K\x01tR(K\x03"
            + text(b"|")
            + b"NNNJ"
            + number(-1)
            + b"J"
            + number(-1)
            + b"K\x00tb",
            b"\x89T" + number(images.numel()) + images.numpy().tobytes() + b"tb",
        ]
    )
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    entries = text(b"batch_label") + text(b"training batch 1 of 5") + text(b"labels") + listed + text(b"data") + array
    return b"\x80\x02}(" + entries + b"u."


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """A folder of its files with 100 images each, of random bytes, and what is in them."""
    folder = tmp_path_factory.mktemp("cifar-10-batches-py")
    random = torch.Generator().manual_seed(0)
    contents = {}
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        images = torch.randint(256, (100, 3072), dtype=torch.uint8, generator=random)
        labels = torch.randint(10, (100,), generator=random)
        (folder / name).write_bytes(published_batch(images, labels.tolist()))
        contents[name] = images, labels
    return folder, contents


def test_cifar_is_read_as_published(cifar):
    folder, contents = cifar
    read = data.cifar10(folder)
    assert read.train_images.shape == (500, 3, 32, 32)
    assert read.test_images.shape == (100, 3, 32, 32)
    assert read.train_labels.tolist() == [
        label for name, (_, labels) in contents.items() if name != "test_batch" for label in labels.tolist()
    ]
    assert read.test_labels.tolist() == contents["test_batch"][1].tolist()
    # The second image's green in the third row and fourth column: 1,024 values of each colour, 32 in a row.
    value = contents["data_batch_1"][0][1, 1024 + 2 * 32 + 3].item()
    assert read.train_images[1, 1, 2, 3].item() == pytest.approx(value / 127.5 - 1)
    assert read.train_images.min() == -1
    assert read.train_images.max() == 1


def test_the_full_example_runs_on_cifar(cifar):
    read = data.cifar10(cifar[0])
    ours, theirs = (full_example.train(optim, read, 5, torch.float64)[0] for optim in (fusedopt, torch.optim))
    assert ours == pytest.approx(theirs, rel=1e-12)
    assert len(set(ours.tolist())) == 5


def test_cifar_lacking_a_file_is_explained(cifar, tmp_path, capsys):
    folder, contents = cifar
    for name in contents.keys() - {"data_batch_3"}:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert __main__.main(["momentum", "--cifar", str(tmp_path)]) == 2
    assert re.search(r"data_batch_3: not found; --cifar names the folder cifar-10-batches-py", capsys.readouterr().err)


class Harmful:
    def __reduce__(self):
        return eval, ("called.append(1)", {"called": called})


called = []


def test_a_pickle_of_anything_else_is_refused(tmp_path):
    for number in range(1, 6):
        (tmp_path / f"data_batch_{number}").write_bytes(pickle.dumps({"data": Harmful()}, protocol=2))
    with pytest.raises(pickle.UnpicklingError, match=r"found __builtin__\.eval: this is no file of CIFAR-10"):
        data.cifar10(tmp_path)
    assert not called


# --- command and page -------------------------------------------------------------------------------------------------------


def test_command_prints_numbers_and_draws(cifar, tmp_path, capsys):
    assert __main__.main(["initialisation", "memorisation", "--quick", "--cifar", str(cifar[0]), "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Initialisation: the scale of signals by depth" in printed
    assert re.search(r"random labels: training error at the end, % +│ +0 │", printed)
    for name in ("initialisation", "memorisation"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "lecture.html").exists()


def test_unknown_topic_is_refused_with_those_there_are(capsys):
    assert __main__.main(["momentun"]) == 2
    message = capsys.readouterr().err
    assert "no topic is called momentun" in message
    assert all(name in message for name in TOPICS)


@pytest.mark.parametrize("package", ["rich", "matplotlib", "sklearn", "markdown_it"])
def test_missing_package_is_named_with_the_remedy(package):
    program = f"""
        import runpy, sys
        sys.modules["{package}"] = None
        runpy.run_module("examples.lecture", run_name="__main__")
    """
    finished = child.run(program, PYTHONPATH=str(ROOT))
    assert finished.returncode == 2
    assert f"{package} is not installed" in finished.stderr
    assert 'pip install "fusedopt[lecture]"' in finished.stderr


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page of all topics, with a small figure and two numbers each."""
    folder = tmp_path_factory.mktemp("page")
    figure = Figure(figsize=(1, 1))
    results = {name: topic.Result(figure, {"a number": 1234.5, "a count": 4321, "a word": "none here"}) for name in TOPICS}
    for name in results:
        plotting.save(figure, folder / f"{name}.png")
    page.write(folder, results, topic.Setting(DIGITS, quick=True))
    return folder


class Page(html.parser.HTMLParser):
    """Collects what a page shows and refers to."""

    def __init__(self, text):
        super().__init__()
        self.text, self.references, self.cells = "", [], []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self._inside = tag
        self.references += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, text):
        self.text += text if self._inside != "style" else ""
        if self._inside == "td" and text.strip():
            self.cells.append(text)


def test_page_needs_no_other_file(written):
    shown = Page((written / "lecture.html").read_text(encoding="utf-8"))
    assert shown.references
    assert all(reference.startswith("data:image/") for reference in shown.references)
    assert sum(reference.startswith("data:image/png") for reference in shown.references) == len(TOPICS)


def test_page_shows_every_topic(written):
    shown = Page((written / "lecture.html").read_text(encoding="utf-8"))
    for name in TOPICS:
        assert topic.text_of(name)[0] in shown.text
        assert f"python -m examples.lecture {name}" in shown.text
    assert shown.cells == ["a number", "1.23e+03", "a count", "4,321", "a word", "none here"] * len(TOPICS)
    assert "$" not in shown.text, "a formula that was not drawn"
    assert "(--quick)" in shown.text


@each_topic
def test_topic_has_a_title_a_paragraph_and_a_formula(name):
    title, text = topic.text_of(name)
    assert 10 < len(title) < 80
    assert re.search(r"\$\$ .+ \$\$", text, re.DOTALL)
    assert len(re.sub(r"\$\$.+?\$\$", "", text, flags=re.DOTALL).split()) > 40
    # GitHub takes a backslash before punctuation for its own.
    assert not re.search(r"\$[^$]*\\[,;:!|{}][^$]*\$", text)


@each_topic
def test_page_in_docs_is_of_these_programs(name):
    """Its text and labels are those of today: `make lecture` writes it anew."""
    kept = (ROOT / "docs" / "lecture" / "lecture.md").read_text(encoding="utf-8")
    title, text = topic.text_of(name)
    assert f"## {title}\n\n{text}\n\n![{title}]({name}.png)" in kept
    assert (ROOT / "docs" / "lecture" / f"{name}.png").is_file()
    assert {row for row in found(name).numbers if not on_a_gpu(row)} <= numbers_in_docs(name).keys()
    assert f"[{name}.py](../../examples/lecture/{name}.py)" in kept


def numbers_in_docs(name):
    """The numbers of the full run whose page is kept."""
    kept = (ROOT / "docs" / "lecture" / "lecture.md").read_text(encoding="utf-8")
    section = kept.partition(f"]({name}.png)")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| ([-\d.,e+]+) \|$", section, re.MULTILINE)
    return {label: float(value.replace(",", "")) for label, value in rows}


@pytest.mark.parametrize(("name", "claim"), EACH_CLAIM, ids=[f"{name}: {claim}" for name, claim in EACH_CLAIM])
def test_claim_holds_for_the_page_in_docs(name, claim):
    assert CLAIMS[name][claim](numbers_in_docs(name)), numbers_in_docs(name)
