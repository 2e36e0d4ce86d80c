"""A tensor of a bucket whose numbers have codes, as float32 and back, for the backends without kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt.kernels import blocks

if TYPE_CHECKING:
    from fusedopt.kernels.tables import Bucket, Launch


class Coded:
    """The parameter and the states of one tensor.

    Args:
        bucket: of coded kind.
        launch: of the step.
        index: of the tensor.
    """

    def __init__(self, bucket: Bucket, launch: Launch, index: int) -> None:
        kind = bucket.kind
        self._parameter = bucket.parameters[index]
        self._tensors = {name: column[index] for name, column in zip(kind.tensors, bucket.states, strict=True)}
        self._form, _, *forms = kind.formats
        self._forms = dict(zip(kind.update.states, forms, strict=True))
        self._partners = kind.update.rule.relative
        chance = [name for name, form in (("p", self._form), *self._forms.items()) if form.chance]
        self._slots = {name: slot for slot, name in enumerate(chance)}
        self._random: dict[int, Tensor] = {}
        if chance:
            assert launch.coefficients is not None
            self._step = int(launch.coefficients[launch.row_of_tensor[index]][-1])
            self._key, self._first = (int(row[index]) for row in bucket.addresses[-2:])

    def load(self) -> tuple[Tensor, list[Tensor]]:
        """Return the parameter and the states as float32 tensors."""
        codes = {name: form for name, form in self._forms.items() if form.words}
        flat = {name: blocks.flat(self._tensors[name], self._parameter) for name in codes}
        words = {name: tensor for name, tensor in self._tensors.items() if name.endswith("_words")}
        decoded = blocks.decoded_states(codes, self._partners, {**flat, **words})
        p = self._parameter.detach().float()
        if self._form.master is not None:
            kept, master = blocks.flat(self._parameter.detach()), blocks.flat(self._tensors["master"], self._parameter)
            p = blocks.unflat(blocks.join(self._form, kept, master), self._parameter)
        states = [
            blocks.unflat(decoded[name], self._parameter) if name in decoded else self._tensors[name].float()
            for name in self._forms
        ]
        return p, states

    def store(self, p: Tensor, states: list[Tensor]) -> None:
        """Write the parameter and the states."""
        flat = blocks.flat(p, self._parameter)
        if self._form.master is not None:
            kept, master = blocks.split(self._form, flat, self._draw("p") if self._form.chance else None)
            self._tensors["master"].copy_(blocks.unflat(master, self._parameter))
            self._parameter.copy_(blocks.unflat(kept, self._parameter))
        elif self._form.chance:
            self._parameter.copy_(blocks.unflat(blocks.to_bfloat16(flat, self._draw("p")), self._parameter))
        else:
            self._parameter.copy_(p)
        sizes: dict[str, Tensor] = {}
        new = dict(zip(self._forms, states, strict=True))
        for name in sorted(new, key=lambda name: self._forms[name].name == "relative"):
            form, elements = self._forms[name], blocks.flat(new[name], self._parameter)
            if form.words:
                of = sizes.get(self._partners.get(name, ""))
                code, words, sizes[name] = blocks.encode(form, elements, self._draw(name), of)
                self._tensors[f"{name}_words"].copy_(words)
                self._tensors[name].copy_(blocks.unflat(code, self._parameter))
            elif form.chance:
                self._tensors[name].copy_(blocks.unflat(blocks.to_bfloat16(elements, self._draw(name)), self._parameter))
            else:
                self._tensors[name].copy_(new[name])

    def _draw(self, name: str) -> Tensor:
        slot = self._slots[name]
        if slot // 2 not in self._random:
            count, device = self._parameter.numel(), self._parameter.device
            self._random[slot // 2] = blocks.random_words(self._key, self._step, self._first, count, slot // 2, device)
        return blocks.draw(self._random[slot // 2], slot, self._form if name == "p" else self._forms[name])


def correct_root(names: dict[str, Any]) -> dict[str, Any]:
    """Return ``names``, a binding for tensors, with a root that is rounded correctly, as that of kernels is."""
    return {**names, "sqrt": lambda x: blocks.sqrt(x) if isinstance(x, Tensor) and x.dtype == torch.float32 else names["sqrt"](x)}
