"""The parameters of real models, as shapes, in the order of ``model.parameters()``."""

from __future__ import annotations

Shape = tuple[int, ...]
Shapes = list[Shape]


def _norm(width: int) -> Shapes:
    return [(width,), (width,)]


def _linear(outputs: int, inputs: int) -> Shapes:
    return [(outputs, inputs), (outputs,)]


def _convolution(outputs: int, inputs: int, size: int) -> Shapes:
    """A convolution without bias, and its batch normalisation."""
    return [(outputs, inputs, size, size), *_norm(outputs)]


def resnet50() -> Shapes:
    """torchvision's ``resnet50``."""
    shapes, inputs = _convolution(64, 3, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += _convolution(width, inputs, 1) + _convolution(width, width, 3) + _convolution(4 * width, width, 1)
            if block == 0:
                shapes += _convolution(4 * width, inputs, 1)
            inputs = 4 * width
    return shapes + _linear(1000, inputs)


def mobilenet_v2() -> Shapes:
    """torchvision's ``mobilenet_v2``."""
    shapes, inputs = _convolution(32, 3, 3), 32
    rows = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
    for expansion, outputs, blocks in rows:
        for _ in range(blocks):
            hidden = expansion * inputs
            if expansion > 1:
                shapes += _convolution(hidden, inputs, 1)
            shapes += _convolution(hidden, 1, 3) + _convolution(outputs, hidden, 1)
            inputs = outputs
    return shapes + _convolution(1280, inputs, 1) + _linear(1000, 1280)


def vit_b_16() -> Shapes:
    """torchvision's ``vit_b_16``, for images of 224 x 224."""
    width = 768
    layer = [*_norm(width), *_linear(3 * width, width), *_linear(width, width), *_norm(width)]
    layer += _linear(4 * width, width) + _linear(width, 4 * width)
    shapes: Shapes = [(1, 1, width), (width, 3, 16, 16), (width,), (1, 14 * 14 + 1, width)]
    return shapes + 12 * layer + _norm(width) + _linear(1000, width)


def bert_base() -> Shapes:
    """``bert-base-uncased``: embeddings, 12 layers and the pooler."""
    width = 768
    layer = 4 * _linear(width, width) + _norm(width) + _linear(4 * width, width) + _linear(width, 4 * width) + _norm(width)
    shapes: Shapes = [(30522, width), (512, width), (2, width), *_norm(width)]
    return shapes + 12 * layer + _linear(width, width)


def gpt2_small() -> Shapes:
    """``gpt2``, whose output layer is its input embedding; weights stand as (inputs, outputs)."""
    width = 768
    layer = [*_norm(width), (width, 3 * width), (3 * width,), (width, width), (width,), *_norm(width)]
    layer += [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(50257, width), (1024, width), *(12 * layer), *_norm(width)]


LLAMA_LAYERS = 16


def llama_1b(layers: int = LLAMA_LAYERS, embedding: bool = True) -> Shapes:
    """``Llama-3.2-1B``, whose output layer is its input embedding; or a stack of its layers."""
    width, keys, hidden = 2048, 512, 8192
    layer: Shapes = [(width, width), (keys, width), (keys, width), (width, width)]
    layer += [(hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    return [*([(128256, width)] if embedding else []), *(layers * layer), *([(width,)] if embedding else [])]
