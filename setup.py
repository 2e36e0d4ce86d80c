"""The package: `fusedopt`, with the kernels as `fusedopt.kernels`. Settings of the tools are in pyproject.toml."""

import ast
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "fusedopt"

# The oldest releases that have what is used of them; README.md says which were tried.
OLDEST_PYTHON = "3.11"
OLDEST_TORCH = "2.7"
OLDEST_TRITON = "3.7.1"

TRITON = [f'triton>={OLDEST_TRITON}; platform_system == "Linux"']
DEMO = ["matplotlib", "rich", "scikit-learn"]
LECTURE = [*DEMO, "markdown-it-py"]
# build, setuptools and wheel: tests make a wheel and a source distribution without a network.
TEST = ["build", "expecttest", "hypothesis", "pytest>=8", "pytest-benchmark", "pytest-xdist", "setuptools>=77", "wheel"]
# Whose training loops the tests run; without one of them its tests skip.
FRAMEWORKS = ["accelerate", "lightning", "transformers"]
DEV = ["mypy", "ruff"]
DOCS = ["furo", "myst-parser", "sphinx"]


def version() -> str:
    """Read `__version__` from fusedopt/__init__.py, the one place where it stands, without importing torch."""
    for statement in ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="__version__")], value=ast.Constant(value=str(found))):
                return found
    raise SystemExit("fusedopt/__init__.py: expected a line `__version__ = ...`, found none")


if not (PACKAGE / "kernels").is_dir():
    raise SystemExit(
        "fusedopt/kernels: expected a folder or a symbolic link to ../kernels, found neither. Where git has "
        "checked the link out as text (Windows): git config core.symlinks true, then git checkout -- fusedopt/kernels"
    )

setup(
    name="fusedopt",
    version=version(),
    description="Drop-in replacements for torch.optim: one fused kernel for each rule, by Triton and Numba",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="fusedopt contributors",
    license_expression="MIT",
    license_files=["LICENSE"],
    # fusedopt/kernels is a symbolic link to kernels/: `package_dir` instead would break runs from a checkout.
    packages=find_packages(include=["fusedopt", "fusedopt.*"]),
    package_data={"fusedopt.kernels.ptx": ["*.c"]},
    python_requires=f">={OLDEST_PYTHON}",
    install_requires=[f"torch>={OLDEST_TORCH}", "numba", "numpy"],
    extras_require={
        "triton": TRITON,
        "demo": DEMO,
        "lecture": LECTURE,
        "test": [*TEST, *LECTURE, *TRITON],
        "frameworks": FRAMEWORKS,
        "dev": DEV,
        "docs": DOCS,
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
